"""The gates' default limits. This module does not import numpy, so that ``--help`` can show them without delay."""

from __future__ import annotations

from patcher.arguments import require
from patcher.errors import InputError

__all__ = ["MAX_FLIPS", "MIN_ACCURACY", "MIN_RECALL", "check_limit", "check_share"]

MAX_FLIPS = 0.005
"""Share of old inputs that a patch may turn from right to wrong."""
MIN_RECALL = 0.5
"""Share of a new label's inputs that it must find."""
MIN_ACCURACY = 0.5
"""Share of the held-out texts that a new classifier must answer right."""


def check_limit(name: str, value: float) -> None:
    """Raise InputError unless ``value`` is a share from 0 to 1."""
    require(float, **{name: value})
    if not 0 <= value <= 1:  # written so that NaN, for which every comparison is false, is refused too
        raise InputError(f"{name} is {value}; expected a share from 0 to 1")


def check_share(percent: float) -> None:
    """Raise InputError unless ``percent`` lies between 0 and 100, both excluded; NaN is refused too."""
    require(float, percent=percent)
    if not 0 < percent < 100:  # noqa: PLR2004  per cent
        raise InputError(f"got {percent:g} %; expected a share of the requests between 0 and 100 %")
