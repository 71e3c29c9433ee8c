"""The verbs of ``walk.py`` that change something: their command lines, and what they do to the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from walk_drawing import KINDS, NO_LABELS, Draw, Drawing, Plan
from walk_model import Twin, Version

from patcher import ModelRepository
from patcher.examples import plain_words

if TYPE_CHECKING:
    from collections.abc import Mapping

    from walk_model import World

__all__ = ["Changes"]

_FIT = ("ridge", "lda", "anchored")


class Changes(Drawing):
    """Each method draws one run of a verb that changes labels, versions or classifiers."""

    def loading(self, draw: Draw, plan: Plan) -> tuple[int, ...]:
        """Draw whether the verb contacts servers, as most verbs can; returns the places of those that it tells."""
        if self.maybe(0.1 if draw.server else 0.6):
            plan.options.append("--no-load")
            return ()
        if not draw.server:
            plan.codes = {1} | ({2} & plan.codes)
        return draw.up

    def next_version(self, draw: Draw, plan: Plan, version: Version, *, keep: int | None = None) -> Plan:
        """Complete the plan of a verb that publishes ``version`` and has it served."""
        told = self.loading(draw, plan)
        name = draw.name
        self.used.update(version.kinds)

        def change(world: World) -> None:
            twin = world.twins[name]
            twin.add(version)
            if keep is not None:
                _prune(twin, keep)
            world.tell(name, told)

        plan.change = change
        return plan

    def add_label(self, draw: Draw) -> Plan:  # noqa: C901  each option is a draw
        """Add labels from a few sentences each."""
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
            for place in draw.up:
                world.replicas[place].trying[name] = twin.trial

        plan.change = change
        return plan

    def rename_label(self, draw: Draw) -> Plan:
        """Rename a label, to a name that may be taken, may once have been another label's, or may be invalid."""
        twin, now = draw.twin, draw.twin.now
        old = str(self.pick(now.labels)) if self.maybe(0.93) else "nowhere"
        new = self.new_name(draw) if self.maybe(0.9) else str(self.pick([*now.labels, *NO_LABELS]))
        wrong = old not in now.kinds or new in now.kinds or self.no_label(twin, new)
        kinds = {new if label == old else label: kinds for label, kinds in now.kinds.items()}
        counts = now.counts and {new if label == old else label: count for label, count in now.counts.items()}
        plan = Plan("rename-label", [], [old, new], {2} if wrong else {0})
        if "\0" in new:  # no process can be started with a null character
            plan.words[1] = ""
        return self.next_version(draw, plan, Version(kinds, twin.serving, counts, "rename"))

    def remove_label(self, draw: Draw) -> Plan:
        """Remove a label."""
        twin, now = draw.twin, draw.twin.now
        label = str(self.pick(now.labels)) if self.maybe(0.95) else "nowhere"
        wrong = label not in now.kinds or len(now.kinds) <= 2
        kinds = {each: kinds for each, kinds in now.kinds.items() if each != label}
        counts = {each: count for each, count in (now.counts or {}).items() if each != label} or None
        plan = Plan("remove-label", [], [label], {2} if wrong else {0})
        return self.next_version(draw, plan, Version(kinds, twin.serving, counts, "remove"))

    def merge_labels(self, draw: Draw) -> Plan:
        """Merge labels into one of them, into a new one, or into another existing one."""
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
        """Build the memory anew, for all labels or some."""
        twin, now = draw.twin, draw.twin.now
        labels = list(now.labels) if self.maybe(0.5) else self.some(now.labels, 1, len(now.labels))
        count = int(self.pick([1, 3, 25, 40]))
        groups = {label: self.sentences(now.kinds[label], count) for label in labels}
        counts = {**(now.counts or {}), **dict.fromkeys(groups, count)}
        plan = Plan("remember", ["--data", self.file(groups)], [], {0})
        plan.options += ["--memory", "statistics"] if self.maybe(0.15) else []
        return self.next_version(draw, plan, Version(now.kinds, twin.serving, counts, "remember"))

    def rollback(self, draw: Draw) -> Plan:
        """Roll back to the parent, or switch to any version."""
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
            world.tell(name, told)

        plan.change = change
        return plan

    def prune(self, draw: Draw) -> Plan:
        """Delete old versions."""
        keep, name = int(self.rng.integers(1, 8)), draw.name
        return Plan("prune", ["--keep", str(keep)], [], {0}, lambda world: _prune(world.twins[name], keep))

    def canary(self, draw: Draw) -> Plan:
        """Begin, show, compare, promote or discard a trial."""
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
                world.tell(name, draw.up)
                world.end_trial(name, draw.up)

            plan.change = promoted
        elif what == "discard":
            held = twin.trial or any(name in draw.world.replicas[place].trying for place in draw.up)
            plan = Plan("canary", ["--discard"], [], {0} if held else {2})

            def discarded(world: World) -> None:
                world.twins[name].trial = None
                world.end_trial(name, draw.up)

            plan.change = discarded
        elif what == "begin":
            number = int(self.pick([*twin.versions, twin.highest + 1]))
            fine = number in twin.versions and number != twin.serving and twin.trial in (None, number)
            plan = Plan("canary", ["--version", str(number), "--percent", "30"], [], {0} if fine else {2})
            plan.codes = {2} if twin.in_store else plan.codes

            def begun(world: World) -> None:
                world.twins[name].trial = number
                for place in draw.up:
                    world.replicas[place].trying[name] = number

            plan.change = begun
        else:
            plan = Plan("canary", [] if what == "show" else ["--eval", self.old_data(twin)], [], {0})
            replicas = [draw.world.replicas[place] for place in draw.up]
            # A server without the trial has no statistics of it.
            counted = replicas and all(name in each.trying and name in each.answering for each in replicas)
            if twin.trial and not counted:
                plan.codes = {1}
            return plan
        if not draw.server:
            plan.codes = {1, 2}
            plan.change = None
        return plan

    def new_classifier(self, draw: Draw) -> Plan:
        """Create a classifier, in the head store or with a head model of its own."""
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
            for replica in world.replicas:  # forget an earlier classifier of this name
                replica.answering.pop(name, None)
                replica.dropped.discard(name)
            world.tell(name, told)

        plan.change = change
        return plan

    def drop_classifier(self, draw: Draw) -> Plan:
        """Drop a classifier, or what servers still hold of a dropped one; the initial and the exported ones stay."""
        left = draw.world.left(draw.up)
        names = {*draw.world.twins, *left, "nothing"} - {"intent", "tags", "exported"}
        name = str(self.pick(sorted(names)))
        there = draw.world.twins.get(name)
        plan = Plan("drop-classifier", ["--yes"], [name], {0} if there and not there.trial else {2})
        told = self.loading(draw, plan)
        if name in left and told:  # a head store may have noticed already that it is gone
            plan.codes = {0, 2}
            plan.done = frozenset({0, 2})
        if told and draw.away:  # it would still be served there
            plan.codes = {1}

        def change(world: World) -> None:
            world.twins.pop(name, None)
            world.drop(name, told)

        plan.change = change
        return plan


def _grown(counts: Mapping[str, int] | None, more: Mapping[str, int]) -> dict[str, int] | None:
    return None if counts is None else {**counts, **more}


def _prune(twin: Twin, keep: int) -> None:
    spared = {twin.serving, twin.now.parent, twin.trial, *sorted(twin.versions)[-keep:]}
    for number in set(twin.versions) - spared:
        del twin.versions[number]
