"""The model that ``walk.py`` compares a repository and its servers with, and the rules that it checks.

The model knows labels, versions, parents, the memory's counts, and what each version answered. It knows nothing about
how patcher works.
"""

from __future__ import annotations

import collections
import copy
import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
import tiny

from patcher import ModelRepository, TritonServer
from patcher.errors import PatcherError, ServerError
from patcher.features import extract_features
from patcher.names import CANARY

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from patcher.classifier import Classifier

__all__ = ["TEXTS", "Broken", "Replica", "Rules", "Twin", "Version", "World"]

TEXTS = [tiny.sentences(label, 1, seed=90)[0] for label in (*tiny.OLD, *tiny.NEW)]
TEXTS += ["please tell me the", "balance1 pizza2 payday3", "ünknown words , only", "weather4 " * 30]
_CLOSE = 1e-4


class Broken(AssertionError):
    """A rule was broken."""


@dataclass(frozen=True)
class Version:
    """The expected content of a version: each label's kinds of sentences, and the counts of the memory."""

    kinds: Mapping[str, tuple[str, ...]]
    parent: int | None
    counts: Mapping[str, int] | None
    method: str

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels in the order of the logits."""
        return tuple(self.kinds)


@dataclass
class Twin:
    """The expected state of one classifier."""

    exclusive: bool
    in_store: bool
    versions: dict[int, Version]
    serving: int = 1
    highest: int = 1
    trial: int | None = None
    reach: dict[int, int | None] = field(default_factory=dict)
    """The parent of every version that ever existed."""

    @property
    def now(self) -> Version:
        """The version that should serve."""
        return self.versions[self.serving]

    def add(self, version: Version, *, serve: bool = True) -> int:
        """Add a version, which serves at once unless ``serve`` is False; returns its number."""
        self.highest += 1
        self.versions[self.highest] = version
        self.reach[self.highest] = version.parent
        if serve:
            self.serving = self.highest
        return self.highest

    def descends(self, version: int | None, ancestor: int) -> bool:
        """Whether ``version`` is ``ancestor`` or descends from it."""
        while version is not None and version != ancestor:
            version = self.reach.get(version)
        return version == ancestor


@dataclass
class Replica:
    """What one server was told to serve, and so may answer from."""

    url: str = "127.0.0.1:9"
    """Its address, or its last one; initially one at which nothing listens."""
    up: bool = False
    answering: dict[str, set[int]] = field(default_factory=dict)
    """By classifier, the versions that it may answer from; without the classifiers that it was never told to load."""
    trying: dict[str, int] = field(default_factory=dict)
    """The versions on trial that it has loaded, including those of trials that ended without it being told."""
    dropped: set[str] = field(default_factory=set)
    """The classifiers that it was told to unload."""

    def tell(self, name: str, twin: Twin) -> None:
        """The server is told which version serves."""
        self.answering[name] = {twin.serving}
        self.dropped.discard(name)

    def agrees(self, name: str, twin: Twin) -> bool | None:
        """Whether it serves the pinned version and the trial, if there is one; None if the model cannot know."""
        may = self.answering.get(name, set())
        if self.trying.get(name) != twin.trial or twin.serving not in may:
            return False
        return True if len(may) == 1 else None


@dataclass
class World:
    """The expected state of a repository's classifiers and of its servers."""

    twins: dict[str, Twin] = field(default_factory=dict)
    replicas: list[Replica] = field(default_factory=list)

    def copy(self) -> World:
        """A deep copy."""
        return copy.deepcopy(self)

    @property
    def up(self) -> tuple[int, ...]:
        """The places of the servers that run."""
        return tuple(place for place, replica in enumerate(self.replicas) if replica.up)

    def start(self, place: int, url: str) -> None:
        """A server starts and loads what the repository says."""
        self.replicas[place] = Replica(url, up=True)
        self.sync([place])

    def stop(self, place: int) -> None:
        """A server stops and forgets everything."""
        self.replicas[place] = Replica(self.replicas[place].url)

    def tell(self, name: str, places: Iterable[int]) -> None:
        """These servers are told which version of a classifier serves; head stores of others may notice it, too."""
        twin, told = self.twins[name], set(places)
        for place, replica in enumerate(self.replicas):
            if place in told:
                replica.tell(name, twin)
            elif name in replica.answering and twin.in_store:
                replica.answering[name].add(twin.serving)

    def sync(self, places: Iterable[int]) -> None:
        """These servers get all classifiers as pinned."""
        for place in places:
            replica = self.replicas[place]
            replica.trying = {name: twin.trial for name, twin in self.twins.items() if twin.trial}
            for name, twin in self.twins.items():
                replica.tell(name, twin)

    def end_trial(self, name: str, places: Iterable[int]) -> None:
        """These servers unload the version on trial."""
        for place in places:
            self.replicas[place].trying.pop(name, None)

    def drop(self, name: str, places: Iterable[int]) -> None:
        """These servers unload a classifier."""
        for place in places:
            replica = self.replicas[place]
            replica.answering.pop(name, None)
            replica.trying.pop(name, None)
            replica.dropped.add(name)

    def left(self, places: Iterable[int]) -> set[str]:
        """The dropped classifiers that these servers may still answer for."""
        return {name for place in places for name in self.replicas[place].answering} - set(self.twins)


