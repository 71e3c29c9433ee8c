"""Exports the checkpoint's tokenizer as one ``tokenizer.json`` that pads and truncates as transformers would."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import nn

from export.checkpoint import own_logits
from patcher.errors import CheckpointError, ExportError, InputError
from patcher.triton.tokenizer.model import encode
from patcher.wording import listing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from export.checkpoint import Checkpoint

__all__ = ["SAMPLE_TEXTS", "TextEncoder", "embeddings", "prepare_tokenizer"]

DEFAULT_MAX_LENGTH = 2048
"""Maximum tokens per text unless the model allows fewer.

The cost of attention is quadratic in the length, and a single text must not take a server down.
"""

SAMPLE_TEXTS = (
    "Hello",
    "I lost my card, can you block it?",
    "What is the difference between a standing order and a direct debit, and which one should I use for my rent?",
    "  Two  spaces, a tab\tand UPPER case: 1,234.50 € on 2024-02-29!  ",
    "¿Dónde está mi tarjeta? Größe, naïve, façade - „quoted“",
    "我的卡丢了，怎么办？",  # noqa: RUF001  full-width punctuation on purpose
    "emoji 🙂👍🏽 and e\u0301 in two code points",
    "word " * 60,
)
"""Texts of several lengths, scripts and oddities, likely to expose any difference between two tokenizers."""

_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_UNLIMITED = 1_000_000
_SAME = 2e-4
"""Tolerance relative to the largest logit, at least 1; masked padding changes an answer by rounding only."""
_BYTE_FF = ("\xff", "<0xFF>")
"""How byte-level and byte-fallback vocabularies name a byte that UTF-8 never has, so that no text becomes its token."""


@dataclass(frozen=True)
class TextEncoder:
    """What the server needs to turn texts into the model's inputs."""

    json: str
    """JSON of a ``tokenizers.Tokenizer`` with padding and truncation enabled."""
    inputs: tuple[str, ...]
    """Names of the model's token tensors, INT64 ``[batch, sequence]`` each."""
    max_length: int
    """Tokens beyond which a text is cut."""
    pad_id: int
    pad_type_id: int
    left: bool
    """Whether padding comes before the text."""
    misread: str = ""
    """The padding token where the export had to choose one that a text can end with; the text is read without it."""

    def __call__(self, texts: Sequence[str]) -> dict[str, NDArray[np.int64]]:
        """The model's inputs for a batch of texts, as the server makes them."""
        return encode(Tokenizer.from_str(self.json), texts, self.inputs)


def prepare_tokenizer(
    checkpoint: Checkpoint, max_length: int | None = None, served_pad_id: int | None = None
) -> TextEncoder:
    """The checkpoint's tokenizer, prepared for the server.

    Changes the checkpoint: its model looks for the encoder's padding id afterwards, and its tokenizer pads on the
    encoder's side. If the checkpoint has no padding token, ``served_pad_id`` is taken, that of an earlier export.

    Raises
    ------
    CheckpointError
        if the tokenizer is slow (implemented in Python only), has no vocabulary, has tokens without an embedding, or
        does not give the inputs that the model needs; if model and tokenizer have no usable padding token; if the
        model fails on texts or its answers depend on padding.
    InputError
        if ``max_length`` is more than the model can take, or leaves no room for a token beside the special ones.
    ExportError
        if ``tokenizer.json`` gives other ids than transformers.
    """
    model, tokenizer, name = checkpoint.model, checkpoint.tokenizer, checkpoint.source
    _refuse_unusable(model, tokenizer, name)
    inputs = _inputs(model, tokenizer, name)
    pad_id, misread = _agree_on_padding(model, tokenizer, name, served_pad_id)
    length = _max_length(model, tokenizer, max_length)
    left = tokenizer.padding_side == "left"
    for side in (left, not left):
        encoder = _encoder(tokenizer, inputs, length, pad_id, left=side)
        _prove(encoder, tokenizer, name)
        if _takes_padding(model, encoder):
            return dataclasses.replace(encoder, misread=misread)
    raise CheckpointError(
        f"{type(model).__name__} answers a text otherwise when padding follows or precedes it, so texts of different "
        "lengths cannot share a batch; where it takes long texts otherwise, --max-length N leaves them out"
    )


