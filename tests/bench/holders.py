"""How long it takes to find out who has a node open, on a machine with many processes, beside `fuser`."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from gpuswitch.host.linux.processes import LinuxProcesses
from gpuswitch.host.linux.sysfs import Roots
from gpuswitch.model.holders import HolderQuery
from tests.bench.table import Row, median

PROCESSES = 500
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


def measure() -> list[Row]:
    fuser = shutil.which("fuser")
    if fuser is None:
        sys.exit("fuser is missing; install it: apt-get install psmisc")
    with crowd():
        first, ours, theirs = asyncio.run(_measure(fuser))
    return [
        Row(f"fuser (median of {ROUNDS})", median(theirs)),
        Row(f"the service's scanner (median of {ROUNDS})", median(ours), "faster than fuser"),
        Row("  its first look, start-up included", median([first])),
    ]


@contextmanager
def crowd() -> Iterator[None]:
    """So many processes, in memory of their own, with so many descriptors."""
    command = [sys.executable, "-IS", "-c", _CROWD, str(PROCESSES), str(DESCRIPTORS)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(1) == b"."
        yield


async def _measure(fuser: str) -> tuple[float, list[float], list[float]]:
    """In turn, so that what else the machine does is the same for both."""
    processes = LinuxProcesses(Roots())
    query = HolderQuery((), nodes=NODES)
    nodes = [f"/dev/{node}" for node in NODES]
    theirs = []
    ours = []
    for _ in range(ROUNDS + 1):
        begun = time.perf_counter()
        subprocess.run([fuser, "--silent", *nodes], stderr=subprocess.DEVNULL, check=False)  # noqa: ASYNC221 - nothing else is to be done meanwhile
        theirs.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        await processes.scan(query)
        ours.append(time.perf_counter() - begun)
    await processes.close()
    return ours[0], ours[1:], theirs[1:]
