"""Features of texts, from the running server if there is one, else computed here from the same files."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from patcher.errors import RepositoryError, ServerError
from patcher.runtime import Encoder

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from patcher.backbone import Backbone
    from patcher.triton.client import TritonServer

__all__ = ["check_same_backbone", "extract_features"]


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
