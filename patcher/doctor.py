"""``patcher doctor``: checks the installation, the repository and its servers, and whether they agree."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import platform
from operator import itemgetter
from shlex import quote
from typing import TYPE_CHECKING

from patcher.backbone import unreadable
from patcher.checks import Check, of_programs, of_remains, of_settings, of_upgrades
from patcher.errors import ControlRefused, PatcherError, RepositoryError, ServerRefused, ServerUnreachable
from patcher.fleet import members, present
from patcher.gate_words import unremembered
from patcher.names import CANARY, MODEL, PROGRAM, STORE
from patcher.recovery import catch_up, recover
from patcher.repository import ModelRepository
from patcher.rollout import held_in_stores, probe, probe_text, validate
from patcher.trial import try_backbone
from patcher.wording import install_hint, listing, plural, versions_are

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence
    from pathlib import Path

    from patcher.backbone import Backbone
    from patcher.classifier import Classifier
    from patcher.triton.client import TritonServer

__all__ = ["Check", "diagnose", "repair"]

_NEEDED = ("numpy", "onnx", "tritonclient", "tokenizers", "safetensors")
_OPTIONAL = {
    "nvidia-pytriton": "patcher serve",
    "torch": "patcher export",
    "transformers": "patcher export",
    "huggingface-hub": "patcher export",
    "accelerate": "a Trainer with an ExportCallback",
    "pyarrow": "Parquet files",
    "botocore": "a repository on s3://",
    "matplotlib": "plots",
    "jinja2": "patcher report",
    "prometheus-client": "patcher metrics",
}


def diagnose(location: Path | str, server: TritonServer | None, url: str, *, expected: bool = False) -> Iterator[Check]:
    """Check everything, the cheap things first, and yield each finding as it is made.

    ``server`` is None if no server answered at ``url``, which is a fault if a server is ``expected`` there.
    """
    yield from _installation()
    try:
        repository = ModelRepository(location)
    except PatcherError as error:
        yield Check("repository", "fault", str(error))
        return
    names, unlisted = _classifiers(repository)
    if unlisted:
        yield Check("repository", "fault", unlisted)
    elif names:
        yield Check("repository", "ok", f"{location}: {plural(len(names), 'classifier')} ({listing(names)})")
    else:
        yield Check("repository", "note", f"{location} holds no classifier yet")
    yield from of_programs(repository)
    yield from of_upgrades(repository)
    yield from of_remains(repository)
    seen: set[str] = set()
    for name in names:
        try:
            yield from _on_disk(repository, name, seen)
        except Exception as error:  # noqa: BLE001  an unexpected error is a finding, too
            yield Check(name, "fault", f"its files cannot be read: {type(error).__name__} {error}")
    if server is None:
        found = f"no server answers at {url} (gRPC); `patcher serve --repo {quote(str(location))}` starts a server"
        yield Check("server", "fault" if expected else "note", found)
        return
    several = len(members(server)) > 1
    for member in members(server):
        if member not in present(server):
            yield Check(
                "server", "fault", f"no server answers at {member.url}, one of {url}; run `patcher sync` when it does"
            )
            continue
        for check in _on_server(repository, names, member):
            yield dataclasses.replace(check, what=f"{check.what} at {member.url}") if several else check


def repair(location: Path | str, server: TritonServer | None) -> Iterator[Check]:
    """Repair each classifier, and yield what was done.

    Finishes or undoes an interrupted change, moves an unreadable journal aside for a new one, writes off missing
    versions, and has the servers serve what is pinned. Damaged versions are left alone: only the user may have another
    copy.
    """
    repository = ModelRepository(location)
    for name in _classifiers(repository)[0]:
        found: list[Check] = []
        try:
            classifier = repository.classifier(name)
            with repository.lock():
                _repair(classifier, server, found)
        except PatcherError as error:
            found.append(Check(f"{name}, repair", "fault", str(error)))
        yield from found  # without the lock: nobody else has to wait for what the caller does with them


def _classifiers(repository: ModelRepository) -> tuple[Sequence[str], str]:
    """All classifiers; if some cannot be read, those that can, and the reason, which is empty otherwise."""
    try:
        return repository.classifiers(), ""
    except PatcherError as error:
        reason = str(error)
    found = []
    with contextlib.suppress(PatcherError):
        for head in sorted(repository.storage.glob("*_head")):
            with contextlib.suppress(PatcherError):
                found.append(repository.classifier(head.removesuffix("_head")).name)
    return found, reason


def _repair(classifier: Classifier, server: TritonServer | None, found: list[Check]) -> None:
    """Repair one classifier and append to ``found`` what was done; the lock must be held."""
    what = f"{classifier.name}, repair"
    try:
        classifier.journal.entries()
    except RepositoryError as error:
        found.append(Check(what, "note", f"{error}; it was moved to {classifier.journal.set_aside()}"))
    found.append(Check(what, "ok", recover(classifier, server) or "nothing was interrupted"))
    if gone := _gone(classifier):
        classifier.journal.append("pruned", versions=gone)
        found.append(Check(what, "note", f"{versions_are(gone)} written off"))
    classifier.adopt()
    for url, state in (catch_up(classifier, server) if server else {}).items():
        found.append(Check(what, "ok" if state in ("agreed", "caught up") else "fault", f"{url}: {state}"))


def _installation() -> Iterator[Check]:
    yield Check("python", "ok", f"{platform.python_version()} on {platform.platform()}")
    for package in _NEEDED:
        yield _package(package, "fault", f"needed: {install_hint()}")
    runtimes = [_package(f"onnxruntime{kind}", "note", "") for kind in ("-gpu", "")]
    there = [check for check in runtimes if check.state == "ok"]
    yield there[0] if there else Check("onnxruntime", "fault", "missing: pip install onnxruntime-gpu (or onnxruntime)")
    for package, verb in _OPTIONAL.items():
        yield _package(package, "note", f"needed only for {verb}")
    from patcher.triton.perf_analyzer import find_perf_analyzer

    try:
        yield Check("perf_analyzer", "ok", str(find_perf_analyzer()))
    except PatcherError as error:
        yield Check("perf_analyzer", "note", str(error))


def _package(name: str, missing: str, why: str) -> Check:
    try:
        return Check(name, "ok", importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Check(name, missing, f"not installed; {why}")


def _on_disk(repository: ModelRepository, name: str, seen: set[str]) -> Iterator[Check]:
    """Check one classifier's files; a backbone that is in ``seen`` was checked before."""
    try:
        classifier = repository.classifier(name)
        serving, versions = classifier.serving(), classifier.versions()
        classifier.version_name(serving)
        repository.config(classifier.features_model)
    except PatcherError as error:
        yield Check(name, "fault", str(error))
        return
    published = _published(classifier)  # read after the versions, so that it covers each of them
    found = [check for version in versions if (check := _version(classifier, version, serving, published))]
    yield from found
    faults = [check for check in found if check.state == "fault"]
    for number in classifier.incomplete():
        yield Check(
            f"{name}, version {number}",
            "note",
            f"{classifier.head_model}/{number} has files but no {MODEL}, perhaps from an interrupted copy; copy it "
            "again, or delete the folder",
        )
    yield _journal(classifier)
    damaged = f", {len(faults)} with a fault" if faults else ""
    yield Check(name, "fault" if faults else "ok", f"{plural(len(versions), 'version')}, {serving} serves{damaged}")
    if classifier.backbone_model not in seen:
        seen.add(classifier.backbone_model)
        yield _backbone(classifier)
        yield _local_answer(classifier)


