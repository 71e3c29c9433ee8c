"""The types of options and arguments, whose refusals say in plain words what was expected."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["VERSION", "Location", "Number", "Version", "WholeNumber", "named_files"]


class WholeNumber(click.IntRange):
    """A whole number within bounds."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number; a usage error for anything else."""
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter:
            self.fail(f"expected a whole number {_bounds(self)}, got {str(value)!r}", param, ctx)


class Version(WholeNumber):
    """The number of a head version."""

    name = "version"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number; a usage error for anything else."""
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter:
            said = f"expected the number of a version, got {str(value)!r}; `patcher history` lists the versions"
            self.fail(said, param, ctx)


class Number(click.FloatRange):
    """A number within bounds."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number; a usage error for anything else."""
        try:
            number = super().convert(value, param, ctx)
        except click.BadParameter:
            number = math.nan
        if math.isnan(number):  # which click takes to be within any bounds
            self.fail(f"expected a number {_bounds(self)}, got {str(value)!r}", param, ctx)
        return number


class Location(click.Path):
    """A folder, or a URL, which must not be converted to a path."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path, or the URL as it is."""
        from patcher.storage import is_url

        return value if is_url(value) else super().convert(value, param, ctx)


VERSION = Version(1)


def named_files(texts: Sequence[str]) -> bool:
    """Whether every one of ``texts``, of which there must be one, is the name of a file that is there."""
    # Not Path.is_file, which raises an error for a text that is longer than any name may be.
    return bool(texts) and all(map(os.path.isfile, texts))


def _bounds(kind: click.IntRange | click.FloatRange) -> str:
    least = f"{'above' if kind.min_open else 'of at least'} {kind.min}"
    if kind.max is None:
        return least
    most = f"{'below' if kind.max_open else 'at most'} {kind.max}"
    return f"{least} and {most}" if kind.min_open or kind.max_open else f"from {kind.min} to {kind.max}"
