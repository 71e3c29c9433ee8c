"""Texts as Triton models on the Python backend: to token tensors, or by way of the backbone to features.

`export` copies this file to ``<name>_tokenizer/1/model.py`` and ``<name>_encoder/1/model.py``, next to the
``tokenizer.json`` that it reads, so it needs nothing but `tokenizers` and numpy and runs the same in NVIDIA's
container. Truncation and padding (token, side) are as ``tokenizer.json`` says.

The tokenizer turns ``text`` BYTES ``[batch, 1]`` into INT64 token tensors; its configuration tells which. The encoder's
configuration names a ``backbone_model``: it asks that one and answers with ``features`` FP32 ``[batch, width]``. Triton
joins only requests of one shape. Tokens of two texts seldom have one, while texts themselves always do: so they gather
in front of the encoder as long as the backbone works, which then gets them sorted by length, in batches with little
padding. Where `patcher serve` started the server and the backbone is for a CPU or the only GPU, the encoder runs it in
its own process: to ask another one costs a tenth to a fifth of a short text's time.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

MAX_BYTES = 1 << 20
"""The longest text that is tokenized; a longer one gets an error."""

SLACK = 12
"""Tokens of padding that cost about as much as one more batch (MiniLM on two cores: 0.1 ms a token, 1 ms a batch)."""
LARGEST = 64
"""Texts that the backbone gets at once."""
MOST_PAIRS = 32 * 256**2
"""Pairs of tokens that it gets at once, padding among them: attention's memory grows with them, and is then kept."""
CHARACTERS = 16
"""Of a long text so many a token that counts are tokenized first: about four times as many as a token has."""
MANY = 3
"""Responses from which on sending them in order of length pays for sending them one by one."""

BACKEND = "PATCHER_ONNXRUNTIME_BACKEND"
"""Environment variable that `patcher serve` sets: the file of its onnxruntime backend, for encoders to run theirs."""

_SPACE = re.compile(r"\s")
_NO_LETTER = re.compile(r"[^\w]")
_FIELDS = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
_FEATURES = "features"


class TextError(ValueError):
    """A text that cannot be tokenized."""


def encode(tokenizer: Tokenizer, texts: Sequence[str], names: Sequence[str]) -> dict[str, NDArray[np.int64]]:
    """Tokenize ``texts`` together: INT64 ``[n, longest]`` for each of ``names``, padded to the longest of them.

    ``names`` are some of ``input_ids``, ``attention_mask`` and ``token_type_ids``; ``tokenizer`` is left as it was.
    """
    return _tensors(tokenize(tokenizer, texts), tokenizer.padding, names)


def tokenize(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Any]:
    """What ``tokenizer.encode_batch`` makes of ``texts``, of each by no more of its beginning than can matter.

    Of a megabyte all but the first few hundred tokens would be made for nothing, in most of a second and 100 MB. A
    beginning is enough where it has more tokens than are kept and these end in its first half: what follows lies too
    far off to change them. Else twice as much is taken.
    """
    kept = tokenizer.truncation or {"direction": "left"}
    reach = CHARACTERS * kept["max_length"] if kept["direction"] == "right" else MAX_BYTES
    taken = [_beginning(text, reach) for text in texts]
    found: list[Any] = tokenizer.encode_batch(taken)
    for place, text in enumerate(texts):
        while len(taken[place]) < len(text) and not _enough(found[place], len(taken[place])):
            taken[place] = _beginning(text, 2 * len(taken[place]))
            found[place] = tokenizer.encode(taken[place])
    return found


def _beginning(text: str, reach: int) -> str:
    """A text up to the end of a word, from ``reach`` to twice as many characters."""
    if len(text) <= reach:
        return text
    cut = _SPACE.search(text, reach, 2 * reach) or _NO_LETTER.search(text, reach, 2 * reach)
    return text[: cut.start() if cut else 2 * reach]


def _enough(encoding: Any, characters: int) -> bool:
    return bool(encoding.overflowing) and 2 * max(stop for _, stop in encoding.offsets) <= characters