def _journal(classifier: Classifier) -> Check:
    what = f"{classifier.name}, journal"
    try:
        there = set(classifier.versions())  # read before the journal, which then covers each of them
        unfinished, published = _unfinished(classifier), classifier.journal.published()
        if unfinished and classifier.storage.busy():
            return Check(what, "note", f"in progress: {unfinished}; another patcher is running")
        unfinished = unfinished and _unfinished(classifier)  # the other patcher may have finished meanwhile
    except PatcherError as error:
        return Check(what, "fault", str(error))
    if unfinished:
        done = "`patcher doctor --repair`, or the next verb that changes anything, finishes or undoes it"
        return Check(what, "fault", f"interrupted: {unfinished}; {done}")
    if gone := _gone(classifier):
        done = "restore what is missing, or write it off with `patcher doctor --repair`"
        return Check(what, "fault", f"{versions_are(gone)} missing, and not pruned; {done}")
    unknown = sorted(there - set(published))
    if unknown:
        done = "perhaps made by an older patcher; the next change adds what is missing"
        return Check(what, "note", f"{versions_are(unknown)} not in it, {done}")
    return Check(what, "ok", "nothing was interrupted; every file is as published")


def _unfinished(classifier: Classifier) -> str:
    """The change that was begun and has not ended, in words; empty if there is none."""
    if pending := classifier.journal.pending():
        return str(pending)
    half_gone = classifier.half_gone()
    return f"{versions_are(half_gone)} still there after a pruning" if half_gone else ""


