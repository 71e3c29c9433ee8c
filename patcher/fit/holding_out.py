"""Choose the inputs that are held out of a fit, so that it can be evaluated on them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from patcher.arrays import Bools, Ints

__all__ = ["hold_out", "hold_out_several"]

_SHARE = 0.2


def hold_out(ids: Ints, share: float = _SHARE, most: int | None = None, seed: int = 0) -> tuple[Ints, Ints]:
    """Positions of the inputs to fit and of those held out, a ``share`` of each label's; about ``most`` in total.

    The split is random, since files are often sorted by label or alternate between labels. A label with two or more
    inputs has at least one on each side, even if the total then exceeds ``most``.
    """
    rng = np.random.default_rng(seed)
    counts = np.bincount(ids)
    part = 1.0 if most is None else min(1.0, most / max(1, len(ids)))
    kept = np.maximum(np.minimum(counts, 2), np.floor(counts * part).astype(np.int64))
    held = np.clip(np.round(kept * share).astype(np.int64), np.minimum(kept // 2, 1), None)
    order = rng.permutation(len(ids))
    order = order[np.argsort(ids[order], kind="stable")]
    place = np.arange(len(ids)) - np.repeat(np.cumsum(counts) - counts, counts)
    sorted_ids = ids[order]
    apart = order[place < held[sorted_ids]]
    fitted = order[(place >= held[sorted_ids]) & (place < kept[sorted_ids])]
    return np.sort(fitted), np.sort(apart)


def hold_out_several(targets: Bools, most: int | None = None) -> tuple[Ints, Ints]:
    """``hold_out`` for inputs with any number of labels, BOOL ``[n, C]``: an input counts for its rarest label.

    There is an input with each label among those to fit, and one without it, if there is any.
    """
    rarest = np.where(targets, targets.sum(axis=0), len(targets) + 1).argmin(axis=1)
    fitted, apart = hold_out(rarest, most=most)
    for asked in (targets, ~targets):
        for label in np.flatnonzero(asked.any(axis=0) & ~asked[fitted].any(axis=0)):
            moved = np.flatnonzero(asked[:, label])[:1]
            fitted, apart = np.union1d(fitted, moved), np.setdiff1d(apart, moved)
    return fitted, apart
