"""One service of the system bus, talked to for the length of one operation.

A connection takes a few milliseconds to make, and ends with the operation: so nothing has to be mended where the bus
went away in between, what was subscribed to goes with it, and no signal wakes a service that has nothing to do. One
task at a time may use it. It negotiates no file descriptors, and dbus-broker hangs up where an answer carries one: what
is answered with one (logind's Inhibit) is left to systemd's own programs. jeepney's own router is left out: where the
bus is lost it lets those wait who listen for signals, and where a log-in is cancelled its socket stays open.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Self

from jeepney import DBusAddress, HeaderFields, MatchRule, Message, MessageFlag, MessageType, new_method_call
from jeepney.auth import BEGIN, AuthenticationError, Authenticator
from jeepney.bus import get_bus
from jeepney.bus_messages import message_bus
from jeepney.io.asyncio import DBusConnection

from gpuswitch.errors import KernelError

PROPERTIES = "org.freedesktop.DBus.Properties"

_BUS = "org.freedesktop.DBus"
# The bus answers in place of a service that is not there, or that it could not start for us: in whatever words systemd
# has for that. These errors of the bus itself say something else.
_OTHERWISE = frozenset({"NoReply", "AccessDenied", "LimitsExceeded", "TimedOut"})
_ERRNO: Mapping[str, int] = {
    "NoSuchUnit": errno.ENOENT,
    "NoSuchSession": errno.ENOENT,
    "AccessDenied": errno.EACCES,
    "InteractiveAuthorizationRequired": errno.EACCES,
    "InvalidArgs": errno.EINVAL,
    "UnitMasked": errno.EPERM,
    "OnlyByDependency": errno.EPERM,
}


class CallError(Exception):
    """The error that a call was answered with: its D-Bus `name`, and what it says to a person.

    With `absent`, nobody was there to answer.
    """

    def __init__(self, name: str, text: str, *, absent: bool = False) -> None:
        super().__init__(text)
        self.name = name
        self.text = text.rstrip(".")
        self.absent = absent

    @property
    def kind(self) -> str:
        """The last part of its name: `NoSuchUnit`."""
        return self.name.rpartition(".")[2]

    @property
    def errno(self) -> int:
        return errno.ENOENT if self.absent else _ERRNO.get(self.kind, errno.EIO)


@dataclass(frozen=True, slots=True)
class Signal:
    member: str
    arguments: tuple[Any, ...]


class Remote:
    """The service that has the name `name` on the system bus. With `start`, the bus may start it for us."""

    def __init__(self, connection: DBusConnection, name: str, *, start: bool) -> None:
        self._connection = connection
        self._name = name
        self._flags = 0 if start else MessageFlag.no_auto_start.value
        self._owner = ""
        self._answers: dict[int, Message] = {}
        self._signals: deque[Signal | None] = deque()

    @classmethod
    async def connect(cls, name: str, *, start: bool = False) -> Self:
        """Connect to the system bus.

        Raises:
            OSError, EOFError: there is none, or it does not let us in.
        """
        try:
            path = get_bus("SYSTEM")
        except (ValueError, LookupError, RuntimeError) as error:  # what jeepney's parser of addresses stumbles over
            raise OSError(errno.EINVAL, "DBUS_SYSTEM_BUS_ADDRESS is not the address of a bus") from error
        reader, writer = await asyncio.open_unix_connection(path)
        remote = cls(DBusConnection(reader, writer), name, start=start)
        try:
            await remote._log_in()
        except BaseException:
            remote.close()
            raise
        return remote

    def close(self) -> None:
        """Hang up."""
        self._connection.writer.close()

    async def call(self, path: str, interface: str, method: str, signature: str = "", *arguments: object) -> Any:
        """Call a method of the service; returns the one value of its answer, None where it has none.

        Raises:
            CallError: it answered with an error.
            OSError, EOFError: the bus is lost.
        """
        address = DBusAddress(path, self._name, interface)
        message = new_method_call(address, method, signature or None, arguments)
        message.header.flags |= self._flags
        return await self._ask(message)

    async def listen(self, interface: str, member: str) -> None:
        """Have `signal` tell of these signals from now on."""
        changes = MatchRule(type="signal", sender=_BUS, interface=_BUS, member="NameOwnerChanged")
        changes.add_arg_condition(0, self._name)
        wanted = MatchRule(type="signal", sender=self._name, interface=interface, member=member)
        # In one go: each answer that is waited for alone wakes the bus and us once more.
        rules = [await self._sent(message_bus.AddMatch(rule)) for rule in (changes, wanted)]
        owner = await self._sent(message_bus.GetNameOwner(self._name))
        for rule in rules:
            await self._answer(rule)
        self._owner = await self._answer(owner)

    async def signal(self) -> Signal | None:
        """Wait for the next signal. None: the service was replaced by a new run of it, and some may be missed.

        Raises:
            OSError, EOFError: the bus is lost.
        """
        while not self._signals:
            await self._receive()
        return self._signals.popleft()

    async def _log_in(self) -> None:
        connection = self._connection
        talk = Authenticator()
        try:
            for line in talk:
                connection.writer.write(line)
                data = await connection.reader.read(1024)
                if not data:
                    raise EOFError
                talk.feed(data)
        except AuthenticationError as error:
            raise OSError(errno.EACCES, "it does not let us in") from error
        connection.writer.write(BEGIN)
        await self._ask(message_bus.Hello())

    async def _ask(self, message: Message) -> Any:
        return await self._answer(await self._sent(message))

    async def _sent(self, message: Message) -> int:
        """The number by which its answer is known."""
        serial: int = next(self._connection.outgoing_serial)
        await self._connection.send(message, serial=serial)
        return serial

    async def _answer(self, serial: int) -> Any:
        while serial not in self._answers:
            await self._receive()
        answer = self._answers.pop(serial)
        if answer.header.message_type is MessageType.error:
            name = str(answer.header.fields[HeaderFields.error_name])
            by_bus = answer.header.fields.get(HeaderFields.sender) == _BUS
            text = str(answer.body[0]) if answer.body else name
            raise CallError(name, text, absent=by_bus and name.rpartition(".")[2] not in _OTHERWISE)
        return answer.body[0] if answer.body else None

    async def _receive(self) -> None:
        """Take one message from the bus. Any peer may send us any signal, so the sender is what makes it true."""
        message = await self._connection.receive()
        fields = message.header.fields
        if (serial := fields.get(HeaderFields.reply_serial)) is not None:
            self._answers[serial] = message
        elif message.header.message_type is MessageType.signal:
            sender, member = fields.get(HeaderFields.sender), fields.get(HeaderFields.member)
            if sender == _BUS and member == "NameOwnerChanged" and message.body[0] == self._name:
                self._owner = message.body[2]
                if self._owner:
                    self._signals.append(None)
            elif sender == self._owner:
                self._signals.append(Signal(member, message.body))


@asynccontextmanager
async def connected_to(name: str, operation: str, subject: str, *, start: bool = False) -> AsyncIterator[Remote]:
    """A connection for one operation; what goes wrong in it is a `KernelError` that says "cannot OPERATION SUBJECT"."""
    try:
        remote = await Remote.connect(name, start=start)
        try:
            yield remote
        finally:
            remote.close()
    except CallError as error:
        text = f"there is no {name} on the system bus ({error.text})" if error.absent else error.text
        raise KernelError(operation, subject, error.errno, text) from error
    except EOFError as error:
        raise KernelError(operation, subject, errno.EIO, "the connection to the system bus is lost") from error
    except OSError as error:
        number = error.errno or errno.EIO
        text = f"the system bus cannot be used: {error.strerror or os.strerror(number)}"
        raise KernelError(operation, subject, number, text) from error


def plain(values: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
    """An `a{sv}` as jeepney reads it (each value a pair of signature and value), without the signatures."""
    return {key: value for key, (_, value) in values.items()}
