"""The model repository: find its classifiers and backbones, and add new ones."""

from __future__ import annotations

import contextlib
import difflib
from typing import TYPE_CHECKING

from patcher.arguments import require
from patcher.backbone import Backbone, added_backbone
from patcher.classifier import Classifier, add_classifier
from patcher.errors import InputError
from patcher.files import RepositoryFiles, format_file
from patcher.names import CANARY, FORMAT_FILE, check_name, holds
from patcher.storage import open_storage

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractContextManager
    from typing import TypeAlias

    from patcher.head import Head
    from patcher.layout import BackboneFiles
    from patcher.memory import Memory

    ClassifierLike: TypeAlias = "ModelRepository | Classifier"

__all__ = ["ModelRepository", "one_classifier"]

_NAMED_IN_ERRORS = 8


class ModelRepository(RepositoryFiles):
    """A folder, or a place in an object store (``s3://BUCKET/PATH``), that Triton serves and this project writes.

    Raises RepositoryError if ``location`` is not a repository, or was written by a newer version of this project.
    """

    def __repr__(self) -> str:
        return f"<ModelRepository at {self.location}>"

    @classmethod
    def create(cls, location: str | os.PathLike[str]) -> ModelRepository:
        """Open the repository at ``location``; its folder and format file are created if they are missing."""
        storage = open_storage(location)
        storage.create(FORMAT_FILE, format_file())
        return cls(location, storage=storage)

    @classmethod
    def at(cls, location: str | os.PathLike[str]) -> ModelRepository | None:
        """Open the repository at ``location``; None if there is none yet."""
        storage = open_storage(location)
        return None if storage.find(FORMAT_FILE) is None else cls(location, storage=storage)

    @classmethod
    @contextlib.contextmanager
    def making(cls, location: str | os.PathLike[str]) -> Iterator[ModelRepository]:
        """Open or create the repository; if it was created here and the body fails, it is removed again."""
        storage = open_storage(location)
        there, new = storage.there(), storage.find(FORMAT_FILE) is None
        try:
            storage.create(FORMAT_FILE, format_file())
            yield cls(location, storage=storage)
            storage.create(FORMAT_FILE, format_file())  # again: another process that failed may have removed it
        except BaseException:
            if new:
                storage.abandon(FORMAT_FILE, made=not there)
            raise

    def classifier(self, name: str | None = None) -> Classifier:
        """One classifier by name; without a name the only one, not counting canaries. Else InputError."""
        require(str, None, name=name)
        # A named classifier is looked up directly, without listing all: there may be thousands.
        if name is not None and holds(self.storage, name):
            return Classifier(self, name)
        names = tuple(each for each in self.classifiers() if not each.endswith(CANARY))
        if name is None:
            if len(names) != 1:
                found = f"{len(names)} classifiers ({_some(names)})" if names else "no classifier"
                raise InputError(
                    f"{self.location} holds {found}; expected --classifier NAME (.classifier(NAME)) with one of them"
                )
            return Classifier(self, names[0])
        raise InputError(
            f"no classifier {check_name(name)!r} in {self.location}; it holds {_some(names, name) or 'none'}"
        )

    def backbone(self, name: str | None = None) -> Backbone:
        """One backbone by name; without a name the only one. Else InputError."""
        if name is not None and self.has_backbone(check_name(name)):
            return Backbone(self, name)
        names = self.backbones()
        if name is None and len(names) == 1:
            return Backbone(self, names[0])
        if name is None:
            found = f"{len(names)} backbones ({_some(names)})" if names else "no backbone"
            raise InputError(f"{self.location} holds {found}; expected --backbone NAME (backbone=...) with one of them")
        raise InputError(f"no backbone {name!r} in {self.location}; it holds {_some(names, name) or 'none'}")

    def add_backbone(self, name: str, files: BackboneFiles) -> Backbone:
        """Add a backbone with its encoder, tokenizer and features ensemble under ``name``; the lock must be held."""
        with self.added_backbone(name, files) as backbone:
            return backbone

    def added_backbone(self, name: str, files: BackboneFiles) -> AbstractContextManager[Backbone]:
        """Like ``add_backbone``, but as a context manager that removes the backbone again if the body fails."""
        return added_backbone(self, check_name(name), files)

    def add_classifier(
        self, name: str, head: Head, memory: Memory | None = None, *, backbone: str, in_store: bool = False
    ) -> Classifier:
        """Add a classifier on an existing backbone, with ``head`` as its first version. The lock must be held.

        With ``in_store`` the backbone's head store serves it, instead of an ensemble and a head model of its own.
        """
        return add_classifier(self, check_name(name), head, memory, base=self.backbone(backbone), in_store=in_store)


def one_classifier(given: ClassifierLike, name: str | None = None) -> Classifier:
    """The given classifier, or one of the given repository: the one called ``name``, or the only one.

    Raises InputError as :meth:`ModelRepository.classifier` does, for a given classifier with another name than
    ``name``, and for an argument of any other type.
    """
    require(ModelRepository, Classifier, classifier=given)
    if isinstance(given, ModelRepository):
        return given.classifier(name)
    if name not in (None, given.name):
        raise InputError(f"got the classifier {given.name}, and the name {name}; expected one and the same")
    return given


def _some(names: Sequence[str], wanted: str | None = None) -> str:
    """All names; if there are many, those similar to ``wanted`` and the first few."""
    if len(names) <= _NAMED_IN_ERRORS:
        return ", ".join(names)
    near = difflib.get_close_matches(wanted, names, 3) if wanted else []
    return ", ".join(dict.fromkeys([*near, *names[:3]])) + f" … {len(names)} in all"
