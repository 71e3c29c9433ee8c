"""Find files in a folder by patterns, as ``Path.glob`` does, but without passing over what cannot be read.

A head's folder that this user may not read would otherwise be taken for one that does not exist.
"""

from __future__ import annotations

import os
import re
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from patcher.errors import RepositoryError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

__all__ = ["matching"]

_OURS = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
"""Names of models and versions. A lost+found has another, and so has a folder in which another user stages a change."""


def matching(root: Path, patterns: Sequence[str]) -> list[str]:
    """Names, relative to ``root``, of the files and folders that match one of the patterns.

    Raises RepositoryError for a folder on the way that cannot be read although its name may be a model's.
    """
    return list(dict.fromkeys(name for pattern in patterns for name in _below(root, (), pattern.split("/"))))


def _below(root: Path, within: tuple[str, ...], parts: Sequence[str]) -> Iterator[str]:
    part, *rest = parts
    folder = root.joinpath(*within)
    try:
        if any(sign in part for sign in "*?["):
            with os.scandir(folder) as entries:
                names = [entry.name for entry in entries if fnmatchcase(entry.name, part)]
        else:
            names = [part]
            if not rest:
                (folder / part).stat()
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        if all(map(_OURS.fullmatch, within)):
            raise RepositoryError(f"cannot read {folder}: {error.strerror or error}") from error
        return
    for name in names:
        if rest:
            yield from _below(root, (*within, name), rest)
        else:
            yield "/".join((*within, name))
