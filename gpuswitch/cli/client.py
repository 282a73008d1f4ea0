"""The service as seen from the command line: calls over D-Bus, and the signals of switches.

Whatever goes wrong here is a `CtlError` with a sentence and an exit status.
"""

from __future__ import annotations

import os
import time
from collections import deque, namedtuple
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from select import POLLERR, POLLHUP, POLLIN, poll
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
from jeepney.bus import get_bus
from jeepney.io.blocking import DBusConnection, prep_socket

from gpuswitch.cli.failures import AskedForError, CtlError, called
from gpuswitch.cli.interrupts import INTERRUPTS
from gpuswitch.cli.output import ReaderGoneError, clean, output_descriptor
from gpuswitch.cli.parser import BUS_VARIABLE
from gpuswitch.cli.translate import _, is_english, reworded
from gpuswitch.errors import (
    AUTHENTICATION_REQUIRED,
    EXIT_CODES,
    EXIT_UNREACHABLE,
    PREFIX,
    Failed,
    InvalidArgument,
    NoSuchGpu,
    NotAuthorized,
    Timeout,
)

NAME = "org.gpuswitch1"
ROOT = "/org/gpuswitch1"
MANAGER = "org.gpuswitch1.Manager"
GPU = "org.gpuswitch1.Gpu"
OBJECTS = "org.freedesktop.DBus.ObjectManager"
PEER = "org.freedesktop.DBus.Peer"
PROPERTIES = "org.freedesktop.DBus.Properties"

Options = Mapping[str, tuple[str, Any]]
"""An `a{sv}` as jeepney writes it: each value a pair of signature and value."""
DECISION_SECONDS = 180.0
"""To begin a switch may take a look at every process, and the end of another GPU's switch."""
ANSWER_SECONDS = 30.0
"""How long an answer may take that does not wait for a switch: longer than dbus-daemon waits for a service to start.
dbus-broker leaves that to systemd."""

_LONGEST_POLL = 86400.0
"""Seconds that the kernel is asked to wait at once: it takes milliseconds as an int, and people any number."""

CANNOT_CONNECT = (OSError, AuthenticationError)
"""What jeepney raises where nobody listens there, or does not want us."""
BAD_ADDRESS = (ValueError, LookupError, RuntimeError)
"""What its parser of addresses stumbles over."""

_SYSTEM_BUS_VARIABLE = "DBUS_SYSTEM_BUS_ADDRESS"
_BUS_ERROR = "org.freedesktop.DBus.Error."
_NOT_RUNNING = ("ServiceUnknown", "NameHasNoOwner", "Spawn.", "TimedOut")
_WENT_AWAY = ("NoReply", "Disconnected")

# Not dataclasses, nor typing's: those take longer to import than all that is done with them here.
Signal = namedtuple("Signal", "path interface member body")
"""What the service told everybody."""


class Typed(Exception):  # noqa: N818 -- nothing has gone wrong
    """There is something to be read from the terminal that was listened to."""


