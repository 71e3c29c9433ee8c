"""The options that several verbs share, and the objects that they resolve to."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from patcher import audit
from patcher.cli.completion import complete_classifier, complete_version
from patcher.cli.output import tell
from patcher.cli.values import VERSION, Location, Number
from patcher.errors import InputError, RepositoryError
from patcher.limits import MAX_FLIPS, MIN_RECALL

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from patcher.classifier import Classifier
    from patcher.repository import ModelRepository
    from patcher.triton.client import TritonServer
    from patcher.triton.tls import ClientTls

__all__ = [
    "FILE",
    "SHARE",
    "CommonOptions",
    "allow_pickle_option",
    "common_options",
    "dry_run_option",
    "eval_option",
    "force_option",
    "max_flips_option",
    "memory_option",
    "min_recall_option",
    "no_load_option",
    "read_key",
    "refuse_overwriting",
    "repo_option",
    "trust_remote_code_option",
    "version_option",
    "warn_if_open",
]

Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass(frozen=True)
class CommonOptions:
    """Where the repository and the server are, and how to print to the user."""

    repo: Path | str
    classifier_name: str | None
    url: str
    json: bool
    key_file: Path | None
    watch: float
    tls_files: tuple[Path | None, Path | None, Path | None] = (None, None, None)
    """The CA, and the client's own certificate and key."""
    tls_server_name: str | None = None

    @cached_property
    def repository(self) -> ModelRepository:
        """The model repository."""
        from patcher.repository import ModelRepository

        return ModelRepository(self.repo)

    @cached_property
    def classifier(self) -> Classifier:
        """The named classifier, or the only one; also recorded in the audit event of this run."""
        found = self.repository.classifier(self.classifier_name)
        audit.note(classifier=found.name)
        return found

    @property
    def address(self) -> str:
        """The classifier's address on the server; a name that the repository does not contain is used as it is."""
        from patcher.names import holds
        from patcher.storage import is_url, open_storage

        name = self.classifier_name
        if name is None:
            return self.classifier.address
        # Only a repository in a folder has head stores: elsewhere the name is the address, and nothing need be read.
        here = not is_url(self.repo) and holds(open_storage(self.repo), name)
        return self.classifier.address if here else name

    def require_held(self) -> None:
        """InputError if ``--classifier`` names no classifier of the repository; nothing if there is no repository."""
        if self.classifier_name is None or "/" in self.classifier_name:
            return
        with contextlib.suppress(RepositoryError):
            self.repository.classifier(self.classifier_name)

    def server(self) -> TritonServer:
        """The server at ``--url``, or a fleet of several. A single one is not contacted before the first call."""
        from patcher.fleet import Fleet, addresses
        from patcher.triton.client import TritonServer

        urls, key, tls = addresses(self.url), read_key(self.key_file), self.tls
        if len(urls) == 1:
            return TritonServer(urls[0], admin_key=key, tls=tls)
        if tls and tls.server_name is None and "," not in self.url:
            # Several addresses behind one DNS name are contacted by IP address; their certificate is for the name.
            tls = dataclasses.replace(tls, server_name=self.url.rpartition(":")[0])
        fleet = Fleet(urls, watch_seconds=self.watch, admin_key=key, tls=tls)
        if fleet.away and len(fleet.away) < len(urls):
            away = ", ".join(fleet.away)
            self.warn(f"{away} does not answer and is left out; run `patcher sync` when it is back")
        return fleet

    def server_unless(self, no_load: bool) -> AbstractContextManager[TritonServer | None]:
        """The server, or None if the verb is to work without one."""
        return contextlib.nullcontext() if no_load else self.server()

    @property
    def tls(self) -> ClientTls | None:
        """TLS as set by the options; None if they do not ask for it."""
        from patcher.triton.tls import ClientTls

        ca, certificate, key = self.tls_files
        if ca is None:
            if certificate or key or self.tls_server_name:
                raise InputError(
                    "TLS needs --tls-ca FILE (or $PATCHER_TLS_CA), the CA that signed the server's certificate"
                )
            return None
        if key is not None:
            warn_if_open(key)
        return ClientTls(ca, certificate, key, self.tls_server_name)

    def say(self, text: str = "") -> None:
        """Print text for people: to stdout, or to stderr with ``--json``."""
        tell(text, err=self.json)

    def emit(self, document: Any) -> None:
        """Print the one JSON document of ``--json``; does nothing without that option.

        An object gets the ``warnings`` of this run: scripts do not read stderr.
        """
        if self.json:
            if isinstance(document, dict):
                document = {**document, "warnings": audit.warned(document.get("warnings", ()))}
            text = json.dumps(document, ensure_ascii=False, indent=2)
            # Characters that are not printable become JSON escapes.
            tell("".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text))

    def warn(self, *warnings: str) -> None:
        """Print warnings to stderr, and record them in the audit event of this run."""
        audit.warn(*warnings)
        for warning in warnings:
            tell(f"warning: {warning}", err=True)

    def progress(self, total: int, noun: str = "text") -> Callable[[int], None]:
        """Report on stderr, every few seconds, how many of ``total`` texts are done, or of what ``noun`` says."""
        from patcher.stopwatch import counter

        return counter(functools.partial(tell, err=True), total, noun)


