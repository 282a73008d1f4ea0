"""RLIMIT_MEMLOCK: vfio locks all memory of a virtual machine, and counts it against the limit of who runs that.

vfio_lock_acct and vfio_pin_pages_remote in drivers/vfio/vfio_iommu_type1.c, do_update_pinned in
drivers/iommu/iommufd/pages.c; neither counts for who has CAP_IPC_LOCK.
"""

from __future__ import annotations

import os
import pwd
import resource
from pathlib import Path

from gpuswitch.cli.asking import can_ask, go_on
from gpuswitch.cli.failures import CtlError
from gpuswitch.cli.output import problem
from gpuswitch.cli.translate import _
from gpuswitch.errors import NotViable

EVERYBODYS = 8 << 20
"""Bytes: what everybody has, so that nobody has seen to it: MLOCK_LIMIT in include/uapi/linux/resource.h (64 KiB before
Linux 5.16), and DefaultLimitMEMLOCK= of systemd. Who has more has been given it, and what a command needs only that
command knows.
"""
_CAP_IPC_LOCK = 14
FILE = "/etc/security/limits.d/50-vfio.conf"


def check(*, user: bool, yes: bool) -> None:
    """Say that a command could lock next to no memory, before anything is moved.

    `user`: it is to open the GPU as who runs it, so that no virtual machine could work: who is there is asked whether
    to go on, unless he has said `yes`. Without it, the command may yet become root, and it is only said.

    Raises:
        CtlError: it is not to be run so.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if not _is_everybodys(soft) or _may_lock_all():
        return
    why = _(
        "it may lock {size} of memory, and vfio locks all that a virtual machine has, so QEMU would end with 'Cannot "
        "allocate memory'",
        size=f"{soft >> 10} KiB",
    )
    remedy = _remedy(hard)
    if not user:
        problem(_("unless the command becomes root, {why}; {remedy}", why=why, remedy=remedy))
    elif yes:
        problem(f"{why}; {remedy}")
    elif can_ask():
        problem(f"{why}; {remedy}")
        go_on()
    else:
        text = _(
            "cannot run this as you: {why}; {remedy}; or, to run it all the same, add --yes", why=why, remedy=remedy
        )
        raise CtlError.of(NotViable, text, is_whole=True)


def _is_everybodys(limit: int) -> bool:
    return limit != resource.RLIM_INFINITY and limit <= EVERYBODYS


def _may_lock_all() -> bool:
    """Whether it has CAP_IPC_LOCK, as root has, and what is run as root gets."""
    status = Path("/proc/self/status").read_text("utf-8", "replace")
    effective = next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff:"))
    return bool(int(effective, 16) >> _CAP_IPC_LOCK & 1)


def _user() -> str:
    """Whose limit it is, as limits.conf(5) has it."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return f"{os.getuid()}:"


def _remedy(hard: int) -> str:
    if hard == resource.RLIM_INFINITY:
        return _("for this shell: {command}", command="ulimit -l unlimited")
    return _(
        "for this shell: {command}; for good: the line '{line}' in {file}, and log in anew",
        command="sudo prlimit --pid $$ --memlock=unlimited",
        line=f"{_user()} - memlock unlimited",
        file=FILE,
    )
