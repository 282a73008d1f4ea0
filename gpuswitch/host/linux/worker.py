"""A process of ours that may be in the kernel for ever: what does a GPU's operations, and what scans for holders.

A worker may be in the kernel for ever, and nothing of ours may then depend on it. So it is a plain process with a
session of its own (a terminal's ^C does not reach it), it is never sent a signal (some kernel waits turn from S into D
or spin after one), and it has no descriptor but its socket: all three standard ones are /dev/null or that socket, since
a pipe or the journal's socket that a stuck process keeps open makes whoever waits for its end wait for ever. What goes
wrong in it comes back in its replies; if it dies, its exit status tells. asyncio's own subprocesses are no help: their
transport kills what it is closed on.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
from collections.abc import Callable, Sequence

_LONGEST_REPLY = 1 << 17
# What is meant for the daemon (LD_PRELOAD, PYTHON...) is not meant for a program that writes to the kernel.
_ENVIRONMENT: dict[str, str] = {}


class Worker:
    """One worker process. `received` gets each of its messages; `ended` is told how, once, when it is dead."""

    def __init__(
        self,
        command: Sequence[str],
        received: Callable[[Worker, bytes], None],
        ended: Callable[[Worker, str], None],
    ) -> None:
        """Start it; returns as soon as the program runs.

        Raises:
            OSError: it cannot be started.
        """
        self._received = received
        self._ended = ended
        self._loop = asyncio.get_running_loop()
        self.gone = asyncio.Event()
        # Each message arrives as a whole, or not at all: neither side can be left with half of one.
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                self._process = subprocess.Popen(
                    command,
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    close_fds=True,
                    cwd="/",
                    env=_ENVIRONMENT,
                    start_new_session=True,
                )
                self._pidfd = os.pidfd_open(self._process.pid)
            except OSError:
                self._socket.close()
                raise
        self._socket.setblocking(False)
        self.pid = self._process.pid
        self._loop.add_reader(self._socket, self._receive)
        self._loop.add_reader(self._pidfd, self._end)

    def send(self, message: bytes) -> None:
        """Give it something to do.

        Raises:
            OSError: it is gone.
        """
        self._socket.send(message)

    def let_go(self) -> None:
        """Close our end: it ends when it is idle, or when the kernel lets it be."""
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket)
            self._socket.close()

    def _receive(self) -> None:
        while self._socket.fileno() >= 0:
            try:
                message = self._socket.recv(_LONGEST_REPLY)
            except OSError:  # EAGAIN: that was all; ECONNRESET: it died with a request unread
                return
            if not message:
                # End-of-file, and readable for ever. It is about to end, which the pidfd tells.
                self._loop.remove_reader(self._socket)
                return
            self._received(self, message)

    def _end(self) -> None:
        """It is dead. What it said before it died still counts."""
        self._receive()
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self.let_go()
        status = self._process.wait()  # returns at once: a pidfd is readable when the process can be reaped
        self.gone.set()
        self._ended(self, f"died of signal {-status}" if status < 0 else f"ended with status {status}")
