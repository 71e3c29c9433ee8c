"""The tokenizer as a Triton model on the Python backend: ``text`` BYTES ``[batch, 1]`` to INT64 token tensors.

`export` copies this file to ``<name>_tokenizer/1/model.py``, next to the ``tokenizer.json`` that it reads, so it needs
nothing but `tokenizers` and numpy and runs the same in NVIDIA's container. Truncation and padding (token, side, longest
of the batch) are as ``tokenizer.json`` says. The model's own configuration tells which tensors it emits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

MAX_BYTES = 1 << 20
"""The longest text that is tokenized; a longer one gets an error."""

SLACK = 12
"""Tokens of padding that cost about as much as one more batch (MiniLM on two cores: 0.1 ms a token, 1 ms a batch)."""
MANY = 3
"""Responses from which on sending them in order of length pays for sending them one by one."""

_FIELDS = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}


class TextError(ValueError):
    """A text that cannot be tokenized."""


def encode(tokenizer: Tokenizer, texts: Sequence[str], names: Sequence[str]) -> dict[str, NDArray[np.int64]]:
    """Tokenize ``texts`` together: INT64 ``[n, longest]`` for each of ``names``, padded to the longest of them.

    ``names`` are some of ``input_ids``, ``attention_mask`` and ``token_type_ids``; ``tokenizer`` is left as it was.
    """
    return _tensors(tokenizer.encode_batch(list(texts)), tokenizer.padding, names)


def _tensors(
    encodings: Sequence[Any], padding: Mapping[str, Any] | None, names: Sequence[str], shortest: int = 1
) -> dict[str, NDArray[np.int64]]:
    options = dict(padding or {})
    multiple = options.pop("pad_to_multiple_of", None) or 1
    # An empty text may have no token at all; one of padding keeps the model's shapes alive.
    length = max(1, shortest, options.pop("length", None) or 0, *(len(each) for each in encodings))
    length = -(-length // multiple) * multiple
    for each in encodings:
        each.pad(length, **options)
    return {name: np.array([getattr(each, _FIELDS[name]) for each in encodings], dtype=np.int64) for name in names}


def read_text(value: bytes | str) -> str:
    """A text as it came over the wire; TextError where it is above 1 MiB or not UTF-8. An empty one is fine."""
    if len(value) > MAX_BYTES:
        raise TextError(f"a text of {len(value)} bytes; expected at most {MAX_BYTES} (1 MiB)")
    try:
        return value if isinstance(value, str) else value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TextError(f"a text that is not UTF-8 ({error.reason} at byte {error.start}); expected UTF-8") from None


def shared_lengths(lengths: Sequence[tuple[int, int]], slack: int) -> list[tuple[int, int]]:
    """Which requests of one call share a length: ``(index, padded length)``, shortest first.

    ``lengths`` are (longest text, number of texts) of each request. Triton joins neighbours in a queue whose shapes are
    equal. A batch more costs as much as some ``slack`` tokens of padding, so neighbours in length are padded to one
    length as long as that adds no more than so many; beyond, each goes on at its own length.
    """
    order = sorted(range(len(lengths)), key=lambda index: lengths[index][0])
    groups: list[list[int]] = []
    texts = tokens = 0
    for index in order:
        longest, count = lengths[index]
        texts, tokens = texts + count, tokens + longest * count
        if not groups or longest * texts - tokens > slack:
            groups.append([])
            texts, tokens = count, longest * count
        groups[-1].append(index)
    return [(index, lengths[group[-1]][0]) for group in groups for index in group]


class TritonPythonModel:
    """One instance of the tokenizer; the requests of a call are tokenized at once, like lengths padded alike."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Read ``tokenizer.json`` and the names of the outputs."""
        config = json.loads(args["model_config"])
        self._names = [output["name"] for output in config["output"]]
        unknown = set(self._names) - set(_FIELDS)
        if unknown:
            raise ValueError(f"the configuration declares output {sorted(unknown)}; expected some of {sorted(_FIELDS)}")
        self._slack = int(config.get("parameters", {}).get("padding_slack", {}).get("string_value", SLACK))
        path = Path(args["model_repository"], args["model_version"], "tokenizer.json")
        self._tokenizer = Tokenizer.from_file(str(path))
        # All requests are tokenized in one call, and padded by what this call finds best.
        self._padding = self._tokenizer.padding
        self._tokenizer.no_padding()

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response for each request; a text that cannot be tokenized fails its own request alone."""
        import triton_python_backend_utils as pb_utils

        responses: list[Any] = [None] * len(requests)
        texts: list[str] = []
        spans: list[tuple[int, int, int]] = []
        for index, request in enumerate(requests):
            values = pb_utils.get_input_tensor_by_name(request, "text").as_numpy().reshape(-1)
            start = len(texts)
            try:
                texts += [read_text(value) for value in values]
            except TextError as error:
                refusal = pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG)
                responses[index] = pb_utils.InferenceResponse(error=refusal)
            else:
                spans.append((index, start, len(texts)))
        encodings = self._tokenizer.encode_batch(texts)
        lengths = [(max(map(len, encodings[start:stop])), stop - start) for _, start, stop in spans]
        order = shared_lengths(lengths, self._slack)
        for place, length in order:
            index, start, stop = spans[place]
            outputs = _tensors(encodings[start:stop], self._padding, self._names, length)
            responses[index] = pb_utils.InferenceResponse([pb_utils.Tensor(*each) for each in outputs.items()])
        if len(spans) < MANY:
            return responses
        # Sent in order of their length: the next model joins neighbours in its queue, if their shapes are equal.
        for place, _ in order:
            index = spans[place][0]
            requests[index].get_response_sender().send(responses[index], pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            responses[index] = None
        return responses
