"""Runs first in every Python stub of Triton: makes its start cheap, and keeps it from writing into the repository.

A new head version is a new stub process, and what that waits for is mostly the import of numpy. A third of it (random
numbers, polynomials, FFT, masked arrays, ctypes) is nothing a model here uses, so those parts are put off until one
does. One BLAS thread is enough, too: nobody multiplies matrices in numpy here, onnxruntime has threads of its own.
"""

from __future__ import annotations

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


def install() -> None:
    """Change this process; called from the stub environment's .pth file."""
    gc.set_threshold(50_000, 10, 10)  # looking for garbage while modules are imported costs a tenth of the import
    sys.dont_write_bytecode = True  # a __pycache__ in the repository would make Triton load the model again
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    sys.meta_path.insert(0, LazyFinder)
