#!/usr/bin/python3 -ISE
"""Brings connections to the machine's system bus that come in over a virtio-serial port.

    bus_relay.py PORT

Both ways there are frames: two numbers of 32 bits, big-endian, and a body. The numbers are that of the connection and
the size of the body. The first frame of a number opens a connection, one without a body says that it has ended.
At start: READY, which is no frame.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import sys
from contextlib import suppress

BUS = "/run/dbus/system_bus_socket"
HEADER = struct.Struct(">II")
MOST = 1 << 16
READY = b"\0harness: the relay of the system bus\0"
"""Of a relay that has just been started. Whatever came before is of another boot."""


class Relay:
    def __init__(self, port: str) -> None:
        self._port = os.open(port, os.O_RDWR | os.O_CLOEXEC)
        self._received = bytearray()
        self._connections: dict[int, socket.socket] = {}
        self._numbers: dict[int, int] = {}
        self._poll = select.poll()
        self._poll.register(self._port, select.POLLIN)

    def run(self) -> None:
        self._write(READY)
        while True:
            for descriptor, _ in self._poll.poll():
                if descriptor == self._port:
                    self._from_port()
                elif descriptor in self._numbers:
                    self._from_bus(self._numbers[descriptor])

    def _from_port(self) -> None:
        self._received += os.read(self._port, MOST)
        while len(self._received) >= HEADER.size:
            number, size = HEADER.unpack_from(self._received)
            end = HEADER.size + size
            if len(self._received) < end:
                return
            body = bytes(self._received[HEADER.size : end])
            del self._received[:end]
            if not body:
                self._close(number)
            else:
                self._to_bus(number, body)

    def _to_bus(self, number: int, body: bytes) -> None:
        try:
            if number not in self._connections:
                self._open(number)
            self._connections[number].sendall(body)
        except OSError:
            self._end(number)

    def _from_bus(self, number: int) -> None:
        data = b""
        with suppress(ConnectionResetError):
            data = self._connections[number].recv(MOST)
        if data:
            self._write(HEADER.pack(number, len(data)) + data)
        else:
            self._end(number)

    def _open(self, number: int) -> None:
        connection = self._connections[number] = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.connect(BUS)
        self._numbers[connection.fileno()] = number
        self._poll.register(connection, select.POLLIN)

    def _end(self, number: int) -> None:
        self._close(number)
        self._write(HEADER.pack(number, 0))

    def _close(self, number: int) -> None:
        connection = self._connections.pop(number, None)
        if connection is None:
            return
        if self._numbers.pop(connection.fileno(), None) is not None:
            self._poll.unregister(connection)
        connection.close()

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._port, rest[:MOST]) :]


if __name__ == "__main__":
    Relay(sys.argv[1]).run()
