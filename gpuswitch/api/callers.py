"""Who called: what the bus says of a caller, and what /proc shows of its process."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

from gpuswitch.api.bus import Bus
from gpuswitch.api.serving import caller
from gpuswitch.errors import GpuswitchError
from gpuswitch.model.holders import Process, unit_and_session
from gpuswitch.runtime.threads import run_in_thread
from gpuswitch.switch.record import Requester

_T = TypeVar("_T")

SECONDS = 1.0
"""How long a switch waits until it is known who asked for it: long enough on a machine that is very busy."""


class Callers:
    """Tells callers on this bus."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    async def requester(self) -> Requester:
        """Who called the method that is being served, without what cannot be told. Raises LookupError outside of one.

        It has to be asked before the answer is sent: afterwards the caller may be gone. Uid and pid are of one process
        even then: the bus noted both when it connected, and gives its unique name to no other (specification, Unique
        Connection Name).
        """
        name = caller().name
        end = asyncio.get_running_loop().time() + SECONDS
        pid = await _by(end, partial(self._bus.process, name))
        found = await _by(end, partial(run_in_thread, partial(_process, pid))) if pid else None
        unit, command = found or ("", "")
        return Requester(uid=caller().user, pid=pid, unit=unit, command=command)


async def user_of(process: Process) -> int | None:
    """Who runs this process, by its real uid; None: it has ended, or nobody can tell."""
    return await _by(asyncio.get_running_loop().time() + SECONDS, partial(run_in_thread, partial(_user, process)))


async def _by(end: float, ask: Callable[[], Awaitable[_T]]) -> _T | None:
    """The answer; None where it is not known, or not told by then, which is a time of the loop's clock."""
    with suppress(GpuswitchError, TimeoutError):
        async with asyncio.timeout_at(end):
            return await ask()
    return None


def _user(process: Process) -> int | None:
    # In this order: had another process got the number before the first of them was read, the second shows it.
    try:
        status = Path(f"/proc/{process.pid}/status").read_text("utf-8", errors="replace")
        started = Path(f"/proc/{process.pid}/stat").read_text("utf-8", errors="replace").rpartition(")")[2].split()[19]
    except OSError:
        return None
    numbers = {key: fields.split() for key, _colon, fields in (line.partition(":") for line in status.splitlines())}
    # A thread has a number, too, and is no process.
    if int(started) != process.started or numbers["Tgid"] != [str(process.pid)]:
        return None
    return int(numbers["Uid"][0])


def _process(pid: int) -> tuple[str, str]:
    """The unit and the name of a process; empty where it is gone. /proc/PID/cgroup waits for a lock of the kernel's."""
    texts = []
    for file in ("cgroup", "comm"):
        try:
            texts.append(Path(f"/proc/{pid}/{file}").read_bytes().decode(errors="replace"))
        except OSError:
            texts.append("")
    unit, _ = unit_and_session(texts[0])
    return str(unit or ""), texts[1].rstrip("\n")
