"""Whose turn it is to decide over one GPU, and since when."""

from __future__ import annotations

import asyncio
from types import TracebackType


class Deciding:
    """One at a time: `async with`. `task` is who has the turn, since `began` on the loop's clock; None: nobody."""

    def __init__(self) -> None:
        self.task: asyncio.Task[object] | None = None
        self.began = 0.0
        self._lock = asyncio.Lock()

    async def __aenter__(self) -> None:
        await self._lock.acquire()
        self.task = asyncio.current_task()
        self.began = asyncio.get_running_loop().time()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.task = None
        self._lock.release()

    def locked(self) -> bool:
        """Somebody decides."""
        return self._lock.locked()
