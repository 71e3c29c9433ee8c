"""What the shell offers for classifiers, labels and versions: those of the repository at --repo or $TRITON_MODEL_REPO.

Nothing here may raise or print, whatever the repository holds, since that would end up in the line being typed. A
repository in an object store is not asked: pressing a key should not wait for a network.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import click

__all__ = ["complete_classifier", "complete_label", "complete_version"]

_UNQUOTED = re.compile(r"\w[\w.@%+/-]*")
"""A word that every shell takes as it is; any other label would have to be quoted, differently in each."""


def complete_classifier(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """The classifiers; for the option ``--classifier`` or an argument."""
    found: Sequence[str] = ()
    with contextlib.suppress(Exception):
        from patcher.files import RepositoryFiles
        from patcher.names import CANARY

        found = [name for name in RepositoryFiles(_repository(ctx)).classifiers() if not name.endswith(CANARY)]
    return _starting(found, incomplete)


def complete_version(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """The versions of the classifier, newest first."""
    found: Sequence[str] = ()
    with contextlib.suppress(Exception):
        from patcher.files import RepositoryFiles

        named = ctx.params.get("classifier_name")
        (name,) = [named] if named else complete_classifier(ctx, param, "")
        found = [str(version) for version in reversed(RepositoryFiles(_repository(ctx)).versions_of(name))]
    return _starting(found, incomplete)


def complete_label(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """The labels of the version that serves; reading its file takes ONNX's package, and a third of a second."""
    found: Sequence[str] = ()
    with contextlib.suppress(Exception):
        from patcher.repository import ModelRepository

        found = ModelRepository(_repository(ctx)).classifier(ctx.params.get("classifier_name")).head().labels
    return _starting([label for label in found if _UNQUOTED.fullmatch(label)], incomplete)


def _repository(ctx: click.Context) -> Path:
    location = ctx.params.get("repo")
    if not isinstance(location, Path):
        raise TypeError(f"{location!r} is not a folder")
    return location


def _starting(found: Sequence[str], incomplete: str) -> list[str]:
    return [word for word in found if word.startswith(incomplete)]
