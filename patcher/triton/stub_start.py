"""Runs first in every Python stub of Triton: speeds up its start, and keeps it from writing into the repository.

Every new head version starts a new stub process, which spends most of its start-up importing numpy. A good third of
that (random numbers, polynomials, FFT, masked arrays, documentation, file-related modules of the standard library) is
not used by any model here, so those modules are imported lazily. One BLAS thread is enough, too: no model here
multiplies matrices in numpy, and onnxruntime has its own threads. And once Triton is done with the process, it ends at
once, since tearing down the interpreter gains nothing.
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
    """Finds the modules that are imported lazily: each is executed on the first access to one of its attributes."""

    @classmethod
    def find_spec(
        cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The module's own spec with its loader wrapped in a lazy one, on the first import; None for other modules."""
        if name not in _PUT_OFF:
            return None
        _PUT_OFF.discard(name)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec and spec.loader:
            spec.loader = importlib.util.LazyLoader(spec.loader)
        return spec


def _leave() -> None:
    """End the process at once; runs last, after the model and all threads are done."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def install() -> None:
    """Apply all of this to the current process; called from the environment's .pth file, which may be read twice."""
    if LazyFinder in sys.meta_path:
        return
    atexit.register(_leave)
    gc.set_threshold(50_000, 10, 10)  # garbage collection during imports takes a tenth of their time
    sys.dont_write_bytecode = True  # a __pycache__ in the repository would make Triton reload the model
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    sys.meta_path.insert(0, LazyFinder)
