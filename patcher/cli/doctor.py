"""``patcher doctor``."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from patcher import audit
from patcher.cli.options import CommonOptions, common_options
from patcher.wording import plural

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from patcher.checks import Check

_MARKS = {"ok": "ok   ", "note": "note ", "fault": "FAULT"}
_FEW = 3
"""With more classifiers, those without a note or a fault share one line, and notes and faults come last."""
_NOTHING_DONE = ("nothing was interrupted", ": agreed")
"""Ends of what a repair says of a classifier that needed none."""


@click.command("doctor")
@click.option(
    "--repair",
    is_flag=True,
    help="Finish or undo interrupted changes, write off versions whose files are gone, replace a journal that cannot "
    "be read with a new one (the old one is kept), and make every server serve the pinned version.",
)
@common_options("server", "control")
def doctor_command(repair: bool, options: CommonOptions) -> int:
    """Check what is installed, the repository and the servers, and whether they agree.

    With more than three classifiers, those in order share one line, and notes and faults come last; --json has all.

    Exits with 1 if anything is at fault, or if no server answers at an address that --url or $TRITON_URL names.
    """
    from patcher import doctor
    from patcher.errors import PatcherError, TlsError, WrongPort

    checks: list[Check] = []
    many = _many(options)
    expected = click.get_current_context().get_parameter_source("urls") is not ParameterSource.DEFAULT

    def tell(check: Check) -> None:
        checks.append(check)
        later = many and (check.state != "ok" or _usual(check, many))
        if not (options.json or later):
            options.say(_line(check))

    with options.server() as asked:
        server = None
        try:
            server = asked if asked.is_live() else None
        except TlsError as error:
            tell(doctor.Check("TLS", "fault", str(error)))
        except WrongPort as error:
            tell(doctor.Check("port", "fault", str(error)))
        if repair:
            audit.note(repair=True)
            with contextlib.suppress(PatcherError):  # a finding of the checks
                audit.concern(options.repository.classifiers())
            for check in doctor.repair(options.repo, server):
                tell(check)
        for check in doctor.diagnose(options.repo, server, options.url, expected=expected):
            tell(check)
    if many:
        for line in _last(checks, many):
            options.say(line)
    options.emit([check.to_json() for check in checks])
    return int(any(check.state == "fault" for check in checks))


def _many(options: CommonOptions) -> frozenset[str]:
    """The classifiers, if they are so many that their lines would bury the faults; empty with ``--json``, too."""
    from patcher.errors import PatcherError

    try:
        names = () if options.json else options.repository.classifiers()
    except PatcherError:  # a finding of the checks
        names = ()
    return frozenset(names if len(names) > _FEW else ())


def _line(check: Check) -> str:
    return f"{_MARKS[check.state]}  {check.what}: {check.finding}"


def _subject(check: Check) -> str:
    """What a check is about: of ``intent, version 3`` the classifier."""
    return check.what.partition(",")[0]


def _usual(check: Check, names: frozenset[str]) -> bool:
    """Whether a check found one of the classifiers ``names`` in order, and did nothing to it."""
    done = ", repair" in check.what and not check.finding.endswith(_NOTHING_DONE)
    return check.state == "ok" and _subject(check) in names and not done


def _last(checks: Sequence[Check], names: frozenset[str]) -> Iterator[str]:
    """A line for all classifiers in order, then the notes, then the faults."""
    rest = [check for state in ("note", "fault") for check in checks if check.state == state]
    fine = names - {_subject(check) for check in rest}
    served = {_subject(check) for check in checks if ", served" in check.what}
    if fine:
        yield f"{_MARKS['ok']}  {plural(len(fine), 'classifier')}: as published{' and served' * (fine <= served)}"
    yield from map(_line, rest)
