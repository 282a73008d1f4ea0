"""Whose connection it is, and of which process: what the message bus says."""

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
    """The users and processes behind connections.

    A name is given to one connection only, for as long as the bus lives (specification, Unique Connection Name), so
    what was said of it stays true.
    """

    def __init__(
        self, ask: Callable[[str], Awaitable[int]], ask_process: Callable[[str], Awaitable[int | None]]
    ) -> None:
        self._ask = ask
        self._ask_process = ask_process
        self._known: OrderedDict[str, int] = OrderedDict()
        self._processes: OrderedDict[str, int] = OrderedDict()
        self._learning: dict[str, asyncio.Task[None]] = {}

    def known(self, name: str) -> int | None:
        """Who it is, where that has been asked before."""
        return self._known.get(name)

    def process(self, name: str) -> int | None:
        """The pid of its process, where that has been asked before: it follows soon after the user."""
        return self._processes.get(name)

    async def of(self, name: str) -> int:
        """Who it is; asked anew, since that says as well that it is still there.

        Raises GpuswitchError where the connection is gone, or the bus does not say.
        """
        user = await self._find_user(name)
        self._begin(name, self._find_process)
        return user

    def learn(self, name: str) -> None:
        """Find out who it is, for the next time."""
        if name not in self._known:
            self._begin(name, self._find_both)

    async def stop(self) -> None:
        """Ask no more."""
        tasks = list(self._learning.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _begin(self, name: str, find: Callable[[str], Awaitable[None]]) -> None:
        if name not in self._learning and len(self._learning) < LEARNING:
            self._learning[name] = asyncio.create_task(self._learn(name, find))

    async def _learn(self, name: str, find: Callable[[str], Awaitable[None]]) -> None:
        try:
            with suppress(GpuswitchError):
                await find(name)
        finally:
            del self._learning[name]

    async def _find_both(self, name: str) -> None:
        await self._find_user(name)
        await self._find_process(name)

    async def _find_user(self, name: str) -> int:
        user = await self._ask(name)
        _remember(self._known, name, user)
        return user

    async def _find_process(self, name: str) -> None:
        if name not in self._processes and (process := await self._ask_process(name)) is not None:
            _remember(self._processes, name, process)


def _remember(table: OrderedDict[str, int], name: str, number: int) -> None:
    table[name] = number
    if len(table) > REMEMBERED:
        table.popitem(last=False)
