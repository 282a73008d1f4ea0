"""The daemon's place on the bus: its name, the objects that it exports and the calls that it makes."""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final, Self

from gpuswitch.api.connection import DRIVER, Connection, Message, MessageFlag, MessageType, NameFlag, RequestNameReply
from gpuswitch.api.departures import Departures
from gpuswitch.api.interface import Interface
from gpuswitch.api.serving import Authority, Server
from gpuswitch.api.signatures import plain
from gpuswitch.api.standard import Introspectable, ObjectManager, Peer, Properties, interface_values, is_below, told
from gpuswitch.api.users import Users
from gpuswitch.errors import Failed, Timeout
from gpuswitch.runtime.threads import run_in_thread

logger = logging.getLogger(__name__)

BUS_SECONDS: Final = 10.0
"""Seconds that the message bus itself has to answer."""


_BUS: Final = (DRIVER, "/org/freedesktop/DBus", DRIVER)
"""Name, path and interface of the message bus itself."""


_MACHINE_ID: Final = (Path("/etc/machine-id"), Path("/var/lib/dbus/machine-id"))
"""Where it is, and where it was before there was systemd (dbus-uuidgen(1))."""


class BusError(Failed):
    """The bus, or somebody on it, did not do what it was asked."""


class BusLostError(BusError):
    """There is no connection to the bus any more."""


class CallError(BusError):
    """A call was answered with an error: `remote_name` is its D-Bus name, `sender` who answered, `str()` its text."""

    def __init__(self, remote_name: str, text: str, sender: str) -> None:
        super().__init__(text)
        self.remote_name = remote_name
        self.sender = sender


