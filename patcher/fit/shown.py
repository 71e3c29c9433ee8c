"""What a fit is shown of a new label."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from patcher.arrays import Doubles, Floats, Ints

__all__ = ["Shown", "Variants"]


class Variants(NamedTuple):
    """Examples said a little differently: features float32 ``[m, width]``, and the place of each one's example."""

    features: Floats
    places: Ints


@dataclass(frozen=True)
class Shown:
    """Features of a label's examples float32 ``[n, width]``, its name among them, and their variants where there are.

    An example and its variants belong together: they share its weight, and are left out of a fit together.
    """

    examples: Floats
    variants: Variants | None = None

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def points(self) -> Floats:
        """Features float32 ``[n + m, width]``: the examples, and behind them their variants."""
        return self.examples if self.variants is None else np.concatenate([self.examples, self.variants.features])

    @property
    def places(self) -> Ints:
        """INT64 ``[n + m]``: which example each point is, or was made from."""
        own = np.arange(len(self), dtype=np.int64)
        return own if self.variants is None else np.concatenate([own, self.variants.places])

    def weights(self, share: float) -> Doubles:
        """Of each point, float64 ``[n + m]``: 1 for an example and its variants together, ``share`` of it theirs."""
        made = np.bincount(self.places, minlength=len(self)) - 1
        weights = np.where(made > 0, 1.0 - share, 1.0)
        if self.variants is None:
            return weights
        return np.concatenate([weights, share / made[self.variants.places]])
