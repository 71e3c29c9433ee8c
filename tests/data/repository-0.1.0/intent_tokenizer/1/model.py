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

_FIELDS = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}


class TextError(ValueError):
    """A text that cannot be tokenized."""


def encode(tokenizer: Tokenizer, texts: Sequence[str], names: Sequence[str]) -> dict[str, NDArray[np.int64]]:
    """Tokenize ``texts`` together: INT64 ``[n, longest]`` for each of ``names``, padded to the longest of them.

    ``names`` are some of ``input_ids``, ``attention_mask`` and ``token_type_ids``; ``tokenizer`` is left as it was.
    """
    return _tensors(tokenizer.encode_batch(list(texts)), tokenizer.padding, names)


def _tensors(
    encodings: Sequence[Any], padding: Mapping[str, Any] | None, names: Sequence[str]
) -> dict[str, NDArray[np.int64]]:
    options = dict(padding or {})
    multiple = options.pop("pad_to_multiple_of", None) or 1
    # An empty text may have no token at all; one of padding keeps the model's shapes alive.
    length = max(1, options.pop("length", None) or 0, *(len(each) for each in encodings))
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


class TritonPythonModel:
    """One instance of the tokenizer; all requests of a call are tokenized at once, each padded to its own longest."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Read ``tokenizer.json`` and the names of the outputs."""
        config = json.loads(args["model_config"])
        self._names = [output["name"] for output in config["output"]]
        unknown = set(self._names) - set(_FIELDS)
        if unknown:
            raise ValueError(f"the configuration declares output {sorted(unknown)}; expected some of {sorted(_FIELDS)}")
        path = Path(args["model_repository"], args["model_version"], "tokenizer.json")
        self._tokenizer = Tokenizer.from_file(str(path))
        # All requests are tokenized in one call, but padded each on its own: padding a short one to its neighbour's
        # length would be work for nothing.
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
        for index, start, stop in spans:
            outputs = _tensors(encodings[start:stop], self._padding, self._names)
            responses[index] = pb_utils.InferenceResponse([pb_utils.Tensor(*each) for each in outputs.items()])
        return responses
