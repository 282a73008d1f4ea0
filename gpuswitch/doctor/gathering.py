"""Looks that may never return, each by a process of its own and under one deadline.

A read that waits in the kernel cannot be ended, and a thread of ours that does keeps us from ending. So a look that is
late is killed, and becomes a word on what could not be seen.
"""

from __future__ import annotations

import os
import pickle
import select
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

LOOK_SECONDS = 30.0
"""How long a look may take. It takes milliseconds on a machine that is well, and seconds on an emulated one."""


_END_SECONDS = 1.0
"""How long those that were killed may take to go: milliseconds, or as long as they wait in the kernel."""


class LookError(Exception):
    """A look did not come back, or said nothing."""


@dataclass(slots=True)
class _Begun:
    """A look under way. `process` is the leader of a group of its own, which has whatever the look begins."""

    name: str
    process: int
    said: bytearray = field(default_factory=bytearray)


def gathered(looks: Mapping[str, Callable[[], object]], seconds: float = LOOK_SECONDS) -> dict[str, object]:
    """What each look returns, by its name; a `LookError` where it is late or has failed.

    Results go through a pipe, so they must be plain values (pickle). All looks share the deadline, and run at once.
    None of them, and nothing that one has begun, is left when this returns or is interrupted, but for what waits in
    the kernel: that is killed, and gone as soon as it comes back.
    """
    found: dict[str, object] = {}
    under_way: dict[int, _Begun] = {}
    try:
        for name, look in looks.items():
            reader, process = _begun(look, [*under_way])
            under_way[reader] = _Begun(name, process)
        deadline = time.monotonic() + seconds
        while under_way:
            ready = select.select([*under_way], [], [], max(0.0, deadline - time.monotonic()))[0]
            if not ready:
                break
            for reader in ready:
                begun = under_way[reader]
                if part := os.read(reader, 1 << 16):
                    begun.said += part
                    continue
                found[begun.name] = _result(bytes(begun.said))
                del under_way[reader]
                os.close(reader)
                _end([begun.process])
    finally:
        for reader in under_way:
            os.close(reader)
        _end([begun.process for begun in under_way.values()])
    return found | {begun.name: LookError("late") for begun in under_way.values()}


def _end(processes: Sequence[int]) -> None:
    """Kill these with all that they have begun, and reap those that go.

    One that waits in the kernel does not hear it before it comes back. That is not waited for: whoever reaps orphans
    gets it when this command has ended.
    """
    going = {}
    for process in processes:
        # Not yet reaped, so the number of its group is nobody else's.
        os.killpg(process, signal.SIGKILL)
        going[os.pidfd_open(process)] = process
    deadline = time.monotonic() + _END_SECONDS
    while going and (gone := select.select([*going], [], [], max(0.0, deadline - time.monotonic()))[0]):
        for descriptor in gone:
            os.waitpid(going.pop(descriptor), 0)
            os.close(descriptor)
    for descriptor in going:
        os.close(descriptor)


def _begun(look: Callable[[], object], others: list[int]) -> tuple[int, int]:
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        os.setpgid(0, 0)
        for descriptor in (reader, *others):
            os.close(descriptor)
        _told(look, writer)
    # Here as well: whichever of the two comes first, the group is there before anybody kills it.
    os.setpgid(process, process)
    os.close(writer)
    return reader, process


def _told(look: Callable[[], object], writer: int) -> None:
    """Does not return."""
    try:
        try:
            said = pickle.dumps((True, look()))
        except Exception as error:  # noqa: BLE001 -- whatever went wrong is told, and ends this look alone
            said = pickle.dumps((False, f"{type(error).__name__}: {error}"))
        with open(writer, "wb") as pipe:
            pipe.write(said)
    finally:
        os._exit(0)  # as the child that it is: what the parent has to say at its end is not ours


def _result(said: bytes) -> object:
    if not said:
        return LookError("it ended without a word")
    worked, value = pickle.loads(said)  # noqa: S301 -- of our own process
    return value if worked else LookError(value)
