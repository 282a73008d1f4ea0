"""Who starts the services of a bus that does not do it itself: systemd, as far as dbus-broker's launcher asks it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import jeepney
from jeepney.io.asyncio import DBusConnection, open_dbus_connection

from tests.harness.managers.doubles import EMPTY_ANSWER, FakeBusService
from tests.harness.managers.memory import RefusedError

UNIT = "org.freedesktop.systemd1.Unit"
PATH = "/org/freedesktop/systemd1/unit/started"
JOB = "/org/freedesktop/systemd1/job/1"


class Starter(FakeBusService):
    """org.freedesktop.systemd1, with a single unit: the command that the launcher makes one of (its service.c)."""

    name = "org.freedesktop.systemd1"
    path = "/org/freedesktop/systemd1"
    interface = "org.freedesktop.systemd1.Manager"

    def __init__(self, connection: DBusConnection) -> None:
        super().__init__(connection)
        self.tasks: set[asyncio.Task[None]] = set()

    async def call(self, message: jeepney.Message, member: str, arguments: tuple[Any, ...]) -> None:
        match member:
            case "Subscribe":
                await self.answer(message, EMPTY_ANSWER)
            case "LoadUnit":
                await self.answer(message, ("o", (PATH,)))
            case "StartTransientUnit":
                unit, _, properties, _ = arguments
                await self.answer(message, ("o", (JOB,)))
                _, [(_, command, _)] = dict(properties)["ExecStart"]
                self.tasks.add(asyncio.create_task(self._run(unit, command)))
            case _:
                raise RefusedError("UnknownMethod", member)

    async def _run(self, unit: str, command: Sequence[str]) -> None:
        process = await asyncio.create_subprocess_exec(*command)
        try:
            await self.signal("JobRemoved", "uoss", 1, JOB, unit, "done")
            if await process.wait():
                await self._fail()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    async def _fail(self) -> None:
        emitter = jeepney.DBusAddress(PATH, interface="org.freedesktop.DBus.Properties")
        values: tuple[object, ...] = (UNIT, {"ActiveState": ("s", "failed")}, [])
        await self.connection.send(jeepney.new_signal(emitter, "PropertiesChanged", "sa{sv}as", values))


@asynccontextmanager
async def starting_services(address: str) -> AsyncIterator[None]:
    """Start what the bus at this address wants to have started."""
    starter = Starter(await open_dbus_connection(address))
    async with starter.at_work():
        yield
        for task in starter.tasks:
            task.cancel()
        await asyncio.gather(*starter.tasks, return_exceptions=True)
