"""``patcher doctor``."""

from __future__ import annotations

import click

from patcher.cli.options import Settings, common_options, read_key

_MARKS = {"ok": "ok   ", "note": "note ", "fault": "FAULT"}


@click.command("doctor")
@common_options
def doctor_command(settings: Settings) -> int:
    """Say what is installed, what the repository holds, what the server says, and whether they agree.

    Ends with 1 where something is at fault.
    """
    from patcher.doctor import diagnose
    from patcher.triton.client import TritonServer

    checks = []
    with TritonServer(settings.url, admin_key=read_key(settings.key_file)) as server:
        for check in diagnose(settings.repo, server if server.is_live() else None, settings.url):
            checks.append(check)
            if not settings.json:
                settings.say(f"{_MARKS[check.state]}  {check.what}: {check.finding}")
    settings.emit([check.to_json() for check in checks])
    return int(any(check.state == "fault" for check in checks))
