"""A Python-based ``onnxruntime`` backend for Triton: runs ``model.onnx`` where the C++ backend is not installed.

It stands in for NVIDIA's C++ backend, so that a production repository can be served with packages from ``pip`` alone.
It refuses at load what the C++ backend refuses (``check.py``), since a stand-in that accepted more would hide a fault
until production. It reads the same settings: ``parameters`` (threads, memory, execution mode),
``optimization.graph.level``, ``default_model_filename``, and the kind and device of instances. It does not support
sequence batching, ragged batches and custom operators, and refuses configurations that ask for them.

Triton's stub loads this file by its path, and so does an encoder that runs its backbone itself. Each other file of the
folder is a stage: ``settings.py`` reads the configuration, ``session.py`` opens the session, ``check.py`` checks the
model against the configuration, ``graphs.py`` records CUDA graphs, ``failures.py`` explains a request that failed, and
``backbone.py`` is for encoders. All run in the process of a stub, where the rest of this package need not be installed.
So they import each other relatively, and nothing else of the package.
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
except ImportError:  # imported outside Triton, where opening a session works too
    pb_utils = None

BACKEND = "PATCHER_ONNXRUNTIME_BACKEND"
"""Environment variable that encoders read, too; set if they run their backbones themselves, with this file."""
_FOLDER = "patcher_onnxruntime"
_TOKENS = ("input_ids", "attention_mask", "token_type_ids")
"""The inputs of a backbone, which have one shape."""


def _beside(name: str) -> Any:
    """Import a module of this file's folder, which need not be a package: Triton loads this file by its path."""
    package = __package__ or _FOLDER
    if package not in sys.modules:
        sys.modules[package] = folder = ModuleType(package)
        folder.__path__ = [str(Path(__file__).parent)]
    return importlib.import_module(f"{package}.{name}")


_session, _settings = _beside("session"), _beside("settings")


class Asyncio(ModuleType):
    """Stands in for `asyncio` until more of it is used than Triton's stub uses.

    After the first ``execute`` the stub imports `asyncio` to find out whether the answer is a coroutine. The import
    takes ten times as long as the head's session, and the first answer of every new head version would wait for it.
    """

    @staticmethod
    def iscoroutine(value: object) -> bool:
        """Whether ``value`` is a coroutine."""
        return isinstance(value, CoroutineType)

    def __getattr__(self, name: str) -> Any:
        sys.modules.pop(self.__name__, None)
        return getattr(importlib.import_module(self.__name__), name)


class TritonPythonModel:
    """One instance of one model: a session, which gets all requests of a call with equal shapes as one batch."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the session and check the file against the configuration."""
        config = json.loads(args["model_config"])
        try:
            path = _settings.model_path(config, args["model_repository"], args["model_version"])
            device = int(args["model_instance_device_id"])
            self._open = functools.partial(_session.open_runner, config, path, args["model_instance_kind"], device)
            self._run: Run = self._open()
        except _settings.LoadError as error:
            raise pb_utils.TritonModelException(f"unable to load model '{config['name']}': {error}") from None
        self._inputs = [(entry["name"], entry["data_type"] == "TYPE_STRING") for entry in config["input"]]
        self._tokens = [name for name, _ in self._inputs if name in _TOKENS]
        self._batches = int(config.get("max_batch_size", 0)) > 0
        sys.modules.setdefault("asyncio", Asyncio("asyncio"))
        # Only on a CPU: on a GPU, Triton's warm-up requests would open the session again at once.
        runs_here = os.environ.get(BACKEND) and _settings.device_kind(config) == "CPU"
        if runs_here and _encoder_runs(Path(args["model_repository"])):
            self._run = self._opened_late  # that it opens is proven; open it again only if tokens arrive
            _beside("backbone").give_back()

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Return one response for each request; if one fails in onnxruntime, only that one gets an error."""
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
        if len({first[name].shape for name in self._tokens if name in first}) > 1:  # some graphs would answer wrongly
            for index in members:
                said = _beside("failures").differing({name: feeds[index].get(name) for name in self._tokens})
                responses[index] = _refusal(said, invalid=True)
            return
        feed = {name: np.concatenate([feeds[i][name] for i in members]) for name in first} if joined else first
        try:
            results = dict(zip(names, self._run(names, feed), strict=True))
        except Exception as error:  # noqa: BLE001 - onnxruntime raises a dozen types; the client gets the error
            if joined:  # answer one by one, to find the request at fault
                for index in members:
                    self._answer(requests, feeds, [index], responses)
            else:
                responses[members[0]] = _refusal(*_beside("failures").explain(error))
            return
        start = 0
        for index, outputs in zip(members, wanted, strict=True):
            stop = start + len(next(iter(feeds[index].values()))) if joined else None
            own = ((name, results[name][start:stop] if joined else results[name]) for name in outputs)
            tensors = [pb_utils.Tensor(name, value) for name, value in own]
            responses[index] = pb_utils.InferenceResponse(output_tensors=tensors)
            start = stop or 0


def runner(folder: Path, instances: int = 1) -> Run | None:
    """Open the model in ``folder`` in the process of an encoder with ``instances``; see ``backbone.py``."""
    found: Run | None = _beside("backbone").runner(folder, instances)
    return found


def _refusal(said: str, invalid: bool) -> Any:
    code = [pb_utils.TritonError.INVALID_ARG] if invalid else []
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(said, *code))


def _encoder_runs(folder: Path) -> bool:
    """Whether the model in ``folder`` is a backbone whose encoder, in the folder next to it, can run it itself."""
    name, _, role = folder.name.rpartition("_")
    program = folder.with_name(f"{name}_encoder") / "1" / "model.py"
    return role == "backbone" and program.is_file() and BACKEND in program.read_text(encoding="utf-8")


def _decode(value: Any) -> Any:
    # Triton passes bytes, onnxruntime takes str
    flat = [item.decode("utf-8", "replace") if isinstance(item, bytes) else item for item in value.reshape(-1)]
    return np.array(flat, dtype=object).reshape(value.shape)
