"""Writes the log to journald, with fields: the native protocol (systemd.io/JOURNAL_NATIVE_PROTOCOL).

One datagram a line. It never waits: where journald does not read, the line goes to standard error if that takes it, and
else is lost and counted. Of what stands in the log, systemd adds who wrote it (`_SYSTEMD_UNIT=`, `_PID=`) by itself.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import select
import socket
import sys
from array import array
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import TextIO

from gpuswitch.log.events import FAULT
from gpuswitch.log.fields import fields_of

SOCKET = "/run/systemd/journal/socket"
IDENTIFIER = "gpuswitchd"
_STANDARD_ERROR = 2
_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
"""syslog(3): critical, error, warning, informational; below that, 7: debug."""
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
"""Without them, journald takes it for a file, and those are to have names (server_process_native_file in
src/journal/journald-native.c)."""
_TOO_LONG = (errno.EMSGSIZE, errno.ENOBUFS)


def log_handler() -> logging.Handler:
    """Where the log goes: to journald, where standard error does; else to standard error, as it is."""
    plain = logging.StreamHandler(sys.stderr)
    return JournalHandler(plain) if is_journal(_STANDARD_ERROR) else plain


def is_journal(descriptor: int) -> bool:
    """Whether this is the stream to journald that systemd opened for us ($JOURNAL_STREAM, systemd.exec(5))."""
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        there = os.fstat(descriptor)
    except OSError:
        return False
    return (device, inode) == (str(there.st_dev), str(there.st_ino))


class JournalHandler(logging.Handler):
    """Sends each record to `path`; `otherwise` writes to a stream where that cannot be."""

    def __init__(self, otherwise: logging.StreamHandler[TextIO], path: str = SOCKET) -> None:
        super().__init__()
        self._otherwise = otherwise
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        self._lost = 0

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if self._lost and self._sent(_lost(self._lost)):
                self._lost = 0
            if self._sent(record):
                return
            if self._otherwise_can_write():
                self._otherwise.emit(record)
            else:
                self._lost += 1
        except Exception:  # noqa: BLE001 -- as logging.Handler.emit has it: no line of the log ends the service
            self.handleError(record)

    def close(self) -> None:
        self._socket.close()
        super().close()

    def _sent(self, record: logging.LogRecord) -> bool:
        """Whether journald has it: not where it does not read, or is not there."""
        data = encoded(self._fields(record))
        try:
            self._socket.sendto(data, self._path)
        except OSError as error:
            return error.errno in _TOO_LONG and self._sent_as_memory(data)
        return True

    def _sent_as_memory(self, data: bytes) -> bool:
        """The same in memory that journald is handed, and that nobody can change any more."""
        with open(os.memfd_create(IDENTIFIER, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), "wb") as memory:  # noqa: PTH123 -- no path
            memory.write(data)
            memory.flush()
            fcntl.fcntl(memory, fcntl.F_ADD_SEALS, _SEALS)
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [memory.fileno()]))
            with suppress(OSError):
                self._socket.sendmsg([], [rights], 0, self._path)
                return True
        return False

    def _fields(self, record: logging.LogRecord) -> Iterator[tuple[str, str]]:
        yield "MESSAGE", self.format(record)
        yield "PRIORITY", str(next((number for level, number in _PRIORITIES if record.levelno >= level), 7))
        yield "SYSLOG_IDENTIFIER", IDENTIFIER
        yield "CODE_FILE", record.pathname
        yield "CODE_LINE", str(record.lineno)
        yield "CODE_FUNC", record.funcName or ""
        # What nobody expected is logged with its traceback, wherever that is (docs/style.md, Errors).
        own = {"MESSAGE_ID": FAULT.message_id} if record.exc_info else {}
        yield from {**own, **fields_of(record)}.items()

    def _otherwise_can_write(self) -> bool:
        """Without waiting for whoever reads it."""
        with suppress(OSError, ValueError):
            poll = select.poll()
            poll.register(self._otherwise.stream.fileno(), select.POLLOUT)
            return any(events & select.POLLOUT for _, events in poll.poll(0))
        return False


def encoded(fields: Iterable[tuple[str, str]]) -> bytes:
    """Fields as journald reads them: `NAME=value`; a value of several lines after its length in 8 bytes."""
    lines = bytearray()
    for name, text in fields:
        value = text.encode(errors="backslashreplace")
        if b"\n" in value:
            lines += name.encode() + b"\n" + len(value).to_bytes(8, "little") + value + b"\n"
        else:
            lines += name.encode() + b"=" + value + b"\n"
    return bytes(lines)


def _lost(lines: int) -> logging.LogRecord:
    return logging.LogRecord(
        "gpuswitch", logging.WARNING, __file__, 0, "%d lines of the log are lost: journald did not read", (lines,), None
    )
