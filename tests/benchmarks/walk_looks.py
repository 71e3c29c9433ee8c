"""The verbs of ``walk.py`` that look, measure, or mend what is behind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from walk_drawing import KINDS, Draw, Drawing, Plan
from walk_model import Twin, Version

if TYPE_CHECKING:
    from walk_model import Rules, World

__all__ = ["Looks"]


class Looks(Drawing):
    """Each draws one run of a verb that changes no label."""

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
        texts, may = self.sentences(self.some(KINDS, 1, 3), 3), draw.answering
        codes = {0} if may else {0, 1} if draw.server else {1}

        def check(rules: Rules, _: World, found: Any) -> None:
            for answer in found:
                rules.need("classify's version", not may or answer["head_version"] in may, found)

        return Plan("classify", [], texts, codes, check=check)

    def loadtest(self, draw: Draw) -> Plan:
        """Two loads, for moments."""
        file, texts = self.old_data(draw.twin), str(self.folder / "load.csv")
        options = ["--concurrency", "1:2:1", "--window", "0.2", "--input", file, "--csv", texts]
        codes = {0} if draw.answering else {0, 1} if draw.server else {1}

        def check(rules: Rules, _: World, found: Any) -> None:
            fine = all(each["throughput"] > 0 and each["failures"] == 0 for each in found)
            rules.need("loadtest", fine and len(found) == 2, found)

        return Plan("loadtest", options, [], codes, check=check)

    # -- what mends -------------------------------------------------------------------------------------------------

    def doctor(self, draw: Draw) -> Plan:
        """Repairs what there is to repair; a server that is away is a fault."""
        codes = {1} if draw.away else {0}
        return Plan("doctor", ["--repair"], [], codes, lambda world: world.sync(draw.up), done=frozenset(codes))

    def sync(self, draw: Draw) -> Plan:
        """Every server has every classifier as pinned."""
        replicas = [draw.world.replicas[place] for place in draw.named]
        agreed = {
            (name, replica.url): replica.agrees(name, twin) if replica.up else None
            for name, twin in draw.world.twins.items()
            for replica in replicas
        }
        gone = {replica.url for replica in replicas if not replica.up}

        def check(rules: Rules, _: World, found: Any) -> None:
            for each in found:
                behind, state = agreed[each["classifier"], each["url"]] is False, each["state"]
                if each["url"] in gone:
                    rules.need("sync tells who is away", state == "away", each)
                elif behind:
                    rules.need("sync tells who was behind", state == "caught up", each)
                else:  # it may have had what is left of a dropped one
                    rules.need("sync tells who agrees", state in ("agreed", "caught up"), each)
            told = {(each["classifier"], each["url"]) for each in found}
            rules.need("sync tells of every classifier and server", told == set(agreed), found)

        codes = {0} if draw.server and not draw.away else {1}
        plan = Plan("sync", [], [], codes, lambda world: world.sync(draw.up), done=frozenset({0, 1}))
        plan.check = check if draw.server else None
        return plan

    def upgrade(self, _: Draw) -> Plan:
        """Nothing is of an earlier version here."""
        options = [[], ["--dry-run"], ["--force"], ["--backbone", "intent"]][int(self.rng.integers(4))]
        check = lambda rules, _, found: rules.need("upgrade", found["changed"] == [], found)  # noqa: E731
        return Plan("upgrade", options, [], {0}, check=check)

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
        options = ["--input", file, "--seconds", "5", "--concurrency", "2", *(["--dry-run"] if self.maybe(0.5) else [])]
        return Plan("tune", options, [], {0})
