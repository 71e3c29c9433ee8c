"""The verbs that ``walk.py`` draws: what stands on the command line, the codes it may end with, what the model does."""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import tiny
from walk_model import Twin, Version

from patcher import ModelRepository
from patcher.examples import plain_words

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    import numpy as np
    from walk_model import Rules, World

__all__ = ["Plan", "Verbs"]

KINDS = (*tiny.OLD, *tiny.NEW)
ODD = [
    "null", "LABEL_0", "2024", "NaN", "-dash", "--help", "a, b", 'say "x"', "naïve Bayes", "ピザ", "é" * 250, "x" * 500,
    "😀", "'", "True", "a|b", "../../etc", "{json: 1}", "label", "text", "O'Neil; DROP", "0", "1e3", "none of these",
]  # fmt: skip
NO_LABELS = ["", " ", " padded", "line\nbreak", "nul\0", "y" * 600]
_FIT = ("ridge", "lda", "anchored")


@dataclass
class Plan:
    """A verb to run: its options, its words (which follow ``--``), the codes that it may end with.

    ``change`` has the model do what the verb does where it ends with 0, ``check`` looks at its document.
    """

    verb: str
    options: list[str]
    words: list[str]
    codes: set[int]
    change: Callable[[World], None] | None = None
    check: Callable[[Rules, World, Any], None] | None = None


@dataclass
class Draw:
    """What a verb is drawn for."""

    world: World
    name: str
    server: bool

    @property
    def twin(self) -> Twin:
        """The model of the classifier."""
        return self.world.twins[self.name]


