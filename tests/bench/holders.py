"""How long it takes to find out who has a node open, on a machine with many processes, beside `fuser`."""

from __future__ import annotations

import asyncio
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from gpuswitch.host.linux.processes import LinuxProcesses
from gpuswitch.host.linux.sysfs import Roots
from gpuswitch.model.holders import HolderQuery
from tests.bench.table import Row, median

CROWDS = (500, 2000)
DESCRIPTORS = 40
"""Of each process: files, sockets, pipes and a device that nobody asks about."""
NODES = ("full", "zero")
ROUNDS = 15
_CROWD = """
import os, socket, sys
processes, descriptors = map(int, sys.argv[1:])
for _ in range(descriptors // 4 - 1):
    held = [os.open(path, os.O_RDONLY) for path in ("/dev/null", "/etc/passwd")]
    held += [os.open("/", os.O_RDONLY), socket.socket().detach()]
for _ in range(processes):
    if os.fork() == 0:
        os.close(1)
        os.read(0, 1)
        os._exit(0)
os.write(1, b".")
os.read(0, 1)
"""


class Spent(NamedTuple):
    """Seconds that a look took, and seconds of a processor."""

    wall: float
    cpu: float


def measure() -> Iterator[Row]:
    fuser = shutil.which("fuser")
    if fuser is None:
        sys.exit("fuser is missing; install it: apt-get install psmisc")
    for processes in CROWDS:
        with crowd(processes):
            first, ours, theirs = asyncio.run(_measure(fuser))
        among = f"among {processes}"
        yield Row(f"fuser, {among} (median of {ROUNDS})", median([each.wall for each in theirs]))
        yield Row(f"the service's scanner, {among} (median of {ROUNDS})", median([each.wall for each in ours]))
        yield Row("  its first look, start-up included", median([first.wall]))
        pairs = list(zip(ours, theirs, strict=True))
        wall = statistics.median(mine.wall / other.wall for mine, other in pairs)
        yield Row("  scanner / fuser, wall", f"{wall:.2f} x", "≤ 0.6 x")
        # The kernel tells it in hundredths of a second: of all rounds together.
        cpu = sum(mine.cpu for mine in ours) / sum(other.cpu for other in theirs)
        yield Row("  scanner / fuser, processor", f"{cpu:.2f} x", "≤ 1 x")


@contextmanager
def crowd(processes: int) -> Iterator[None]:
    """So many processes, in memory of their own, with so many descriptors."""
    command = [sys.executable, "-IS", "-c", _CROWD, str(processes), str(DESCRIPTORS)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(1) == b"."
        yield


def _used() -> float:
    """Seconds of a processor that this process and those that it has started and seen end have had: fuser's."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _scanners() -> float:
    """The same of the scanner, and of the other half of its looks: they are children that live on."""
    ticks = 0
    for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        said = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
        if "scan_main" in Path(f"/proc/{child}/cmdline").read_text():
            ticks += sum(map(int, said[11:15]))  # utime, stime, cutime and cstime (proc_pid_stat(5))
    return ticks / os.sysconf("SC_CLK_TCK")


async def _measure(fuser: str) -> tuple[Spent, list[Spent], list[Spent]]:
    """In turn, so that what else the machine does is the same for both."""
    processes = LinuxProcesses(Roots())
    query = HolderQuery((), nodes=NODES)
    nodes = [f"/dev/{node}" for node in NODES]
    theirs = []
    ours = []
    for _ in range(ROUNDS + 1):
        begun, used = time.perf_counter(), _used()
        subprocess.run([fuser, "--silent", *nodes], stderr=subprocess.DEVNULL, check=False)  # noqa: ASYNC221 - nothing else is to be done meanwhile
        theirs.append(Spent(time.perf_counter() - begun, _used() - used))
        begun, used = time.perf_counter(), _scanners()
        await processes.scan(query)
        ours.append(Spent(time.perf_counter() - begun, _scanners() - used))
    await processes.close()
    return ours[0], ours[1:], theirs[1:]
