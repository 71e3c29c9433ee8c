"""Features of texts, from the running server if there is one, else computed here from the same files."""

from __future__ import annotations

import re
import unicodedata
from typing import TYPE_CHECKING

import numpy as np

from patcher.blocks import blocks
from patcher.errors import RepositoryError, ServerError
from patcher.runtime import Encoder, read_tokenizer
from patcher.storage.disk import read_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from patcher.backbone import Backbone
    from patcher.triton.client import TritonServer

__all__ = ["check_same_backbone", "count_cut", "extract_features"]

_LIMIT = re.compile(rb'"truncation":\s*\{[^{}]*"max_length":\s*(\d+)')
_START = 4096
"""Bytes of a tokenizer's file in which its truncation stands: after a version, before all tokens."""
_SPECIAL = 16
"""More special tokens than a text gets."""
_AT_ONCE = 64
"""Texts that are counted together: a token takes 122 bytes of memory."""


def extract_features(
    backbone: Backbone,
    texts: Sequence[str],
    server: TritonServer | None = None,
    progress: Callable[[int], None] | None = None,
) -> NDArray[np.float32]:
    """Features FP32 ``[n, width]`` of ``texts``, through ``server`` if given, else computed in this process.

    ``backbone`` may also be a classifier on it.

    Raises
    ------
    ServerError
        if the server's backbone is not the repository's: its features would mean nothing to the head.
    RepositoryError
        if the backbone returns features that are not finite.
    """
    if server is None:
        features = Encoder(backbone.backbone_path, backbone.tokenizer_path).encode(texts, progress)
    else:
        check_same_backbone(backbone, server)
        features = server.features(backbone.features_model, texts, progress)
    if not np.isfinite(features).all():
        bad = int(np.flatnonzero(~np.isfinite(features).all(axis=1))[0])
        raise RepositoryError(f"the backbone gives features that are not finite for {texts[bad]!r:.80}")
    return features


def count_cut(tokenizer: Path, texts: Sequence[str]) -> tuple[int, int]:
    """How many of the texts have more tokens than the tokenizer keeps, and that number of tokens; 0, 0 if none has.

    The tokenizer itself, which takes up to a second to read, is read only if a text might have so many.
    """
    limit = _limit(tokenizer)
    long = [text for text in texts if _most_tokens(text) > limit > 0]
    if not long:
        return 0, 0
    from patcher.triton.tokenizer.model import tokenize

    whole = read_tokenizer(tokenizer)
    whole.no_padding()
    whole.enable_truncation(limit)  # on the right, where `tokenize` spares itself the end of a very long text
    parts = (tokenize(whole, long[some]) for some in blocks(len(long), _AT_ONCE))
    count = sum(bool(tokens.overflowing) for part in parts for tokens in part)
    return (count, limit) if count else (0, 0)


def _limit(tokenizer: Path) -> int:
    found = _LIMIT.search(read_bytes(tokenizer)[:_START])
    return int(found[1]) if found else (read_tokenizer(tokenizer).truncation or {}).get("max_length", 0)


def _most_tokens(text: str) -> int:
    """No tokenizer makes more of a text: the smallest tokens are bytes, of the text or of what it is normalized to."""
    plain = text if text.isascii() else unicodedata.normalize("NFKD", text)
    return max(len(text.encode()), len(plain.encode())) + _SPECIAL


def check_same_backbone(backbone: Backbone, server: TritonServer) -> None:
    """ServerError unless the server's backbone is the repository's.

    Loads the backbone and its features ensemble if the server has not loaded them yet.
    """
    ours = backbone.fingerprint()
    _load_missing(backbone, backbone.backbone_model, server)
    theirs = server.model_config(backbone.backbone_model).parameters["fingerprint"].string_value
    if ours != theirs:
        raise ServerError(
            f"the server at {server.url} serves backbone {theirs[:12] or 'without a fingerprint'}, the repository "
            f"{backbone.repository.location} holds {ours[:12]}: they must be the same; is --repo the "
            "repository that this server serves?"
        )
    _load_missing(backbone, backbone.features_model, server)


def _load_missing(backbone: Backbone, model: str, server: TritonServer) -> None:
    if server.is_ready(model):
        return
    try:
        server.load(model)
    except ServerError as error:
        if "failed to poll" not in str(error) and "unknown model" not in str(error):
            raise
        raise ServerError(
            f"the server at {server.url} has no model {model}, which the repository "
            f"{backbone.repository.location} holds ({error}); is --repo the repository that this server serves?"
        ) from error
