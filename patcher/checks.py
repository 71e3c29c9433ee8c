"""The type of doctor's findings, and its checks of what runs inside Triton."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from patcher.configs import PROGRAM_HASH
from patcher.errors import PatcherError
from patcher.foreign import foreign, outdated
from patcher.model_config import parameter
from patcher.names import CANARY, CONFIG
from patcher.upgrade import interrupted, lacks_encoder

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from patcher.backbone import Backbone
    from patcher.repository import ModelRepository
    from patcher.triton.client import TritonServer

__all__ = ["Check", "of_programs", "of_remains", "of_settings", "of_upgrades"]


@dataclass(frozen=True)
class Check:
    """The finding of one check; ``state`` is ``ok``, ``note`` (worth knowing, but nothing is broken) or ``fault``."""

    what: str
    state: str
    finding: str

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return dataclasses.asdict(self)


def of_programs(repository: ModelRepository) -> Iterator[Check]:
    """Check whether a server of this repository would run anything but what patcher wrote into it."""
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
    """Report backbones whose upgrade was interrupted, or that still lack an encoder."""
    try:
        names = repository.backbones()
    except PatcherError as error:
        yield Check("backbones", "fault", str(error))
        return
    for name in names:
        what = f"{name}, upgrade"
        with contextlib.suppress(PatcherError):  # an unreadable configuration is reported by another check
            backbone = repository.backbone(name)
            if interrupted(backbone):
                if repository.storage.busy():
                    yield Check(what, "note", "in progress; another patcher is running")
                elif interrupted(backbone):  # asked again: the other patcher may have finished
                    yield Check(what, "fault", "interrupted; `patcher upgrade` finishes it")
            elif lacks_encoder(backbone):
                yield Check(what, "note", "no encoder, as in exports before 0.4; `patcher upgrade` adds it")


def of_remains(repository: ModelRepository) -> Iterator[Check]:
    """Report what an interrupted `new-classifier` or `drop-classifier` left: the memory holds features of texts."""
    try:
        names = [name for name in repository.remains() if not name.endswith(CANARY)]
        if not names or repository.storage.busy():  # perhaps one that is just being made
            return
        names = sorted({*names} & {*repository.remains()})
    except PatcherError as error:
        yield Check("remains", "fault", str(error))
        return
    for name in names:
        found = (
            f"there is {name}_head, but no classifier: making or deleting it was interrupted, or {name}/{CONFIG} is "
            f"gone; restore that file from a copy, or delete what is left by `patcher drop-classifier {name} --yes`"
        )
        yield Check(f"{name}, remains", "note", found)


def of_settings(repository: ModelRepository, server: TritonServer) -> Iterator[Check]:
    """Report models that a server still runs with settings or a program from before a `tune` or an `upgrade`."""
    for name in repository.backbones():
        models: tuple[str, ...] = ()
        with _reported_elsewhere():
            backbone = repository.backbone(name)
            loaded = server.model_config(backbone.backbone_model)
            if parameter(loaded, "fingerprint", "") == backbone.fingerprint():  # not another repository's
                models = (backbone.text_model, backbone.backbone_model, *_store(backbone))
        for model in models:
            with _reported_elsewhere():
                changed = _changed(server.model_config(model), repository.config(model))
                if changed:
                    found = f"{server.url} runs it with {', '.join(changed)}; start that server again"
                    yield Check(f"{model}, served", "note", found)


def _reported_elsewhere() -> AbstractContextManager[None]:
    """Pass over a model that is not loaded or not readable, which other checks report."""
    return contextlib.suppress(PatcherError)


def _store(backbone: Backbone) -> list[str]:
    there = backbone.storage.has(f"{backbone.store_model}/{CONFIG}")
    return [backbone.store_model] if there else []


def _changed(loaded: Any, there: Any) -> list[str]:
    """The differences between a server's configuration and the repository's, in words."""
    before, now = _settings(loaded), _settings(there)
    if not there.instance_group:  # the number is left to the server
        now["instances"] = before["instances"]
    found = []
    if before.pop(PROGRAM_HASH, "") != now.pop(PROGRAM_HASH, ""):
        found.append("the program of before an `upgrade`")
    changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    return found + [f"{key} {before.get(key, 'unset')} (its file: {now.get(key, 'unset')})" for key in changed]


def _settings(message: Any) -> dict[str, str]:
    """The settings in a parsed configuration that decide how a model runs, and that Triton reports unchanged."""
    found = {key: str(value.string_value) for key, value in message.parameters.items()}
    found["instances"] = str(sum(group.count for group in message.instance_group))
    found["max_queue_delay_microseconds"] = str(message.dynamic_batching.max_queue_delay_microseconds)
    found["response_cache"] = str(message.response_cache.enable).lower()
    return found