def refuse_overwriting(output: Path | None, *inputs: Path | None) -> None:
    """Raise InputError if ``output`` would overwrite one of the files that the verb reads."""
    for path in inputs:
        if output and path and output.exists() and path.exists() and output.samefile(path):
            raise InputError(f"{output} is read by this very command; name another file to write to")


def read_key(path: Path | None) -> str | None:
    """The admin key: from ``--admin-key-file``, else from ``$PATCHER_ADMIN_KEY``, else None."""
    if path is None:
        return os.environ.get("PATCHER_ADMIN_KEY") or None
    try:
        key = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the admin key file {path}: {getattr(error, 'strerror', '') or error}") from error
    if not key or not key.isascii() or not key.isprintable():
        raise InputError(f"the admin key file {path} holds no key; expected one line of printable ASCII")
    warn_if_open(path)
    return key


def warn_if_open(path: Path) -> None:
    """Warn on stderr if others can access a file that holds a secret; read access for the group is accepted."""
    with contextlib.suppress(OSError):
        if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO) & ~stat.S_IRGRP:
            said = f"others can read {path}; chmod 600 {path}"
            audit.warn(said)
            tell(f"warning: {said}", err=True)


FILE = click.Path(path_type=Path, dir_okay=False)
SHARE = Number(0, 100, min_open=True, max_open=True)
"""Percentage of the requests that go to a version on trial."""

version_option = click.option(
    "--version",
    type=VERSION,
    shell_complete=complete_version,
    help="Head version; by default the one that serves.",
)
dry_run_option = click.option("--dry-run", is_flag=True, help="Fit and judge only; publish nothing.")
force_option = click.option(
    "--force", is_flag=True, help="Publish even if the gate refuses; recorded permanently in the lineage."
)
max_flips_option = click.option(
    "--max-flips",
    type=Number(0, 1),
    default=MAX_FLIPS,
    show_default=True,
    help="Largest share of old inputs that may turn from right to wrong.",
)
min_recall_option = click.option(
    "--min-recall",
    type=Number(0, 1),
    default=MIN_RECALL,
    show_default=True,
    help="Smallest recall that the new label must reach.",
)
memory_option = click.option(
    "--memory",
    "kind",
    type=click.Choice(["features", "statistics"]),
    default="features",
    show_default=True,
    help="What to keep: the features of a few texts of each label, or only statistics and nothing of any single text.",
)
allow_pickle_option = click.option(
    "--allow-pickle", is_flag=True, help="Read weights from a pickle, which can run code."
)
trust_remote_code_option = click.option(
    "--trust-remote-code", is_flag=True, help="Run Python code that comes with the checkpoint."
)


def eval_option(text: str) -> Callable[[Command], Command]:
    """``--eval FILE``, whose help is ``text``."""
    return click.option("--eval", "evaluation", type=FILE, help=text)


def no_load_option(text: str = "Publish without contacting a server.") -> Callable[[Command], Command]:
    """``--no-load``, whose help is ``text``."""
    return click.option("--no-load", is_flag=True, help=text)


