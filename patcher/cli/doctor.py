"""``patcher doctor``."""

from __future__ import annotations

import itertools

import click

from patcher.cli.options import Settings, common_options

_MARKS = {"ok": "ok   ", "note": "note ", "fault": "FAULT"}


@click.command("doctor")
@common_options
def doctor_command(settings: Settings) -> int:
    """Say what is installed, what the repository holds, what the server says, and whether they agree.

    Ends with 1 where something is at fault.
    """
    from patcher.doctor import Check, diagnose
    from patcher.errors import TlsError

    checks = []
    with settings.server() as server:
        fault = []
        try:
            live = server.is_live()
        except TlsError as error:
            live, fault = False, [Check("TLS", "fault", str(error))]
        for check in itertools.chain(fault, diagnose(settings.repo, server if live else None, settings.url)):
            checks.append(check)
            if not settings.json:
                settings.say(f"{_MARKS[check.state]}  {check.what}: {check.finding}")
    settings.emit([check.to_json() for check in checks])
    return int(any(check.state == "fault" for check in checks))
