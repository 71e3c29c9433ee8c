"""Features of texts, from the running server if there is one, else computed here from the same files."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from patcher.errors import RepositoryError, ServerError
from patcher.runtime import Encoder, read_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from patcher.backbone import Backbone
    from patcher.triton.client import TritonServer

__all__ = ["check_same_backbone", "count_cut", "extract_features"]

_SHORT = 200
"""A text of this many characters is not cut: the usual limits are 128 tokens and more, of several characters each."""


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


def count_cut(backbone: Backbone, texts: Sequence[str]) -> tuple[int, int]:
    """How many of the texts have more tokens than the backbone reads, and that number of tokens; 0, 0 if none has.

    If all texts are short, this does not look at the tokenizer, which takes up to a second to read.
    """
    long = [text for text in texts if len(text) > _SHORT]
    if not long:
        return 0, 0
    whole = read_tokenizer(backbone.tokenizer_path)
    limit = (whole.truncation or {}).get("max_length", 0)
    whole.no_truncation()
    whole.no_padding()
    count = sum(len(tokens.ids) > limit > 0 for tokens in whole.encode_batch(long))
    return (count, limit) if count else (0, 0)


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
