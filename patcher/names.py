"""Names of classifiers, backbones and their models, and the names reserved for a repository's own files."""

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
    "MEMORY",
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
MEMORY = "memory.safetensors"
PROGRAM = "1/model.py"
STORE = "store"
"""A file in the head's folder that marks a classifier in a head store; its content is the backbone's name."""
FORMAT_FILE = "patcher.json"
JOURNAL = ".journal"
"""Suffix of a journal's file name, after the classifier's name."""
CANARY = "_canary"
"""Suffix of a classifier that serves another one's version on trial (``patcher.canary``)."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_FOLDER = re.compile(rf"[A-Za-z0-9][A-Za-z0-9_.-]{{0,{63 + len(CANARY)}}}")
"""The name of an existing classifier: a canary's may be longer than one that a user may choose."""
_ROLES = ("_head", "_features", "_tokenizer", "_encoder", "_backbone", "_heads", "_any", CANARY)


class BackboneNames:
    """The names of a backbone's models."""

    def __init__(self, backbone: str) -> None:
        self.backbone_name = backbone
        self.tokenizer_model = f"{backbone}_tokenizer"
        self.encoder_model = f"{backbone}_encoder"
        """Computes features from texts; exports before 0.4.0 have none."""
        self.backbone_model = f"{backbone}_backbone"
        self.features_model = f"{backbone}_features"
        self.store_model = f"{backbone}_heads"
        """The one model that answers from the heads of all stored classifiers."""
        self.any_model = f"{backbone}_any"
        """The ensemble above the store: text and classifier name in, answer out."""


def check_name(name: str) -> str:
    """Return ``name`` if a new classifier or backbone may have it (as a folder and a Triton model), else InputError."""
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
    """Whether an existing classifier, canaries included, may have this name."""
    return _FOLDER.fullmatch(name) is not None


def holds(storage: Storage, name: str) -> bool:
    """Whether ``storage`` has a classifier ``name``, be it a patcher repository or not."""
    head = f"{name}_head"
    if not is_classifier_name(name) or not storage.has(f"{head}/{CONFIG}"):
        return False
    return storage.has(f"{name}/{CONFIG}") or storage.has(f"{head}/{STORE}")


def version_numbers(names: Sequence[str]) -> tuple[int, ...]:
    """The versions among names like ``intent_head/3/model.onnx``, ascending."""
    found = (name.split("/")[1] for name in names)
    return tuple(sorted(int(number) for number in found if number.isascii() and number.isdigit() and int(number) > 0))
