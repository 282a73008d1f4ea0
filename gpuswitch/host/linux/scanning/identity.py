"""Who a process is."""

import os
import pwd
import re
from contextlib import suppress
from dataclasses import dataclass
from threading import Thread

from gpuswitch.host.linux.scanning.files import text

_UID = re.compile(r"^Uid:\s*(\d+)", re.MULTILINE)
# PF_KTHREAD in include/linux/sched.h; TASK_COMM_LEN, less the zero at its end.
_KERNEL_THREAD = 0x00200000
_LONGEST_NAME = 15
_NAME_SECONDS = 1.0
"""How long a user's name is waited for: it may come from a directory in the network (LDAP, sssd), which may be away."""
_asked: dict[int, Thread] = {}
"""Whose name is still waited for, or was."""


@dataclass(frozen=True, slots=True)
class Who:
    """`started` in clock ticks since boot; `cgroup` as /proc/PID/cgroup has it; `arguments` of its command line.

    `empty`: it has no descriptors at all, being a thread of the kernel's or dead.
    """

    parent: int
    started: int
    command: str
    arguments: list[str]
    uid: int
    user: str
    cgroup: str
    empty: bool


def who(folder: int, *, sparing: bool = False) -> Who | None:
    """The process whose folder in /proc this is; None: it is gone.

    Its command line comes out of its memory, so this may take its time; `sparing`: without that, and its user's name.
    `user` is the number where nobody knows its name, or nobody has said it within _NAME_SECONDS.
    """
    stat = text("stat", folder)
    uid = _UID.search(text("status", folder))
    if not stat or uid is None:
        return None
    # The name is in brackets, and may hold brackets itself; what follows is field 3 of proc(5) and on.
    fields = stat.rpartition(")")[2].split()
    arguments = [""] if sparing else text("cmdline", folder).split("\0")
    return Who(
        parent=int(fields[1]),
        started=int(fields[19]),
        command=_command(stat.partition("(")[2].rpartition(")")[0], arguments[0]),
        arguments=arguments,
        uid=int(uid[1]),
        user=uid[1] if sparing else _user(int(uid[1])),
        cgroup=text("cgroup", folder),
        empty=bool(int(fields[6]) & _KERNEL_THREAD) or (fields[0] in "ZX" and int(fields[17]) <= 1),
    )


def _command(name: str, path: str) -> str:
    """The kernel's name for it, which is cut, also within a letter; in full, where its command line begins with it."""
    full = os.path.basename(path)  # noqa: PTH119 - text, of whatever form
    cut = len(name.encode()) >= _LONGEST_NAME
    return full if cut and full.startswith(name.rstrip("\N{REPLACEMENT CHARACTER}")) else name


def _user(uid: int) -> str:
    """While a question has no answer there is no second one: the library waits for as long as it likes."""
    found: list[str] = []

    def ask() -> None:
        with suppress(KeyError):
            found.append(pwd.getpwuid(uid).pw_name)

    if uid not in _asked or not _asked[uid].is_alive():
        _asked[uid] = Thread(target=ask, daemon=True)
        _asked[uid].start()
        _asked[uid].join(_NAME_SECONDS)
    return found[0] if found else str(uid)