def _tensors(
    encodings: Sequence[Any], padding: Mapping[str, Any] | None, names: Sequence[str], shortest: int = 1
) -> dict[str, NDArray[np.int64]]:
    options = padding or {}
    multiple = options.get("pad_to_multiple_of") or 1
    # An empty text may have no token at all; one of padding keeps the model's shapes alive.
    length = max(1, shortest, options.get("length") or 0, *(len(each) for each in encodings))
    length = -(-length // multiple) * multiple
    filling = {"input_ids": options.get("pad_id", 0), "token_type_ids": options.get("pad_type_id", 0)}
    left = options.get("direction") == "left"
    # Not by the encodings' own `pad`, which stays: a text that is asked for again alone should be as short as it is.
    tensors = {name: np.full((len(encodings), length), filling.get(name, 0), np.int64) for name in names}
    for name, rows in tensors.items():
        for row, each in zip(rows, encodings, strict=True):
            start = length - len(each) if left else 0
            row[start : start + len(each)] = getattr(each, _FIELDS[name])
    return tensors


def read_text(value: bytes | str) -> str:
    """A text as it came over the wire; TextError where it is above 1 MiB or not UTF-8. An empty one is fine."""
    if len(value) > MAX_BYTES:
        raise TextError(f"a text of {len(value)} bytes; expected at most {MAX_BYTES} (1 MiB)")
    try:
        return value if isinstance(value, str) else value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TextError(f"a text that is not UTF-8 ({error.reason} at byte {error.start}); expected UTF-8") from None


def like_lengths(
    lengths: Sequence[tuple[int, int]],
    slack: int,
    largest: int | None = None,
    most: int = MOST_PAIRS,
    power: int = 1,
) -> list[list[int]]:
    """Which items share a length, shortest first: places in ``lengths``, which are (longest text, number of texts).

    A batch more costs as much as some ``slack`` tokens of padding, so neighbours in length are padded to one length
    as long as that adds no more than so many, there are no more than ``largest`` of them, and ``most`` pairs of tokens.
    With a ``power`` of 2 it is pairs of tokens that are counted: what padding costs in attention alone.
    """
    groups: list[list[int]] = []
    texts = own = 0
    for place in sorted(range(len(lengths)), key=lambda place: lengths[place][0]):
        longest, count = lengths[place]
        texts, own = texts + count, own + longest**power * count
        full = bool(groups) and largest is not None and len(groups[-1]) >= largest
        if not groups or full or longest**power * texts - own > slack or longest**2 * texts > most:
            groups.append([])
            texts, own = count, longest**power * count
        groups[-1].append(place)
    return groups


def graphed_shapes(setting: str, largest: int, multiple: int = 1) -> tuple[list[int], list[int]]:
    """The batches and the lengths, ascending, that a backbone has CUDA graphs of, and that are asked of it.

    ``setting`` names them as in ``1,2,4 x 8,16``; none is for more than the ``largest`` batch, or for a length that the
    tokenizer does not pad to, which is the ``multiple`` of a number. ValueError for another text.
    """
    if not setting:
        return [], []
    batches, lengths = (sorted(map(int, part.split(","))) for part in setting.split("x"))
    return [size for size in batches if size <= largest], [size for size in lengths if size % multiple == 0]


def graphed(texts: int, longest: int, shapes: tuple[Sequence[int], Sequence[int]]) -> tuple[int, int]:
    """The smallest of some shapes (batches, lengths) that is large enough; the shape as it is where there is none."""
    batches, lengths = shapes
    batch = next((size for size in batches if size >= texts), 0)
    length = next((size for size in lengths if size >= longest), 0)
    return (batch, length) if batch and length else (texts, longest)


class TritonPythonModel:
    """One instance of the tokenizer or the encoder; all requests of a call are tokenized at once."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Read ``tokenizer.json``, and from the configuration what is asked for."""
        config = json.loads(args["model_config"])
        settings = {key: value["string_value"] for key, value in config.get("parameters", {}).items()}
        self._backbone = settings.get("backbone_model", "")
        named = settings.get("token_inputs", "").split(",") if self._backbone else []
        self._names = named or [output["name"] for output in config["output"]]
        unknown = set(self._names) - set(_FIELDS)
        if unknown:
            raise ValueError(f"the configuration declares output {sorted(unknown)}; expected some of {sorted(_FIELDS)}")
        self._looked = False
        self._slack = int(settings.get("padding_slack", SLACK))
        self._power = int(settings.get("padding_power", 1))
        self._largest = int(settings.get("largest_batch", LARGEST))
        path = Path(args["model_repository"], args["model_version"], "tokenizer.json")
        self._tokenizer = Tokenizer.from_file(str(path))
        # All requests are tokenized in one call, and padded by what this call finds best.
        self._padding = self._tokenizer.padding
        multiple = (self._padding or {}).get("pad_to_multiple_of") or 1
        self._graphs = graphed_shapes(settings.get("cuda_graphs", ""), self._largest, multiple)
        self._tokenizer.no_padding()
        self._run = _backbone_here(config, Path(args["model_repository"]), self._backbone) if self._backbone else None

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response for each request; a text that cannot be tokenized fails its own request alone."""
        import triton_python_backend_utils as pb_utils

        call = _Call(requests, pb_utils)
        texts: list[str] = []
        for index, request in enumerate(requests):
            values = pb_utils.get_input_tensor_by_name(request, "text").as_numpy().reshape(-1)
            start = len(texts)
            try:
                texts += [read_text(value) for value in values]
            except TextError as error:
                call.fail(index, str(error), pb_utils.TritonError.INVALID_ARG)
            else:
                call.spans[index] = (start, len(texts))
        encodings = tokenize(self._tokenizer, texts)
        if self._backbone:
            self._answer_features(call, encodings)
        else:
            self._answer_tokens(call, encodings)
        return call.responses

    def _answer_tokens(self, call: _Call, encodings: Sequence[Any]) -> None:
        """Token tensors, like lengths padded alike."""
        places = list(call.spans)
        lengths = [(max(map(len, encodings[slice(*call.spans[index])])), _size(call.spans[index])) for index in places]
        for group in like_lengths(lengths, self._slack):
            for place in group:
                index = places[place]
                own = encodings[slice(*call.spans[index])]
                tensors = _tensors(own, self._padding, self._names, lengths[group[-1]][0])
                # In order of their length: the next model joins neighbours in its queue, if their shapes are equal.
                call.answer(index, tensors, early=len(places) >= MANY)

    def _answer_features(self, call: _Call, encodings: Sequence[Any]) -> None:
        """Features of the backbone, asked for texts of like length together, the shortest first."""
        owners = [index for index, (start, stop) in call.spans.items() for _ in range(start, stop)]
        left = {index: _size(span) for index, span in call.spans.items()}
        found: list[Any] = [None] * len(encodings)
        groups = like_lengths([(len(each), 1) for each in encodings], self._slack, self._largest, power=self._power)
        several = len(groups) > 1
        while groups:
            group = groups.pop(0)
            rows, problem = self._ask([encodings[place] for place in group], call.utils)
            if problem and len({owners[place] for place in group}) > 1:
                # One text that the backbone cannot take must not fail those of others that came at the same time.
                groups = [[place] for place in group] + groups
                continue
            for row, place in enumerate(group):
                index = owners[place]
                left[index] -= 1
                if problem:
                    call.fail(index, problem)
                    continue
                found[place] = rows[row]
                if not left[index]:
                    features = np.stack(found[slice(*call.spans[index])])
                    call.answer(index, {_FEATURES: features}, early=several)

    def _ask(self, encodings: Sequence[Any], utils: Any) -> tuple[Any, str]:
        """The backbone's features FP32 ``[n, width]``, and why there are none."""
        fixed = (self._padding or {}).get("length") or 0
        texts, longest = graphed(len(encodings), max(fixed, *map(len, encodings)), self._graphs)
        tensors = _tensors(encodings, self._padding, self._names, longest)
        if texts > len(encodings):  # with the last one over again: what has no token at all, not every model can take
            more = texts - len(encodings)
            tensors = {name: np.concatenate([rows, rows[-1:].repeat(more, 0)]) for name, rows in tensors.items()}
        if self._run is not None:
            try:
                return self._run([_FEATURES], tensors)[0], ""
            except Exception as error:  # noqa: BLE001 - onnxruntime raises a dozen kinds; the clients get it
                return None, f"onnxruntime: {error}"
        self._load_once(utils)
        response = self._request([utils.Tensor(*each) for each in tensors.items()], utils).exec()
        if response.has_error():
            return None, str(response.error().message())
        return utils.get_output_tensor_by_name(response, _FEATURES).as_numpy(), ""

    def _load_once(self, utils: Any) -> None:
        """Have the backbone loaded where a server under explicit control was told of the ensemble alone.

        Triton knows of no tie between the two. It is tried once: a load that fails can end Triton 24.10, by a race in
        its Python backend.
        """
        if self._looked:
            return
        self._looked = True
        if not utils.is_model_ready(self._backbone):
            with contextlib.suppress(Exception):  # what the backbone then answers is the error that the client gets
                utils.load_model(self._backbone)

    def _request(self, tensors: Sequence[Any], utils: Any) -> Any:
        return utils.InferenceRequest(
            model_name=self._backbone,
            requested_output_names=[_FEATURES],
            inputs=list(tensors),
            preferred_memory=utils.PreferredMemory(utils.TRITONSERVER_MEMORY_CPU, 0),
        )


class _Call:
    """The requests of one call: the texts of each by place, and how it was answered."""

    def __init__(self, requests: Sequence[Any], utils: Any) -> None:
        self.requests = requests
        self.utils = utils
        self.responses: list[Any] = [None] * len(requests)
        self.spans: dict[int, tuple[int, int]] = {}
        self._failed: set[int] = set()

    def answer(self, index: int, tensors: Mapping[str, Any], *, early: bool) -> None:
        """Answer a request, at once where it is ``early``: others of the call are still to come."""
        if index in self._failed:
            return
        response = self.utils.InferenceResponse([self.utils.Tensor(*each) for each in tensors.items()])
        if early:
            final = self.utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
            self.requests[index].get_response_sender().send(response, final)
        else:
            self.responses[index] = response

    def fail(self, index: int, message: str, *code: Any) -> None:
        """Answer a request with an error."""
        self._failed.add(index)
        self.responses[index] = self.utils.InferenceResponse(error=self.utils.TritonError(message, *code))


def _backbone_here(
    config: Mapping[str, Any], folder: Path, backbone: str
) -> Callable[[list[str], Mapping[str, Any]], list[Any]] | None:
    """What runs the ``backbone`` beside the encoder's ``folder`` in this process; None where Triton is to be asked."""
    file = os.environ.get(BACKEND)
    spec = importlib.util.spec_from_file_location("onnxruntime_backend", file) if file else None
    if spec is None or spec.loader is None:
        return None
    backend = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(backend)
    instances = sum(int(group.get("count", 1)) for group in config.get("instance_group", [{}]))
    found: Callable[[list[str], Mapping[str, Any]], list[Any]] | None
    found = backend.runner(folder.parent / backbone, instances)
    return found


def _size(span: tuple[int, int]) -> int:
    return span[1] - span[0]
