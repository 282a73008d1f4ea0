"""How long something is waited for: an answer, and before something is tried again that makes no event."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

_log = logging.getLogger(__name__)

FIRST_SECONDS = 1.0
LONGEST_SECONDS = 60.0


class Pause:
    """Longer each time it is waited for, a minute at most; from the beginning again once it was `over`."""

    def __init__(self) -> None:
        self._next = FIRST_SECONDS

    def over(self) -> None:
        """It worked."""
        self._next = FIRST_SECONDS

    def seconds(self) -> float:
        """How long it is this time."""
        seconds, self._next = self._next, min(2 * self._next, LONGEST_SECONDS)
        return seconds

    async def wait(self) -> None:
        await within(self.seconds(), asyncio.Event())


async def whatever_happens(work: Callable[[], Awaitable[None]], what: object) -> None:
    """Do this work, and after a fault in it once more; `what` is watched so, for a person."""
    pause = Pause()
    while True:
        try:
            return await work()
        except Exception as fault:  # noqa: BLE001 -- whatever it was, it goes on, and is told
            _log.critical("a fault of gpuswitch itself: %s is watched anew", what, exc_info=fault)
        await pause.wait()


async def within(seconds: float, event: asyncio.Event) -> None:
    """Until it is set, this long at most."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()


class LateError(TimeoutError):
    """There was no answer within so many seconds."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"no answer within {seconds:g} s")
        self.seconds = seconds


@asynccontextmanager
async def answered(seconds: float) -> AsyncIterator[None]:
    """What is done in it has so long for all of it.

    Raises:
        LateError: it took longer.
    """
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise LateError(seconds) from None
