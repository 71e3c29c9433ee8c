"""Where a checkpoint is: in a folder, or on the hub. Anything else is refused here, without importing torch."""

from __future__ import annotations

import contextlib
import difflib
import re
import ssl
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import constants as hub
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from patcher.errors import CheckpointError
from patcher.wording import listing

__all__ = ["ADAPTER", "HUB", "Place", "locate", "unmerged", "unread"]

ADAPTER = "adapter_config.json"
"""File that a checkpoint with an adapter of PEFT has."""

HUB = "hf://"
"""Prefix of an id on the hub; with it, no local folder is looked for."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_HUB_SECONDS = 5.0


class Place(NamedTuple):
    """A folder's path or an id on the hub, and whether only local files can be read because the hub does not answer."""

    name: str
    local_files_only: bool


def locate(source: str) -> Place:
    """Find ``source``; CheckpointError if it is neither a checkpoint's folder nor an id on the hub that can be read."""
    name = _checked_source(source)
    if Path(name).is_dir():
        return Place(name, local_files_only=False)
    # The hub's own library tries six times for each file, which takes a minute if nothing answers.
    place = Place(name, local_files_only=not _hub_answers())
    if _is_cached(name):
        return place
    reason = ""
    if place.local_files_only or hub.HF_HUB_OFFLINE:
        reason = (
            f"We couldn't connect to '{hub.ENDPOINT}' to load the files, and couldn't find them in the cached files."
        )
    elif _is_unknown(name):
        reason = f"{name} is not a local folder and is not a valid model identifier listed on '{hub.ENDPOINT}/models'"
    if reason:
        raise unread(place, "configuration", reason)
    return place


def unread(place: Place, what: str, reason: str) -> CheckpointError:
    """The error for a part of a checkpoint (``what``) that cannot be read."""
    looked = "no hub answers to be asked for it" if place.local_files_only else "it was looked for on the hub"
    where = "" if Path(place.name).is_dir() else f" (no folder of that name is here, and {looked})"
    return CheckpointError(f"cannot read the {what} of {place.name}{where}: {reason}")


def unmerged(name: str) -> CheckpointError:
    """The error for a checkpoint with an adapter of PEFT, which transformers ignores where PEFT is not installed."""
    return CheckpointError(
        f"{name} holds a PEFT adapter ({ADAPTER}) that is not merged into its model; expected the folder that "
        "`merge_and_unload()` and then `save_pretrained()` write"
    )


def _is_cached(name: str) -> bool:
    with contextlib.suppress(ValueError):  # not a valid id after all: the reader of checkpoints says why
        return try_to_load_from_cache(name, "config.json") is not None
    return True


def _is_unknown(name: str) -> bool:
    """Whether the hub has no such repository; any other answer is left to the reader of checkpoints."""
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=_HUB_SECONDS)
    except GatedRepoError:  # it exists, but access is restricted
        return False
    except RepositoryNotFoundError:
        return True
    except Exception:  # noqa: BLE001  the errors depend on the HTTP client of the hub library's version
        return False
    return False


def _checked_source(name: str) -> str:
    if name.startswith(HUB):
        return _hub_id(name.removeprefix(HUB))
    path = Path(name)
    if path.is_dir():
        if (path / ADAPTER).is_file():
            raise unmerged(name)
        if not (path / "config.json").is_file():
            below = sorted(str(each.parent) for each in path.glob("*/config.json"))
            hint = f", such as {listing(below)}" if below else ""
            raise CheckpointError(
                f"{name} holds no config.json; expected the folder of a saved transformers model{hint}"
            )
        return name
    near = _near(path)
    if path.exists() or near or not _HUB_ID.fullmatch(name):
        what = "a file" if path.exists() else "no folder that is there"
        hint = f": did you mean {' or '.join(near)}?" if near else ""
        if near and not path.exists() and _HUB_ID.fullmatch(name):
            hint += f" {HUB}{name} is the hub's"
        raise CheckpointError(
            f"{name!r} is {what}; expected the folder of a checkpoint, or an id of the hub (owner/name){hint}"
        )
    return name


def _hub_id(name: str) -> str:
    if not _HUB_ID.fullmatch(name):
        raise CheckpointError(f"{HUB + name!r}: {name!r} is no id of the hub; expected {HUB}owner/name")
    if Path(name).exists():  # transformers would read that folder instead
        raise CheckpointError(f"{name} lies in this folder, where {HUB}{name} cannot be read; run this from another")
    return name


def _near(path: Path) -> list[str]:
    """Checkpoint folders beside ``path`` with similar names."""
    try:
        there = {each.name: str(each) for each in path.parent.iterdir() if (each / "config.json").is_file()}
    except OSError:
        return []
    return [there[name] for name in difflib.get_close_matches(path.name, there)]


def _hub_answers() -> bool:
    """Whether the hub can be reached; True without trying if the environment forbids network access."""
    if hub.HF_HUB_OFFLINE:
        return True
    try:
        request = urllib.request.Request(hub.ENDPOINT, method="HEAD")  # noqa: S310  the hub library's own address
        urllib.request.urlopen(request, timeout=_HUB_SECONDS).close()  # noqa: S310  the same
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # leave certificate errors to the hub's own library
    except OSError:
        return False
    return True
