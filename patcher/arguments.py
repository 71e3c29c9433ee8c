"""Checks the arguments of public functions on entry, so that a mistake is reported before anything is done."""

from __future__ import annotations

import numbers
from collections.abc import Iterable
from typing import TypeVar

from patcher.errors import InputError

__all__ = ["listed", "require"]

_NUMBERS: dict[type, type] = {int: numbers.Integral, float: numbers.Real}
"""Abstract number types, so that NumPy's numbers pass for Python's."""
_BOOLEANS = ("bool", "bool_")
"""Python's and, under either of its names, NumPy's, which is not imported for this."""
_Item = TypeVar("_Item")


def require(*kinds: type | None, **given: object) -> None:
    """InputError if an argument, passed by its name, has none of the types ``kinds``; a bool is not a number here.

    Python's abstract numbers and NumPy's scalars pass for ``int``, ``float`` and ``bool``.
    """
    for name, value in given.items():
        if not any(_is(value, kind) for kind in kinds):
            expected = " or ".join("None" if kind is None else kind.__name__ for kind in kinds)
            # Name only the type: the value may be a secret key, or long.
            raise InputError(f"{name}: expected {expected}, got {'None' if value is None else type(value).__name__}")


def _is(value: object, kind: type | None) -> bool:
    if kind is None:
        return value is None
    if kind is bool or isinstance(value, bool):
        return kind is bool and type(value).__name__ in _BOOLEANS
    return isinstance(value, _NUMBERS.get(kind, kind))


def listed(given: Iterable[_Item], name: str, hint: str = "") -> list[_Item]:
    """The items of any iterable as a list; InputError for a string, whose characters would count as items.

    ``hint`` is appended to that error, to suggest what a string may have been meant for.
    """
    if isinstance(given, (str, bytes)):
        got = type(given).__name__
        raise InputError(f'{name}: expected a list, got {got}; put brackets around a single one: ["…"]{hint}')
    require(Iterable, **{name: given})
    return list(given)
