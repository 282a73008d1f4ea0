"""A pause before something is tried again that may work later, and that makes no event when it does."""

from __future__ import annotations

import asyncio
from contextlib import suppress

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
