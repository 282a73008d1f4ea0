"""The service as seen from the command line: calls over D-Bus, and the signals of one switch.

Whatever goes wrong here is a `CtlError` with a sentence and an exit status.
"""

from __future__ import annotations

import os
import select
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self

from jeepney import (
    DBusAddress,
    HeaderFields,
    MatchRule,
    Message,
    MessageFlag,
    MessageType,
    message_bus,
    new_method_call,
)
from jeepney.auth import AuthenticationError
from jeepney.io.blocking import DBusConnection, open_dbus_connection

from gpuswitch.errors import (
    AUTHENTICATION_REQUIRED,
    EXIT_CODES,
    EXIT_UNREACHABLE,
    Failed,
    InvalidArgument,
    NotAuthorized,
    Timeout,
)

NAME = "org.gpuswitch1"
ROOT = "/org/gpuswitch1"
MANAGER = "org.gpuswitch1.Manager"
GPU = "org.gpuswitch1.Gpu"
OBJECTS = "org.freedesktop.DBus.ObjectManager"
PROPERTIES = "org.freedesktop.DBus.Properties"

Options = Mapping[str, tuple[str, Any]]
"""An `a{sv}` as jeepney writes it: each value a pair of signature and value."""
DECISION_SECONDS = 180.0
"""To begin a switch may take a look at every process, and the end of another GPU's switch."""
ANSWER_SECONDS = 30.0
"""How long an answer may take that does not wait for a switch: longer than dbus-daemon waits for a service to start.
dbus-broker leaves that to systemd."""

_BUS_ERROR = "org.freedesktop.DBus.Error."
_NOT_RUNNING = ("ServiceUnknown", "NameHasNoOwner", "Spawn.", "TimedOut")
_WENT_AWAY = ("NoReply", "Disconnected")


class CtlError(Exception):
    """What `gpuswitchctl` ends with when it did not do what it was asked: text for a person, and an exit status."""

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code


class AskedForError(CtlError):
    """A person has to prove that they may do this."""


@dataclass(frozen=True, slots=True)
class StepChange:
    """What has just become of step `index` (from 1) of `count`; `seconds` is how long it took, 0 while it runs."""

    index: int
    count: int
    kind: str
    title: str
    status: str
    seconds: float

    @property
    def at_work(self) -> bool:
        return self.status in {"running", "reverting"}