class Bus:
    """A connection to a message bus. Made by `connect`; not safe to use from other threads."""

    def __init__(self, connection: Connection, address: str) -> None:
        self._connection = connection
        self._address = address
        self._apart: Bus | None = None
        self._objects: dict[str, dict[str, Interface]] = {}
        self._calls: dict[int, asyncio.Future[Message]] = {}
        self._gone: Callable[[str], None] | None = None
        self._watched = False
        self._users = Users(self.user, self.process)
        self._departures = Departures(connection, self._users)
        self._server = Server(connection, self._objects, self._everywhere, self._users, self.watch_names)
        connection.owner_of = self._owner
        connection.add_message_handler(self._receive)
        self._end = asyncio.create_task(self._await_end())

    @classmethod
    async def connect(cls, address: str) -> Self:
        """Connect to the bus at `address` (D-Bus specification, Server Addresses). Raises BusError if that fails."""
        try:
            async with asyncio.timeout(BUS_SECONDS):
                connection = Connection(address)
                await connection.connect()
        except TimeoutError as error:
            raise BusError(f"cannot connect to the bus at {address}: no answer in {BUS_SECONDS:g} s") from error
        except Exception as error:
            raise BusError(f"cannot connect to the bus at {address}: {error}") from error
        return cls(connection, address)

    async def ask_apart(self) -> None:
        """From now on, ask others over a second connection. Raises BusError if there can be none.

        The bus keeps what it has for a connection in order, so an answer comes behind all calls that wait there. The
        second one has no name that anybody knows, and drops what it was not asked for.
        """
        self._apart = await type(self).connect(self._address)

    @property
    def name(self) -> str:
        """Our unique name."""
        return str(self._connection.unique_name)

    async def lost(self) -> None:
        """Return when the connection is gone, or the one that others are asked over, for whatever reason."""
        ends = [self._end]
        if self._apart is not None:
            ends.append(asyncio.create_task(self._apart.lost()))
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)

    async def close(self) -> None:
        """Answer the calls that are still served with an error, then hang up."""
        await self._server.stop()
        await self._users.stop()
        self._connection.disconnect()
        await self._end
        if self._apart is not None:
            await self._apart.close()

    def authorize_by(self, authority: Authority) -> None:
        """Have this one say who may call what; until then nobody may."""
        self._server.authority = authority

    # Objects

    def export(self, path: str, *interfaces: Interface, manages: bool = False) -> None:
        """Make an object with these interfaces; with `manages`, an ObjectManager for all that is exported below it.

        Raises ValueError if there is an object already, or if an interface belongs to another.
        """
        if path in self._objects:
            raise ValueError(f"cannot export {path}: it is exported already")
        every = [*interfaces, *self._everywhere(path), *([ObjectManager(self._objects, path)] if manages else [])]
        table = {each.dbus_name: each for each in every}
        table[Properties.dbus_name] = Properties(table)
        for each in table.values():
            each.attach(self._connection, path)
        self._objects[path] = table
        for manager in self._managers(path):
            manager.interfaces_added(path, interface_values(table))

    def unexport(self, path: str) -> None:
        """Take an object away. Raises KeyError if there is none."""
        table = self._objects.pop(path)
        for each in table.values():
            each.detach()
        self._server.object_gone(path)
        for manager in self._managers(path):
            manager.interfaces_removed(path, list(told(table)))

    def _managers(self, path: str) -> list[ObjectManager]:
        above = [table for root, table in self._objects.items() if is_below(path, root)]
        return [each for table in above for each in table.values() if isinstance(each, ObjectManager)]

    def _everywhere(self, path: str) -> list[Interface]:
        """What also answers on a path that only leads to objects."""
        return [Introspectable(self._objects, path), Peer(self._machine_id)]

    # Calls that we make

    async def own(self, name: str) -> None:
        """Become the owner of `name`. Raises BusError if another owns it or the bus does not let us."""
        request = Message(*_BUS, "RequestName", signature="su", body=[name, NameFlag.DO_NOT_QUEUE.value])
        try:
            answer = await self._call(request, BUS_SECONDS)
        except BusError as error:
            raise BusError(f"cannot own {name}: {error}") from error
        if answer != [RequestNameReply.PRIMARY_OWNER.value]:
            raise BusError(f"cannot own {name}: another gpuswitchd owns it")

    async def call(self, message: Message, *, within: float | None) -> list[object]:
        """Call a method and return the body of the answer in plain Python.

        Call only those whose answers carry no file descriptors: dbus-broker would hang up on us, who negotiate none
        (its peer.c, peer_queue_reply).

        Raises CallError if the answer is an error, Timeout if there is none `within` so many seconds (None: it may
        take as long as it likes), and BusLostError. Cancelled or timed out, nothing of the call is left behind.
        """
        if self._apart is not None:
            return await self._apart.call(message, within=within)
        return await self._call(message, within)

    async def _call(self, message: Message, within: float | None) -> list[object]:
        if not self._connection.connected:
            raise BusLostError(f"cannot call {message.member}: the connection to the bus is lost")
        message.serial = self._connection.next_serial()
        answer = self._calls[message.serial] = asyncio.get_running_loop().create_future()
        try:
            self._connection.send(message)
            async with asyncio.timeout(within):
                reply = await answer
        except TimeoutError:
            raise Timeout(f"{message.destination} did not answer {message.member} within {within:g} s") from None
        finally:
            del self._calls[message.serial]
        body = [plain(value) for value in reply.body]
        if reply.message_type is MessageType.ERROR:
            raise CallError(reply.error_name, str(body[0]) if body else reply.error_name, str(reply.sender))
        return body

    async def user(self, name: str) -> int:
        """The uid of the process behind a connection.

        This and `process` are asked instead of GetConnectionCredentials: dbus-broker answers that one with a file
        descriptor too, and hangs up on whoever has negotiated none (its driver.c, driver_send_unicast).

        Raises CallError if there is no such connection any more or its uid is not known, and as `call` does.
        """
        return await self._number("GetConnectionUnixUser", name)

    async def process(self, name: str) -> int | None:
        """The pid of the process behind a connection. None for one of a PID namespace that the bus cannot see: it is 0
        there (pid_namespaces(7)), which dbus-broker passes on.

        Raises CallError if there is no such connection any more or its pid is not known, and as `call` does.
        """
        return await self._number("GetConnectionUnixProcessID", name) or None

    async def _number(self, member: str, name: str) -> int:
        answer = await self.call(Message(*_BUS, member, signature="s", body=[name]), within=BUS_SECONDS)
        match answer:
            case [int(number)]:
                return number
            case _:
                raise BusError(f"cannot use what the bus answers to {member}: it is no number")

    def watch_names(self, gone: Callable[[str], None] | None) -> None:
        """Have `gone` called with the name of each connection that leaves the bus; None: no longer.

        Whoever asks for the user of a connection after this hears of its end, or is told that it is gone already: the
        bus works off what one connection sends in order (specification, Message Bus Message Routing).
        """
        self._gone = gone
        self._watch(on=gone is not None or self._connection.crowded)

    def _watch(self, *, on: bool) -> None:
        """Hear of connections that leave: while calls of some are under way, and in a crowd."""
        if on == self._watched:
            return
        self._watched = on
        if self._apart is not None:
            self._apart.watch_names(self._leave if on else None)
            return
        # arg2 is the new owner: of a unique name there never is one again
        rule = "type='signal',sender='org.freedesktop.DBus',member='NameOwnerChanged',arg2=''"
        member = "AddMatch" if on else "RemoveMatch"
        self.send(Message(*_BUS, member, signature="s", body=[rule], flags=MessageFlag.NO_REPLY_EXPECTED))

    def send(self, message: Message) -> None:
        """Send what is not answered, over the same connection as calls; nothing once the bus is lost."""
        if self._apart is not None:
            self._apart.send(message)
        elif self._connection.connected:
            self._connection.send(message)

    async def _machine_id(self) -> str:
        return await run_in_thread(_read_machine_id)

    async def _await_end(self) -> None:
        try:
            await self._connection.wait_for_disconnect()
        except Exception as error:  # noqa: BLE001 -- whatever it was: it is logged, and `lost` says that it happened
            under_way = self._departures.lost(self._server.calls)
            logger.warning("the connection to the bus is lost: %s%s", error, under_way)
        for answer in self._calls.values():
            if not answer.done():
                answer.set_exception(BusLostError("the connection to the bus was lost before the answer came"))

    def _owner(self, name: str) -> int | str:
        """In whose turn this connection is served: its user's, where that is known."""
        if (user := self._users.known(name)) is not None:
            return user
        if self._connection.crowded and name:
            self._users.learn(name)
            self._watch(on=True)
        return name

    def _receive(self, message: Message) -> bool:
        """Called by the connection for each message. Returns True: the library has nothing more to do for it."""
        if message.message_type is MessageType.METHOD_CALL:
            self._server.serve(message)
        elif message.message_type is MessageType.SIGNAL:
            self._hear(message)
        elif (answer := self._calls.get(message.reply_serial)) and not answer.done():
            answer.set_result(message)
        return True

    def _hear(self, message: Message) -> None:
        """Who has left the bus: the name, its old owner, and no new one."""
        if message.member == "NameOwnerChanged" and message.sender == DRIVER:
            name, _, new = message.body
            if not new:
                self._leave(name)

    def _leave(self, name: str) -> None:
        """A connection is gone, or nobody has this name any more."""
        if name.startswith(":"):
            self._departures.left(name, self._server.called_by(name))
        if self._gone is not None:
            self._gone(name)
        elif not self._connection.crowded:
            self._watch(on=False)


def _read_machine_id() -> str:
    """Raises Failed. The bus is not asked: to a system bus nobody may send `Peer` (dbus-daemon 1.14, system.conf)."""
    for file in _MACHINE_ID:
        with suppress(OSError):
            if found := file.read_text().strip():
                return found
    raise Failed(f"cannot tell the id of this machine: {_MACHINE_ID[0]} cannot be read")
