"""Say before anything is installed whether this Python and this machine can run the whole project.

Usage: python preflight.py VENV. Nothing outside the standard library, and no syntax newer than Python 3.6, so that an
old Python gets a message rather than a syntax error.
"""

import ctypes.util
import platform
import sys
import sysconfig
from pathlib import Path

OLDEST, NEWEST = (3, 10), (3, 12)
OLDEST_GLIBC = (2, 35)
PYTHON = sys.version_info[:2]


def python_problem() -> str:
    """What is wrong with the interpreter, or an empty text."""
    if OLDEST <= PYTHON <= NEWEST:
        return ""
    problem = (
        f"Python {platform.python_version()} is not supported; expected 3.10 to 3.12 (3.13 for all but the server). "
    )
    if PYTHON == (3, 13):
        problem = (
            "Triton's wheel needs numpy<2, which does not exist for Python 3.13; expected 3.10 to 3.12. Everything but "
            "`patcher serve` runs here, against a Triton elsewhere (--url): "
            "pip install -c constraints.txt '.[export]'. "
        )
    return problem + "Try: make setup PYTHON=python3.11 (or the path of such an interpreter)"


def machine_problem() -> str:
    """What of the system Triton's wheel does not run on, or an empty text."""
    if sys.platform != "linux":
        return (
            f"{sys.platform} is not supported by Triton's wheel; expected Linux. Everything but `patcher serve` runs "
            "here, against a Triton elsewhere (--url). Try: pip install '.[export]'"
        )
    libc, version = platform.libc_ver()
    if libc != "glibc":
        return f"the C library is {libc or 'unknown'}; expected glibc 2.35 or newer, which Triton's wheel is built for"
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_GLIBC:
        return (
            f"glibc {version} is too old; expected 2.35 or newer, which Triton's wheel is built for. "
            "Try: a newer system (Ubuntu 22.04, Debian 12, RHEL 10), or docker/"
        )
    return ""


def library_problem() -> str:
    """Where libpython, which Triton's Python backend loads, is missing, or an empty text."""
    name = f"python{PYTHON[0]}.{PYTHON[1]}"
    folder = sysconfig.get_config_var("LIBDIR") or ""
    if (Path(folder) / f"lib{name}.so.1.0").exists() or ctypes.util.find_library(name):
        return ""
    return (
        f"lib{name}.so.1.0 is neither in {folder or 'the lib folder of this Python'} nor known to the system's linker; "
        f"Triton's Python backend needs it. Try: apt-get install lib{name} for a system's Python, or "
        "PYTHON_CONFIGURE_OPTS=--enable-shared when building one"
    )


def environment_problem(folder: str) -> str:
    """Why the environment that is there cannot be used, or an empty text."""
    config = Path(folder) / "pyvenv.cfg"
    if not config.exists():
        return ""
    settings = dict(line.split(" = ", 1) for line in config.read_text().splitlines() if " = " in line)
    version = settings.get("version", "unknown")
    if version.split(".")[:2] == [str(part) for part in PYTHON]:
        return ""
    return f"{folder} was made by Python {version}, this is {platform.python_version()}. Try: make clean, then again"


def main() -> int:
    """Print the first thing that stands in the way; the exit status says whether there is one."""
    problem = python_problem() or machine_problem() or library_problem() or environment_problem(sys.argv[1])
    if problem:
        print(f"setup: {problem}", file=sys.stderr)
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main())