def _gone(classifier: Classifier) -> list[int]:
    """Versions that once served, were not pruned, and yet are not on disk."""
    return sorted(classifier.journal.served() - set(classifier.versions()) - classifier.journal.pruned())


def _published(classifier: Classifier) -> dict[int, dict[str, str]]:
    """The journal's record of every version; empty if the journal cannot be read, which is a finding of its own."""
    try:
        return classifier.journal.published()
    except PatcherError:
        return {}


def _version(
    classifier: Classifier, version: int, serving: int, published: Mapping[int, Mapping[str, str]]
) -> Check | None:
    """A fault of a version, or a note on labels that the memory of the serving version does not cover; else None."""
    what = f"{classifier.name}, version {version}"
    try:
        if version in published:
            _untouched(classifier, version, published[version])
        head = classifier.head(version)
        memory = classifier.memory(version)
        if version == serving:
            validate(classifier.head_bytes(version), head)
        if head.lineage.backbone != classifier.fingerprint():
            raise RepositoryError("belongs to a different backbone")
    except PatcherError as error:
        if version not in classifier.versions():  # pruned meanwhile
            return None
        return Check(what, "fault", str(error))
    # Patches build on the serving version only, so the memories of the others do not matter.
    forgotten = unremembered(head.labels, memory) if version == serving else ""
    return Check(what, "note", forgotten) if forgotten else None


def _untouched(classifier: Classifier, version: int, recorded: Mapping[str, str]) -> None:
    files = classifier.files(version)
    classifier.require_published(version, {name: files.get(name) for name in (*files, *recorded)}, recorded)


def _backbone(classifier: Classifier) -> Check:
    what = classifier.backbone_model
    try:
        expected, found = classifier.fingerprint(), _sha256(classifier.backbone_path)
    except PatcherError as error:
        return Check(what, "fault", str(error))
    except OSError as error:
        return Check(what, "fault", str(unreadable(classifier.backbone_path, error)))
    if found != expected:
        return Check(what, "fault", f"its file's SHA-256 is {found[:12]}; expected {expected[:12]}: export it again")
    return Check(what, "ok", f"SHA-256 {found[:12]}, as its heads expect")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _local_answer(classifier: Classifier) -> Check:
    try:
        what = classifier.text_model
    except PatcherError as error:
        return Check(classifier.features_model, "fault", str(error))
    if not classifier.storage.has(f"{what}/{PROGRAM}"):
        return Check(what, "fault", f"{classifier.repository.location}/{what}/1 has no model.py; export it again")
    try:
        try_backbone(classifier, probe_text())
    except PatcherError as error:
        return Check(what, "fault", str(error))
    return Check(what, "ok", "tokenizer and backbone give features")


def _on_server(repository: ModelRepository, names: Sequence[str], server: TritonServer) -> Iterator[Check]:
    """Check one server against each classifier; what ends the checks, such as a server that stops, is told."""
    try:
        yield Check("server", "ok", f"{server.server_metadata()} at {server.url}")
        try:
            server.check_control()
        except ControlRefused as error:  # only a note: a user who only classifies does not need the key
            yield Check("server", "note", f"no version can be loaded there from here: {error}")
        yield from of_settings(repository, server)
        held = held_in_stores(repository, _with_models(repository, names), server)
        for name in names:
            yield _served(repository, name, server)
            yield from _left(repository, name, names, server, held)
        yield from _dropped(repository, server, held)
    except PatcherError as error:
        yield Check("server", "fault", f"{error}; no further checks were made on it")


