"""The record of one switch: what was asked, how far it is, how it ended."""

from __future__ import annotations

import asyncio
import secrets
import time
from dataclasses import dataclass, field
from enum import StrEnum

from gpuswitch.model.states import State
from gpuswitch.switch.engine import StepEvent


class Result(StrEnum):
    """How a switch ended. Only `done` is what was asked for; `reverted` and `cancelled` left the GPU as it was."""

    DONE = "done"
    REVERTED = "reverted"
    FAILED = "failed"
    CANCELLED = "cancelled"
    WEDGED = "wedged"


@dataclass
class Switch:
    """One switch. `started` and `finished` are seconds since the epoch; `seconds` is how long it took.

    `index` of `count` steps is under way, or was the last; `result` is None until it is over.
    """

    target: State
    count: int
    id: str = field(default_factory=lambda: secrets.token_hex(4))
    started: float = field(default_factory=time.time)
    finished: float | None = None
    seconds: float = 0.0
    index: int = 0
    step: str = ""
    result: Result | None = None
    reason: str = ""
    _over: asyncio.Event = field(default_factory=asyncio.Event, repr=False)
    _clock: float = field(default_factory=lambda: asyncio.get_running_loop().time(), repr=False)

    def at(self, event: StepEvent) -> None:
        self.index, self.step = event.index, event.step.title

    def finish(self, result: Result, reason: str) -> None:
        self.seconds = asyncio.get_running_loop().time() - self._clock
        self.finished = self.started + self.seconds
        self.result, self.reason = result, reason
        self._over.set()

    async def wait(self) -> None:
        """Until it is over."""
        await self._over.wait()
