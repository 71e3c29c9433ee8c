"""What a switch to another version tells, whichever verb made it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from patcher import audit

if TYPE_CHECKING:
    from patcher.cli.options import CommonOptions
    from patcher.rollout import Switch

__all__ = ["tell_switch"]


def tell_switch(name: str, switch: Switch, options: CommonOptions) -> None:
    """Tell which version of the classifier ``name`` serves now, and record it in the audit event."""
    audit.note(version=switch.version, previous=switch.previous)
    options.warn(*switch.warnings)
    options.emit({"classifier": name, "version": switch.version, "previous": switch.previous, "served": switch.served})
    if not options.json:
        state = "now serves" if switch.served else "is pinned (no server was asked to load it)"
        options.say(f"version {switch.version} of {name} {state}; previously version {switch.previous}")
