#!/usr/bin/python3 -ISE
"""The keeper of one container: makes it, waits until it ends or nobody wants it any more, and leaves nothing of it.

    unshare --mount keeper.py CONTROL CONSOLE LAYER...       < ARCHIVE

CONTROL is the number of a Unix stream socket. The program inside that runs commands connects to a socket that the
keeper listens on; that connection is handed over as soon as it is there, in a message of one byte. When the other side
closes CONTROL, or dies, the container is killed. The keeper ends when nothing is left of it.
CONSOLE is the number of a file that gets what is written to the container's console. LAYERs are folders, the uppermost
first; ARCHIVE is a tar of what lies on top of them. What the container writes is in memory.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import tty
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

BOOT = Path(__file__).with_name("boot.sh")
OVERLAY = Path(__file__).parents[1] / "debian/overlay.sh"

FIRST = ("setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child")
THEN = ("unshare", "--cgroup", "--ipc", "--net", "--uts")
"""Its first process joins its control group in between: only so is that the uppermost one in there, with no other."""

PR_SET_CHILD_SUBREAPER = 36
"""linux/prctl.h"""


@contextmanager
def folder() -> Iterator[Path]:
    """A place for the container's socket and mount points; what is mounted there is seen from here only."""
    with tempfile.TemporaryDirectory(prefix="gpuswitch-container-") as name:
        yield Path(name)


@contextmanager
def control_group(place: Path) -> Iterator[Path]:
    """A control group of version 2 below our own, whatever version the machine itself uses."""
    hierarchy = place / "cgroup"
    hierarchy.mkdir()
    subprocess.run(["mount", "-t", "cgroup2", "cgroup2", hierarchy], check=True)
    (own,) = [line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::")]
    group = Path(f"{hierarchy}{own}") / place.name
    group.mkdir()
    try:
        yield group
    finally:
        await_empty(group)
        for path, _, _ in os.walk(group, topdown=False):
            Path(path).rmdir()
        subprocess.run(["umount", hierarchy], check=True)
        hierarchy.rmdir()


def await_empty(group: Path) -> None:
    """Wait until its last process is gone. The kernel tells of a change of this file (its cgroup-v2.rst, populated)."""
    with (group / "cgroup.events").open() as events:
        poll = select.poll()
        poll.register(events, select.POLLPRI)
        while "populated 1" in events.read():
            poll.poll()
            events.seek(0)


@contextmanager
def container(place: Path, group: Path, layers: list[str], console: str, log: int) -> Iterator[subprocess.Popen[bytes]]:
    """The container, from its first process on; it is killed at the end. It dies with us, too."""
    join = ("sh", "-c", 'echo 0 >"$1"; shift; exec "$@"', "sh", group / "cgroup.procs")
    process = subprocess.Popen([*FIRST, *join, *THEN, "sh", BOOT, place, console, OVERLAY, *layers], stderr=log)
    try:
        yield process
    finally:
        process.kill()
        # the container's first process is ours by now
        with suppress(ChildProcessError):
            while True:
                os.wait()


def keep(control: socket.socket, log: int, layers: list[str]) -> None:
    with ExitStack() as stack:
        place = stack.enter_context(folder())
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(place / "agent"))
        listener.listen()
        ours, theirs = os.openpty()
        # what is written there is taken as it is
        tty.setraw(theirs)
        group = stack.enter_context(control_group(place))
        process = stack.enter_context(container(place, group, layers, os.ttyname(theirs), log))
        watch(process, control, listener, ours, log)


def watch(
    process: subprocess.Popen[bytes], control: socket.socket, listener: socket.socket, terminal: int, log: int
) -> None:
    """Write down the console and hand over who connects, until the container has ended, or nobody wants it any more."""
    ended = os.pidfd_open(process.pid)
    awaited: list[socket.socket | int] = [control, listener, terminal, ended]
    while True:
        ready = select.select(awaited, [], [])[0]
        if listener in ready:
            connection, _ = listener.accept()
            with connection, suppress(BrokenPipeError):
                socket.send_fds(control, [b"."], [connection.fileno()])
        if terminal in ready:
            os.write(log, os.read(terminal, 1 << 16))
        elif control in ready or ended in ready:
            return


def main() -> None:
    # From a terminal, ctrl-c goes to all; we are told by whoever started us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Of what dies with its parent, we are the next one; nobody else would wait for it.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    control, log, *layers = sys.argv[1:]
    with socket.socket(fileno=int(control)) as end:
        keep(end, int(log), layers)


if __name__ == "__main__":
    main()