class Service:
    """gpuswitchd, on the bus at `address` (None: the system bus)."""

    def __init__(self, connection: DBusConnection, address: str | None) -> None:
        self.connection = connection
        self._address = address

    @classmethod
    def connect(cls, address: str | None) -> Self:
        where = f"the bus at {address}" if address else "the system bus"
        try:
            return cls(open_dbus_connection(address or "SYSTEM", auth_timeout=ANSWER_SECONDS), address)
        except (OSError, AuthenticationError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CtlError(f"cannot connect to {where}: {reason}", EXIT_UNREACHABLE) from error
        except (ValueError, LookupError, RuntimeError) as error:  # what jeepney's parser of addresses stumbles over
            given = address or os.environ.get("DBUS_SYSTEM_BUS_ADDRESS")
            raise CtlError(
                f"cannot use the bus address {given!r}: write it like unix:path=/run/dbus/system_bus_socket",
                InvalidArgument.exit_code,
            ) from error

    def close(self) -> None:
        self.connection.close()

    def gpu(self, selector: str) -> Gpu:
        """The GPU of that name or address; "" where there is only one."""
        reply = self.ask(call(NAME, ROOT, MANAGER, "GetGpu", "s", selector))
        return Gpu(self, owner=reply.header.fields[HeaderFields.sender], path=reply.body[0])

    def gpus(self) -> list[dict[str, Any]]:
        """The properties of every GPU, in address order."""
        objects = self.ask(call(NAME, ROOT, OBJECTS, "GetManagedObjects")).body[0]
        found = [plain_values(interfaces[GPU]) for _, interfaces in sorted(objects.items()) if GPU in interfaces]
        return sorted(found, key=lambda gpu: str(gpu["Address"]))

    def groups(self) -> list[dict[str, Any]]:
        """Every PCI function that is in an IOMMU group."""
        return [plain_values(each) for each in self.ask(call(NAME, ROOT, MANAGER, "Groups")).body[0]]

    def config(self) -> list[dict[str, Any]]:
        """Every setting in force."""
        return [plain_values(each) for each in self.ask(call(NAME, ROOT, MANAGER, "Config")).body[0]]

    def warnings(self) -> list[str]:
        """What the configuration says that is about no GPU of this host, a sentence each."""
        return list(self.ask(call(NAME, ROOT, MANAGER, "Warnings")).body[0])

    def history(self, limit: int) -> list[dict[str, Any]]:
        """The last finished switches without their steps, newest first; 0: all."""
        return [plain_values(each) for each in self.ask(call(NAME, ROOT, MANAGER, "History", "u", limit)).body[0]]

    def history_entry(self, switch: str) -> dict[str, Any]:
        """A finished switch with its steps."""
        return plain_values(self.ask(call(NAME, ROOT, MANAGER, "HistoryEntry", "s", switch)).body[0])

    def ask_allowed(self, message: Message, seconds: float = ANSWER_SECONDS) -> Message:
        """The same for what not everybody may do: a person at a terminal is asked, which may take as long as it likes.

        Only once that is needed: members of the group `gpuswitch` are not. A desktop's agent asks, where there is one.
        """
        try:
            return self.ask(message, seconds)
        except AskedForError:
            from gpuswitch.cli.agent import agent, can_ask  # noqa: PLC0415 -- brings subprocess, for few who ask

            if not can_ask():
                raise
        message.header.flags |= MessageFlag.allow_interactive_authorization
        with suppress(AskedForError):
            return self.ask(message, None)
        with agent():
            return self.ask(message, None)

    def ask(self, message: Message, seconds: float | None = ANSWER_SECONDS) -> Message:
        """Send a method call and return its answer, which may take that long."""
        try:
            reply = self.connection.send_and_get_reply(message, timeout=seconds)
        except TimeoutError:
            raise CtlError(f"the service did not answer within {seconds:g} s", EXIT_UNREACHABLE) from None
        except OSError as error:
            raise bus_lost(error) from error
        return self.checked(reply)

    def checked(self, reply: Message) -> Message:
        """The answer, unless it is an error."""
        if reply.header.message_type is not MessageType.error:
            return reply
        name = str(reply.header.fields[HeaderFields.error_name])
        text = str(reply.body[0]) if reply.body and reply.body[0] else name
        raise self._error(name, text)

    def _error(self, name: str, text: str) -> CtlError:
        if name == AUTHENTICATION_REQUIRED:
            return AskedForError(f"{text}; on a terminal you are asked, and root is not", NotAuthorized.exit_code)
        if name in EXIT_CODES:
            return CtlError(text, EXIT_CODES[name])
        kind = name.removeprefix(_BUS_ERROR)
        if kind == "AccessDenied":
            return CtlError("the policy of the bus does not allow it", NotAuthorized.exit_code)
        if kind == "InvalidArgs":
            return CtlError(text, InvalidArgument.exit_code)
        if kind.startswith(_WENT_AWAY):
            return CtlError("the service went away before it answered; it may have been restarted", EXIT_UNREACHABLE)
        if kind.startswith(_NOT_RUNNING) or name.startswith("org.freedesktop.systemd1."):
            return CtlError(self._not_running(text), EXIT_UNREACHABLE)
        return CtlError(text, Failed.exit_code)

    def _not_running(self, text: str) -> str:
        if self._address:
            return f"the gpuswitch service is not on the bus at {self._address}; start it: gpuswitchd"
        return f"the gpuswitch service is not running ({text}); start it: systemctl start gpuswitchd"


class Gpu:
    """One GPU of the service. It talks to the very process that named it, whose signals it believes, and no other."""

    def __init__(self, service: Service, owner: str, path: str) -> None:
        self._service = service
        self._owner = owner
        self._path = path
        self._signals: deque[Message] = deque()
        self._rule = MatchRule(type="signal", sender=owner, interface=GPU, member="StepChanged", path=path)
        self._subscribed = False

    def properties(self) -> dict[str, Any]:
        return plain_values(self._ask(PROPERTIES, "GetAll", "s", GPU))

    def plan(self, target: str, options: Options) -> list[dict[str, Any]]:
        """The steps of a switch to `host` or `vfio`, without taking one."""
        steps = self._ask(GPU, "Plan", "sa{sv}", target, options, seconds=DECISION_SECONDS)
        return [plain_values(step) for step in steps]

    def holders(self) -> list[dict[str, Any]]:
        """Who has it open."""
        return [plain_values(holder) for holder in self._ask(GPU, "Holders", seconds=DECISION_SECONDS)]

    def move(self, target: str, options: Options) -> str:
        """Begin a switch to `host` or `vfio`, or join the one under way; returns its id.

        `follow` misses nothing of it.
        """
        return self._begin({"vfio": "ToVfio", "host": "ToHost"}[target], options)

    def trial(self, seconds: float, options: Options) -> str:
        """As `move` to vfio; so many seconds after it came there, it goes home by itself."""
        return self._begin("Trial", options, seconds)

    def recover(self) -> str:
        """Begin a recovery, or join the one under way; returns its id. `follow` misses nothing of it."""
        return self._begin("Recover", {})

    def _begin(self, method: str, options: Options, *numbers: float) -> str:
        self._subscribe()
        message = call(self._owner, self._path, GPU, method, "d" * len(numbers) + "a{sv}", *numbers, options)
        return str(self._service.ask_allowed(message, DECISION_SECONDS).body[0])

    def cancel(self, switch: str) -> None:
        """Take a running switch back. `follow` misses nothing of it."""
        self._subscribe()
        self._service.ask_allowed(call(self._owner, self._path, GPU, "Cancel", "s", switch))

    def follow(self, switch: str, seconds: float | None) -> Iterator[StepChange | dict[str, Any]]:
        """What becomes of each step, as it happens; the record of the finished switch is the last.

        Raises:
            CtlError: also when it has not finished within `seconds`.

        """
        connection = self._service.connection
        deadline = None if seconds is None else time.monotonic() + seconds
        serial = next(connection.outgoing_serial)
        try:
            connection.send(call(self._owner, self._path, GPU, "Wait", "s", switch), serial=serial)
            while True:
                # Those that came while `move` waited for its answer are in the queue.
                message = self._signals.popleft() if self._signals else connection.receive(timeout=_left(deadline))
                if message.header.fields.get(HeaderFields.reply_serial) == serial:
                    yield plain_values(self._service.checked(message).body[0])
                    return
                if self._rule.matches(message) and message.body[0] == switch:
                    yield StepChange(*message.body[1:])
        except TimeoutError:
            text = f"switch {switch} has not finished within {seconds:g} s, and goes on"
            raise CtlError(text, Timeout.exit_code) from None
        except OSError as error:
            raise bus_lost(error) from error

    def watch(self) -> None:
        """From now on, `pause` ends when a property of it changes."""
        rule = MatchRule(type="signal", sender=self._owner, interface=PROPERTIES, path=self._path)
        self._service.ask(message_bus.AddMatch(rule))

    def pause(self, seconds: float | None, descriptor: int) -> bool:
        """Until this can be read (True), the service says something, or so many seconds are over (None: never)."""
        connection = self._service.connection
        if self._take_in():
            return False
        readable, _, _ = select.select([connection.sock, descriptor], [], [], seconds)
        if connection.sock in readable:
            self._take_in()
        return descriptor in readable

    def _take_in(self) -> bool:
        """Whatever has come and nobody has read; what `follow` is to have of it is kept. Whether there was anything."""
        some = False
        try:
            while True:
                message = self._service.connection.receive(timeout=0)
                some = True
                if self._rule.matches(message):
                    self._signals.append(message)
        except TimeoutError:
            return some
        except OSError as error:
            raise bus_lost(error) from error

    def _subscribe(self) -> None:
        if self._subscribed:
            return
        self._subscribed = True
        self._service.ask(message_bus.AddMatch(self._rule))
        self._service.connection.filter(self._rule, queue=self._signals)

    def _ask(
        self, interface: str, method: str, signature: str = "", *arguments: object, seconds: float = ANSWER_SECONDS
    ) -> Any:
        message = call(self._owner, self._path, interface, method, signature, *arguments)
        return self._service.ask(message, seconds).body[0]


def call(to: str, path: str, interface: str, method: str, signature: str = "", *arguments: object) -> Message:
    return new_method_call(DBusAddress(path, to, interface), method, signature or None, arguments)


def plain_values(values: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
    """An `a{sv}` as jeepney reads it (pairs of signature and value), without the signatures, also further down."""
    return {key: _plain(signature, value) for key, (signature, value) in values.items()}


def bus_lost(error: OSError) -> CtlError:
    return CtlError(f"the connection to the bus is lost: {error.strerror or error}", EXIT_UNREACHABLE)


def _plain(signature: str, value: Any) -> Any:
    if signature == "aa{sv}":
        return [plain_values(each) for each in value]
    return plain_values(value) if signature == "a{sv}" else value


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())
