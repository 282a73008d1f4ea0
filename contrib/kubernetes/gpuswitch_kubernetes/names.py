"""What the agent writes and reads on its node is called so."""

from __future__ import annotations

import re

PREFIX = "gpuswitch.io/"
DESIRED = f"{PREFIX}desired."
"""Written by others, never by the agent."""
STATE = f"{PREFIX}state."
REASON = f"{PREFIX}reason."
HANDLED = f"{PREFIX}handled."
"""What became of a desire: so that a restart of the agent moves no GPU twice."""
TAINT = f"{PREFIX}switching"
EFFECT = "NoSchedule"
CONDITION = "GpuSwitchHealthy"
MANAGER = "gpuswitch-agent"
"""The field manager of server-side apply, and the source of events."""

_ADDRESS = re.compile(r"([0-9a-f]{4,8})_([0-9a-f]{2})_([0-9a-f]{2})_([0-7])")


def part_of(address: str) -> str:
    """`0000_01_00_0` for 0000:01:00.0, as its D-Bus object is called: the name of an annotation has no colon.

    Its syntax: https://kubernetes.io/docs/concepts/overview/working-with-objects/annotations/#syntax-and-character-set
    """
    return address.replace(":", "_").replace(".", "_")


def address_of(part: str) -> str | None:
    """The other way; None: it is no address."""
    match = _ADDRESS.fullmatch(part)
    return None if match is None else "{}:{}:{}.{}".format(*match.groups())