class Rules:
    """The rules for the repository at ``location`` and for its servers' answers, checked after every step."""

    def __init__(self, location: Any) -> None:
        self.location = location
        self.checks: collections.Counter[str] = collections.Counter()
        self._files: dict[tuple[str, int], dict[str, str]] = {}
        self._answers: dict[tuple[str, int], bytes] = {}
        self._features: dict[str, Any] = {}

    def forget(self, name: str) -> None:
        """Forget a dropped classifier: another one may take its name and starts again with version 1."""
        for known in (self._files, self._answers):
            for key in [key for key in known if key[0] == name]:
                del known[key]  # type: ignore[attr-defined]

    def need(self, rule: str, holds: bool, found: object) -> None:
        """Count a check of ``rule``; raise Broken if it does not hold."""
        self.checks[rule] += 1
        if not holds:
            raise Broken(f"{rule}: {found}")

    def repository(self, world: World, *, damaged: bool = False) -> None:
        """Check that the repository contains what the model expects."""
        repository = ModelRepository(self.location)
        trials = {name + CANARY for name, twin in world.twins.items() if twin.trial}
        self.need("classifiers", {*world.twins, *trials} == {*repository.classifiers()}, repository.classifiers())
        for name, twin in world.twins.items():
            classifier = repository.classifier(name)
            there = (set(classifier.versions()), classifier.serving(), classifier.next_version())
            wanted = (set(twin.versions), twin.serving, twin.highest + 1)
            self.need("versions, the serving one, the next number", there == wanted, f"{name}: {there}, not {wanted}")
            if twin.trial:
                tried = repository.classifier(name + CANARY)
                self.need("the trial", tried.serving() == twin.trial, f"{name}: {tried.serving()}, not {twin.trial}")
            for number, version in twin.versions.items():
                if not damaged:
                    self._version(classifier, twin, number, version)
        left = [path for path in repository.storage.glob("*") if path.rpartition("/")[2].startswith((".", "tmp"))]
        left = [path for path in left if path != ".patcher.lock"]
        self.need("nothing is left in the repository", not left, left)

    def _version(self, classifier: Classifier, twin: Twin, number: int, version: Version) -> None:
        key = (classifier.name, number)
        if key in self._files and not classifier.storage.in_one_step and self.checks["parent"] % 8:
            return  # reading everything from an object store takes long
        hashes = {name: hashlib.sha256(data).hexdigest() for name, data in classifier.files(number).items()}
        if key in self._files:
            self.need("no file of a version changes", hashes == self._files[key], f"{key}: {hashes}")
            return
        head, memory = classifier.head(number), classifier.memory(number)
        self.need("labels", head.labels == version.labels, f"{key}: {head.labels}, not {version.labels}")
        self.need(
            "parent", head.lineage.parent == version.parent, f"{key}: {head.lineage.parent}, not {version.parent}"
        )
        self.need("problem", head.exclusive == twin.exclusive, key)
        counts = None if memory is None else dict(zip(memory.labels, memory.counts.tolist(), strict=True))
        self.need("counts of the memory", counts == version.counts, f"{key}: {counts}, not {version.counts}")
        if version.parent in twin.versions:
            self._step(classifier, version, number)
        self._files[key] = hashes

    def _step(self, classifier: Classifier, version: Version, number: int) -> None:
        """Check what changed between a version's parent and the version."""
        key = (classifier.name, number)
        assert version.parent
        parent, head = classifier.head(version.parent), classifier.head(number)
        if version.method not in ("ridge", "lda", "anchored"):
            before, after = parent.rows_hash(), head.rows_hash()
            same = [label for label in after if label in before and label not in head.lineage.added]
            moved = [label for label in same if before[label] != after[label]]
            self.need("old rows keep their bits", not moved, f"{key}: {moved}")
            self.need("the fine-tuned rows stay", parent.base_hash() == head.base_hash(), key)
        old, new = classifier.memory(version.parent), classifier.memory(number)
        if old is None or new is None or version.method == "remember":
            return
        touched = {*head.lineage.added, *head.lineage.removed}
        for label in set(old.labels) & set(new.labels) - touched:
            first, second = old.sums[old.labels.index(label)], new.sums[new.labels.index(label)]
            self.need("sums of other labels keep their bits", first.tobytes() == second.tobytes(), f"{key}: {label}")
        within = new.within()
        least, most = np.linalg.eigvalsh(within)[[0, -1]]
        self.need(
            "a covariance, but for the rounding of few sentences",
            least > -0.2 * max(most, 1e-9),
            f"{key}: eigenvalues {least:.3g} to {most:.3g}",
        )
        held = np.bincount(new.sample_labels, minlength=len(new.labels))
        self.need("no more is sampled than was seen", bool((held <= new.counts).all()), f"{key}: {held} {new.counts}")

    def expected(self, classifier: Classifier, number: int) -> tuple[Any, ...]:
        """What onnxruntime computes from the file of a version, on features computed in this process."""
        backbone = classifier.backbone_name
        if backbone not in self._features:
            self._features[backbone] = extract_features(classifier, TEXTS, None)
        features = self._features[backbone]
        session = onnxruntime.InferenceSession(classifier.head_bytes(number), providers=["CPUExecutionProvider"])
        found = session.run(["label", "score", "logits", "in_scope"], {"features": features})
        in_numpy = classifier.head(number).logits(features)
        off = np.abs(found[2] - in_numpy) - classifier.head(number).rounding(features)
        self.need("numpy computes what the file answers", bool((off < _CLOSE).all()), f"{classifier.name}, {number}")
        return tuple(found)

    def served(self, world: World, replica: Replica) -> None:
        """Check that a server answers from allowed versions, as their files do, and always with the same bits."""
        repository = ModelRepository(self.location)
        with TritonServer(replica.url) as server:
            for name, twin in world.twins.items():
                if name in replica.answering:
                    self._answer(repository.classifier(name), twin, replica.answering[name], server)
                if twin.trial and replica.trying.get(name) == twin.trial:
                    self._answer(repository.classifier(name + CANARY), twin, {twin.trial}, server, of=name)
            for name in replica.dropped - set(world.twins):
                self.need("a dropped classifier is not answered for", not self._answers_for(server, name), name)

    def version_at(self, url: str, name: str) -> int:
        """The version of the classifier ``name`` that the server at ``url`` answers from."""
        with TritonServer(url) as server:
            (answer,) = server.classify(ModelRepository(self.location).classifier(name).address, TEXTS[:1])
        return answer.head_version

    def diagnosis(self, world: World, code: int, found: list[dict[str, str]]) -> None:
        """``doctor`` must report which servers are down and what is behind on the others, and nothing else."""
        faults = {each["finding"] for each in found if each["state"] == "fault"}
        behind = []
        for replica in world.replicas:
            if not replica.up:
                if world.up:
                    told = any(each.startswith(f"no server answers at {replica.url},") for each in faults)
                    self.need("doctor names who is away", told, faults)
                continue
            mine = {each["what"] for each in _section(found, replica.url) if each["state"] == "fault"}
            states = {name: replica.agrees(name, twin) for name, twin in world.twins.items()}
            behind += [state for state in states.values() if state is not True]
            for name, state in states.items():
                named = bool({f"{name}, served", f"{name}{CANARY}, served"} & mine)
                told = f"{replica.url}, {name}: {mine}, {replica}"
                if state is not None:
                    self.need("doctor names what is behind, and nothing else", named is not state, told)
        away = len(world.up) < len(world.replicas)
        if None not in behind:
            self.need("doctor finds nothing else", code == int(bool(behind or away)), [code, *faults])

    def _answers_for(self, server: TritonServer, name: str) -> bool:
        if server.is_ready(name) or server.is_ready(name + CANARY):
            return True
        try:
            server.classify(f"intent_any/{name}", TEXTS[:1])
        except (ServerError, PatcherError):
            return False
        return True

    def _answer(self, classifier: Classifier, twin: Twin, may: set[int], server: TritonServer, of: str = "") -> None:
        name = of or classifier.name
        answers = server.classify(classifier.address, TEXTS)
        (number,) = {answer.head_version for answer in answers}
        self.need("the version that answers", number in may, f"{classifier.name}: {number}, not {may}")
        if number not in twin.versions:
            return  # pruned without contacting the server
        _, scores, logits, in_scope = self.expected(classifier, number)
        known = twin.versions[number].labels
        for row, answer in enumerate(answers):
            where = f"{classifier.name} {number}, {answer.text!r}: {answer}"
            off = np.abs(answer.logits - logits[row]) if len(answer.logits) == len(known) else np.array([np.inf])
            self.need(
                "logits are those of the file", bool((off < _CLOSE * (1 + np.abs(logits[row]).max())).all()), where
            )
            places = [known.index(label) for label in answer.labels]
            best = np.sort(answer.logits)[::-1][: len(places)]
            self.need("labels are those of the model, best first", bool((answer.logits[places] == best).all()), where)
            self.need("scores", bool(np.allclose(answer.scores, scores[row], atol=1e-3)), where)
            self.need("in_scope", abs((answer.in_scope or 0) - float(in_scope[row, 0])) < 1e-2, where)
        bits = b"".join(answer.logits.tobytes() for answer in answers)
        before = self._answers.setdefault((name, number), bits)
        self.need("a version answers the same bits whenever it serves", bits == before, f"{classifier.name} {number}")

    def history(self, twin: Twin, name: str, found: list[dict[str, Any]]) -> None:
        """Check a history: all versions in order, each after its parent, and the serving one marked."""
        numbers = [entry["version"] for entry in found]
        self.need("history has every version, in order", numbers == sorted(twin.versions), f"{name}: {numbers}")
        serving = [entry["version"] for entry in found if entry["serving"]]
        self.need("history marks the one that serves", serving == [twin.serving], f"{name}: {serving}")
        for entry in found:
            version = twin.versions[entry["version"]]
            self.need("history's labels", entry["labels"] == len(version.labels), f"{name}: {entry}")
            earlier = entry["parent"] is None or entry["parent"] < entry["version"]
            self.need("a parent comes first", earlier and entry["parent"] == version.parent, f"{name}: {entry}")

    def difference(self, twin: Twin, a: int, b: int, found: dict[str, Any]) -> None:
        """Check that a diff is consistent with the labels of both versions."""
        before, after = list(twin.versions[a].labels), list(twin.versions[b].labels)
        renamed = [tuple(pair) for pair in found["renamed"]]
        self.need("diff renames labels that were there", {old for old, _ in renamed} <= set(before), found)
        self.need("diff renames to labels that are there", {new for _, new in renamed} <= set(after), found)
        self.need("diff adds labels that are there", set(found["added"]) <= set(after), found)
        kept = len(before) - len(found["removed"])
        self.need("diff adds up", kept + len(found["added"]) == len(after), (found, before, after))
        self.need("diff's rows", found["same_rows"] + len(found["changed_rows"]) == kept, found)


def _section(found: list[dict[str, str]], url: str) -> list[dict[str, str]]:
    """Doctor's findings about one server: those that name it, or, with a single server, all after its own line."""
    suffix = f" at {url}"
    named = [{**each, "what": each["what"].removesuffix(suffix)} for each in found if each["what"].endswith(suffix)]
    if named:
        return named
    there = False
    mine = []
    for each in found:
        if each["what"] == "server":
            there = each["finding"].endswith(f" at {url}")
        elif there:
            mine.append(each)
    return mine
