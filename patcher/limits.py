"""What the gates allow where the caller says nothing else; without numpy, so that ``--help`` can tell it at once."""

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
    """InputError for a limit that is no share from 0 to 1."""
    require(float, **{name: value})
    if not 0 <= value <= 1:  # NaN, which no comparison stops, is refused here too
        raise InputError(f"{name} is {value}; expected a share from 0 to 1")


def check_share(percent: float) -> None:
    """InputError for a share of the requests that is none, NaN included."""
    require(float, percent=percent)
    if not 0 < percent < 100:  # noqa: PLR2004  per cent
        raise InputError(f"got {percent:g} %; expected a share of the requests between 0 and 100 %")
