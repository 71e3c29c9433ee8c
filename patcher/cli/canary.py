"""``patcher canary``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from patcher import audit
from patcher.cli.completion import complete_version
from patcher.cli.options import SHARE, CommonOptions, common_options, eval_option, no_load_option
from patcher.cli.output import changed_answers, table
from patcher.cli.switching import tell_switch
from patcher.cli.values import VERSION
from patcher.errors import PatcherError

if TYPE_CHECKING:
    from pathlib import Path

    from patcher.canary import Canary
    from patcher.classifier import Classifier
    from patcher.difference import Difference
    from patcher.examples import Examples
    from patcher.triton.client import TritonServer


@click.command("canary")
@click.option("--version", type=VERSION, shell_complete=complete_version, help="The version to try.")
@click.option("--percent", "share", type=SHARE, help="Percentage of request keys to send to it.")
@click.option("--promote", is_flag=True, help="Make the trial version serve all requests and end the trial.")
@click.option("--discard", is_flag=True, help="End the trial; the version stays on disk.")
@eval_option("Labelled file to compare both versions on.")
@no_load_option("Change the repository only; a server picks the change up when it restarts.")
@common_options("classifier", "server", "control", "rollout")
def canary_command(
    version: int | None,
    share: float | None,
    promote: bool,
    discard: bool,
    evaluation: Path | None,
    no_load: bool,
    options: CommonOptions,
) -> None:
    """Try a version on a share of the requests; without options, compare it with the one that serves.

    The version gets its own ensemble, NAME_canary, on the same backbone. Clients that use patcher.SplitClient send it
    that share of their keys, always the same ones; all other clients are unaffected.

    \b
    patcher canary --version 7 --percent 10
    patcher canary --percent 20
    patcher canary --eval held-out.csv
    patcher canary --promote
    """
    from patcher import canary
    from patcher.examples_file import read_examples
    from patcher.rollout import overtaken

    classifier = options.classifier
    if sum((version is not None or share is not None, promote, discard)) > 1:
        raise click.UsageError("expected one of --version with --percent, --promote, --discard")
    if version is None and share is not None and (trial := canary.on_trial(classifier)):
        version = trial.serving()  # of the trial that runs, another share
    if (version is None) != (share is None):
        raise click.UsageError("expected --version N and --percent P together")
    examples = read_examples(evaluation) if evaluation else None
    with options.server_unless(no_load) as server:
        if promote:
            _promote(classifier, server, options)
            return
        if discard:
            _discard(classifier, server, options)
            return
        difference = _compared(classifier, version, examples)  # before a trial begins: FILE may be of no use
        if version is not None and share is not None:
            found, warnings = _begun(classifier, version, share, server)
        else:
            found, warnings = canary.status(classifier, server), overtaken(classifier, classifier.serving())
    options.warn(*warnings)
    _show(classifier, found, difference, options)


def _promote(classifier: Classifier, server: TritonServer | None, options: CommonOptions) -> None:
    from patcher import canary

    tell_switch(classifier.name, canary.promote(classifier, server), options)


def _discard(classifier: Classifier, server: TritonServer | None, options: CommonOptions) -> None:
    from patcher import canary

    serving = classifier.serving()  # read first: once the trial has ended, nothing may fail any more
    tried = canary.discard(classifier, server)
    audit.note(version=tried)
    options.emit({"classifier": classifier.name, "discarded": tried, "version": serving})
    if not options.json:
        state = "serves as before" if server else "is pinned as before (no server was asked to end the trial)"
        options.say(f"the trial of version {tried} has ended; version {serving} {state}")


def _compared(classifier: Classifier, version: int | None, examples: Examples | None) -> Difference | None:
    """The serving version compared with ``version``, by default that on trial; None without examples or a trial."""
    from patcher.canary import on_trial
    from patcher.difference import diff

    if examples is None:
        return None
    if version is None and (trial := on_trial(classifier)):
        version = trial.serving()
    return None if version is None else diff(classifier, classifier.serving(), version, examples)


def _begun(
    classifier: Classifier, version: int, share: float, server: TritonServer | None
) -> tuple[Canary | None, tuple[str, ...]]:
    """Begin a trial; returns its state, and a warning if the server could not be asked for its statistics."""
    from patcher import canary

    found = canary.begin(classifier, version, share, server)
    audit.note(version=version)
    try:
        return canary.status(classifier, server), ()
    except (PatcherError, KeyboardInterrupt) as error:
        return found, (f"the trial has begun, but its requests were not counted: {str(error) or 'interrupted'}",)


def _show(
    classifier: Classifier,
    found: Canary | None,
    difference: Difference | None,
    options: CommonOptions,
) -> None:
    document: dict[str, Any] = {"classifier": classifier.name, "version": None} if found is None else found.to_json()
    if difference is not None:
        document["comparison"] = difference.to_json()
    options.emit(document)
    if options.json:
        return
    if found is None:
        options.say(f"no version of {classifier.name} is on trial")
        return
    asked = "" if found.arms else "; no server was asked"
    options.say(f"version {found.version} of {classifier.name} is on trial with {found.percent:g} % of the keys{asked}")
    rows = [
        (arm.model, arm.version, arm.requests, arm.failures, "—" if arm.mean_ms is None else f"{arm.mean_ms:.2f}")
        for arm in found.arms
    ]
    if rows:
        options.say(table(("model", "version", "requests", "failed", "ms in the head"), rows, right=(1, 2, 3, 4)))
    for line in changed_answers(difference, "in the trial") if difference else ():
        options.say(line)
