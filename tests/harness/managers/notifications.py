"""org.freedesktop.Notifications on a private bus: a desktop that keeps what it is to show."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple, Self

import jeepney
from jeepney.io.asyncio import DBusConnection, open_dbus_connection

from tests.harness.managers.doubles import FakeBusService
from tests.harness.managers.memory import RefusedError


class Shown(NamedTuple):
    """One notification. `number` is its own, `replaces` that of the one whose place it takes (0: none)."""

    number: int
    replaces: int
    summary: str
    body: str
    urgency: int


class FakeDesktop(FakeBusService):
    """`shown` has the notifications in their order. `refuses`: an error instead of each answer."""

    name = "org.freedesktop.Notifications"
    path = "/org/freedesktop/Notifications"
    interface = "org.freedesktop.Notifications"

    refuses: RefusedError | None = None

    def __init__(self, connection: DBusConnection) -> None:
        super().__init__(connection)
        self.shown: asyncio.Queue[Shown] = asyncio.Queue()
        self._last = 0

    @classmethod
    @asynccontextmanager
    async def on(cls, address: str) -> AsyncIterator[Self]:
        desktop = cls(await open_dbus_connection(address))
        async with desktop.at_work():
            yield desktop

    async def call(self, message: jeepney.Message, member: str, arguments: tuple[Any, ...]) -> None:
        assert member == "Notify"
        _, replaces, _, summary, body, _, hints, _ = arguments
        self._last += 1
        number = replaces or self._last
        self.shown.put_nowait(Shown(number, replaces, summary, body, hints["urgency"][1]))
        if self.refuses is not None:
            raise self.refuses
        await self.answer(message, ("u", (number,)))
