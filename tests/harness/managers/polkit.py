"""org.freedesktop.PolicyKit1 on a private bus, which says what a test wants. tests/real_system asks the real one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Self

import jeepney
from jeepney.bus_messages import message_bus
from jeepney.io.asyncio import open_dbus_connection

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

    @classmethod
    @asynccontextmanager
    async def on(cls, address: str) -> AsyncIterator[Self]:
        async with await open_dbus_connection(address) as connection:
            await connection.send(message_bus.RequestName(cls.name), serial=next(connection.outgoing_serial))
            polkit = cls(connection)
            polkit.asked = []
            polkit.withdrawn = asyncio.Queue()
            serving = asyncio.create_task(polkit._serve())
            try:
                yield polkit
            finally:
                serving.cancel()
                await asyncio.wait([serving])

    asked: list[tuple[Any, ...]]
    withdrawn: asyncio.Queue[str]

    async def call(self, message: jeepney.Message, member: str, arguments: tuple[Any, ...]) -> None:
        if member == "CancelCheckAuthorization":
            self.withdrawn.put_nowait(arguments[0])
            return
        self.asked.append(arguments)
        if isinstance(self.says, RefusedError):
            raise self.says
        if self.says is not None:
            await self.answer(message, ("(bba{ss})", (self.says,)))