def embeddings(model: PreTrainedModel) -> nn.Embedding:
    """The model's token embedding table; CheckpointError if it has none."""
    try:
        table = model.get_input_embeddings()
    except NotImplementedError:  # CANINE hashes characters
        table = None
    if not isinstance(table, nn.Embedding):
        kind = "no table" if table is None else f"a {type(table).__name__}"
        raise CheckpointError(f"{type(model).__name__} embeds words with {kind}; expected an Embedding")
    return table


def _refuse_unusable(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    kind = type(tokenizer).__name__
    if not getattr(tokenizer, "is_fast", False) or not hasattr(tokenizer, "backend_tokenizer"):
        raise CheckpointError(
            f"{name} has a slow tokenizer ({kind}): its rules are Python code, which has no tokenizer.json for the "
            "server; expected a fast one (a folder with tokenizer.json)"
        )
    vocabulary = tokenizer.get_vocab()
    if not set(vocabulary) - set(tokenizer.all_special_tokens):
        raise CheckpointError(
            f"{name} has no vocabulary for its {kind}; expected the tokenizer's files beside the weights "
            "(tokenizer.json, or its vocabulary such as vocab.txt)"
        )
    rows = embeddings(model).num_embeddings
    beyond = sorted(token for token, place in vocabulary.items() if place >= rows)
    if beyond:
        raise CheckpointError(
            f"the tokenizer of {name} knows {len(beyond)} token(s) that the model has no embedding for ({rows} rows), "
            f"{beyond[0]!r} for one: texts with it would fail; model.resize_token_embeddings(len(tokenizer)) adds them"
        )


def _inputs(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> tuple[str, ...]:
    taken = inspect.signature(model.forward).parameters
    given = {*tokenizer("a"), "attention_mask"} & set(taken)
    if not {"input_ids", "attention_mask"} <= given:
        raise CheckpointError(
            f"{type(model).__name__} takes {listing(taken, 6)}; expected input_ids and attention_mask, for "
            "texts of different lengths to share a batch"
        )
    unknown = given - set(_INPUTS)
    if unknown:
        raise CheckpointError(f"{name}: the model wants {', '.join(sorted(unknown))}, which a text alone does not give")
    return tuple(each for each in _INPUTS if each in given)


def _agree_on_padding(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, served: int | None
) -> tuple[int, str]:
    """The id to pad with, which the model looks for afterwards, and its token if a text may end with it, else "".

    If model and tokenizer know different ids, the model's wins, because its forward pass looks for that id.
    """
    config = model.config.get_text_config()
    rows = embeddings(model).num_embeddings
    known = (config.pad_token_id, tokenizer.pad_token_id)
    found = next((each for each in (*known, served) if each is not None and 0 <= each < rows), None)
    pad, misread = _spare(tokenizer, rows) if found is None else (found, "")
    if pad is None:
        raise CheckpointError(
            f"{name} has no padding token that both model ({known[0]}) and tokenizer ({known[1]}) know, so texts "
            "cannot share a batch; set pad_token_id in its config.json"
        )
    config.pad_token_id = model.config.pad_token_id = int(pad)
    return int(pad), misread


def _spare(tokenizer: PreTrainedTokenizerBase, rows: int) -> tuple[int | None, str]:
    """An id to pad with among ``rows``, and its token if a text may end with it.

    Decoders are often fine-tuned one text at a time, without padding. They classify at the last token that is not
    padding, so a text that ends with the padding token would be read without it.
    """
    vocabulary = tokenizer.get_vocab()
    free = min(set(range(rows)) - set(vocabulary.values()), default=None)
    spare = [vocabulary.get(token) for token in _BYTE_FF]
    named = [tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id]
    usual = _last_ids(tokenizer, SAMPLE_TEXTS)
    possible = [each for each in (free, *spare, *named) if each is not None and each < rows and each not in usual]
    for each in possible:
        token = _token(tokenizer, each)
        if not token or each not in _last_ids(tokenizer, (token, f"a{token}", f"a {token}")):
            return each, ""
    written = next((each for each in possible if each in named), None)
    return written, "" if written is None else _token(tokenizer, written)


def _token(tokenizer: PreTrainedTokenizerBase, number: int) -> str:
    """The token of an id, "" if there is none."""
    return str(tokenizer.backend_tokenizer.id_to_token(number) or "")


def _last_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> set[int]:
    return {each for text in texts for each in tokenizer(text, verbose=False)["input_ids"][-1:]}


def _max_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, wanted: int | None) -> int:
    # Truncation never removes the special tokens that the tokenizer adds ([CLS], [SEP]).
    least = 1 + tokenizer.num_special_tokens_to_add()
    limits = [each for each in (tokenizer.model_max_length, _positions(model)) if isinstance(each, (int, float))]
    limit = min((int(each) for each in limits if least <= each < _UNLIMITED), default=None)
    if wanted is None:
        return min(limit or DEFAULT_MAX_LENGTH, DEFAULT_MAX_LENGTH)
    if wanted < least or (limit and wanted > limit):
        raise InputError(
            f"a maximum length of {wanted} tokens; expected {least} to {limit or 'any'}, which the model can take"
        )
    return wanted


def _positions(model: PreTrainedModel) -> int | None:
    """Number of tokens the model's position table has room for; None if positions are computed."""
    rows = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    words = embeddings(model)
    tables = (each for each in model.modules() if isinstance(each, nn.Embedding) and each is not words)
    for table in tables:
        # OPT and its kin reserve some rows at the front of the table.
        if rows is not None and table.num_embeddings == rows + getattr(table, "offset", 0):
            # RoBERTa and its kin number positions from the one after the padding index.
            return int(rows) - (0 if table.padding_idx is None else table.padding_idx + 1)
    return None


def _encoder(
    tokenizer: PreTrainedTokenizerBase, inputs: tuple[str, ...], length: int, pad_id: int, *, left: bool
) -> TextEncoder:
    """``tokenizer`` with padding on the given side; sets the side of the transformers tokenizer, too."""
    tokenizer.padding_side = "left" if left else "right"
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.enable_padding(
        direction=tokenizer.padding_side,
        pad_id=pad_id,
        pad_type_id=tokenizer.pad_token_type_id,
        pad_token=_token(tokenizer, pad_id) or "[PAD]",  # a name only, in case no token has this id
    )
    backend.enable_truncation(length, direction=tokenizer.truncation_side)
    return TextEncoder(str(backend.to_str(pretty=True)), inputs, length, pad_id, tokenizer.pad_token_type_id, left)


def _takes_padding(model: PreTrainedModel, encoder: TextEncoder) -> bool:
    """Whether a text's answer stays the same when it shares a batch with longer ones.

    A model that counts positions from the batch's left edge tolerates padding on the right only, whatever its
    tokenizer is set to.
    """
    # Compare texts of all lengths, with little and with much padding: a convolution may read just past a text's end.
    together, *alone = (
        own_logits(model, {name: torch.from_numpy(ids) for name, ids in encoder(texts).items()})
        for texts in (SAMPLE_TEXTS, *([text] for text in SAMPLE_TEXTS))
    )
    logits = np.concatenate(alone)
    if not np.isfinite(logits).all():
        text = SAMPLE_TEXTS[int(np.flatnonzero(~np.isfinite(logits).all(axis=1))[0])]
        raise CheckpointError(f"{type(model).__name__} answers {text!r} with logits that are not finite")
    return bool(np.abs(logits - together).max() <= _SAME * max(1.0, float(np.abs(logits).max())))


def _prove(encoder: TextEncoder, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    texts = [*SAMPLE_TEXTS, *(f"{token} my card{token}" for token in tokenizer.all_special_tokens)]
    ours = encoder(texts)
    # Without padding, for which the tokenizer may have no token; `_takes_padding` shows that ours changes no answer.
    theirs = tokenizer(texts, truncation=True, max_length=encoder.max_length)
    real = ours["attention_mask"].astype(bool)
    for key in encoder.inputs:
        for row, mask, expected in zip(ours[key], real, theirs[key], strict=True):
            if not np.array_equal(row[mask], expected):
                raise ExportError(
                    f"tokenizer.json of {name} gives other {key} than its {type(tokenizer).__name__} does in "
                    f"transformers: {_why_other(tokenizer)}"
                )


def _why_other(tokenizer: PreTrainedTokenizerBase) -> str:
    if getattr(tokenizer, "split_special_tokens", False):
        return (
            "split_special_tokens (in tokenizer_config.json) has it read special tokens in texts as plain words, which "
            "tokenizer.json cannot say; set it to false if texts with special tokens may be read otherwise"
        )
    return "it changes texts in Python code, which the server does not run"
