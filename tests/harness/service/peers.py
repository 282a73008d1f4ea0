"""Others on the bus: a peer that calls us, and a message bus that misbehaves by script.

Both speak D-Bus through jeepney, which shares no code with the library that the daemon uses.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Self

import jeepney
from jeepney.bus_messages import MatchRule, Monitoring, message_bus
from jeepney.io.asyncio import DBusRouter, open_dbus_connection


class PeerError(Exception):
    """The error that a peer's call was answered with."""

    def __init__(self, answer: jeepney.Message) -> None:
        self.name: str = answer.header.fields[jeepney.HeaderFields.error_name]
        self.text: str = answer.body[0]
        self.body: tuple[Any, ...] = answer.body
        super().__init__(f"{self.name}: {self.text}")


class Peer:
    """A client of the bus at some address."""

    def __init__(self, router: DBusRouter) -> None:
        self._router = router
        self.name: str = router.unique_name

    @classmethod
    @asynccontextmanager
    async def on(cls, address: str) -> AsyncIterator[Self]:
        async with await open_dbus_connection(address) as connection:
            router = DBusRouter(connection)
            try:
                yield cls(router)
            finally:
                with suppress(EOFError):  # the bus may be gone by now; the library would not hang up then
                    await router.__aexit__(None, None, None)

    async def call(
        self, to: str, path: str, method: str, signature: str = "", *arguments: object, interactive: bool = False
    ) -> Any:
        """Call `method` (interface and member; or the member alone) and return the one value of the answer, if any.

        Raises PeerError.
        """
        interface, _, member = method.rpartition(".")
        address = jeepney.DBusAddress(path, to, interface or None)
        message = jeepney.new_method_call(address, member, signature, arguments)
        if interactive:
            message.header.flags |= jeepney.MessageFlag.allow_interactive_authorization
        answer = await self._router.send_and_get_reply(message)
        if answer.header.message_type is jeepney.MessageType.error:
            raise PeerError(answer)
        return answer.body[0] if answer.body else None

    async def signal(self, to: str, path: str, interface: str, member: str, signature: str, *values: object) -> None:
        """Send a signal to one other, who may not have asked for any."""
        message = jeepney.new_signal(jeepney.DBusAddress(path, interface=interface), member, signature, values)
        message.header.fields[jeepney.HeaderFields.destination] = to
        await self._router.send(message)

    @asynccontextmanager
    async def hear(self, sender: str) -> AsyncIterator["asyncio.Queue[jeepney.Message]"]:
        """All signals of `sender`."""
        rule = MatchRule(type="signal", sender=sender)
        await self._router.send_and_get_reply(message_bus.AddMatch(rule))
        with self._router.filter(rule, bufsize=0) as heard:
            yield heard


@asynccontextmanager
async def watching(address: str) -> AsyncIterator["asyncio.Queue[jeepney.Message]"]:
    """Every call that is made on the bus at this address, in order, as a monitor sees it."""
    async with await open_dbus_connection(address) as connection:
        router = DBusRouter(connection)
        with router.filter(MatchRule(type="method_call"), bufsize=0) as calls:
            await router.send_and_get_reply(Monitoring().BecomeMonitor(["type='method_call'"]))
            try:
                yield calls
            finally:
                with suppress(EOFError):
                    await router.__aexit__(None, None, None)


class ScriptedBus:
    """The far end of a connection: a message bus that does what the test says."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self._parser = jeepney.Parser()

    async def log_in(self) -> None:
        """Let the client in, and give it the name :1.1."""
        self.answer(await self.receive_hello(), "s", ":1.1")

    async def receive_hello(self) -> jeepney.Message:
        await self.reader.readuntil(b"\r\n")
        self.writer.write(b"OK 00\r\n")
        await self.reader.readuntil(b"BEGIN\r\n")
        return await self.receive()

    def answer(self, call: jeepney.Message, signature: str, *values: object) -> None:
        self.send(jeepney.new_method_return(call, signature, values))

    def send(self, *messages: jeepney.Message, first_serial: int = 1) -> None:
        """Send all of them in one go."""
        self.write(*(message.serialise(serial) for serial, message in enumerate(messages, first_serial)))

    def write(self, *data: bytes) -> None:
        self.writer.write(b"".join(data))

    async def close(self) -> None:
        self.writer.close()
        await self.writer.wait_closed()

    async def receive(self) -> jeepney.Message:
        while (message := self._parser.get_next_message()) is None:
            data = await self.reader.read(65536)
            if not data:
                raise EOFError
            self._parser.add_data(data)
        return message


async def until(bus: ScriptedBus, member: str) -> jeepney.Message:
    """The next call of this method."""
    while (message := await bus.receive()).header.fields.get(jeepney.HeaderFields.member) != member:
        pass
    return message


@asynccontextmanager
async def scripted_bus(folder: Path) -> AsyncIterator[tuple[str, "asyncio.Queue[ScriptedBus]"]]:
    """An address to connect to, and a queue of the connections that are made."""
    connections: asyncio.Queue[ScriptedBus] = asyncio.Queue()
    path = folder / "scripted"

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.put_nowait(ScriptedBus(reader, writer))

    server = await asyncio.start_unix_server(accept, path)
    async with server:
        yield f"unix:path={path}", connections
