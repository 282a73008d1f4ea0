"""A wedged GPU in words: what has not returned, who could make it return, and what is left where nobody can."""

from __future__ import annotations

from collections.abc import Iterable

from gpuswitch.model.address import PciAddress
from gpuswitch.model.drivers import NVIDIA, waits_for_ever
from gpuswitch.model.holders import Holder
from gpuswitch.switch.engine import StuckError
from gpuswitch.switch.holder_policy import in_the_way

_REBOOT = (
    "only a reboot frees it, and an ordinary one will hang: as root, write s, then u, then b to /proc/sysrq-trigger "
    "(sync the disks, remount them read-only, reboot)"
)


def first_words(gpu: PciAddress, stuck: StuckError) -> str:
    """What is known at once."""
    return f"{stuck}; nothing more is written to {gpu} until it does"


def report(gpu: PciAddress, stuck: StuckError, holders: Iterable[Holder] | None, nvidia: str) -> str:
    """The whole story. `holders`: who has it open now, None where that cannot be told; `nvidia`: its version, or ""."""
    words = first_words(gpu, stuck)
    if stuck.pending.what.endswith(" from nvidia") and waits_for_ever(NVIDIA, nvidia):
        return f"{words}. nvidia {nvidia} never returns from this, whoever lets go: {_REBOOT}"
    holders = tuple(holders or ())
    if holders:
        return f"{words}. It recovers by itself once these let go:\n{in_the_way(gpu, holders)}"
    unseen = "It recovers by itself should the kernel return; since nobody is seen to have it open, most likely"
    return f"{words}. {unseen} {_REBOOT}"
