"""A byte stream with deadlines: what the QMP client and the command channel have in common."""

from __future__ import annotations

import select
import socket
import time


class Channel:
    """One end of a connected stream socket. Deadlines are instants of time.monotonic().

    Every method raises TimeoutError when the deadline has passed and EOFError when the other side is gone.
    What was received before a TimeoutError is kept for the next call.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._received = bytearray()

    def fileno(self) -> int:
        return self._socket.fileno()

    def has_input(self) -> bool:
        """Whether something has come that was not yet given out, or the end."""
        return bool(self._received) or bool(select.select([self._socket], [], [], 0)[0])

    def send(self, data: bytes, deadline: float) -> None:
        self._arm(deadline)
        try:
            self._socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            raise EOFError from None

    def line(self, deadline: float) -> bytes:
        """The next line, without its newline."""
        searched = 0
        while (end := self._received.find(b"\n", searched)) < 0:
            searched = len(self._received)
            self._receive(deadline)
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        return line

    def exactly(self, count: int, deadline: float) -> bytes:
        while len(self._received) < count:
            self._receive(deadline)
        data = bytes(self._received[:count])
        del self._received[:count]
        return data

    def _receive(self, deadline: float) -> None:
        self._arm(deadline)
        try:
            data = self._socket.recv(1 << 16)
        except ConnectionResetError:
            data = b""
        if not data:
            raise EOFError
        self._received += data

    def _arm(self, deadline: float) -> None:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError
        self._socket.settimeout(remaining)
