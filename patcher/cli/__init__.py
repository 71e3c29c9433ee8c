"""The command line: parses, calls the API, renders, sets the exit code; nothing else."""

from __future__ import annotations

import importlib
import json
import os
import sys

import click

from patcher import audit
from patcher.cli.output import tell
from patcher.errors import PatcherError
from patcher.signals import interruptible
from patcher.wording import redacted

__all__ = ["main"]

# Section -> verb -> module, command and one line of help: a verb's imports are paid by that verb alone, so that
# `--help` answers at once.
_SECTIONS = {
    "To start": {
        "export": ("export:export_command", "A fine-tuned checkpoint into a model repository."),
        "serve": ("serve:serve_command", "A real Triton server on this machine."),
        "new-classifier": ("new_classifier:new_classifier_command", "A classifier from labelled texts, on a backbone."),
        "remember": ("remember:remember_command", "Build the memory from labelled data, after the export."),
    },
    "Labels": {
        "add-label": ("add_label:add_label_command", "New labels from a few examples, live."),
        "rename-label": ("relabel:rename_label_command", "Give a label another name."),
        "merge-labels": ("relabel:merge_labels_command", "Make one label of several."),
        "remove-label": ("relabel:remove_label_command", "Take a label out."),
    },
    "Versions": {
        "labels": ("versions:labels_command", "What a version knows."),
        "history": ("versions:history_command", "Where each version comes from."),
        "rollback": ("versions:rollback_command", "An earlier version serves again."),
        "canary": ("canary:canary_command", "Try a version on a share of the requests."),
        "prune": ("versions:prune_command", "Delete old versions."),
        "drop-classifier": ("new_classifier:drop_classifier_command", "Delete a classifier; its backbone stays."),
        "to-transformers": ("to_transformers:to_transformers_command", "The patched head back into a checkpoint."),
    },
    "Answers": {
        "classify": ("classify:classify_command", "Ask the server."),
        "evaluate": ("evaluate:evaluate_command", "Accuracy of a version on a labelled file."),
        "diff": ("versions:diff_command", "What changed between two versions."),
        "report": ("report:report_command", "One page about a version: what changed, before and after."),
    },
    "Operations": {
        "doctor": ("doctor:doctor_command", "What is installed, what the server says, whether all agree; repairs."),
        "sync": ("versions:sync_command", "Every server serves what is pinned."),
        "loadtest": ("loadtest:loadtest_command", "Throughput and latency, by perf_analyzer."),
        "tune": ("tune:tune_command", "The fastest settings for this machine."),
        "metrics": ("metrics:metrics_command", "For Prometheus: what each replica serves, patches, refusals."),
        "upgrade": ("upgrade:upgrade_command", "An export of an earlier version gets what this one has."),
    },
}
_VERBS = {verb: place for section in _SECTIONS.values() for verb, (place, _) in section.items()}


class _Verbs(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _VERBS:
            return None
        module, name = _VERBS[cmd_name].split(":")
        command: click.Command = getattr(importlib.import_module(f"patcher.cli.{module}"), name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in _VERBS and not args[0].startswith("-"):
            import difflib

            near = difflib.get_close_matches(args[0], _VERBS, 1)
            hint = f"; did you mean `patcher {near[0]}`?" if near else "; `patcher --help` lists them"
            raise click.UsageError(f"no verb {args[0]!r}{hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # Not through the commands themselves, which would import them all.
        width = max(map(len, _VERBS))
        for section, verbs in _SECTIONS.items():
            with formatter.section(section):
                formatter.write_dl([(verb.ljust(width), line) for verb, (_, line) in verbs.items()])


@click.group(
    cls=_Verbs,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="`patcher VERB --help` teaches a verb. Exit codes: 0 done, 1 failed, 2 bad input, 3 the gate refused, "
    "4 published but not served (the previous version was put back).",
)
@click.option("--log-json", is_flag=True, expose_value=False, help="One JSON event on stderr  [env: PATCHER_LOG=json]")
@click.version_option(package_name="triton-label-patcher", prog_name="patcher")
def _patcher() -> None:
    """Add a label to a fine-tuned text classifier in production: one small head, no downtime.

    \b
    patcher export my-finetuned-bert --repo model_repository --name intent --train train.csv
    patcher serve
    patcher add-label card_lost --examples examples.csv
    patcher classify "my card is gone"
    """


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code; a traceback shows only with ``PATCHER_DEBUG=1``."""
    given = sys.argv[1:] if arguments is None else arguments
    # numpy's BLAS threads turn on the spot for 25 ms after each product, on cores that a server beside us may need.
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")
    audit.begin(next((word for word in given if word in _VERBS), ""))
    if "--dry-run" in given:
        audit.note(outcome="dry_run")
    with interruptible():
        code, error = _run(arguments, "--json" in given)
    verbose = os.environ.get("PATCHER_LOG") == "json" or "--log-json" in given[:1]
    audit.finish(code, error, to_stderr=verbose)
    return code


def _run(arguments: list[str] | None, as_json: bool) -> tuple[int, str]:
    try:
        result = _patcher.main(args=arguments, prog_name="patcher", standalone_mode=False)
    except PatcherError as error:
        if os.environ.get("PATCHER_DEBUG") == "1":
            raise
        return _failed(str(error), error.exit_code, as_json, error.report)
    except click.exceptions.NoArgsIsHelpError as error:
        tell(error.format_message(), err=True)
        return 2, "no verb was given"
    except click.ClickException as error:
        context = error.ctx if isinstance(error, click.UsageError) else None
        if context is not None and not as_json:
            tell(context.get_usage(), err=True)
        return _failed(error.format_message(), 2, as_json)
    except (click.Abort, KeyboardInterrupt):
        return _failed("interrupted; what was begun was undone", 130, as_json)
    except Exception as error:
        if os.environ.get("PATCHER_DEBUG") == "1":
            raise
        said = f"unexpected {type(error).__name__}: {error}. This is a fault of patcher; PATCHER_DEBUG=1 shows where"
        return _failed(said, 1, as_json)
    return (result if isinstance(result, int) else 0), ""


def _failed(message: str, code: int, as_json: bool, report: dict[str, object] | None = None) -> tuple[int, str]:
    message = redacted(message)
    tell(f"error: {message}", err=True)
    if as_json:
        tell(json.dumps({**(report or {}), "error": message, "exit_code": code}))
    return code, message
