"""What classifiers, backbones and their models are called, and the names that are kept for a repository's own files."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from patcher.arguments import require
from patcher.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from patcher.storage import Storage

__all__ = [
    "CANARY",
    "CONFIG",
    "FORMAT_FILE",
    "JOURNAL",
    "MODEL",
    "PROGRAM",
    "STORE",
    "BackboneNames",
    "check_name",
    "holds",
    "is_classifier_name",
    "version_numbers",
]

CONFIG = "config.pbtxt"
MODEL = "model.onnx"
PROGRAM = "1/model.py"
STORE = "store"
"""A file in the head's folder of a classifier that a head store answers for: it names the backbone."""
FORMAT_FILE = "patcher.json"
JOURNAL = ".journal"
"""What follows a classifier's name in that of its journal."""
CANARY = "_canary"
"""A classifier of this ending is another one's version on trial (``patcher.canary``)."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_FOLDER = re.compile(rf"[A-Za-z0-9][A-Za-z0-9_.-]{{0,{63 + len(CANARY)}}}")
"""Of a classifier that is there: a canary's name is longer than one that is given."""
_ROLES = ("_head", "_features", "_tokenizer", "_encoder", "_backbone", "_heads", "_any", CANARY)


class BackboneNames:
    """The models of a backbone."""

    def __init__(self, backbone: str) -> None:
        self.backbone_name = backbone
        self.tokenizer_model = f"{backbone}_tokenizer"
        self.encoder_model = f"{backbone}_encoder"
        """Text to features; exports before 0.4.0 have none."""
        self.backbone_model = f"{backbone}_backbone"
        self.features_model = f"{backbone}_features"
        self.store_model = f"{backbone}_heads"
        """The one model that answers from the heads of all stored classifiers."""
        self.any_model = f"{backbone}_any"
        """The ensemble text and classifier -> answer above it."""


def check_name(name: str) -> str:
    """The name of a classifier or backbone if it can be a folder and a Triton model, else InputError."""
    require(str, name=name)
    if not _NAME.fullmatch(name):
        raise InputError(
            f"{name!r} cannot name a model: expected letters, digits, '_', '-' and '.', at most 64 of them"
        )
    if name.endswith(_ROLES):
        raise InputError(f"{name!r} cannot name a classifier: names ending in {', '.join(_ROLES)} belong to its parts")
    if name == FORMAT_FILE or JOURNAL in name:
        raise InputError(f"{name!r} cannot name a classifier: a repository's own files have such names")
    return name


def is_classifier_name(name: str) -> bool:
    """Whether a classifier that is there, or a canary, may have this name."""
    return _FOLDER.fullmatch(name) is not None


def holds(storage: Storage, name: str) -> bool:
    """Whether ``storage`` has a classifier ``name``; it need hold no repository."""
    head = f"{name}_head"
    if not is_classifier_name(name) or not storage.has(f"{head}/{CONFIG}"):
        return False
    return storage.has(f"{name}/{CONFIG}") or storage.has(f"{head}/{STORE}")


def version_numbers(names: Sequence[str]) -> tuple[int, ...]:
    """The versions among names like ``intent_head/3/model.onnx``, ascending."""
    found = (name.split("/")[1] for name in names)
    return tuple(sorted(int(number) for number in found if number.isascii() and number.isdigit() and int(number) > 0))