def _with_models(repository: ModelRepository, names: Sequence[str]) -> list[str]:
    """The classifiers with a head model of their own, without canaries."""
    try:
        marks = repository.storage.glob(f"*_head/{STORE}")
    except RepositoryError:  # reported by the checks of the files
        return []
    stored = {path.partition("_head/")[0] for path in marks}
    return [name for name in names if name not in stored and not name.endswith(CANARY)]


def _left(
    repository: ModelRepository,
    name: str,
    names: Sequence[str],
    server: TritonServer,
    held: Mapping[Backbone, Collection[str]],
) -> Iterator[Check]:
    """Models that a server still runs although they belong to an ended trial, or to a dropped classifier.

    The dropped classifier had the same name, but was served the other way (head store or ensemble).
    """
    if name + CANARY not in names and server.is_ready(f"{name}{CANARY}_head"):
        found = f"its trial has ended, but {server.url} still runs it; `patcher sync` ends it there too"
        yield Check(f"{name}{CANARY}, served", "fault", found)
    try:
        stored = repository.stored_on(name) is not None
    except RepositoryError:  # reported by the checks of the files
        return
    if stored and server.is_ready(f"{name}_head"):
        found = f"{server.url} answers it from a model that the repository no longer has; `patcher sync` ends that"
        yield Check(f"{name}, served", "fault", found)
    for backbone in [each for each, there in held.items() if name in there and not stored]:
        found = f"{server.url} answers {backbone.any_model}/{name}, too, which was dropped; `patcher sync` ends that"
        yield Check(f"{name}, served", "fault", found)


def _dropped(
    repository: ModelRepository, server: TritonServer, held: Mapping[Backbone, Collection[str]]
) -> Iterator[Check]:
    """Dropped classifiers that a server still answers for, on a backbone of this repository.

    To be reported, a model must consist of a classifier's parts, on a backbone that this repository holds. This leaves
    out models that patcher did not make.
    """
    try:
        there = set(repository.classifiers())  # read again: a classifier made meanwhile was not dropped
    except RepositoryError:  # reported by the checks of the files
        return
    models = {each.name for each in server.statistics()}
    heads = [name for name in models if f"{name}_head" in models and name.removesuffix(CANARY) not in there]
    found = [(name, _below(repository, name, server)) for name in heads]
    found += [(f"{each.any_model}/{name}", each) for each, names in held.items() for name in names if name not in there]
    for address, backbone in sorted(found, key=itemgetter(0)):
        if backbone is not None and _serves(backbone, server):
            name = address.rpartition("/")[2].removesuffix(CANARY)
            said = f"{server.url} answers it, and the repository has no classifier {name}; if it was dropped, "
            yield Check(f"{address}, served", "note", f"{said}`patcher drop-classifier {name}` ends it there, too")


def _below(repository: ModelRepository, model: str, server: TritonServer) -> Backbone | None:
    """The backbone of a server's model, if its steps are those of a classifier: encoder to head. Else None."""
    steps = [step.model_name for step in server.model_config(model).ensemble_scheduling.step]
    if len(steps) < 2 or steps[-1] != f"{model}_head":  # noqa: PLR2004  an encoder and a head
        return None
    backbones = map(repository.backbone, repository.backbones())
    return next((each for each in backbones if steps[0] in (each.encoder_model, each.tokenizer_model)), None)


def _serves(backbone: Backbone, server: TritonServer) -> bool:
    """Whether a server has loaded this backbone, judged by its fingerprint and not only by its name."""
    try:
        found = server.model_config(backbone.backbone_model).parameters["fingerprint"].string_value
    except ServerRefused:
        return False
    return bool(found == backbone.fingerprint())


def _served(repository: ModelRepository, name: str, server: TritonServer) -> Check:
    """Whether a server answers from the version that the files pin; ServerUnreachable if it stopped answering."""
    what = f"{name}, served"
    try:
        classifier = repository.classifier(name)
        head = classifier.head()
        probe(classifier, head, server)
    except PatcherError as error:
        if isinstance(error, ServerUnreachable) and not server.is_live():
            raise
        if repository.storage.busy():
            return Check(what, "note", f"another patcher is running: {error}")
        said = str(error) if server.url in str(error) else f"{server.url}: {error}"  # it may be one of several
        return Check(what, "fault", f"{said} (in its own repository: `patcher doctor --repair`)")
    return Check(what, "ok", f"answers from version {head.lineage.version}, {len(head.labels)} labels")
