"""Runs calls of a few fixed shapes as CUDA graphs, which are recorded once and then launched as a whole.

A short text's time on a GPU is the sum of the launches of some hundred kernels. A CUDA graph launches them all at once,
but only for tensors of the shape and at the address that it was recorded with. So each shape has tensors of its own on
the device, into which the inputs are copied. A call of any other shape runs without a graph.

This file is loaded only if a configuration asks for CUDA graphs on a GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import onnxruntime as ort

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["GraphedSession", "check_version", "parse_shapes"]

_SOUND = (1, 31)
_NEAR = 1e-2
"""Tolerance: far above FP16 rounding, far below the error of a graph that reads memory which is not its own."""
_IDS = 5
"""Every vocabulary has the token ids below this."""
_ID = "gpu_graph_id"
_NONE = "-1"
"""The graph id of a run that neither records a graph nor launches one."""


class _Recording(NamedTuple):
    binding: Any
    options: Any
    inputs: dict[str, Any]
    outputs: list[Any]


class GraphedSession:
    """Runs a session, with CUDA graphs if all inputs have one of ``shapes``, each (batch, length).

    The inputs of ``session`` all have the same shape ``[batch, length]``; it was opened with the provider option
    ``enable_cuda_graph``. Its tensors are on ``device`` ``number``; ``device`` is ``cuda`` except in tests. Not
    thread-safe.
    """

    def __init__(self, session: Any, shapes: frozenset[tuple[int, int]], device: str = "cuda", number: int = 0) -> None:
        self._session = session
        self._shapes = shapes
        self._device = (device, number)
        self._recorded: dict[tuple[int, ...], _Recording] = {}
        self._names = [output.name for output in session.get_outputs()]
        self._dims = [output.shape[1:] for output in session.get_outputs()]
        self._plain = ort.RunOptions()
        self._plain.add_run_config_entry(_ID, _NONE)

    def record(self) -> None:
        """Record all shapes now, which takes a few milliseconds each, so that no client waits for a recording.

        Raises ValueError if a recorded graph, given inputs other than those it was recorded with, answers differently
        from a run without a graph.
        """
        names = [each.name for each in self._session.get_inputs()]
        shapes = sorted(self._shapes, reverse=True)  # largest first: its memory then suffices for the others
        for shape in shapes:
            self.run(self._names, {name: np.zeros(shape, np.int64) for name in names})
        for batch, length in shapes:
            ids = (np.arange(batch)[:, None] + np.arange(length)) % _IDS
            others = {"attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
            inputs = {name: others.get(name, ids) for name in names}
            plain = self._session.run(self._names, inputs, self._plain)
            for found, expected in zip(self.run(self._names, inputs), plain, strict=True):
                if not np.allclose(found, expected, rtol=_NEAR, atol=_NEAR):
                    raise ValueError(f"recorded, {batch} x {length} tokens give other answers than before")

    def run(self, names: list[str], inputs: Mapping[str, Any]) -> list[Any]:
        """The outputs ``names``, each of shape ``[batch, ...]``, as ``session.run`` gives them."""
        shapes = {value.shape for value in inputs.values()}
        shape = shapes.pop()
        if shapes or shape not in self._shapes or names != self._names:
            return list(self._session.run(names, inputs, self._plain))
        recorded = self._recorded.get(shape)
        if recorded is None:  # onnxruntime runs the model as usual, then once more to record it
            recorded = self._recorded[shape] = self._bind(shape, inputs)
        else:
            for name, value in inputs.items():
                recorded.inputs[name].update_inplace(np.ascontiguousarray(value))
        self._session.run_with_iobinding(recorded.binding, recorded.options)
        return [each.numpy() for each in recorded.outputs]

    def _bind(self, shape: tuple[int, ...], values: Mapping[str, Any]) -> _Recording:
        binding, options = self._session.io_binding(), ort.RunOptions()
        options.add_run_config_entry(_ID, str(len(self._recorded) + 1))
        inputs = {
            name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value), *self._device)
            for name, value in values.items()
        }
        outputs = [
            ort.OrtValue.ortvalue_from_shape_and_type([shape[0], *dims], np.float32, *self._device)
            for dims in self._dims
        ]
        for name, each in inputs.items():
            binding.bind_ortvalue_input(name, each)
        for name, each in zip(self._names, outputs, strict=True):
            binding.bind_ortvalue_output(name, each)
        return _Recording(binding, options, inputs, outputs)


def check_version(version: str) -> None:
    """Raise ValueError if this version of onnxruntime is not known to record correctly.

    Earlier versions copied small tables from a block of memory that the next run overwrote with its own, so that a
    graph could compute with the tables of another shape (onnxruntime's pull request 32121).
    """
    if tuple(map(int, version.split(".")[:2])) < _SOUND:
        raise ValueError(f"onnxruntime {version} may record them wrongly; expected {_SOUND[0]}.{_SOUND[1]} or later")


def parse_shapes(text: str) -> frozenset[tuple[int, int]]:
    """Parse a setting such as ``1,2,4 x 8,16``: each batch size with each length; ValueError if it is malformed."""
    batches, lengths = (sorted({int(size) for size in part.split(",")}) for part in text.split("x"))
    if min(batches[0], lengths[0]) < 1:
        raise ValueError(text)
    return frozenset((batch, length) for batch in batches for length in lengths)
