"""Looks that may never return, each by a process of its own and under one deadline.

A read that waits in the kernel cannot be ended, and a thread of ours that does keeps us from ending. So a look that is
late is left alone, and becomes a word on what could not be seen.
"""

from __future__ import annotations

import os
import pickle
import select
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

LOOK_SECONDS = 30.0
"""How long a look may take. It takes milliseconds on a machine that is well, and seconds on an emulated one."""


class LookError(Exception):
    """A look did not come back, or said nothing."""


def gathered(looks: Mapping[str, Callable[[], object]], seconds: float = LOOK_SECONDS) -> dict[str, object]:
    """What each look returns, by its name; a `LookError` where it is late or has failed.

    Results go through a pipe, so they must be plain values (pickle). All looks share the deadline, and run at once.
    """
    found: dict[str, object] = {}
    readers: dict[int, tuple[str, int, bytearray]] = {}
    for name, look in looks.items():
        reader, pid = _begun(look, [*readers])
        readers[reader] = (name, pid, bytearray())
    deadline = time.monotonic() + seconds
    while readers:
        ready = select.select([*readers], [], [], max(0.0, deadline - time.monotonic()))[0]
        if not ready:
            break
        for reader in ready:
            name, pid, said = readers[reader]
            if part := os.read(reader, 1 << 16):
                said += part
                continue
            found[name] = _result(bytes(said))
            del readers[reader]
            os.close(reader)
            os.waitpid(pid, 0)
    for reader, (name, pid, _) in readers.items():
        os.close(reader)
        with suppress(ProcessLookupError):
            # One that waits in the kernel does not hear it before it comes back; then nobody needs it any more.
            os.kill(pid, signal.SIGKILL)
        found[name] = LookError("late")
    return found


def _begun(look: Callable[[], object], others: list[int]) -> tuple[int, int]:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        for descriptor in (reader, *others):
            os.close(descriptor)
        _told(look, writer)
    os.close(writer)
    return reader, pid


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
