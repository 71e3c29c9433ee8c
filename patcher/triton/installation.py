"""Set up the real tritonserver from the ``nvidia-pytriton`` wheel so that it runs with this interpreter.

The wheel contains the server, its libraries and a Python stub for each Python version, but no backend folder. The stub
cannot be configured by environment variables: it uses the environment of the first ``python3`` on the PATH, like any
Python that finds a ``pyvenv.cfg`` next to itself. So a folder is built once for each interpreter and installation::

    <folder>/backends/python/{libtriton_python.so, triton_python_backend_utils.py, triton_python_backend_stub}
    <folder>/backends/onnxruntime/*.py              this package's backend
    <folder>/backends/onnxruntime/*.so*             Triton's own backend, if a folder with it was given: it is preferred
    <folder>/env/{pyvenv.cfg, bin/python3, lib/python3.X/site-packages/patcher_stub.pth}
                                                    this interpreter, its standard library, the paths of its packages
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes.util
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import stat
import sys
import sysconfig
import threading
from dataclasses import dataclass
from pathlib import Path

from patcher.errors import InputError, ToolError
from patcher.scratch import scratch
from patcher.triton.prepared import in_use, make_private, take_away
from patcher.wording import install_hint

__all__ = ["Installation", "find_installation", "find_libpython"]

_HERE = Path(__file__).parent
_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
_LIBRARY = "libtriton_onnxruntime.so"
_VARIABLE = "PATCHER_SERVER_ONNXRUNTIME"
_kept: dict[str, Path] = {}
_held: dict[Path, int] = {}
"""Descriptors that mark folders as in use until this process ends: it may start a server from them at any time."""
_building = threading.Lock()
_at_exit = contextlib.ExitStack()
atexit.register(_at_exit.close)


@dataclass(frozen=True)
class Installation:
    """A tritonserver that can be started: ``binary``, with ``environment`` added to the current environment."""

    binary: Path
    backends: Path
    caches: Path
    environment: dict[str, str]
    kept: tuple[int, ...] = ()
    """Descriptors that the server must inherit: they keep its folder from being removed while it runs."""


def find_installation(onnxruntime_backend: Path | str | None = None) -> Installation:
    """The wheel's tritonserver with its backend folder for this interpreter, which is built if it does not exist.

    ``onnxruntime_backend`` is a folder with Triton's C++ backend and the libraries that it needs. The default is the
    folder that the environment variable ``PATCHER_SERVER_ONNXRUNTIME`` names, or else this package's Python-based
    backend.

    Raises
    ------
    ToolError
        if the wheel, its stub for this Python or the interpreter's shared library is missing, with what to install; if
        numpy is not below 2; or if the folder cannot be built.
    InputError
        for a folder without that backend.
    """
    given = onnxruntime_backend or os.environ.get(_VARIABLE)
    libraries_given = _libraries(Path(given)) if given else []
    server, libraries = _wheel()
    stub = server / "python_backend_stubs" / _PYTHON / "triton_python_backend_stub"
    if not stub.is_file():
        there = ", ".join(sorted(path.name for path in stub.parent.parent.iterdir()))
        raise ToolError(f"nvidia-pytriton has no stub for Python {_PYTHON}; expected one of {there}: use such a Python")
    _check_numpy()
    folder = _assembled(server, stub, libraries_given)
    search = [str(libraries)]
    libpython = find_libpython(libraries)
    if libpython:
        search.append(str(libpython))
    if inherited := os.environ.get("LD_LIBRARY_PATH"):
        search.append(inherited)
    environment = {
        "LD_LIBRARY_PATH": os.pathsep.join(search),
        "PATH": os.pathsep.join([str(folder / "env" / "bin"), os.environ.get("PATH", os.defpath)]),
    }
    kept = tuple(mark for mark in [_held.get(folder, -1)] if mark >= 0)
    return Installation(server / "bin" / "tritonserver", folder / "backends", server / "caches", environment, kept)


def find_libpython(bundled: Path) -> Path | None:
    """The folder of this Python's shared library, which the stub loads; None if the loader finds it anyway.

    ``bundled`` is the wheel's own library folder, which contains the library for some Python versions.

    Raises
    ------
    ToolError
        if neither this interpreter nor the system has the library for this version.
    """
    if any(bundled.glob(f"libpython3-*.{sys.version_info.minor}.so.1.0")):
        return None
    name = f"libpython{_PYTHON}.so.1.0"
    variables = sysconfig.get_config_vars()
    folders = [variables.get("LIBDIR"), Path(sys.base_prefix, "lib")]
    if variables.get("LIBDIR") and variables.get("MULTIARCH"):
        folders.insert(1, Path(variables["LIBDIR"], variables["MULTIARCH"]))
    for folder in folders:
        if folder and Path(folder, name).is_file():
            return Path(folder)
    if ctypes.util.find_library(f"python{_PYTHON}") == name:
        return None
    raise ToolError(
        f"Triton's Python stub needs {name}: this interpreter ({sys.executable}) was built without it and the system "
        f"has none. `apt-get install libpython{_PYTHON}` on Debian or Ubuntu, `dnf install python3-libs` on Fedora or "
        "RHEL; with pyenv, build it with PYTHON_CONFIGURE_OPTS=--enable-shared; uv's and conda's Pythons have it"
    )


def _libraries(backend: Path) -> list[Path]:
    if not (backend / _LIBRARY).is_file():
        there = "is no folder" if not backend.is_dir() else f"has no {_LIBRARY}"
        raise InputError(
            f"{backend} {there}; expected --onnxruntime-backend (onnxruntime_backend=...) or ${_VARIABLE} to name a "
            "folder with Triton's C++ onnxruntime backend and the libonnxruntime.so.1 that it needs (NVIDIA's image "
            "has it in /opt/tritonserver/backends/onnxruntime)"
        )
    return sorted(path for path in backend.iterdir() if ".so" in path.suffixes and path.is_file())


def _check_numpy() -> None:
    # The stub is built against numpy 1; it reads garbage from text tensors of numpy 2 and aborts at the first request.
    version = importlib.metadata.version("numpy")
    if int(version.partition(".")[0]) >= 2:  # noqa: PLR2004
        raise ToolError(
            f"Triton's Python stub needs numpy below 2, this environment has {version}: pip install 'numpy<2', with "
            "Python 3.10 to 3.12 (for 3.13 there is none); the other verbs run with any numpy"
        )


def _wheel() -> tuple[Path, Path]:
    # The package itself is not imported, since that would load half of its dependencies.
    spec = importlib.util.find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        where = f"{platform.system()} {platform.machine()}"
        raise ToolError(
            f"no tritonserver here (nvidia-pytriton, Linux x86-64 only; this is {where}): {install_hint('serve')}"
        )
    package = Path(next(iter(spec.submodule_search_locations)))
    server, libraries = package / "tritonserver", package.parent / "nvidia_pytriton.libs"
    for path in (server / "bin" / "tritonserver", server / "backends" / "python" / "libtriton_python.so", libraries):
        if not path.exists():
            raise ToolError(
                f"nvidia-pytriton in {package.parent} has no {path.name}; expected version 0.7: {install_hint('serve')}"
            )
    return server, libraries


def _assembled(server: Path, stub: Path, onnxruntime: list[Path]) -> Path:
    """The folder for this interpreter and installation: in the user's cache, or else a temporary one."""
    sources = {
        **{f"backends/onnxruntime/{path.name}": path for path in onnxruntime},
        "backends/python/libtriton_python.so": server / "backends" / "python" / "libtriton_python.so",
        "backends/python/triton_python_backend_utils.py": server / "backends/python/triton_python_backend_utils.py",
        "backends/python/triton_python_backend_stub": stub,
        **{f"backends/onnxruntime/{path.name}": path for path in sorted((_HERE / "backends/onnxruntime").glob("*.py"))},
        "stub_start.py": _HERE / "stub_start.py",
    }
    paths = _package_folders()
    stamps = [(name, str(path), path.stat().st_size, path.stat().st_mtime_ns) for name, path in sources.items()]
    # "private" rules out folders built before 0.13, which the user's group could write to under some umasks.
    identity = json.dumps(["private", sys.version, _interpreter(), sys.base_prefix, paths, stamps])
    name = "triton-" + hashlib.sha256(identity.encode()).hexdigest()[:16]
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "patcher"
    folder = base / name
    make_private(base)
    try:
        ready = folder.is_dir() and _is_ours(base, folder) and _hold(folder)
    except OSError:  # the folder belongs to somebody else and is closed to us
        return _temporary(name, sources, paths)
    if not ready:
        with contextlib.ExitStack() as stack:
            try:
                base.mkdir(mode=0o700, parents=True, exist_ok=True)
                if not _is_ours(base, *([folder] if os.path.lexists(folder) else [])):
                    return _temporary(name, sources, paths)
                building = stack.enter_context(scratch(".triton-", base)) / name
            except OSError:
                return _temporary(name, sources, paths)
            _build(building, sources, paths)
            with contextlib.suppress(OSError):  # another process built it first
                building.rename(folder)
        if not _hold(folder):
            return _temporary(name, sources, paths)
    take_away(base, "triton-*", folder)
    return folder


