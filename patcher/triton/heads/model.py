"""The head store as a Triton model on the Python backend: one process that answers for every classifier of a backbone.

``features`` FP32 ``[batch, width]`` and ``classifier`` BYTES ``[batch, 1]`` (one classifier a request) to the answer of
that classifier's head. The heads are the files that `patcher` publishes beside this model: ``NAME_head/N/model.onnx``,
where N is the version that ``NAME_head/config.pbtxt`` pins, and ``NAME_head/store`` names this store's backbone.

A head is read when it is first asked for, and again only when a request to this very model carries the parameter
``refresh``: so a change of one head touches no other, and a pin that is being tried on one server does not show on the
next (unless that one has not read the head yet). One that cannot be read leaves the head before it in place. A request
with the parameter ``held`` gets, as its label and from head version 0, a JSON list of the classifiers whose heads are
loaded, for these are answered for whatever became of their files. Needs onnxruntime and numpy, as NVIDIA's container
with `patcher` in it has them.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

# onnxruntime tells Microsoft of each model since 1.29, where this does not say no before it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime as ort

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

# As in `patcher.names`: nothing that leads out of the repository's folder.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_PIN = re.compile(r"version_policy\s*:?\s*\{\s*specific\s*:?\s*\{\s*versions\s*:\s*\[?\s*(\d+)\s*\]?\s*\}\s*\}")
_ANSWER = ("label", "score", "logits", "head_version", "in_scope")


class HeadError(ValueError):
    """A classifier that is not in this store, or whose head cannot be served."""


class Served(NamedTuple):
    """A head that is loaded: its version and its session."""

    version: int
    session: Any


class Heads:
    """The heads in ``root`` that belong to the store of ``backbone``, each loaded when it is first asked for."""

    def __init__(self, root: Path, backbone: str, width: int) -> None:
        self._root, self._backbone, self._width = root, backbone, width
        self._served: dict[str, Served] = {}

    def held(self) -> list[str]:
        """The classifiers whose heads are loaded."""
        return sorted(self._served)

    def get(self, name: str) -> Served:
        """The head that serves; HeadError where there is none."""
        served = self._served.get(name)
        return self.refresh(name) if served is None else served

    def refresh(self, name: str) -> Served:
        """Load the version that is pinned now; HeadError, with the head before it still in place, where that fails.

        A classifier that is not here any more is forgotten.
        """
        folder = self._root / f"{name}_head"
        try:
            if not _NAME.fullmatch(name):
                raise FileNotFoundError
            backbone = (folder / "store").read_text(encoding="utf-8").strip()
            version = pinned((folder / "config.pbtxt").read_text(encoding="utf-8"), name)
        except (FileNotFoundError, NotADirectoryError):
            self._served.pop(name, None)
            raise HeadError(f"no classifier {name!r:.80} in the store of {self._backbone}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise HeadError(f"cannot read {folder}: {error}") from None
        if backbone != self._backbone:
            raise HeadError(f"{name} belongs to the store of {backbone:.80}; this is that of {self._backbone}")
        served = Served(version, open_head(folder / str(version) / "model.onnx", version, self._width))
        self._served[name] = served
        return served


def pinned(config: str, name: str) -> int:
    """The version that a ``config.pbtxt`` pins; HeadError where it pins none, or several."""
    found = _PIN.search(config)
    if found is None:
        raise HeadError(
            f"{name}_head/config.pbtxt pins no version; expected version_policy {{ specific {{ versions: N }} }}"
        )
    return int(found[1])


def open_head(path: Path, version: int, width: int) -> Any:
    """A session that has given one answer, of the version expected; HeadError where it does not."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # A few small products: more threads would fight the backbone's. An arena for each of a thousand heads is memory
    # that none of them needs.
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        (found,) = session.run(["head_version"], {"features": np.zeros((1, width), np.float32)})
    except Exception as error:  # noqa: BLE001 - onnxruntime raises a dozen kinds; the client gets it, the store goes on
        raise HeadError(f"onnxruntime {ort.__version__} cannot serve {path}: {error}") from None
    if int(found[0, 0]) != version:
        raise HeadError(f"{path} answers as version {int(found[0, 0])}; expected {version}")
    return session


class TritonPythonModel:
    """The one instance of the store; the requests of a call that ask for one classifier are answered together."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Find the heads; none is read yet, so that a server starts as quickly with thousands of them."""
        config = json.loads(args["model_config"])
        (width,) = (tensor["dims"][0] for tensor in config["input"] if tensor["name"] == "features")
        backbone = config["parameters"]["backbone"]["string_value"]
        self._heads = Heads(Path(args["model_repository"]).parent, backbone, int(width))

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response for each request; what is wrong with one classifier fails the requests for it alone."""
        responses: list[Any] = [None] * len(requests)
        groups: dict[str, list[int]] = {}
        stale = set()
        for index, request in enumerate(requests):
            parameters = json.loads(request.parameters() or "{}")
            if parameters.get("held"):
                responses[index] = _response(request, listed(self._heads.held()))
                continue
            try:
                name = classifier_of(_input(request, "classifier"))
            except HeadError as error:
                responses[index] = _refusal(error)
                continue
            groups.setdefault(name, []).append(index)
            if parameters.get("refresh"):
                stale.add(name)
        for name, members in groups.items():
            try:
                head = self._heads.refresh(name) if name in stale else self._heads.get(name)
                answers = answer(head.session, [_input(requests[index], "features") for index in members])
            except HeadError as error:
                for index in members:
                    responses[index] = _refusal(error)
                continue
            for index, outputs in zip(members, answers, strict=True):
                responses[index] = _response(requests[index], outputs)
        return responses


def classifier_of(values: NDArray[Any]) -> str:
    """The classifier that a request asks for; HeadError where its texts name several."""
    names = set(values.reshape(-1).tolist())
    if len(names) != 1:
        raise HeadError(f"a request for {len(names)} classifiers; expected one a request, however many texts it has")
    (name,) = names
    return str(name.decode("utf-8", "replace") if isinstance(name, bytes) else name)


def answer(session: Any, features: Sequence[NDArray[np.float32]]) -> list[dict[str, NDArray[Any]]]:
    """A head's outputs for each request's features FP32 ``[n, width]``, computed together."""
    joined = features[0] if len(features) == 1 else np.concatenate(features)
    try:
        results = dict(zip(_ANSWER, session.run(_ANSWER, {"features": joined}), strict=True))
    except Exception as error:  # noqa: BLE001 - as above
        raise HeadError(f"onnxruntime: {error}") from None
    if len(features) == 1:
        return [results]
    ends = np.cumsum([len(each) for each in features]).tolist()
    return [
        {name: value[start:end] for name, value in results.items()}
        for start, end in zip([0, *ends[:-1]], ends, strict=True)
    ]


def listed(names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """An answer that names classifiers, of a head version that none of them has."""
    zero = np.zeros((1, 1), np.float32)
    label = np.array([[json.dumps(names).encode()]], dtype=object)
    return {**dict.fromkeys(_ANSWER, zero), "label": label, "head_version": zero.astype(np.int64)}


def _input(request: Any, name: str) -> Any:
    import triton_python_backend_utils as pb_utils

    return pb_utils.get_input_tensor_by_name(request, name).as_numpy()


def _response(request: Any, outputs: Mapping[str, NDArray[Any]]) -> Any:
    import triton_python_backend_utils as pb_utils

    wanted = request.requested_output_names()
    return pb_utils.InferenceResponse([pb_utils.Tensor(name, outputs[name]) for name in wanted])


def _refusal(error: HeadError) -> Any:
    import triton_python_backend_utils as pb_utils

    return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG))
