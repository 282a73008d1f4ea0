"""The machine's system bus, out here: who connects to a socket of ours is connected to the bus in there.

guest/bus_relay.py is the other end, and describes what goes over the virtio-serial port between the two. A client out
here starts twenty times as fast as one in there; the bus takes it for a program of root's.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
import tempfile
import threading
from asyncio import StreamReader, StreamWriter
from contextlib import suppress
from pathlib import Path

from tests.harness.virtual_machines.inside.bus_relay import HEADER, MOST, READY


class Relay:
    """Serves connections in a thread of its own for as long as QEMU has the other end of `port`.

    They carry bytes, and no descriptors.
    """

    def __init__(self, port: socket.socket, *, booting: bool) -> None:
        """Listen. Who connects to a machine that is `booting` is served when the relay in there has started."""
        self._folder = tempfile.TemporaryDirectory(prefix="gpuswitch-bus-")
        path = Path(self._folder.name, "bus")
        self.address = f"unix:path={path}"
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listening.bind(str(path))
        self._listening.listen()
        self._port = port
        self._numbers = itertools.count(1)
        self._clients: dict[int, StreamWriter] = {}
        self._up = asyncio.Event()
        if not booting:
            self._up.set()
        self._runner = asyncio.Runner()
        self._loop = self._runner.get_loop()
        self._thread = threading.Thread(target=self._run, daemon=True, name="relay of a system bus")
        self._thread.start()

    def wait_up(self, timeout: float) -> None:
        """Wait until the other end has started. TimeoutError after so many seconds."""
        asyncio.run_coroutine_threadsafe(self._up.wait(), self._loop).result(timeout)

    def forget(self) -> None:
        """End all connections: the machine is about to be booted anew."""
        self._loop.call_soon_threadsafe(self._forget)

    def close(self) -> None:
        """Clear up. QEMU has ended."""
        self._thread.join()
        self._folder.cleanup()

    def _run(self) -> None:
        with self._runner:
            self._runner.run(self._serve())

    async def _serve(self) -> None:
        from_machine, to_machine = await asyncio.open_connection(sock=self._port)

        async def carry(reader: StreamReader, writer: StreamWriter) -> None:
            number = next(self._numbers)
            self._clients[number] = writer
            with suppress(OSError):
                while data := await reader.read(MOST):
                    await self._up.wait()
                    to_machine.write(HEADER.pack(number, len(data)) + data)
                    await to_machine.drain()
                if self._clients.pop(number, None):
                    to_machine.write(HEADER.pack(number, 0))
            writer.close()

        async with await asyncio.start_unix_server(carry, sock=self._listening):
            with suppress(OSError):
                await self._deliver(from_machine)
            self._forget()
        to_machine.close()

    async def _deliver(self, port: StreamReader) -> None:
        received = bytearray()
        while data := await port.read(MOST):
            received += data
            if not self._up.is_set():
                start = received.find(READY)
                if start < 0:
                    continue
                del received[: start + len(READY)]
                self._up.set()
            while len(received) >= HEADER.size:
                number, size = HEADER.unpack_from(received)
                end = HEADER.size + size
                if len(received) < end:
                    break
                self._to_client(number, bytes(received[HEADER.size : end]))
                del received[:end]

    def _to_client(self, number: int, body: bytes) -> None:
        client = self._clients.get(number)
        if client is None:
            return
        if body:
            client.write(body)
        else:
            del self._clients[number]
            client.close()

    def _forget(self) -> None:
        self._up.clear()
        for client in self._clients.values():
            client.close()
        self._clients.clear()