class _Connection(DBusConnection):  # type: ignore[misc]  # jeepney has no types
    """One whose first call, which it makes by itself, has to be answered within so many seconds, too."""

    def __init__(self, address: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        socket = prep_socket(get_bus(address), timeout=seconds)
        self._first = deadline - time.monotonic()
        super().__init__(socket)

    def send_and_get_reply(self, message: Message, *, timeout: float | None = None) -> Message:
        return super().send_and_get_reply(message, timeout=self._first if timeout is None else timeout)


class Service:
    """gpuswitchd, on the bus at `address` (None: the system bus).

    `seconds` is how long its user lets all that is asked of it take (None: they have not said), and `deadline` when
    that is over, by the monotonic clock.
    """

    def __init__(
        self,
        connection: DBusConnection,
        address: str | None,
        *,
        seconds: float | None = None,
        deadline: float | None = None,
    ) -> None:
        self.connection = connection
        self.deadline = deadline
        self._seconds = seconds
        self._address = address
        self._signals: deque[tuple[int, Message]] = deque()
        self._replies: dict[int, tuple[int, Message]] = {}
        """Both with a number that says which came first."""
        self._arrivals = count()
        self._given_up: set[int] = set()
        self._rules: list[MatchRule] = []
        self._terminal: int | None = None
        self._output: int | None = None

    @classmethod
    def connect(cls, address: str | None, seconds: float | None = None) -> Self:
        where = _("the bus at {address}", address=address) if address else _("the system bus")
        deadline = None if seconds is None else time.monotonic() + seconds
        within = ANSWER_SECONDS if seconds is None else min(seconds, ANSWER_SECONDS)
        try:
            connection = _Connection(address or "SYSTEM", within)
            return cls(connection, address, seconds=seconds, deadline=deadline)
        except TimeoutError as error:
            text = _(
                "cannot connect to {where}: it did not answer within {seconds} s", where=where, seconds=f"{within:g}"
            )
            if within == seconds:
                raise CtlError.of(Timeout, text) from error
            raise CtlError(text, EXIT_UNREACHABLE, name="Unreachable") from error
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise CtlError(_no_bus(address, where, error), EXIT_UNREACHABLE, name="Unreachable") from error
        except CANNOT_CONNECT as error:
            reason = getattr(error, "strerror", None) or error
            text = _("cannot connect to {where}: {reason}", where=where, reason=reason)
            raise CtlError(text, EXIT_UNREACHABLE, name="Unreachable") from error
        except BAD_ADDRESS as error:
            given = address or os.environ.get(_SYSTEM_BUS_VARIABLE)
            text = _(
                "cannot use the bus address {address}: write it like unix:path=/run/dbus/system_bus_socket",
                address=repr(given),
            )
            raise CtlError.of(InvalidArgument, text) from error

    def close(self) -> None:
        self.connection.close()

    # What it knows --------------------------------------------------------------------------------------------------

    def runs(self, seconds: float = ANSWER_SECONDS) -> bool:
        """Whether it does. It is not started for that, as it would be by a call."""
        return bool(self.ask(message_bus.NameHasOwner(NAME), seconds).body[0])

    def version(self, seconds: float = ANSWER_SECONDS) -> str:
        return str(self.ask(call(NAME, ROOT, PROPERTIES, "Get", "ss", MANAGER, "Version"), seconds).body[0][1])

    def about(self) -> dict[str, Any]:
        """What it says of itself, as properties of its Manager."""
        return plain_values(self.ask(call(NAME, ROOT, PROPERTIES, "GetAll", "s", MANAGER)).body[0])

    def own_pid(self) -> int:
        """Ours, as the bus knows it: it may be in another PID namespace."""
        return int(self.ask(message_bus.GetConnectionUnixProcessID(self.connection.unique_name)).body[0])

    def owner(self) -> str:
        """The process that is the service now, as the bus calls it. It is started first where the bus can do that."""
        reply = self.ask(call(NAME, ROOT, PEER, "Ping"))
        return str(reply.header.fields[HeaderFields.sender])

    def gpu(self, selector: str) -> Gpu:
        """The GPU of that name or address; "" where there is only one."""
        reply = self.ask(call(NAME, ROOT, MANAGER, "GetGpu", "s", selector))
        return Gpu(self, owner=reply.header.fields[HeaderFields.sender], path=reply.body[0])

    def gpus(self) -> list[Gpu]:
        """Every GPU with its properties, in address order."""
        reply = self.ask(call(NAME, ROOT, OBJECTS, "GetManagedObjects"))
        owner = reply.header.fields[HeaderFields.sender]
        found = [
            Gpu(self, owner, path, plain_values(interfaces[GPU]))
            for path, interfaces in reply.body[0].items()
            if GPU in interfaces
        ]
        return sorted(found, key=lambda gpu: gpu.address)

    def groups(self) -> list[dict[str, Any]]:
        """Every PCI function that is in an IOMMU group."""
        return self._list("Groups")

    def config(self) -> list[dict[str, Any]]:
        """Every setting in force."""
        return self._list("Config")

    def warnings(self) -> list[str]:
        """What of the configuration is about no GPU of this host, or has no effect otherwise, a sentence each."""
        return list(self.ask(call(NAME, ROOT, MANAGER, "Warnings")).body[0])

    def history(self, limit: int) -> list[dict[str, Any]]:
        """The last finished switches without their steps, newest first; 0: all."""
        return self._list("History", "u", limit)

    def history_entry(self, switch: str) -> dict[str, Any]:
        """A finished switch with its steps."""
        return plain_values(self.ask(call(NAME, ROOT, MANAGER, "HistoryEntry", "s", switch)).body[0])

    def _list(self, method: str, signature: str = "", *arguments: object) -> list[dict[str, Any]]:
        return [
            plain_values(each) for each in self.ask(call(NAME, ROOT, MANAGER, method, signature, *arguments)).body[0]
        ]

    # Questions and answers ------------------------------------------------------------------------------------------

    def ask_allowed(self, message: Message, seconds: float | None = DECISION_SECONDS) -> Message:
        """As `ask`, of what not everybody may do (`answer_allowed`)."""
        return self.answer_allowed(message, self.send(message), seconds)

    def answer_allowed(self, message: Message, serial: int, seconds: float | None = DECISION_SECONDS) -> Message:
        """The answer to a call, sent so, that not everybody may make: a person at a terminal is asked, who may take as
        long as they like.

        Only once that is needed: members of the group `gpuswitch` are not. A desktop's agent asks, where there is one.

        Raises:
            CtlError: among others, ^C before there is an answer.
            KeyboardInterrupt: the same of a call whose answer comes when all is done, and may take any time.
        """
        try:
            return self.answer(serial, seconds)
        except AskedForError:
            from gpuswitch.cli.agent import agent, can_authenticate  # noqa: PLC0415 -- brings subprocess, for few who ask

            if not can_authenticate():
                raise
        message.header.flags |= MessageFlag.allow_interactive_authorization
        try:
            with self.clock_stopped():
                with suppress(AskedForError):
                    return self.ask(message, None)
                with agent():
                    return self.ask(message, None)
        except KeyboardInterrupt:
            if seconds is None:
                raise
            # Asked or allowed, that is known to the service alone.
            shows = _("{command} shows whether it was begun", command="gpuswitchctl status")
            raise CtlError.interrupted(_("interrupted before it was answered; {shows}", shows=shows)) from None

    @contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """The time that somebody takes to answer a question is not the service's: meanwhile there is no deadline."""
        deadline, self.deadline, begun = self.deadline, None, time.monotonic()
        try:
            yield
        finally:
            self.deadline = None if deadline is None else deadline + time.monotonic() - begun

    def ask(self, message: Message, seconds: float | None = ANSWER_SECONDS) -> Message:
        """Send a method call and return its answer, which may take that long."""
        return self.answer(self.send(message), seconds)

    def send(self, message: Message) -> int:
        """Send a method call; the serial number that its answer is known by."""
        serial: int = next(self.connection.outgoing_serial)
        try:
            self.connection.send(message, serial=serial)
        except OSError as error:
            raise bus_lost(error) from error
        except UnicodeEncodeError as error:
            text = _("{word} is not UTF-8, and so the name of nothing here", word=f"'{clean(error.object)}'")
            raise CtlError.of(InvalidArgument, text, is_whole=True) from None
        return serial

    def answer(self, serial: int, seconds: float | None = ANSWER_SECONDS) -> Message:
        """The answer to what was sent so; other answers and signals that come meanwhile are kept.

        Raises:
            CtlError: it is an error, or did not come within these seconds, or before the deadline.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        first = min((each for each in (deadline, self.deadline) if each is not None), default=None)
        try:
            while serial not in self._replies:
                if not self._receive(first):
                    raise self._late(seconds, by_user=first == self.deadline)
        except BaseException:
            # Nobody takes the answer any more, and `next_event` would offer it for ever.
            self._given_up.add(serial)
            self._replies.pop(serial, None)
            raise
        return self.checked(self._replies.pop(serial)[1])

    def _late(self, seconds: float | None, *, by_user: bool) -> CtlError:
        if by_user:
            text = _("the time is over: the service has not answered within {seconds} s", seconds=f"{self._seconds:g}")
            return CtlError.of(Timeout, text, is_whole=True)
        text = _("the service did not answer within {seconds} s", seconds=f"{seconds:g}")
        return CtlError(text, EXIT_UNREACHABLE, name="Unreachable")

    def subscribe(self, rule: MatchRule) -> None:
        """Keep the signals that match this for `next_event`."""
        self._rules.append(rule)
        self.ask(message_bus.AddMatch(rule))

    def unsubscribe(self, rule: MatchRule) -> None:
        """Give up what was subscribed to by this rule; what is kept of it already comes all the same."""
        text = rule.serialise()
        self._rules = [each for each in self._rules if each.serialise() != text]
        # Nobody needs the answer, and it may be an error: dbus-daemon drops a rule with the process that it is about,
        # if that had rules of its own (rule_list_remove_by_connection in its bus/signals.c).
        self._given_up.add(self.send(message_bus.RemoveMatch(rule)))

    def next_event(self, deadline: float | None = None) -> Signal | int | None:
        """A signal that was subscribed to, or the serial number of an answer that has come, for `answer`.

        In the order in which they came, also those that came while another answer was waited for.

        `deadline` is by the monotonic clock; None is returned when it is over.
        """
        while True:
            answer = next(iter(self._replies.items()), None)
            if self._signals and (answer is None or self._signals[0][0] < answer[1][0]):
                return _signal(self._signals.popleft()[1])
            if answer is not None:
                return answer[0]
            if not self._receive(deadline):
                return None

    def take_kept(self, path: str) -> list[Signal]:
        """What has come of this object until now, in its order; `next_event` does not offer it any more.

        Right after an answer, that is what was told before it was given.
        """
        kept, self._signals = self._signals, deque()
        taken = []
        for each in kept:
            if each[1].header.fields[HeaderFields.path] == path:
                taken.append(_signal(each[1]))
            else:
                self._signals.append(each)
        return taken

    def end_with_its_reader(self) -> None:
        """From here on, whatever waits for the service ends with ReaderGoneError once nobody reads standard output.

        Not before what was asked for is begun: who looks on decides nothing.
        """
        self._output = output_descriptor()

    def pause(self, seconds: float | None, descriptor: int) -> bool:
        """Until this can be read (True), something is told that was subscribed to, or so many seconds are over (None:
        never). What was told is not kept.
        """
        if self._taken_in():
            return False
        ours = self.connection.sock.fileno()
        readable = self._readable([ours, descriptor], seconds)
        if ours in readable:
            self._taken_in()
        return descriptor in readable

    def _taken_in(self) -> bool:
        """Take in whatever has come; whether it was a signal that was subscribed to."""
        while self._receive(time.monotonic()):
            pass
        some = bool(self._signals)
        self._signals.clear()
        return some

    def _receive(self, deadline: float | None) -> bool:
        """Take in one message; False: the time is over."""
        try:
            message = self._message(deadline)
        except TimeoutError:
            return False
        except OSError as error:
            raise bus_lost(error) from error
        serial = message.header.fields.get(HeaderFields.reply_serial)
        if serial is not None:
            if serial not in self._given_up:
                self._replies[serial] = next(self._arrivals), message
        elif any(rule.matches(message) for rule in self._rules):
            self._signals.append((next(self._arrivals), message))
        return True

    def _message(self, deadline: float | None) -> Message:
        """The next message.

        Raises:
            TimeoutError: the time is over.
        """
        while True:
            # A message is read as a whole, or not at all: a ^C in the midst of it would break what follows.
            with suppress(TimeoutError):
                return self.connection.receive(timeout=0)
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            with INTERRUPTS.let_in():
                self._wait_for_more(left)

    def _wait_for_more(self, seconds: float | None) -> None:
        terminal, interrupts = self._terminal, INTERRUPTS.descriptor
        within = None if seconds is None else min(seconds, _LONGEST_POLL)
        if terminal is interrupts is self._output is None:
            if not self.connection.selector.select(within) and within == seconds:
                raise TimeoutError
            return
        ours = self.connection.sock.fileno()
        readable = self._readable([each for each in (ours, terminal, interrupts) if each is not None], within)
        if not readable and within == seconds:
            raise TimeoutError
        if interrupts in readable:
            INTERRUPTS.heard()
        elif readable and ours not in readable:
            raise Typed

    def _readable(self, descriptors: Sequence[int], seconds: float | None) -> list[int]:
        """Which of these can be read, once one can; none when so many seconds are over.

        Raises:
            ReaderGoneError: nobody reads standard output, and that is to end it.
        """
        polled = poll()
        for each in descriptors:
            polled.register(each, POLLIN)
        if self._output is not None and self._output not in descriptors:
            # These are told whatever is asked for: a pipe without a reader has POLLERR (pipe_poll in the kernel's
            # fs/pipe.c), a socket POLLHUP or both, a terminal that was hung up POLLHUP (tty_poll, n_tty_poll).
            polled.register(self._output, 0)
        found = dict(polled.poll(None if seconds is None else seconds * 1000))
        if self._output is not None and found.get(self._output, 0) & (POLLERR | POLLHUP):
            raise ReaderGoneError
        return [each for each in descriptors if each in found]

    @contextmanager
    def listening_to(self, terminal: int) -> Iterator[None]:
        """Whatever waits for the service meanwhile ends with Typed where this can be read first."""
        self._terminal = terminal
        try:
            yield
        finally:
            self._terminal = None

    def checked(self, reply: Message) -> Message:
        """The answer, unless it is an error."""
        if reply.header.message_type is not MessageType.error:
            return reply
        name = str(reply.header.fields[HeaderFields.error_name])
        text = str(reply.body[0]) if reply.body and reply.body[0] else name
        raise self._error(name, text)

    def _error(self, name: str, text: str) -> CtlError:
        if name == AUTHENTICATION_REQUIRED:
            text = _("{text}; on a terminal you are asked, and root is not", text=text)
            return AskedForError(text, NotAuthorized.exit_code, name="InteractiveAuthorizationRequired")
        if text.startswith("stop_units: "):  # as the key is called on the bus, and in the configuration
            text = f"--stop-unit: {text.removeprefix('stop_units: ')}"
        if name in EXIT_CODES:
            return CtlError(text, EXIT_CODES[name], name=name.removeprefix(PREFIX))
        kind = name.removeprefix(_BUS_ERROR)
        if kind == "AccessDenied":
            return CtlError.of(NotAuthorized, _("the policy of the bus does not allow it"))
        if kind == "InvalidArgs":
            return CtlError.of(InvalidArgument, text)
        if kind.startswith(_WENT_AWAY):
            text = _("the service went away before it answered; it may have been restarted")
            return CtlError(text, EXIT_UNREACHABLE, name="Unreachable")
        if kind.startswith(_NOT_RUNNING) or name.startswith("org.freedesktop.systemd1."):
            return CtlError(self._not_running(text), EXIT_UNREACHABLE, name="Unreachable")
        return CtlError.of(Failed, text)

    def _not_running(self, text: str) -> str:
        if self._address:
            from shlex import quote  # noqa: PLC0415 -- for this alone

            # One on another bus was started by hand, and may have had a machine in memory.
            return _(
                "the gpuswitch service is not on the bus at {address}; start it there: {command}, with the other "
                "options that it had, such as --simulate",
                address=self._address,
                command=f"gpuswitchd --bus {quote(self._address)}",
            )
        if "masked" in text:  # as systemd says it (BUS_ERROR_UNIT_MASKED in its bus-unit-util.c), and buses repeat it
            return _(
                "the gpuswitch service is not running ({reason}); have it start again: systemctl unmask gpuswitchd && "
                "systemctl start gpuswitchd",
                reason=text,
            )
        return _("the gpuswitch service is not running ({reason}); start it: systemctl start gpuswitchd", reason=text)


class Gpu:
    """One GPU of the service. It talks to the very process that named it, whose signals it believes, and no other."""

    def __init__(self, service: Service, owner: str, path: str, properties: dict[str, Any] | None = None) -> None:
        self._service = service
        self.owner = owner
        self.path = path
        self._properties = properties

    @property
    def address(self) -> str:
        return str(self.properties["Address"])

    @property
    def name(self) -> str:
        """As the configuration calls it; "" where that has no name for it."""
        return str(self.properties["Name"])

    @property
    def title(self) -> str:
        """What it is called in sentences: `rtx3070 (0000:01:00.0)`, or its address alone."""
        return title_of(self.properties)

    @property
    def word(self) -> str:
        """What it is called in commands that are to be typed."""
        return self.name or self.address

    @property
    def properties(self) -> dict[str, Any]:
        """As they were when first asked for."""
        if self._properties is None:
            self._properties = self.look()
        return self._properties

    def look(self) -> dict[str, Any]:
        """Its properties now."""
        self._properties = plain_values(self._service.ask(self.properties_now()).body[0])
        return self._properties

    def properties_now(self) -> Message:
        """The call that answers with its properties."""
        return call(self.owner, self.path, PROPERTIES, "GetAll", "s", GPU)

    def plan(self, target: str, options: Options) -> list[dict[str, Any]]:
        """The steps of a switch to `host` or `vfio`, without taking one."""
        steps = self._ask(GPU, "Plan", "sa{sv}", target, options, seconds=DECISION_SECONDS)
        return [plain_values(step) for step in steps]

    def blockers(self, target: str, options: Options) -> list[dict[str, Any]]:
        """What is in the way of a switch to `host` or `vfio` now."""
        found = self._ask(GPU, "Blockers", "sa{sv}", target, options, seconds=DECISION_SECONDS)
        return [plain_values(blocker) for blocker in found]

    def holders(self) -> list[dict[str, Any]]:
        """Who has it open."""
        found = [plain_values(holder) for holder in self._ask(GPU, "Holders", seconds=DECISION_SECONDS)]
        return [_in_words(holder) for holder in found]

    def move(self, target: str, options: Options) -> Message:
        """The call that begins a switch to `host` or `vfio`, or joins the one under way; it answers with its id."""
        method = {"vfio": "ToVfio", "host": "ToHost"}[target]
        return call(self.owner, self.path, GPU, method, "a{sv}", options)

    def recover(self) -> Message:
        """The call that begins a recovery, or joins the one under way; it answers with its id."""
        return call(self.owner, self.path, GPU, "Recover", "a{sv}", {})

    def trial(self, seconds: float, options: Options) -> Message:
        """As `move` to vfio; so many seconds after it came there, it goes home by itself."""
        return call(self.owner, self.path, GPU, "Trial", "da{sv}", seconds, options)

    def cancel(self, switch: str) -> Message:
        """The call that takes a running switch back."""
        return call(self.owner, self.path, GPU, "Cancel", "s", switch)

    def wait(self, switch: str) -> Message:
        """The call that answers when this switch is over, with how it ended."""
        return call(self.owner, self.path, GPU, "Wait", "s", switch)

    def _ask(
        self, interface: str, method: str, signature: str = "", *arguments: object, seconds: float = ANSWER_SECONDS
    ) -> Any:
        message = call(self.owner, self.path, interface, method, signature, *arguments)
        return self._service.ask(message, seconds).body[0]


def title_of(properties: Mapping[str, Any]) -> str:
    """`Gpu.title`, of its properties."""
    return called(properties["Name"], properties["Address"])


def gpus_named(service: Service, selectors: Sequence[str]) -> list[Gpu]:
    """Those GPUs, each once; all of them where none is named."""
    if not selectors:
        return service.gpus()
    return list({gpu.path: gpu for gpu in map(service.gpu, selectors)}.values())


def gpus_to_move(service: Service, selectors: Sequence[str], *, every: bool) -> list[Gpu]:
    """Those GPUs, each once; with `every`, all that are managed; the only one where none is named."""
    if every and selectors:
        raise CtlError.of(InvalidArgument, _("cannot take --all and names of GPUs together: leave one of them out"))
    if not every:
        return gpus_named(service, selectors or [""])
    there = service.gpus()
    if not there:
        raise CtlError.of(NoSuchGpu, _("there is no GPU on this host"))
    managed = [gpu for gpu in there if gpu.properties["Managed"]]
    if not managed:
        first = _("no GPU is managed, and --all means those that are")
        asked = _("or be asked, and have it written: {command}", command="gpuswitchctl setup")
        raise CtlError.of(NoSuchGpu, "\n".join([first, to_manage(service, there), asked]))
    return managed


def to_manage(service: Service, gpus: Sequence[Gpu]) -> str:
    """How one of these GPUs is managed from then on, which none is now: the file, the table, the line. Of several, one
    that is no part of a processor, as those on the first bus are.
    """
    gpu = next((each for each in gpus if not each.address.startswith("0000:00:")), gpus[0])
    return _(
        "to have {gpu} managed, add to {file}, by gpuswitchctl config edit: `{table}`, `{address}`",
        gpu=gpu.address,
        # A service that is older does not say where it reads it.
        file=f"{service.about().get('ConfigDirectory') or '/etc/gpuswitch'}/config.toml",
        table="[[gpu]]",
        address=f'address = "{gpu.address}"',
    )


def call(to: str, path: str, interface: str, method: str, signature: str = "", *arguments: object) -> Message:
    return new_method_call(DBusAddress(path, to, interface), method, signature or None, arguments)


def signals_of(owner: str) -> MatchRule:
    """All that this process tells of its GPUs."""
    return MatchRule(type="signal", sender=owner, path_namespace=ROOT)


def plain_values(values: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
    """An `a{sv}` as jeepney reads it (pairs of signature and value), without the signatures, also further down."""
    return {key: _plain(signature, value) for key, (signature, value) in values.items()}


def _no_bus(address: str | None, where: str, error: OSError) -> str:
    """That no bus is there, and what to do."""
    # As it was tried; of one without a file, a zero stands before its name (unix(7)).
    path = get_bus(address or "SYSTEM").replace("\0", "@")
    if isinstance(error, FileNotFoundError):
        text = _("cannot connect to {where}: there is no socket {path}", where=where, path=path)
    else:
        text = _("cannot connect to {where}: nobody listens at {path}", where=where, path=path)
    if address:
        hint = _(
            "start a bus there; or, for the system bus, leave --bus out and unset {variable}", variable=BUS_VARIABLE
        )
    elif _SYSTEM_BUS_VARIABLE in os.environ:
        hint = _(
            "that is where {variable} says that it is: unset it, or start a bus there", variable=_SYSTEM_BUS_VARIABLE
        )
    else:
        hint = _(
            "the message bus of the system, by which this talks to the service, does not run; start it: {command}; in "
            "a container there is none: run this on the host",
            command="systemctl start dbus.socket",
        )
    if address:
        return f"{text}\n{hint}"
    wrong = _("what else may be wrong with this machine: {command}", command="gpuswitchctl doctor")
    demo = _("to try it on a machine in memory, without any of that: {command}", command="gpuswitchctl demo")
    return "\n".join([text, hint, wrong, demo])


def bus_lost(error: OSError) -> CtlError:
    text = _("the connection to the bus is lost: {reason}", reason=error.strerror or error)
    return CtlError(text, EXIT_UNREACHABLE, name="Unreachable")


def _in_words(holder: dict[str, Any]) -> dict[str, Any]:
    """With its sentences in the language of whoever reads them."""
    words = holder.pop("words", {})
    if is_english():
        return holder
    return holder | {key: reworded(holder[key], [{"text": holder[key], **each}]) for key, each in words.items()}


def _signal(message: Message) -> Signal:
    fields = message.header.fields
    return Signal(fields[HeaderFields.path], fields[HeaderFields.interface], fields[HeaderFields.member], message.body)


def _plain(signature: str, value: Any) -> Any:
    if signature == "aa{sv}":
        return [plain_values(each) for each in value]
    return plain_values(value) if signature == "a{sv}" else value