@dataclass
class Verbs:
    """Draws verbs; their files lie in ``folder``."""

    rng: np.random.Generator
    folder: Path
    location: Any
    in_folder: bool
    checkpoint: Path | None = None
    seeds: int = 100
    used: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Every label that was ever tried, and what it stood for last."""

    # -- drawing ----------------------------------------------------------------------------------------------------

    def draw(self, world: World, *, server: bool, changing: bool = False, classifier: str | None = None) -> Plan:
        """The next verb: only one that changes something, or only on one classifier, where that is asked for."""
        name = classifier or str(self.rng.choice(sorted(world.twins)))
        chances = dict(_CHANGES if changing else {**_CHANGES, **_LOOKS})
        if classifier:
            chances.pop("new_classifier")
        if self.checkpoint and not changing:
            chances |= {"export": 1, "to_transformers": 1, "tune": 0.3}
        names = list(chances)
        total = sum(chances.values())
        verb = str(self.rng.choice(names, p=[chances[each] / total for each in names]))
        plan: Plan = getattr(self, verb)(Draw(world, name, server))
        if plan.verb not in ("new-classifier", "drop-classifier", "sync", "doctor", "export"):
            plan.options += ["--classifier", name]
        return plan

    def maybe(self, chance: float) -> bool:
        """True now and then."""
        return bool(self.rng.random() < chance)

    def pick(self, values: Iterable[Any]) -> Any:
        """One of them."""
        values = list(values)
        return values[int(self.rng.integers(len(values)))]

    def some(self, values: Iterable[Any], least: int, most: int) -> list[Any]:
        """A few of them, in any order."""
        values = list(values)
        count = min(len(values), int(self.rng.integers(least, most + 1)))
        return [values[i] for i in self.rng.permutation(len(values))[:count]]

    def kinds_of(self, label: str) -> tuple[str, ...]:
        """What a label stood for when it was used last."""
        return self.used[label]

    def sentences(self, kinds: Iterable[str], count: int) -> list[str]:
        """Sentences of a label, different ones each time."""
        self.seeds += 1
        kinds = list(kinds)
        each = [tiny.sentences(kind, count, self.seeds) for kind in kinds]
        return [each[i % len(kinds)][i] for i in range(count)]

    def file(self, groups: Mapping[str, Iterable[str]]) -> str:
        """A labelled file."""
        self.seeds += 1
        path = self.folder / f"{self.seeds}.csv"
        rows = [(text, label) for label, texts in groups.items() for text in texts]
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "label"), *rows])
        return str(path)

    def old_data(self, twin: Twin, count: int = 6, **more: Any) -> str:
        """Labelled texts of the labels that serve."""
        known = {label: self.sentences(kinds, count) for label, kinds in twin.now.kinds.items()}
        return self.file(known | more)

    def new_name(self, draw: Draw) -> str:
        """A name for a label: its plain one, an odd one, one that was used before."""
        chosen = self.rng.random()
        if chosen < 0.35 and self.used:
            return str(self.pick(self.used))
        return str(self.pick(ODD)) if chosen < 0.7 else f"label_{self.seeds}_{draw.name}"

    def no_label(self, twin: Twin, label: str) -> bool:
        """Whether no label can have this name."""
        fine = label.strip() == label and label and label.isprintable() and len(label.encode()) <= 512
        return not fine or (not twin.exclusive and "|" in label)

    # -- what changes -----------------------------------------------------------------------------------------------

    def loading(self, draw: Draw, plan: Plan) -> bool:
        """With a server or without, as most verbs take it; whether one is told."""
        if self.maybe(0.1 if draw.server else 0.6):
            plan.options.append("--no-load")
            return False
        if not draw.server:
            plan.codes = {1} | ({2} & plan.codes)
        return draw.server

    def next_version(self, draw: Draw, plan: Plan, version: Version, *, keep: int | None = None) -> Plan:
        """A verb that publishes and serves a version."""
        told = self.loading(draw, plan)
        name = draw.name
        self.used.update(version.kinds)

        def change(world: World) -> None:
            twin = world.twins[name]
            twin.add(version)
            if keep is not None:
                _prune(twin, keep)
            _told(twin, told=told)

        plan.change = change
        return plan

    def add_label(self, draw: Draw) -> Plan:  # noqa: C901  each option is a draw
        """New labels, from a few sentences each."""
        twin, now = draw.twin, draw.twin.now
        taken = {kind for kinds in now.kinds.values() for kind in kinds}
        free = [kind for kind in KINDS if kind not in taken] or list(KINDS)
        kinds = self.some(free, 1, 3 if self.maybe(0.25) else 1)
        names = [kind if self.maybe(0.5) else self.new_name(draw) for kind in kinds]
        if len(set(names)) < len(names):
            names = [f"{name} {i}" for i, name in enumerate(names)]
        count = int(self.pick([1, 2, 5, 10, 10, 10, 30]))
        groups = {name: self.sentences([kind], count) for name, kind in zip(names, kinds, strict=True)}
        if self.maybe(0.2):
            groups = {name: [*texts, texts[0].upper() + " "] for name, texts in groups.items()}
        known = [name for name in names if name in now.kinds]
        wrong = any(self.no_label(twin, name) for name in names)
        force = self.maybe(0.7)
        plan = Plan("add-label", [], [], {0} if force else {0, 3})
        if len(names) == 1 and self.maybe(0.6):
            plan.words = names
            if self.maybe(0.5):
                plan.options += [word for text in groups[names[0]] for word in ("--text", text)]
            else:
                plan.options += ["--examples", self.file(groups)]
                wrong = wrong or (not twin.exclusive and "|" in names[0])
            refused = bool(known)
        else:
            plan.options += ["--examples", self.file(groups)]
            refused = len(known) == len(names)
        method = str(self.pick(["auto", "auto", "auto", "offset-logistic", *_FIT]))
        plan.options += ["--method", method, *(["--force"] if force else [])]
        if method in _FIT:
            plan.codes |= {2}
        if self.maybe(0.3) or method == "anchored":
            plan.options += ["--replay", self.old_data(twin)]
        if self.maybe(0.3):
            new = {
                name: self.sentences([kind], 3) for name, kind in zip(names, kinds, strict=True) if name not in known
            }
            plan.options += ["--eval", self.old_data(twin, **new)]
            plan.codes |= {2} if wrong or refused else set()
        if wrong or refused:
            plan.codes = {2}
        fresh = {name: (kind,) for name, kind in zip(names, kinds, strict=True) if name not in known}
        counts = _grown(now.counts, {name: len({*map(plain_words, groups[name])}) for name in fresh})
        version = Version({**now.kinds, **fresh}, twin.serving, counts, method)
        self.used.update(version.kinds)
        if self.maybe(0.15):
            plan.options.append("--dry-run")
            return plan
        if draw.server and self.maybe(0.2):
            return self._tried(draw, plan, version)
        keep = int(self.rng.integers(1, 6)) if self.maybe(0.1) else None
        plan.options += ["--keep", str(keep)] if keep else []
        return self.next_version(draw, plan, version, keep=keep)

    def _tried(self, draw: Draw, plan: Plan, version: Version) -> Plan:
        plan.options += ["--canary", "20"]
        name = draw.name
        if draw.twin.in_store or draw.twin.trial:
            plan.codes = {2}

        def change(world: World) -> None:
            twin = world.twins[name]
            twin.trial = twin.add(version, serve=False)

        plan.change = change
        return plan

    def rename_label(self, draw: Draw) -> Plan:
        """Another name, which may be taken, have been another label's, or be none."""
        twin, now = draw.twin, draw.twin.now
        old = str(self.pick(now.labels)) if self.maybe(0.93) else "nowhere"
        new = self.new_name(draw) if self.maybe(0.9) else str(self.pick([*now.labels, *NO_LABELS]))
        wrong = old not in now.kinds or new in now.kinds or self.no_label(twin, new)
        kinds = {new if label == old else label: kinds for label, kinds in now.kinds.items()}
        counts = now.counts and {new if label == old else label: count for label, count in now.counts.items()}
        plan = Plan("rename-label", [], [old, new], {2} if wrong else {0})
        if "\0" in new:  # no process can be started with it
            plan.words[1] = ""
        return self.next_version(draw, plan, Version(kinds, twin.serving, counts, "rename"))

    def remove_label(self, draw: Draw) -> Plan:
        """One label less."""
        twin, now = draw.twin, draw.twin.now
        label = str(self.pick(now.labels)) if self.maybe(0.95) else "nowhere"
        wrong = label not in now.kinds or len(now.kinds) <= 2
        kinds = {each: kinds for each, kinds in now.kinds.items() if each != label}
        counts = {each: count for each, count in (now.counts or {}).items() if each != label} or None
        plan = Plan("remove-label", [], [label], {2} if wrong else {0})
        return self.next_version(draw, plan, Version(kinds, twin.serving, counts, "remove"))

    def merge_labels(self, draw: Draw) -> Plan:
        """Some labels into one of them, into a new one, or into another that is there already."""
        twin, now = draw.twin, draw.twin.now
        labels = self.some(now.labels, 2, 3) if self.maybe(0.9) else list(now.labels)
        into = str(self.pick([labels[0], labels[-1], self.new_name(draw), *now.labels]))
        memory = ModelRepository(self.location).classifier(draw.name).memory()
        held = {label: 0 if memory is None else len(memory.features_of(label)) for label in labels}
        wrong = (into in now.kinds and into not in labels) or self.no_label(twin, into) or not all(held.values())
        wrong = wrong or len(labels) < 2 or len(labels) == len(now.kinds)
        joined = tuple(dict.fromkeys(kind for label in labels for kind in now.kinds[label]))
        kinds = {label: kinds for label, kinds in now.kinds.items() if label not in labels} | {into: joined}
        counts = now.counts and {label: count for label, count in now.counts.items() if label not in labels}
        if counts is not None and now.counts:
            counts[into] = sum(now.counts.get(label, 0) for label in labels)
        force = self.maybe(0.7)
        plan = Plan("merge-labels", ["--into=" + into], labels, {2} if wrong else {0} if force else {0, 3})
        plan.options += ["--force"] if force else []
        return self.next_version(draw, plan, Version(kinds, twin.serving, counts, "merge"))

    def remember(self, draw: Draw) -> Plan:
        """The memory anew, for all labels or some."""
        twin, now = draw.twin, draw.twin.now
        labels = list(now.labels) if self.maybe(0.5) else self.some(now.labels, 1, len(now.labels))
        count = int(self.pick([1, 3, 25, 40]))
        groups = {label: self.sentences(now.kinds[label], count) for label in labels}
        counts = {**(now.counts or {}), **dict.fromkeys(groups, count)}
        plan = Plan("remember", ["--data", self.file(groups)], [], {0})
        plan.options += ["--memory", "statistics"] if self.maybe(0.15) else []
        return self.next_version(draw, plan, Version(now.kinds, twin.serving, counts, "remember"))

    def rollback(self, draw: Draw) -> Plan:
        """To the version before, or to any."""
        twin, name = draw.twin, draw.name
        to: int | None = None
        plan = Plan("rollback", [], [], {0})
        if self.maybe(0.5):
            to = int(self.pick([*twin.versions, *range(1, twin.highest + 2)]))
            plan.options += ["--to", str(to)]
        else:
            to = twin.now.parent
        if to is None or to not in twin.versions:
            plan.codes = {2}
        told = self.loading(draw, plan)

        def change(world: World) -> None:
            assert to is not None
            world.twins[name].serving = to
            _told(world.twins[name], told=told)

        plan.change = change
        return plan

    def prune(self, draw: Draw) -> Plan:
        """Old versions away."""
        keep, name = int(self.rng.integers(1, 8)), draw.name
        return Plan("prune", ["--keep", str(keep)], [], {0}, lambda world: _prune(world.twins[name], keep))

    def canary(self, draw: Draw) -> Plan:
        """A trial: begun, looked at, promoted, discarded."""
        twin, name = draw.twin, draw.name
        what = str(self.pick(["begin", "begin", "show", "compare", "promote", "promote", "discard"]))
        if what == "promote":
            stale = twin.trial and not (
                twin.descends(twin.trial, twin.serving) or twin.descends(twin.serving, twin.trial)
            )
            plan = Plan("canary", ["--promote"], [], {2} if stale or not twin.trial else {0})

            def promoted(world: World) -> None:
                changed = world.twins[name]
                changed.serving, changed.trial = changed.trial or 0, None
                _told(changed, told=True)

            plan.change = promoted
        elif what == "discard":
            plan = Plan("canary", ["--discard"], [], {0} if twin.trial else {2})
            plan.change = lambda world: setattr(world.twins[name], "trial", None)
        elif what == "begin":
            number = int(self.pick([*twin.versions, twin.highest + 1]))
            fine = number in twin.versions and number != twin.serving and twin.trial in (None, number)
            plan = Plan("canary", ["--version", str(number), "--percent", "30"], [], {0} if fine else {2})
            plan.codes = {2} if twin.in_store else plan.codes
            plan.change = lambda world: setattr(world.twins[name], "trial", number)
        else:
            plan = Plan("canary", [] if what == "show" else ["--eval", self.old_data(twin)], [], {0})
            if not draw.server:
                plan.codes = {1} if twin.trial else {0}
            return plan
        if not draw.server:
            plan.codes = {1, 2}
            plan.change = None
        return plan

    def new_classifier(self, draw: Draw) -> Plan:
        """One more, in the head store or with a model of its own."""
        name = str(self.pick(["topics", "mail", "forum", "voice", *draw.world.twins]))
        kinds = {kind if self.maybe(0.7) else self.new_name(draw): (kind,) for kind in self.some(KINDS, 2, 5)}
        groups = {label: self.sentences(kind, int(self.pick([3, 10, 25]))) for label, kind in kinds.items()}
        twin = Twin(exclusive=True, in_store=self.maybe(0.5), versions={}, reach={1: None})
        wrong = name in draw.world.twins or len(kinds) < 2 or any(self.no_label(twin, label) for label in kinds)
        force = self.maybe(0.7)
        plan = Plan("new-classifier", ["--train", self.file(groups), "--backbone", "intent"], [name], {0})
        plan.codes = {0} if force else {0, 3}
        plan.options += [*(["--in-store"] if twin.in_store else []), *(["--force"] if force else [])]
        counts = {label: len({*map(plain_words, texts)}) for label, texts in groups.items()}
        twin.versions[1] = Version(kinds, None, counts, "softmax")
        self.used.update(kinds)
        if wrong or (twin.in_store and not self.in_folder):
            plan.codes = {2}
        told = self.loading(draw, plan)

        def change(world: World) -> None:
            world.twins[name] = twin
            world.dropped.discard(name)
            _told(twin, told=told)

        plan.change = change
        return plan

    def drop_classifier(self, draw: Draw) -> Plan:
        """One less; those of the beginning stay."""
        name = str(self.pick([*draw.world.twins, "nothing"]))
        while name in ("intent", "tags", "exported"):
            name = str(self.pick([*draw.world.twins, "nothing"]))
        there = draw.world.twins.get(name)
        plan = Plan("drop-classifier", ["--yes"], [name], {0} if there and not there.trial else {2})
        told = self.loading(draw, plan)

        def change(world: World) -> None:
            del world.twins[name]
            if told:
                world.dropped.add(name)

        plan.change = change
        return plan

    # -- what looks -------------------------------------------------------------------------------------------------

    def labels(self, draw: Draw) -> Plan:
        """The labels of a version."""
        twin, number = draw.twin, int(self.pick(draw.twin.versions))

        def check(rules: Rules, _: World, found: Any) -> None:
            rules.need("labels", tuple(found["labels"]) == twin.versions[number].labels, found)

        return Plan("labels", ["--version", str(number)], [], {0}, check=check)

    def history(self, draw: Draw) -> Plan:
        """The lineage."""
        twin, name = draw.twin, draw.name
        return Plan("history", [], [], {0}, check=lambda rules, _, found: rules.history(twin, name, found))

    def diff(self, draw: Draw) -> Plan:
        """Two versions."""
        twin = draw.twin
        a, b = (int(self.pick(twin.versions)) for _ in range(2))
        options = ["--eval", self.old_data(twin)] if self.maybe(0.5) else []
        codes = {0, 2} if options else {0}  # neither version need have any label of the file
        plan = Plan("diff", options, [str(a), str(b)], codes)
        plan.check = lambda rules, _, found: rules.difference(twin, a, b, found)
        return plan

    def evaluate(self, draw: Draw) -> Plan:
        """How right the serving version is on fresh sentences."""
        twin = draw.twin

        def check(rules: Rules, _: World, found: Any) -> None:
            fits = found["version"] == twin.serving and found["examples"] == 6 * len(twin.now.labels)
            rules.need("evaluate", fits and 0 <= found["accuracy"] <= 1, found)

        return Plan("evaluate", [], [self.old_data(twin)], {0}, check=check)

    def report(self, draw: Draw) -> Plan:
        """A page about a version."""
        number = int(self.pick(draw.twin.versions))
        options = ["--version", str(number), "--html", str(self.folder / "page.html")]
        options += ["--eval", self.old_data(draw.twin)] if self.maybe(0.5) else []
        return Plan("report", options, [], {0, 2} if "--eval" in options else {0})

    def classify(self, draw: Draw) -> Plan:
        """What is answered to a few texts."""
        twin = draw.twin
        texts = self.sentences(self.some(KINDS, 1, 3), 3)
        codes = {0} if draw.server and twin.answering else {1} if not draw.server else {0, 1}

        def check(rules: Rules, _: World, found: Any) -> None:
            for answer in found:
                rules.need("classify's version", not twin.answering or answer["head_version"] in twin.answering, found)

        return Plan("classify", [], texts, codes, check=check)

    def doctor(self, draw: Draw) -> Plan:
        """Repairs, where something is to be repaired."""

        def change(world: World) -> None:
            for twin in world.twins.values():
                _told(twin, told=draw.server)

        return Plan("doctor", ["--repair"], [], {0}, change)

    def sync(self, draw: Draw) -> Plan:
        """Every server has every classifier as pinned."""

        def change(world: World) -> None:
            for twin in world.twins.values():
                _told(twin, told=True)

        return Plan("sync", [], [], {0} if draw.server else {1}, change)

    def upgrade(self, _: Draw) -> Plan:
        """Nothing is of an earlier version here."""
        check = lambda rules, _, found: rules.need("upgrade", found["changed"] == [], found)  # noqa: E731
        return Plan("upgrade", [], [], {0}, check=check)

    # -- with a checkpoint ------------------------------------------------------------------------------------------

    def export(self, draw: Draw) -> Plan:
        """The checkpoint, into the same repository."""
        import checkpoints

        there = "exported" in draw.world.twins
        train = self.file(
            {label: checkpoints.SENTENCES[2 * i : 2 * i + 2] for i, label in enumerate(checkpoints.LABELS)}
        )
        options = ["--name", "exported", "--train", train]
        in_store = self.maybe(0.5) and self.in_folder
        options += ["--in-store"] if in_store else []
        kinds = {label: (KINDS[i],) for i, label in enumerate(checkpoints.LABELS)}

        def change(world: World) -> None:
            version = Version(kinds, None, dict.fromkeys(kinds, 2), "export")
            world.twins["exported"] = Twin(exclusive=True, in_store=in_store, versions={1: version}, reach={1: None})

        return Plan("export", options, [str(self.checkpoint)], {2} if there else {0}, change)

    def to_transformers(self, draw: Draw) -> Plan:
        """A checkpoint of what serves; only what was exported has one."""
        self.seeds += 1
        codes = {0, 2} if draw.name == "exported" else {1, 2}  # rows of an early label may have nothing remembered
        return Plan("to-transformers", [], [str(self.folder / f"checkpoint-{self.seeds}")], codes)

    def tune(self, draw: Draw) -> Plan:
        """Other settings, which a server that is started again takes up."""
        file = self.old_data(draw.twin)
        return Plan("tune", ["--input", file, "--seconds", "5", "--concurrency", "2"], [], {0})


_CHANGES = {
    "add_label": 20, "rename_label": 8, "remove_label": 8, "merge_labels": 5, "remember": 3, "rollback": 12, "prune": 2,
    "canary": 10, "new_classifier": 5, "drop_classifier": 3,
}  # fmt: skip
_LOOKS = {
    "labels": 2, "history": 4, "diff": 4, "evaluate": 3, "report": 2, "classify": 3, "doctor": 3, "sync": 4,
    "upgrade": 1,
}  # fmt: skip


def _told(twin: Twin, *, told: bool) -> None:
    """A server was told of what is pinned, or not."""
    if told:
        twin.answering = {twin.serving}
    elif twin.answering and twin.in_store:
        twin.answering |= {twin.serving}


def _grown(counts: Mapping[str, int] | None, more: Mapping[str, int]) -> dict[str, int] | None:
    return None if counts is None else {**counts, **more}


def _prune(twin: Twin, keep: int) -> None:
    spared = {twin.serving, twin.now.parent, twin.trial, *sorted(twin.versions)[-keep:]}
    for number in set(twin.versions) - spared:
        del twin.versions[number]
