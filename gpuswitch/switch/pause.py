"""How long something is waited for: an answer, and before something is tried again that makes no event."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

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
