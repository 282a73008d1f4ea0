"""An event loop of handles and timers and nothing else. Its clock jumps, and a whole program can be killed on it.

Everything that runs here is part of a `Life`, or of the world around it (None). A life ends like a process that gets
SIGKILL: between two steps of its tasks, or at a point that it has `reached`, and nothing of it runs on.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections import Counter, deque
from collections.abc import Callable, Coroutine
from contextvars import Context, ContextVar, copy_context
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")
LIFE: ContextVar[Life | None] = ContextVar("LIFE", default=None)
"""Whose step runs now."""
AWAIT = "await"
"""The point that a life reaches whenever one of its tasks waits."""
_ROUNDS = 50
_TOO_MANY = 200_000
"""Steps of all tasks at one moment; a story has a few thousand."""


class Killed(BaseException):
    """The life of whoever gets this is over. Nothing may catch it."""


@dataclass
class Fuse:
    """Ends a life when it reaches such a point the `left`-th time from now."""

    point: str
    left: int


class Life:
    """One run of a program: what ends together. `counts` are the points that it reached, each so many times."""

    def __init__(self) -> None:
        self.alive = True
        self.tasks: list[asyncio.Task[Any]] = []
        self.counts: Counter[str] = Counter()
        self.fuse: Fuse | None = None

    def check(self) -> None:
        """Raise `Killed` where it is over."""
        if not self.alive:
            raise Killed

    def reached(self, point: str) -> None:
        """Here it may end.

        Raises:
            Killed: it does, or it has ended before.
        """
        if not self.alive or self.ends_at(point):
            raise Killed

    def ends_at(self, point: str) -> bool:
        """Count this point; whether the life ends there."""
        self.counts[point] += 1
        fuse = self.fuse
        if fuse is not None and fuse.point == point:
            fuse.left -= 1
            if fuse.left <= 0:
                self.alive = False
                return True
        return False


class _Handle(asyncio.Handle):
    """As its base, which asks each time whether it is to be debugged."""

    __slots__ = ()
    _context: Context
    _repr = None
    _source_traceback = None

    def __init__(
        self, callback: Callable[..., object], args: tuple[object, ...], loop: SimulatedLoop, context: Context | None
    ) -> None:
        self._context = context if context is not None else copy_context()
        self._loop = loop
        self._callback = callback
        self._args = args
        self._cancelled = False


class _Timer(_Handle, asyncio.TimerHandle):
    """As its base, but the loop is not told when it is cancelled: it finds out when the time comes."""

    __slots__ = ()
    cancel = asyncio.Handle.cancel

    def __init__(
        self,
        when: float,
        callback: Callable[..., object],
        args: tuple[object, ...],
        loop: SimulatedLoop,
        context: Context | None,
    ) -> None:
        super().__init__(callback, args, loop, context)
        self._when = when
        self._scheduled = True


class SimulatedLoop(asyncio.BaseEventLoop):
    """Starts at second 0, and jumps to the next timer where nothing is to be done before.

    `ended` is called with each life that a fuse has ended; `timed` with each timer that a life sets: its callback, and
    how many seconds.
    """

    _ready: deque[_Handle]
    _stopping: bool
    ended: Callable[[Life], None]
    timed: Callable[[Callable[..., object], float], None]

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        self._timers: list[tuple[float, int, _Timer]] = []
        self._numbers = itertools.count()
        self._at_once = 0
        self._begun: asyncio.Task[object] | None = None
        self.ended = lambda _: None
        self.timed = lambda _, __: None

    def time(self) -> float:
        return self._now

    def call_soon(
        self, callback: Callable[..., object], *args: object, context: Context | None = None
    ) -> asyncio.Handle:
        handle = _Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def call_at(
        self, when: float, callback: Callable[..., object], *args: object, context: Context | None = None
    ) -> asyncio.TimerHandle:
        handle = _Timer(when, callback, args, self, context)
        heapq.heappush(self._timers, (when, next(self._numbers), handle))
        if LIFE.get() is not None:
            self.timed(callback, when - self._now)
        return handle

    def create_task(  # type: ignore[override]  # of what may be awaited, coroutines are all that is used here
        self, coro: Coroutine[Any, Any, T], *, name: str | None = None, context: Context | None = None
    ) -> asyncio.Task[T]:
        task = asyncio.Task(coro, loop=self, name=name, context=context)
        if (life := LIFE.get()) is not None:
            life.tasks.append(task)
            if not life.alive:
                # It is unwound, and begins nothing any more.
                task.cancel()
        return task

    def run_as(self, life: Life | None, work: Callable[..., T], *args: object) -> T:
        """Call this as part of a life, or of the world around it: so are the tasks that it starts."""
        return copy_context().run(_as, life, work, args)

    def tell(self, life: Life, work: Callable[..., object], *args: object) -> None:
        """Have a life do this while somebody else has the turn. Should it end of it, that comes before its own turn."""
        try:
            self.run_as(life, work, *args)
        except Killed:
            self.notice(life)

    def notice(self, life: Life) -> None:
        """Have it seen that a life is over, though it waits for nothing."""
        self.run_as(life, self.call_soon, _nothing)

    def begin(self, life: Life | None, work: Coroutine[Any, Any, object]) -> None:
        """Start this as part of a life, or of the world around it; nobody waits for its end."""
        self._begun = self.run_as(life, self.create_task, work)

    def timers(self, life: Life) -> list[float]:
        """When the timers are due that this life waits for."""
        return sorted(when for when, _, t in self._timers if not t.cancelled() and t._context.get(LIFE) is life)

    def end(self, life: Life) -> None:
        """Unwind all that is left of it, now, before anything else happens. It had its last effect already."""
        life.alive = False
        others: list[_Handle] = []
        for _ in range(_ROUNDS):
            waiting = [task for task in life.tasks if not task.done()]
            for task in waiting:
                task.cancel()
            while self._ready:
                handle = self._ready.popleft()
                if handle._context.get(LIFE) is not life:
                    others.append(handle)
                elif not handle.cancelled():
                    handle._run()
            if not waiting:
                break
        else:
            raise RuntimeError(f"these do not end: {[task for task in life.tasks if not task.done()]}")
        for task in life.tasks:
            # So that nobody is told that it was not heeded.
            if not task.cancelled():
                task.exception()
        life.tasks.clear()
        self._ready.extend(others)
        self._timers[:] = (entry for entry in self._timers if entry[2]._context.get(LIFE) is not life)
        heapq.heapify(self._timers)

    def end_now(self, life: Life) -> None:
        """The same where the loop does not run: from Python 3.14 on, a task takes no step then."""
        self.call_soon(self._end_and_stop, life)
        self._ready.rotate(1)
        self.run_forever()

    def _end_and_stop(self, life: Life) -> None:
        self.end(life)
        self.stop()

    @property
    def idle(self) -> bool:
        """Whether nothing would be done now, if it were not for whoever asks: first the clock has to move."""
        return not self._ready and not (self._timers and self._timers[0][0] <= self._now)

    def _run_once(self) -> None:
        """One handle after the other, and a jump of the clock where there is none, until the loop is stopped."""
        timers, ready = self._timers, self._ready
        while not self._stopping:
            while timers and timers[0][0] <= self._now:
                ready.append(heapq.heappop(timers)[2])
            if not ready:
                self._jump()
                continue
            handle = ready.popleft()
            if handle._cancelled:
                continue
            self._at_once += 1
            if self._at_once > _TOO_MANY:
                raise RuntimeError(f"at {self._now:g} s, something goes on and on and waits for nothing")
            handle._run()
            life = handle._context.get(LIFE)
            if life is not None and life.tasks and (not life.alive or life.ends_at(AWAIT)):
                self.end(life)
                self.ended(life)

    def _jump(self) -> None:
        """Let it be the time of the next timer."""
        timers = self._timers
        while timers and timers[0][2]._cancelled:
            heapq.heappop(timers)
        if not timers:
            raise RuntimeError("everything waits for something that will never happen")
        self._now, self._at_once = timers[0][0], 0

    def _process_events(self, event_list: object) -> None:
        """There are none."""

    def _write_to_self(self) -> None:
        """Nothing sleeps that would have to be woken."""


def _nothing() -> None:
    pass


def _as(life: Life | None, work: Callable[..., T], args: tuple[object, ...]) -> T:
    LIFE.set(life)
    return work(*args)
