"""Whose connection it is: what the message bus says."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final

from gpuswitch.errors import GpuswitchError

REMEMBERED: Final = 2048
"""Connections; a system bus has some hundred."""
LEARNING: Final = 16
"""Connections that are asked for at once, in advance."""


class Users:
    """The users behind connections.

    A name is given to one connection only, for as long as the bus lives (specification, Unique Connection Name), so
    what was said of it stays true.
    """

    def __init__(self, ask: Callable[[str], Awaitable[int]]) -> None:
        self._ask = ask
        self._known: OrderedDict[str, int] = OrderedDict()
        self._learning: dict[str, asyncio.Task[None]] = {}

    def known(self, name: str) -> int | None:
        """Who it is, where that has been asked before."""
        return self._known.get(name)

    async def of(self, name: str) -> int:
        """Who it is; asked anew, since that says as well that it is still there.

        Raises GpuswitchError where the connection is gone, or the bus does not say.
        """
        user = await self._ask(name)
        self._known[name] = user
        if len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return user

    def learn(self, name: str) -> None:
        """Find out who it is, for the next time."""
        if name not in self._known and name not in self._learning and len(self._learning) < LEARNING:
            self._learning[name] = asyncio.create_task(self._learn(name))

    async def stop(self) -> None:
        """Ask no more."""
        tasks = list(self._learning.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _learn(self, name: str) -> None:
        try:
            with suppress(GpuswitchError):
                await self.of(name)
        finally:
            del self._learning[name]
