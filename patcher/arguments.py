"""Arguments of public functions, looked at where they come in: what was mixed up is said before anything is done."""

from __future__ import annotations

import numbers
from collections.abc import Iterable
from typing import TypeVar

from patcher.errors import InputError

__all__ = ["listed", "require"]

_NUMBERS: dict[type, type] = {int: numbers.Integral, float: numbers.Real}
"""What passes for Python's own: NumPy's, too."""
_Item = TypeVar("_Item")


def require(*kinds: type | None, **given: object) -> None:
    """InputError for an argument, given by its name, that is of none of the ``kinds``; a bool is no number."""
    for name, value in given.items():
        if not any(_is(value, kind) for kind in kinds):
            expected = " or ".join("None" if kind is None else kind.__name__ for kind in kinds)
            # Its kind alone: the value may be a key, or long.
            raise InputError(f"{name}: expected {expected}, got {'None' if value is None else type(value).__name__}")


def _is(value: object, kind: type | None) -> bool:
    if kind is None or isinstance(value, bool):
        return value is kind
    return isinstance(value, _NUMBERS.get(kind, kind))


def listed(given: Iterable[_Item], name: str, hint: str = "") -> list[_Item]:
    """What a list, an array or a generator holds; InputError for a string, of which each letter would count as one.

    ``hint`` says what else a string may have been meant for.
    """
    if isinstance(given, (str, bytes)):
        got = type(given).__name__
        raise InputError(f'{name}: expected a list, got {got}; put brackets around a single one: ["…"]{hint}')
    require(Iterable, **{name: given})
    return list(given)
