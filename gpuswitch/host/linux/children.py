"""Programs that run beside the event loop.

asyncio's own subprocesses are no help: their transport kills what it is closed on, and a pipe that a program keeps open
makes whoever reads it wait. Here a program writes into memory, and its end is seen by a pidfd.
"""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

_MOST_OUTPUT = 1 << 20


@dataclass(frozen=True, slots=True)
class Identity:
    """Whose rights a program has."""

    uid: int
    gid: int


class Child:
    """A program with a session of its own and no descriptor but its standard ones; reaped when it ends."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        output: int = subprocess.DEVNULL,
        errors: int = subprocess.DEVNULL,
        identity: Identity | None = None,
    ) -> None:
        """Start it; returns as soon as the program runs.

        Raises:
            OSError: it cannot be started.
        """
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[int] = self._loop.create_future()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            cwd="/",
            env=environment,
            start_new_session=True,
            user=identity.uid if identity else None,
            group=identity.gid if identity else None,
            extra_groups=[] if identity else None,
        )
        self.pid = self._process.pid
        self._pidfd = os.pidfd_open(self.pid)
        self._loop.add_reader(self._pidfd, self._reap)

    async def wait(self) -> int:
        """Wait for its end; returns its status, negative for a signal."""
        return await asyncio.shield(self._ended)

    def send(self, number: signal.Signals) -> None:
        """Send it a signal, unless it has ended."""
        if not self._ended.done():
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def _reap(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        # Returns at once: a pidfd is readable when the process can be reaped.
        self._ended.set_result(self._process.wait())


def find(tools: str, name: str) -> str:
    """Where a program is, in one of the folders `tools`, joined by colons.

    Raises:
        FileNotFoundError: it is in none of them.
    """
    if path := shutil.which(name, path=tools):
        return path
    raise FileNotFoundError(errno.ENOENT, f"there is no {name} in {tools}")


async def run(
    command: Sequence[str], environment: Mapping[str, str], identity: Identity | None = None
) -> tuple[int, str, str]:
    """Run a program; returns its status and what it said, on its output and on its error output.

    A cancelled caller's program is killed: it must be one that leaves nothing half-done.

    Raises:
        OSError: it cannot be started.
    """
    said = [os.memfd_create(name) for name in ("output", "errors")]
    try:
        child = Child(command, environment, output=said[0], errors=said[1], identity=identity)
        try:
            status = await child.wait()
        finally:
            child.send(signal.SIGKILL)
        output, errors = (os.pread(descriptor, _MOST_OUTPUT, 0).decode(errors="replace") for descriptor in said)
    finally:
        for descriptor in said:
            os.close(descriptor)
    return status, output, errors
