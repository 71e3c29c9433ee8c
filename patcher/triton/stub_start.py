"""Runs first in every Python stub of Triton: makes its start cheap, and keeps it from writing into the repository.

A new head version is a new stub process, and what that waits for is mostly the import of numpy. A good third of it
(random numbers, polynomials, FFT, masked arrays, documentation, what it takes from the standard library for files) is
nothing a model here uses, so those parts are put off until one does. One BLAS thread is enough, too: nobody multiplies
matrices in numpy here, onnxruntime has threads of its own. And when Triton has taken leave of the process, nothing is
gained by tearing the interpreter down piece by piece.
"""

from __future__ import annotations

import atexit
import gc
import importlib.machinery
import importlib.util
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

_PUT_OFF = {"numpy.ctypeslib", "numpy.fft", "numpy.ma", "numpy.polynomial", "numpy.random"}
_PUT_OFF |= {"numpy.core._add_newdocs", "numpy.core._add_newdocs_scalars", "numpy.lib.mixins", "numpy.lib.scimath"}
_PUT_OFF |= {"ctypes", "fnmatch", "ipaddress", "ntpath", "pickle", "textwrap"}


class LazyFinder:
    """Finds the modules that are put off; they are run when one of their names is first asked for."""

    @classmethod
    def find_spec(
        cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The module's own spec with a lazy loader around its loader, once; None for all others."""
        if name not in _PUT_OFF:
            return None
        _PUT_OFF.discard(name)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec and spec.loader:
            spec.loader = importlib.util.LazyLoader(spec.loader)
        return spec


def _leave() -> None:
    """End the process at once; the last thing to run, when the model and all threads are done."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def install() -> None:
    """Change this process; called from the stub environment's .pth file, which Python may read twice."""
    if LazyFinder in sys.meta_path:
        return
    atexit.register(_leave)
    gc.set_threshold(50_000, 10, 10)  # looking for garbage while modules are imported costs a tenth of the import
    sys.dont_write_bytecode = True  # a __pycache__ in the repository would make Triton load the model again
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    sys.meta_path.insert(0, LazyFinder)