repo_option = click.option(
    "--repo",
    type=Location(path_type=Path, file_okay=False),
    envvar="TRITON_MODEL_REPO",
    default=Path("model_repository"),
    show_default=True,
    help="Model repository: a folder, or s3://BUCKET/PATH  [env: TRITON_MODEL_REPO]",
)
Group = Literal["classifier", "server", "control", "rollout"]
"""Groups of common options that not every verb uses: the classifier to work on, contacting a server, changing what it
serves, and rolling that out to several servers one after another."""

# Group (None: every verb uses it), names, and further arguments for click.
_OPTIONS: tuple[tuple[Group | None, tuple[str, ...], dict[str, Any]], ...] = (
    (
        "classifier",
        ("--classifier", "classifier_name"),
        {
            "metavar": "NAME",
            "shell_complete": complete_classifier,
            "help": "The classifier to work on; needed only if there are several.",
        },
    ),
    (
        "server",
        ("--url", "urls"),
        {
            "envvar": "TRITON_URL",
            "multiple": True,
            "default": ("localhost:8001",),
            "show_default": True,
            "metavar": "HOST:PORT",
            "help": "gRPC address of the server. For several servers: separate with commas, repeat the option, or give "
            "a DNS name that resolves to all of them.  [env: TRITON_URL]",
        },
    ),
    (
        "rollout",
        ("--watch",),
        {
            "type": Number(0),
            "default": 2.0,
            "show_default": True,
            "metavar": "SECONDS",
            "help": "With several servers: how long the first runs a new version alone before the others get it.",
        },
    ),
    (
        None,
        ("--json", "as_json"),
        {"is_flag": True, "help": "Print one JSON document to stdout and everything else to stderr."},
    ),
    (
        "control",
        ("--admin-key-file", "key_file"),
        {
            "type": FILE,
            "help": "File with the admin key for model control; not needed for a key that your own `patcher serve` on "
            "this machine made.  [env: PATCHER_ADMIN_KEY holds the key itself]",
        },
    ),
    (
        "server",
        ("--tls-ca",),
        {
            "type": FILE,
            "envvar": "PATCHER_TLS_CA",
            "help": "Use TLS and trust servers whose certificate this CA signed.  [env: PATCHER_TLS_CA]",
        },
    ),
    (
        "server",
        ("--tls-cert",),
        {
            "type": FILE,
            "envvar": "PATCHER_TLS_CERT",
            "help": "Client certificate, for servers that require one.  [env: PATCHER_TLS_CERT]",
        },
    ),
    (
        "server",
        ("--tls-key",),
        {
            "type": FILE,
            "envvar": "PATCHER_TLS_KEY",
            "help": "Private key of that certificate.  [env: PATCHER_TLS_KEY]",
        },
    ),
    (
        "server",
        ("--tls-server-name",),
        {
            "metavar": "NAME",
            "envvar": "PATCHER_TLS_SERVER_NAME",
            "help": "Name expected in the server's certificate, if not the host of --url.  "
            "[env: PATCHER_TLS_SERVER_NAME]",
        },
    ),
)


def common_options(*shown: Group) -> Callable[[Command], Command]:
    """Give a command ``--repo``, the options in ``_OPTIONS`` and, built from them, an ``options`` argument.

    Every verb accepts all of them, so that a script can pass the same ones to each. Its help shows only those in the
    groups ``shown``, which are the ones it uses.
    """
    return functools.partial(_with_options, shown=shown)


def _with_options(command: Command, shown: tuple[Group, ...]) -> Command:
    @functools.wraps(command)
    def with_options(
        *args: Any,
        repo: Path | str,
        classifier_name: str | None,
        urls: tuple[str, ...],
        watch: float,
        as_json: bool,
        key_file: Path | None,
        tls_ca: Path | None,
        tls_cert: Path | None,
        tls_key: Path | None,
        tls_server_name: str | None,
        **kwargs: Any,
    ) -> Any:
        tls = (tls_ca, tls_cert, tls_key)
        options = CommonOptions(
            repo,
            classifier_name,
            ",".join(urls),
            as_json,
            key_file,
            watch,
            tls_files=tls,
            tls_server_name=tls_server_name,
        )
        return command(*args, options=options, **kwargs)

    for group, names, attributes in reversed(_OPTIONS):
        hidden = group is not None and group not in shown
        with_options = click.option(*names, hidden=hidden, **attributes)(with_options)
    return repo_option(with_options)  # type: ignore[return-value]  # click decorators keep the function's own type
