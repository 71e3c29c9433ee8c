"""The command line: it only parses arguments, calls the API, renders results and sets the exit code."""

from __future__ import annotations

import errno
import importlib
import json
import os
import sys
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from patcher import __version__, audit
from patcher.cli.mistakes import explained, leniently
from patcher.cli.output import tell, unwritten
from patcher.errors import PatcherError
from patcher.signals import ignore_signals, interruptible, uninterrupted
from patcher.wording import redacted

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["BUG", "main", "program"]

BUG = "This is a bug in patcher; set PATCHER_DEBUG=1 for the traceback"

# Section -> verb -> module:command and one line of help. A verb's module is imported only when that verb runs, so that
# `--help` answers at once.
_SECTIONS = {
    "Getting started": {
        "export": ("export:export_command", "Turn a fine-tuned checkpoint into a model repository."),
        "serve": ("serve:serve_command", "Run a Triton server on this machine."),
        "new-classifier": (
            "new_classifier:new_classifier_command",
            "Make a classifier from labelled texts on an existing backbone.",
        ),
        "remember": ("remember:remember_command", "Build the memory from labelled data after the export."),
    },
    "Labels": {
        "add-label": ("add_label:add_label_command", "Add labels from a few examples, live."),
        "rename-label": ("relabel:rename_label_command", "Rename a label."),
        "merge-labels": ("relabel:merge_labels_command", "Merge several labels into one."),
        "remove-label": ("relabel:remove_label_command", "Remove a label."),
    },
    "Versions": {
        "labels": ("versions:labels_command", "List a version's labels."),
        "history": ("versions:history_command", "Show the lineage of every version."),
        "rollback": ("versions:rollback_command", "Go back to an earlier version."),
        "canary": ("canary:canary_command", "Try a version on a share of the requests."),
        "prune": ("versions:prune_command", "Delete old versions."),
        "drop-classifier": ("new_classifier:drop_classifier_command", "Delete a classifier, but not its backbone."),
        "to-transformers": (
            "to_transformers:to_transformers_command",
            "Write the patched head back into a checkpoint.",
        ),
    },
    "Answers": {
        "classify": ("classify:classify_command", "Classify texts on the server."),
        "evaluate": ("evaluate:evaluate_command", "Measure a version on a labelled file."),
        "diff": ("versions:diff_command", "Show what changed between two versions."),
        "report": ("report:report_command", "Write a page about a version: what changed, before and after."),
    },
    "Operations": {
        "doctor": ("doctor:doctor_command", "Check installation, repository and servers; repair them."),
        "sync": ("versions:sync_command", "Make every server serve the pinned version."),
        "loadtest": ("loadtest:loadtest_command", "Measure throughput and latency with perf_analyzer."),
        "tune": ("tune:tune_command", "Find the fastest settings for this machine."),
        "metrics": ("metrics:metrics_command", "Export metrics for Prometheus."),
        "upgrade": ("upgrade:upgrade_command", "Update an export made by an earlier version."),
    },
}
_USAGE = click.UsageError.__name__
"""The ``kind`` of all of click's errors, whose own names scripts need not know."""
_FULL = frozenset([errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
_VERBS = {verb: place for section in _SECTIONS.values() for verb, (place, _) in section.items()}


@dataclass
class _Run:
    """What must be known about a run even if it fails because of wrong usage."""

    as_json: bool
    log_json: bool

    def foresee(self, ctx: click.Context, verb: str, command: click.Command, rest: list[str]) -> None:
        """Read the flags in advance, as the verb will, but ignoring any mistake.

        The verb's own parser is needed because ``--text "--dry-run"``, for example, is a text and not a flag.
        """
        given = leniently(command, rest, verb, ctx).params
        self.as_json = bool(given.get("as_json", self.as_json))
        audit.note(verb=verb)
        if given.get("dry_run"):
            audit.note(outcome="dry_run")


def _log_json(ctx: click.Context, _: click.Parameter, given: bool) -> None:
    run = ctx.find_object(_Run)
    if run and given:
        run.log_json = True


_LOG_JSON = click.Option(
    ["--log-json"],
    is_flag=True,
    expose_value=False,
    callback=_log_json,
    hidden=True,
)
"""Every verb takes it too; the help of `patcher` explains it."""


def _show_help(ctx: click.Context, _: click.Parameter, given: bool) -> None:
    if given and not ctx.resilient_parsing:
        _shown(ctx, ctx.get_help())


def _show_version(ctx: click.Context, _: click.Parameter, given: bool) -> None:
    if given and not ctx.resilient_parsing:
        _shown(ctx, f"patcher, version {__version__}")


def _shown(ctx: click.Context, text: str) -> None:
    audit.note(verb="")  # the verb does nothing that an audit log would keep
    tell(text)
    ctx.exit()


_HELP = click.Option(
    ["-h", "--help"],
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_help,
    help="Show this message and exit.",
)
"""Instead of click's own, which fails if stdout cannot be written."""


class _Verbs(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _VERBS:
            return None
        module, name = _VERBS[cmd_name].split(":")
        command: click.Command = getattr(importlib.import_module(f"patcher.cli.{module}"), name)
        if _LOG_JSON not in command.params:
            command.params += [_LOG_JSON, _HELP]
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in _VERBS and not args[0].startswith("-"):
            import difflib

            near = difflib.get_close_matches(args[0], _VERBS, 1)
            hint = f"; did you mean `patcher {near[0]}`?" if near else "; `patcher --help` lists them"
            raise click.UsageError(f"there is no verb {args[0]!r}{hint}", ctx)
        name, command, rest = super().resolve_command(ctx, args)
        run = ctx.find_object(_Run)
        if run and name and command:
            run.foresee(ctx, name, command, rest)
        return name, command, rest

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # Not from the commands themselves, since that would import all of them.
        width = max(map(len, _VERBS))
        for section, verbs in _SECTIONS.items():
            with formatter.section(section):
                formatter.write_dl([(verb.ljust(width), line) for verb, (_, line) in verbs.items()])


@click.group(
    cls=_Verbs,
    context_settings={"max_content_width": 100},
    epilog="`patcher VERB --help` explains a verb. Exit codes: 0 done, 1 failed, 2 bad input, 3 the gate refused, "
    "4 published but not served (the previous version was put back), 130 interrupted.",
)
@click.option(
    "--log-json",
    is_flag=True,
    expose_value=False,
    callback=_log_json,
    help="Write one JSON event to stderr; may also follow the verb.  [env: PATCHER_LOG=json]",
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="Show the version and exit.",
)
def _patcher() -> None:
    """Add a label to a fine-tuned text classifier in production: one small head, no downtime.

    \b
    patcher export my-finetuned-bert --repo model_repository --name intent --train train.csv
    patcher serve
    patcher add-label card_lost --examples examples.csv
    patcher classify "my card is gone"
    """


_patcher.params.append(_HELP)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code; a traceback is shown only with ``PATCHER_DEBUG=1``.

    If stdout cannot be written (its disk is full), a verb that only looks exits with 1: its output is all there is to
    it. After a change it stays 0, with a warning: 1 would say that nothing was changed, and a script would try again.
    Any other code stays as well.
    """
    given = sys.argv[1:] if arguments is None else arguments
    # numpy's BLAS threads busy-wait for 25 ms after each product, on cores that a server on this machine may need.
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")
    audit.begin("")
    run = _Run("--json" in given, os.environ.get("PATCHER_LOG") == "json" or "--log-json" in given[:1])
    with interruptible():
        code, error = _run(given, run)
        if reason := unwritten():
            code, error = _not_written(reason, code, error)
        with uninterrupted():  # whatever was done or undone gets recorded, even if Ctrl-C comes now
            audit.finish(code, error, to_stderr=run.log_json)
    return code


def program() -> int:
    """``main`` as a program: once its outcome is told, no signal may change the exit code."""
    code = main()
    ignore_signals()
    return code


def _run(arguments: list[str], run: _Run) -> tuple[int, str]:
    try:
        result = _patcher.main(args=arguments, prog_name="patcher", standalone_mode=False, obj=run)
    except PatcherError as error:
        _trace()
        code, _ = _failed(str(error), error.exit_code, run.as_json, type(error).__name__, error.report)
        return code, error.logged
    except click.exceptions.NoArgsIsHelpError as error:
        tell(error.format_message(), err=True)
        audit.note(kind=_USAGE)
        return 2, "no verb was given"
    except click.ClickException as error:
        context = error.ctx if isinstance(error, click.UsageError) else None
        if context is not None and not run.as_json:
            tell(context.get_usage(), err=True)
        code, _ = _failed(explained(error, arguments), 2, run.as_json, _USAGE)
        return code, "wrong command line"  # the message repeats words of it, which may be texts
    except (click.Abort, KeyboardInterrupt):
        return _failed("interrupted; unfinished changes were undone", 130, run.as_json, KeyboardInterrupt.__name__)
    except Exception as error:  # noqa: BLE001  said to be a bug
        _trace()
        said = f"unexpected {type(error).__name__}: {error}. {BUG}"
        if isinstance(error, OSError) and error.errno in _FULL:
            where = f" {error.filename}" if error.filename else ""
            said = f"cannot write{where}: {error.strerror}; make room, or raise the limit"
        return _failed(said, 1, run.as_json, type(error).__name__)
    return (result if isinstance(result, int) else 0), ""


def _not_written(reason: str, code: int, error: str) -> tuple[int, str]:
    said = f"the output could not be written to stdout: {reason}"
    if code == 0:
        if not audit.is_change():
            return _failed(said, 1, as_json=False, kind=OSError.__name__)
        said += "; what the verb has changed stays changed"
    audit.warn(said)
    tell(f"warning: {said}", err=True)
    return code, error


def _trace() -> None:
    """Print the traceback of the error being handled to stderr if ``PATCHER_DEBUG=1``; the run ends as without it."""
    if os.environ.get("PATCHER_DEBUG") == "1":
        tell(redacted(traceback.format_exc().rstrip()), err=True)


def _failed(
    message: str, code: int, as_json: bool, kind: str, report: Mapping[str, Any] | None = None
) -> tuple[int, str]:
    message, report = redacted(message), report or {}
    audit.note(kind=kind)
    tell(f"error: {message}", err=True)
    if as_json:
        ended = {"error": message, "kind": kind, "exit_code": code}
        tell(json.dumps({**report, **ended, "warnings": audit.warned(report.get("warnings", ()))}))
    return code, message
