"""org.freedesktop.PolicyKit1 on a private bus, which says what a test wants. tests/real_system asks the real one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Self

import jeepney
from jeepney.io.asyncio import DBusConnection, open_dbus_connection

from tests.harness.managers.doubles import FakeBusService
from tests.harness.managers.memory import RefusedError

Says = tuple[bool, bool, dict[str, str]]
"""Yes; that a person could make it so; details."""

YES: Says = (True, False, {})
NO: Says = (False, False, {})
PROVE: Says = (False, True, {})


class FakePolkit(FakeBusService):
    """`says`: what each question is answered with; an error; or, None, nothing until the test ends.

    `asked` has the questions: subject, action, details, flags and number; `withdrawn` the numbers of those taken back.
    """

    name = "org.freedesktop.PolicyKit1"
    path = "/org/freedesktop/PolicyKit1/Authority"
    interface = "org.freedesktop.PolicyKit1.Authority"

    says: Says | RefusedError | None = YES

    def __init__(self, connection: DBusConnection) -> None:
        super().__init__(connection)
        self.asked: list[tuple[Any, ...]] = []
        self.withdrawn: asyncio.Queue[str] = asyncio.Queue()

    @classmethod
    @asynccontextmanager
    async def on(cls, address: str) -> AsyncIterator[Self]:
        polkit = cls(await open_dbus_connection(address))
        async with polkit.at_work():
            yield polkit

    async def call(self, message: jeepney.Message, member: str, arguments: tuple[Any, ...]) -> None:
        if member == "CancelCheckAuthorization":
            self.withdrawn.put_nowait(arguments[0])
            return
        self.asked.append(arguments)
        if isinstance(self.says, RefusedError):
            raise self.says
        if self.says is not None:
            await self.answer(message, ("(bba{ss})", (self.says,)))
