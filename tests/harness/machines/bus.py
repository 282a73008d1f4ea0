"""A client of a machine's system bus that runs out here, where a program starts at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

from jeepney import DBusAddress, HeaderFields, MatchRule, Message, MessageType, message_bus, new_method_call
from jeepney.io.blocking import open_dbus_connection

CALL_SECONDS = 120.0


class BusError(Exception):
    """The answer to a call is an error: its name, and its text."""

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        super().__init__(f"{name}: {text}")


@dataclass(frozen=True)
class BusInterface:
    """One interface of an object: the name on the bus, the path, and the interface."""

    name: str
    path: str
    interface: str


class Bus:
    """For one thread. All methods raise TimeoutError when nobody answers, OSError when the bus is gone."""

    def __init__(self, address: str) -> None:
        self._connection = open_dbus_connection(address, auth_timeout=CALL_SECONDS)

    @property
    def name(self) -> str:
        """The unique name on the bus."""
        return str(self._connection.unique_name)

    def close(self) -> None:
        self._connection.close()

    def call(
        self, target: BusInterface, method: str, signature: str = "", *arguments: Any, timeout: float = CALL_SECONDS
    ) -> tuple[Any, ...]:
        """Call a method; gives what it returns. A value of type `v` is a pair of signature and value.

        Raises:
            BusError: so it was answered.
        """
        to = DBusAddress(target.path, target.name, target.interface)
        message = new_method_call(to, method, signature or None, arguments)
        return answer(self._connection.send_and_get_reply(message, timeout=timeout))

    def get(self, target: BusInterface, name: str, *, timeout: float = CALL_SECONDS) -> Any:
        """A property, without signatures; also those in an `a{sv}` are left out."""
        properties = BusInterface(target.name, target.path, "org.freedesktop.DBus.Properties")
        [value] = self.call(properties, "Get", "ss", target.interface, name, timeout=timeout)
        return plain(*value)

    def until(self, rule: MatchRule, met: Callable[[], bool], *, timeout: float = CALL_SECONDS) -> None:
        """Wait until it is so; look when a signal comes that the rule fits, and once before."""
        with self.signals(rule) as signals:
            while not met():
                self._connection.recv_until_filtered(signals, timeout=timeout)

    @contextmanager
    def signals(self, rule: MatchRule) -> Iterator[deque[Message]]:
        """The signals that the rule fits, from now on; `next_signal` waits for one."""
        answer(self._connection.send_and_get_reply(message_bus.AddMatch(rule), timeout=CALL_SECONDS))
        signals: deque[Message] = deque()
        # The bus looks up who has the sender's name; a signal has that one's unique name.
        ours = copy(rule)
        ours.header_fields = {name: value for name, value in rule.header_fields.items() if name != "sender"}
        with self._connection.filter(ours, queue=signals):
            yield signals
        answer(self._connection.send_and_get_reply(message_bus.RemoveMatch(rule), timeout=CALL_SECONDS))

    def next_signal(self, signals: deque[Message], *, timeout: float = CALL_SECONDS) -> tuple[Any, ...]:
        """What the next of these signals says."""
        return tuple(self._connection.recv_until_filtered(signals, timeout=timeout).body)


def answer(reply: Message) -> tuple[Any, ...]:
    """What a call returned."""
    if reply.header.message_type is MessageType.error:
        name = str(reply.header.fields[HeaderFields.error_name])
        raise BusError(name, str(reply.body[0]) if reply.body else "")
    return tuple(reply.body)


def plain(signature: str, value: Any) -> Any:
    """A value of type `v` without its signature, and without those that are in an `a{sv}` in it."""
    if signature == "a{sv}":
        return {key: plain(*each) for key, each in value.items()}
    if signature == "aa{sv}":
        return [plain("a{sv}", each) for each in value]
    return value
