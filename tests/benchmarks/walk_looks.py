"""The verbs of ``walk.py`` that inspect, measure, or repair."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from walk_drawing import KINDS, Draw, Drawing, Plan
from walk_model import Twin, Version

if TYPE_CHECKING:
    from walk_model import Rules, World

__all__ = ["Looks"]


class Looks(Drawing):
    """Each method draws one run of a verb that changes no label."""

    def labels(self, draw: Draw) -> Plan:
        """List the labels of a version."""
        twin, number = draw.twin, int(self.pick(draw.twin.versions))

        def check(rules: Rules, _: World, found: Any) -> None:
            rules.need("labels", tuple(found["labels"]) == twin.versions[number].labels, found)

        return Plan("labels", ["--version", str(number)], [], {0}, check=check)

    def history(self, draw: Draw) -> Plan:
        """List the versions."""
        twin, name = draw.twin, draw.name
        return Plan("history", [], [], {0}, check=lambda rules, _, found: rules.history(twin, name, found))

    def diff(self, draw: Draw) -> Plan:
        """Compare two versions."""
        twin = draw.twin
        a, b = (int(self.pick(twin.versions)) for _ in range(2))
        options = ["--eval", self.old_data(twin)] if self.maybe(0.5) else []
        codes = {0, 2} if options else {0}  # possibly neither version has any label of the file
        plan = Plan("diff", options, [str(a), str(b)], codes)
        plan.check = lambda rules, _, found: rules.difference(twin, a, b, found)
        return plan

    def evaluate(self, draw: Draw) -> Plan:
        """Measure the accuracy of the serving version on fresh sentences."""
        twin = draw.twin

        def check(rules: Rules, _: World, found: Any) -> None:
            fits = found["version"] == twin.serving and found["examples"] == 6 * len(twin.now.labels)
            rules.need("evaluate", fits and 0 <= found["accuracy"] <= 1, found)

        return Plan("evaluate", [], [self.old_data(twin)], {0}, check=check)

    def report(self, draw: Draw) -> Plan:
        """Write a report about a version."""
        number = int(self.pick(draw.twin.versions))
        options = ["--version", str(number), "--html", str(self.folder / "page.html")]
        options += ["--eval", self.old_data(draw.twin)] if self.maybe(0.5) else []
        return Plan("report", options, [], {0, 2} if "--eval" in options else {0})

    def classify(self, draw: Draw) -> Plan:
        """Classify a few texts."""
        texts, may = self.sentences(self.some(KINDS, 1, 3), 3), draw.answering
        codes = {0} if may else {0, 1} if draw.server else {1}

        def check(rules: Rules, _: World, found: Any) -> None:
            for answer in found:
                rules.need("classify's version", not may or answer["head_version"] in may, found)

        return Plan("classify", [], texts, codes, check=check)

    def loadtest(self, draw: Draw) -> Plan:
        """Measure two loads, briefly."""
        file, texts = self.old_data(draw.twin), str(self.folder / "load.csv")
        options = ["--concurrency", "1:2:1", "--window", "0.2", "--input", file, "--csv", texts]
        codes = {0} if draw.answering else {0, 1} if draw.server else {1}

        def check(rules: Rules, _: World, found: Any) -> None:
            fine = all(each["throughput"] > 0 and each["failures"] == 0 for each in found)
            rules.need("loadtest", fine and len(found) == 2, found)

        return Plan("loadtest", options, [], codes, check=check)

    # -- what mends -------------------------------------------------------------------------------------------------

    def doctor(self, draw: Draw) -> Plan:
        """Repair whatever needs it; a server that is down is a fault."""
        codes = {1} if draw.away else {0}
        return Plan("doctor", ["--repair"], [], codes, lambda world: world.sync(draw.up), done=frozenset(codes))

    def sync(self, draw: Draw) -> Plan:
        """Make every server serve every classifier as pinned."""
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
                else:  # it may have caught up by unloading a dropped one
                    rules.need("sync tells who agrees", state in ("agreed", "caught up"), each)
            told = {(each["classifier"], each["url"]) for each in found}
            rules.need("sync tells of every classifier and server", told == set(agreed), found)

        codes = {0} if draw.server and not draw.away else {1}
        plan = Plan("sync", [], [], codes, lambda world: world.sync(draw.up), done=frozenset({0, 1}))
        plan.check = check if draw.server else None
        return plan

    def upgrade(self, _: Draw) -> Plan:
        """Upgrade, which must find nothing to change."""
        options = [[], ["--dry-run"], ["--force"], ["--backbone", "intent"]][int(self.rng.integers(4))]
        check = lambda rules, _, found: rules.need("upgrade", found["changed"] == [], found)  # noqa: E731
        return Plan("upgrade", options, [], {0}, check=check)

    # -- with a checkpoint ------------------------------------------------------------------------------------------

    def export(self, draw: Draw) -> Plan:
        """Export the checkpoint into the same repository."""
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
        """Write the serving version back into its checkpoint; only an exported classifier has one."""
        self.seeds += 1
        codes = {0, 2} if draw.name == "exported" else {1, 2}  # the memory may keep nothing of a patched-in label
        return Plan("to-transformers", [], [str(self.folder / f"checkpoint-{self.seeds}")], codes)

    def tune(self, draw: Draw) -> Plan:
        """Tune the settings, which servers adopt when they restart."""
        file = self.old_data(draw.twin)
        options = ["--input", file, "--seconds", "5", "--concurrency", "2", *(["--dry-run"] if self.maybe(0.5) else [])]
        return Plan("tune", options, [], {0})