def _hold(folder: Path) -> bool:
    """Mark a folder as in use, so that nobody removes it; False if it does not exist."""
    with _building:
        if folder in _held and folder.is_dir():
            return True
        mark = in_use(folder)
        if mark is not None:
            _held[folder] = mark
        return mark is not None


def _is_ours(*folders: Path) -> bool:
    """Whether only this user (or root) can have written to folders from which programs are run."""
    found = [folder.lstat() for folder in folders]
    mine = all(stat.S_ISDIR(each.st_mode) and each.st_uid in (os.geteuid(), 0) for each in found)
    return mine and not any(each.st_mode & (stat.S_IWGRP | stat.S_IWOTH) for each in found)


def _temporary(name: str, sources: dict[str, Path], paths: list[str]) -> Path:
    """The same folder in a temporary place, removed when this process ends; so does the server that it starts."""
    folder = _kept.get(name)
    if folder is None:
        folder = _at_exit.enter_context(scratch("patcher-triton-")) / name
        _build(folder, sources, paths)
        _kept[name] = folder
    return folder


def _package_folders() -> list[str]:
    names = ("numpy", "onnxruntime", "tokenizers", "tritonclient", "google.protobuf")
    specs = [importlib.util.find_spec(name) for name in names]
    found = (Path(spec.origin).parents[1 + spec.name.count(".")] for spec in specs if spec and spec.origin)
    return list(dict.fromkeys(map(str, found)))


