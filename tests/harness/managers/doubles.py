"""The managers in memory as others see them: systemd and logind on a private bus."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import jeepney
from jeepney.bus_messages import MatchRule, message_bus
from jeepney.io.asyncio import DBusConnection, DBusRouter, Proxy, open_dbus_connection

from tests.harness.managers.memory import Job, Manager, MemoryUnit, RefusedError

Answer = tuple[str, tuple[object, ...]]
"""Signature and values."""

EMPTY_ANSWER: Answer = ("", ())
_FIELDS = jeepney.HeaderFields


class FakeBusService:
    """A name on the bus; a subclass answers the calls to it. `seen` are those answered, their members and senders."""

    name: str
    path: str
    interface: str

    def __init__(self, connection: DBusConnection) -> None:
        self.connection = connection
        self.seen: list[tuple[str, str]] = []
        self.changed = asyncio.Event()
        self._named = asyncio.Event()

    @asynccontextmanager
    async def at_work(self) -> AsyncIterator[None]:
        """Have the name and answer, for as long as this lasts."""
        task = asyncio.ensure_future(self._serve())
        try:
            await self.connection.send(message_bus.RequestName(self.name))
            await self._named.wait()
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])
            with suppress(OSError):
                await self.connection.close()

    async def called(self, member: str, *, times: int = 1) -> str:
        """Wait until this has been called and answered so often; returns who called last."""
        while True:
            callers = [sender for seen, sender in self.seen if seen == member]
            if len(callers) >= times:
                return callers[-1]
            self.changed.clear()
            await self.changed.wait()

    async def call(self, message: jeepney.Message, member: str, arguments: tuple[Any, ...]) -> None:
        """Answer a call, by `answer` or by raising RefusedError."""
        raise NotImplementedError

    async def answer(self, message: jeepney.Message, answer: Answer) -> None:
        signature, values = answer
        await self.connection.send(jeepney.new_method_return(message, signature or None, values))

    async def signal(self, member: str, signature: str, *values: object, interface: str = "") -> None:
        emitter = jeepney.DBusAddress(self.path, interface=interface or self.interface)
        await self.connection.send(jeepney.new_signal(emitter, member, signature, values))

    async def told(self, message: jeepney.Message) -> None:
        """Of a signal of the bus."""

    async def _serve(self) -> None:
        with suppress(EOFError, OSError):
            while True:
                message = await self.connection.receive()
                if message.header.message_type is jeepney.MessageType.signal:
                    if message.header.fields[_FIELDS.member] == "NameAcquired" and message.body[0] == self.name:
                        self._named.set()
                    await self.told(message)
                elif message.header.message_type is jeepney.MessageType.method_call:
                    await self._take(message)

    async def _take(self, message: jeepney.Message) -> None:
        fields = message.header.fields
        try:
            await self.call(message, fields[_FIELDS.member], message.body)
        except RefusedError as error:
            name = f"{self.name}.{error.kind}"
            await self.connection.send(jeepney.new_error(message, name, "s", (error.text,)))
        self.seen.append((fields[_FIELDS.member], fields[_FIELDS.sender]))
        self.changed.set()


_JOBS = {"StartUnit": "start", "StopUnit": "stop", "RestartUnit": "restart", "TryRestartUnit": "try-restart"}


class FakeSystemd(FakeBusService):
    """org.freedesktop.systemd1. `early`: a job is over before the call for it is answered; `mute`: it never is."""

    name = "org.freedesktop.systemd1"
    path = "/org/freedesktop/systemd1"
    interface = "org.freedesktop.systemd1.Manager"

    def __init__(self, connection: DBusConnection, manager: Manager, *, early: bool = False) -> None:
        super().__init__(connection)
        self.manager = manager
        self.early = early
        self.mute = False
        self.state = "running"
        self._over: list[tuple[Job, str]] = []
        self._told: set[asyncio.Task[None]] = set()
        manager.removed.append(self._removed)

    async def call(self, message: jeepney.Message, member: str, arguments: tuple[Any, ...]) -> None:
        if kind := _JOBS.get(member):
            await self._start_job(message, kind, arguments[0])
        else:
            path = message.header.fields[_FIELDS.path]
            await self.answer(message, self._plain_call(path, member, arguments))

    async def _start_job(self, message: jeepney.Message, kind: str, name: str) -> None:
        job = self.manager.queue(name, kind)
        if self.early:
            self.manager.work(job)
            await asyncio.gather(*self._told)
        if not self.mute:
            await self.answer(message, ("o", (job.path,)))
        if not self.early:
            self.manager.work(job)

    def _plain_call(self, path: str, member: str, arguments: tuple[Any, ...]) -> Answer:
        match member:
            case "Subscribe":
                return EMPTY_ANSWER
            case "ListUnitsByNames":
                rows = []
                for name in arguments[0]:
                    with suppress(RefusedError):
                        rows.append(_row(self.manager.find(name)))
                return "a(ssssssouso)", (rows,)
            case "LoadUnit":
                return "o", (self.manager.find(arguments[0]).path,)
            case "ResetFailedUnit":
                self.manager.reset_failed(arguments[0])
                return EMPTY_ANSWER
            case "Cancel":
                self.manager.end(self._job(path), "canceled")
                return EMPTY_ANSWER
            case "Get" | "GetAll":
                return self._property(path, arguments)
        raise RefusedError("UnknownMethod", member)

    def _property(self, path: str, arguments: tuple[Any, ...]) -> Answer:
        match arguments:
            case (_, "SystemState"):
                return "v", (("s", self.state),)
            case (_, "State"):
                return "v", (("s", self._job(path).kind and "running"),)
            case (_, "TriggeredBy"):
                return "v", (("as", list(self._unit(path).sample.triggered_by)),)
        unit = self._unit(path)
        texts = {"Result": unit.result, "StatusText": unit.status_text}
        return "a{sv}", (
            {
                **{name: ("s", text) for name, text in texts.items()},
                "ExecMainStatus": ("i", unit.status),
                "ConditionResult": ("b", unit.condition),
            },
        )

    def _unit(self, path: str) -> MemoryUnit:
        found = [unit for unit in self.manager.units.values() if unit.path == path]
        return found[0] if found else self.manager.find("missing.service")

    def _job(self, path: str) -> Job:
        for job in self.manager.jobs.values():
            if job.path == path:
                return job
        raise RefusedError("UnknownObject", f"Unknown object '{path}'.")

    def _removed(self, job: Job, result: str) -> None:
        values = (job.number, job.path, job.unit.name, result)
        task = asyncio.ensure_future(self.signal("JobRemoved", "uoss", *values))
        self._told.add(task)
        task.add_done_callback(self._told.discard)


def _row(unit: MemoryUnit) -> tuple[object, ...]:
    job = (unit.job.number, unit.job.kind, unit.job.path) if unit.job else (0, "", "/")
    return (unit.name, unit.name, unit.load, unit.state, "", "", unit.path, *job)


@dataclass(frozen=True)
class Lock:
    """One row of ListInhibitors, and the name on the bus of who took it."""

    row: tuple[str, str, str, str, int, int]
    owner: str


class FakeLogind(FakeBusService):
    """org.freedesktop.login1. A lock is its caller's, and lasts as long as that is on the bus."""

    name = "org.freedesktop.login1"
    path = "/org/freedesktop/login1"
    interface = "org.freedesktop.login1.Manager"

    def __init__(self, connection: DBusConnection, bus: DBusRouter) -> None:
        super().__init__(connection)
        self.sessions: dict[str, tuple[int, str]] = {}
        """The uid and the class of each."""
        self.consoles: set[str] = set()
        """Those of them that are text."""
        self.locks: list[Lock] = []
        self._bus = bus

    async def call(self, message: jeepney.Message, member: str, arguments: tuple[Any, ...]) -> None:
        match member:
            case "ListInhibitors":
                await self.answer(message, ("a(ssssuu)", ([lock.row for lock in self.locks],)))
            case "Inhibit":
                await self._inhibit(message.header.fields[_FIELDS.sender], arguments)
                await self.answer(message, EMPTY_ANSWER)
            case "ListSessions":
                rows = [(name, uid, "kim", "seat0", _session_path(name)) for name, (uid, _) in self.sessions.items()]
                await self.answer(message, ("a(susso)", (rows,)))
            case "Get":
                await self.answer(message, ("v", (("s", self._class(message.header.fields[_FIELDS.path])),)))
            case "GetAll":
                path = message.header.fields[_FIELDS.path]
                kind = "tty" if path in map(_session_path, self.consoles) else "wayland"
                values = {"Class": ("s", self._class(path)), "Type": ("s", kind)}
                await self.answer(message, ("a{sv}", (values,)))
            case "GetSession" | "TerminateSession":
                if arguments[0] not in self.sessions:
                    raise RefusedError("NoSuchSession", f"No session '{arguments[0]}' known")
                await self.answer(
                    message, ("o", (_session_path(arguments[0]),)) if member == "GetSession" else EMPTY_ANSWER
                )
            case _:
                raise RefusedError("UnknownMethod", member)

    async def forget(self, session: str) -> None:
        """The session is over."""
        del self.sessions[session]
        await self.signal("SessionRemoved", "so", session, _session_path(session))

    def _class(self, path: str) -> str:
        for name, (_, kind) in self.sessions.items():
            if _session_path(name) == path:
                return kind
        raise RefusedError("UnknownObject", f"Unknown object '{path}'.")

    async def told(self, message: jeepney.Message) -> None:
        gone = [lock for lock in self.locks if message.body == (lock.owner, lock.owner, "")]
        for lock in gone:
            self.locks.remove(lock)
            self.changed.set()
            await self._locks_changed()

    async def no_locks(self) -> None:
        """Wait until nobody holds one."""
        while self.locks:
            self.changed.clear()
            await self.changed.wait()

    async def _inhibit(self, owner: str, arguments: tuple[Any, ...]) -> None:
        ends = MatchRule(type="signal", sender="org.freedesktop.DBus", member="NameOwnerChanged")
        ends.add_arg_condition(0, owner)
        await self.connection.send(message_bus.AddMatch(ends))
        bus = Proxy(message_bus, self._bus)
        (pid,) = await bus.GetConnectionUnixProcessID(owner)
        (uid,) = await bus.GetConnectionUnixUser(owner)
        self.locks.append(Lock((*arguments, uid, pid), owner))
        await self._locks_changed()

    async def _locks_changed(self) -> None:
        """As logind does for every lock that is taken or let go, whether or not the value is another one."""
        what = "org.freedesktop.DBus.Properties"
        await self.signal("PropertiesChanged", "sa{sv}as", self.interface, {}, ["BlockInhibited"], interface=what)


def _session_path(name: str) -> str:
    return f"/org/freedesktop/login1/session/_{name}"


@asynccontextmanager
async def systemd_on(address: str, manager: Manager, *, early: bool = False) -> AsyncIterator[FakeSystemd]:
    """systemd, on the bus at this address."""
    fake = FakeSystemd(await open_dbus_connection(address), manager, early=early)
    async with fake.at_work():
        yield fake


@asynccontextmanager
async def logind_on(address: str) -> AsyncIterator[FakeLogind]:
    """logind, on the bus at this address."""
    async with await open_dbus_connection(address) as connection, DBusRouter(connection) as bus:
        fake = FakeLogind(await open_dbus_connection(address), bus)
        async with fake.at_work():
            yield fake
