"""``patcher doctor``."""

from __future__ import annotations

import contextlib

import click
from click.core import ParameterSource

from patcher import audit
from patcher.cli.options import CommonOptions, common_options

_MARKS = {"ok": "ok   ", "note": "note ", "fault": "FAULT"}


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

    Exits with 1 if anything is at fault, or if no server answers at an address that --url or $TRITON_URL names.
    """
    from patcher import doctor
    from patcher.errors import PatcherError, TlsError, WrongPort

    checks = []
    expected = click.get_current_context().get_parameter_source("urls") is not ParameterSource.DEFAULT

    def tell(check: doctor.Check) -> None:
        checks.append(check)
        if not options.json:
            options.say(f"{_MARKS[check.state]}  {check.what}: {check.finding}")

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
    options.emit([check.to_json() for check in checks])
    return int(any(check.state == "fault" for check in checks))
