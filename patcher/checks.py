"""What doctor's findings are, and those about what runs inside Triton."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from patcher.errors import PatcherError
from patcher.foreign import foreign, outdated
from patcher.upgrade import interrupted, lacks_encoder

if TYPE_CHECKING:
    from collections.abc import Iterator

    from patcher.repository import ModelRepository

__all__ = ["Check", "of_programs", "of_upgrades"]


@dataclass(frozen=True)
class Check:
    """One thing looked at: ``state`` is ``ok``, ``note`` (missing, and not needed for all verbs) or ``fault``."""

    what: str
    state: str
    finding: str

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return dataclasses.asdict(self)


def of_programs(repository: ModelRepository) -> Iterator[Check]:
    """Whether a server of this repository runs anything but what patcher wrote into it."""
    try:
        found, old = list(foreign(repository)), outdated(repository)
    except PatcherError as error:
        yield Check("programs", "fault", str(error))
        return
    for model, said in found:
        yield Check(f"{model}, programs", "fault", said)
    if old:
        yield Check("programs", "note", f"{', '.join(old)}: of an older patcher; `patcher upgrade` renews them")
    elif not found:
        yield Check("programs", "ok", "what a server runs is what patcher wrote")


def of_upgrades(repository: ModelRepository) -> Iterator[Check]:
    """Which backbones an upgrade was cut off on, or has yet to give an encoder."""
    for name in repository.backbones():
        what = f"{name}, upgrade"
        with contextlib.suppress(PatcherError):  # of its configuration, which is told as a fault of that
            backbone = repository.backbone(name)
            if interrupted(backbone):
                if repository.storage.busy():
                    yield Check(what, "note", "in progress; another patcher is running")
                elif interrupted(backbone):  # who was at work may have ended it
                    yield Check(what, "fault", "interrupted; `patcher upgrade` finishes it")
            elif lacks_encoder(backbone):
                yield Check(what, "note", "no encoder, as in exports before 0.4; `patcher upgrade` adds it")