def _interpreter() -> str:
    # With a relative PATH, sys.executable is relative to the current folder, and a symlink to it would be broken. The
    # stub would then use another Python, without the lazy imports, and write bytecode into the repository. Symlinks are
    # not resolved, since the location of the link is what identifies a venv.
    return os.path.abspath(sys.executable)  # noqa: PTH100


def _build(folder: Path, sources: dict[str, Path], paths: list[str]) -> None:
    try:
        _copy(folder, sources, paths)
    except OSError as error:
        raise ToolError(f"cannot put the server together in {folder}: {error}; $XDG_CACHE_HOME moves it") from error


def _copy(folder: Path, sources: dict[str, Path], paths: list[str]) -> None:
    import py_compile

    site = folder / "env" / "lib" / f"python{_PYTHON}" / "site-packages"
    folder.mkdir(mode=0o700, parents=True)
    site.mkdir(parents=True)
    for name, source in sources.items():
        # Copied, not linked: Triton refuses a backend library outside of its folder.
        target = site / "patcher_stub_start.py" if name == "stub_start.py" else folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)
        if target.suffix == ".py":
            py_compile.compile(
                str(target), doraise=True, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
            )
    lines = ["import patcher_stub_start; patcher_stub_start.install()", *paths]
    (site / "patcher_stub.pth").write_text("\n".join(lines) + "\n")
    binaries = folder / "env" / "bin"
    binaries.mkdir()
    (binaries / "python3").symlink_to(_interpreter())
    home = Path(getattr(sys, "_base_executable", sys.executable)).parent
    (folder / "env" / "pyvenv.cfg").write_text(f"home = {home}\ninclude-system-site-packages = false\n")
