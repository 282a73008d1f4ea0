"""The workers of a simulated machine: each sits in at most one operation, and outlives the service if it has to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from gpuswitch.host.port import Pending
from gpuswitch.host.simulated.faults import Call
from gpuswitch.model.holders import Process

T = TypeVar("T")


class Worker:
    """One worker process. `user` is the name under which it has things open; `ended` is called at its end."""

    def __init__(self, process: Process, user: str, ended: Callable[[Worker], None]) -> None:
        self.process = process
        self.user = user
        self._tell = ended
        self._call: Call | None = None
        self._task: asyncio.Task[Any] | None = None
        self._leaving = False
        self._died = False

    @property
    def ended(self) -> bool:
        return self._leaving and self._call is None

    @property
    def pending(self) -> Pending | None:
        """The operation that it sits in."""
        if self._call is None:
            return None
        call, pid = self._call, self.process.pid
        stack = (call.kernel_wait,) if call.kernel_wait else ()
        return Pending(call.what, pid, call.process_state, call.kernel_wait, stack, self.process)

    def give(self, work: Callable[[Call], Coroutine[Any, Any, T]], call: Call) -> asyncio.Task[T]:
        """Start one operation; it runs to its end, whatever becomes of its caller."""
        call.user = self.user
        task = asyncio.get_running_loop().create_task(work(call))
        self._call, self._task = call, task
        task.add_done_callback(self._returned)
        return task

    @property
    def died(self) -> bool:
        """Whether it ended without having been let go."""
        return self._died

    def die(self) -> None:
        """It ends by itself: now, or when the kernel returns; who waits for it then hears nothing of what it did."""
        self._died = True
        self.let_go()

    async def returned(self) -> None:
        while self._task is not None:
            await asyncio.wait([self._task])

    def let_go(self) -> None:
        """Nobody is there any more to give it work: it ends, once the kernel lets it."""
        if self._task is None and not self._leaving:
            self._tell(self)
        self._leaving = True

    def _returned(self, task: asyncio.Task[Any]) -> None:
        self._call = self._task = None
        if not task.cancelled():
            # Nobody may be left to take it.
            task.exception()
        if self._leaving:
            self._tell(self)
