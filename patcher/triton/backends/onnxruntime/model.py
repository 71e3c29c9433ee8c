"""Triton's ``onnxruntime`` backend as a Python-based one: runs ``model.onnx`` where the C++ backend is not installed.

It stands in for NVIDIA's C++ backend, so that the repository which serves in production serves from ``pip`` alone. What
that one refuses at load, this one refuses (``check.py``): a stand-in that accepts more would hide a fault until
production. It reads the same settings: ``parameters`` (threads, memory, execution mode), ``optimization.graph.level``,
``default_model_filename``, the instances' kind and device. Sequence batching, ragged batches and custom operators it
has not, and says so.

Triton's stub loads this file by its path, and so does an encoder that runs its backbone itself. Each other file of the
folder is a stage: ``settings.py`` reads the configuration, ``session.py`` opens the session, ``check.py`` holds the
model against the configuration, ``graphs.py`` records CUDA graphs, ``backbone.py`` is for encoders. All run in a stub's
process, where the rest of this package need not be installed: they import each other relatively, nothing else of it.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys
from pathlib import Path
from types import CoroutineType, ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from patcher.triton.backends.onnxruntime.session import Run

try:
    import triton_python_backend_utils as pb_utils
except ImportError:  # imported outside Triton: what opens a session works there too
    pb_utils = None

BACKEND = "PATCHER_ONNXRUNTIME_BACKEND"
"""Environment variable, the encoder's own: set where encoders run their backbones themselves, with this file."""
_FOLDER = "patcher_onnxruntime"


def _beside(name: str) -> Any:
    """A module of this file's folder, which is a package to those alone that import this file by its whole name."""
    package = __package__ or _FOLDER
    if package not in sys.modules:
        sys.modules[package] = folder = ModuleType(package)
        folder.__path__ = [str(Path(__file__).parent)]
    return importlib.import_module(f"{package}.{name}")


_session, _settings = _beside("session"), _beside("settings")


class Asyncio(ModuleType):
    """Stands for `asyncio` until more of it is asked for than Triton's stub asks.

    After the first ``execute`` the stub imports `asyncio` to learn whether the answer is a coroutine. That costs ten
    times what the head's session does, and the first answer of every new head version would wait for it.
    """

    @staticmethod
    def iscoroutine(value: object) -> bool:
        """Whether ``value`` is a coroutine."""
        return isinstance(value, CoroutineType)

    def __getattr__(self, name: str) -> Any:
        sys.modules.pop(self.__name__, None)
        return getattr(importlib.import_module(self.__name__), name)


class TritonPythonModel:
    """One instance of one model: a session, fed with all requests of a call at once where their shapes agree."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the session and hold the file against the configuration."""
        config = json.loads(args["model_config"])
        try:
            path = _settings.model_path(config, args["model_repository"], args["model_version"])
            device = int(args["model_instance_device_id"])
            self._open = functools.partial(_session.open_runner, config, path, args["model_instance_kind"], device)
            self._run: Run = self._open()
        except _settings.LoadError as error:
            raise pb_utils.TritonModelException(f"unable to load model '{config['name']}': {error}") from None
        self._inputs = [(entry["name"], entry["data_type"] == "TYPE_STRING") for entry in config["input"]]
        self._batches = int(config.get("max_batch_size", 0)) > 0
        sys.modules.setdefault("asyncio", Asyncio("asyncio"))
        # On a GPU Triton's own calls to warm it up would open it again.
        runs_here = os.environ.get(BACKEND) and _settings.device_kind(config) == "CPU"
        if runs_here and _encoder_runs(Path(args["model_repository"])):
            self._run = self._opened_late  # it can be opened, and that is enough until somebody comes with tokens
            _beside("backbone").give_back()

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response for each request; a request that onnxruntime cannot answer gets its error alone."""
        responses: list[Any] = [None] * len(requests)
        feeds: list[dict[str, Any]] = []
        groups: dict[Any, list[int]] = {}
        for index, request in enumerate(requests):
            feed = self._feed(request)
            feeds.append(feed)
            key = tuple((name, value.shape[1:]) for name, value in feed.items()) if self._batches else index
            groups.setdefault(key, []).append(index)
        for members in groups.values():
            self._answer(requests, feeds, members, responses)
        return responses

    def _opened_late(self, names: list[str], inputs: Mapping[str, Any]) -> list[Any]:
        self._run = self._open()
        return self._run(names, inputs)

    def _feed(self, request: Any) -> dict[str, Any]:
        feed = {}
        for name, text in self._inputs:
            tensor = pb_utils.get_input_tensor_by_name(request, name)
            if tensor is not None:  # an optional input that the client left out
                value = tensor.as_numpy()
                feed[name] = _decode(value) if text else value
        return feed

    def _answer(
        self, requests: Sequence[Any], feeds: Sequence[dict[str, Any]], members: Sequence[int], responses: list[Any]
    ) -> None:
        wanted = [requests[index].requested_output_names() for index in members]
        names = list(dict.fromkeys(name for each in wanted for name in each))
        first = feeds[members[0]]
        joined = len(members) > 1
        feed = {name: np.concatenate([feeds[i][name] for i in members]) for name in first} if joined else first
        try:
            results = dict(zip(names, self._run(names, feed), strict=True))
        except Exception as error:  # noqa: BLE001 - onnxruntime raises a dozen kinds; the client gets it, the server goes on
            if joined:  # find the request that is at fault
                for index in members:
                    self._answer(requests, feeds, [index], responses)
            else:
                responses[members[0]] = pb_utils.InferenceResponse(error=pb_utils.TritonError(f"onnxruntime: {error}"))
            return
        start = 0
        for index, outputs in zip(members, wanted, strict=True):
            stop = start + len(next(iter(feeds[index].values()))) if joined else None
            own = ((name, results[name][start:stop] if joined else results[name]) for name in outputs)
            tensors = [pb_utils.Tensor(name, value) for name, value in own]
            responses[index] = pb_utils.InferenceResponse(output_tensors=tensors)
            start = stop or 0


def runner(folder: Path, instances: int = 1) -> Run | None:
    """What runs the model in ``folder`` in the process of an encoder with ``instances``; see ``backbone.py``."""
    found: Run | None = _beside("backbone").runner(folder, instances)
    return found


def _encoder_runs(folder: Path) -> bool:
    """Whether the model in ``folder`` is a backbone whose encoder, beside it, knows how to run it."""
    name, _, role = folder.name.rpartition("_")
    program = folder.with_name(f"{name}_encoder") / "1" / "model.py"
    return role == "backbone" and program.is_file() and BACKEND in program.read_text(encoding="utf-8")


def _decode(value: Any) -> Any:
    # Triton hands bytes, onnxruntime takes str
    flat = [item.decode("utf-8", "replace") if isinstance(item, bytes) else item for item in value.reshape(-1)]
    return np.array(flat, dtype=object).reshape(value.shape)
