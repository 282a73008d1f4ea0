"""Telling who follows udev that a card goes, or is there: by synthetic uevents, which polite programs heed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from gpuswitch.errors import KernelError
from gpuswitch.log.fields import told
from gpuswitch.model.address import PciAddress
from gpuswitch.model.holders import Holder
from gpuswitch.sentence import Sentence
from gpuswitch.switch.steps.step import RESCAN_SECONDS, Step, StepContext

_log = logging.getLogger(__name__)

Announced = tuple[tuple[str, tuple[PciAddress, ...]], ...]
"""Cards that were announced as gone: subsystems, each with functions."""

_NODES = {"sound": "/dev/snd/", "drm": "/dev/dri/"}
_FOLLOWERS = ("wireplumber", "pipewire", "pulseaudio")


@dataclass(frozen=True)
class Announce(Step):
    """Tell who follows udev that a card goes, by a synthetic uevent: PipeWire holds every sound card for ever."""

    kind = "announce"
    functions: tuple[PciAddress, ...]
    subsystem: str

    @property
    def title(self) -> str:
        return Sentence("announce that {card} goes", card=_card(self.subsystem, self.functions))

    async def apply(self, context: StepContext) -> None:
        await context.kernel.announce(self.functions, self.subsystem, "remove")

    async def revert(self, context: StepContext) -> None:
        await context.kernel.announce(self.functions, self.subsystem, "add")


@dataclass(frozen=True)
class AnnounceAgain(Step):
    """Tell who follows udev that a card is there, which never went: a service that ended had announced its leave."""

    kind = "announce"
    optional = True
    functions: tuple[PciAddress, ...]
    subsystem: str

    @property
    def title(self) -> str:
        return Sentence("announce that {card} is there", card=_card(self.subsystem, self.functions))

    async def apply(self, context: StepContext) -> None:
        await context.kernel.announce(self.functions, self.subsystem, "add")


def _card(subsystem: str, functions: Iterable[PciAddress]) -> Sentence:
    named = " and ".join(map(str, functions))
    if subsystem == "sound":
        return Sentence("the sound card of {functions}", functions=named)
    return Sentence("the display of {functions}", functions=named)


class Reminder:
    """Tells those who follow udev and have an announced card all the same: it is there; and a second later: it goes.

    When a session comes to the front, as one does when a display manager ends, WirePlumber takes the cards up. Who does
    so just as he hears of the leave misses it (0.4), and what he thinks is gone cannot go again. And since systemd 258
    logind then has udev look at each node of the seat anew (seat_trigger_devices in src/login/logind-seat.c), of which
    78-sound-card.rules makes a `change` of the card: to all who follow udev it is there again, whatever they heard
    before. Ever more rarely, and nobody else is lured: all who follow udev hear of a card that is there.
    """

    def __init__(self, announced: Announced, now: float) -> None:
        self._announced = announced
        self._there: Announced = ()
        self._pause = RESCAN_SECONDS
        self._due = now + RESCAN_SECONDS

    @property
    def settled(self) -> bool:
        """Whether the last word was that they go: who comes now has not been called."""
        return not self._there

    async def remind(self, context: StepContext, holders: Collection[Holder], now: float, left: float) -> None:
        """Say the next word, if it is time; `now` by the clock of the event loop, `left` seconds before it is over."""
        if self._there:
            if not holders or now >= self._due or left <= 0:
                there, self._there = self._there, ()
                self._pause *= 2
                self._due = now + self._pause
                await _say(context, there, "remove")
        elif now >= self._due and left >= 3 * RESCAN_SECONDS:
            self._there = tuple(each for each in self._announced if _follows(holders, each[0]))
            self._due = now + RESCAN_SECONDS
            await _say(context, self._there, "add")


def _follows(holders: Iterable[Holder], subsystem: str) -> bool:
    """Whether one of them has such a card, and is known to let go of one that goes."""
    those = [holder for holder in holders if holder.command.startswith(_FOLLOWERS)]
    return any(node.startswith(_NODES[subsystem]) for holder in those for node in holder.nodes)


async def _say(context: StepContext, cards: Announced, action: str) -> None:
    """It is only a word: one that is not heard is logged; but a kernel that does not return from it is wedged."""
    for subsystem, functions in cards:
        try:
            async with asyncio.timeout(context.deadlines["announce"]):
                await context.kernel.announce(functions, subsystem, action)
        except KernelError as error:
            _log.warning("%s", error, extra=told(GPU=context.gpu))
        except TimeoutError:
            if context.kernel.pending is not None:
                raise
