"""Telling who follows udev that a card goes, or is there: by synthetic uevents, which polite programs heed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from gpuswitch.model.address import PciAddress
from gpuswitch.model.holders import Holder
from gpuswitch.switch.step import RESCAN_SECONDS, Hands, Step

Announced = tuple[tuple[str, tuple[PciAddress, ...]], ...]
"""Cards that were announced as gone: subsystems, each with functions."""

_NODES = {"sound": "/dev/snd/", "drm": "/dev/dri/"}


@dataclass(frozen=True)
class Announce(Step):
    """Tell who follows udev that a card goes, by a synthetic uevent: PipeWire holds every sound card for ever."""

    kind = "announce"
    functions: tuple[PciAddress, ...]
    subsystem: str

    @property
    def title(self) -> str:
        card = "sound card" if self.subsystem == "sound" else "display"
        return f"announce that the {card} of {' and '.join(map(str, self.functions))} goes"

    async def apply(self, hands: Hands) -> None:
        await hands.kernel.announce(self.functions, self.subsystem, "remove")

    async def revert(self, hands: Hands) -> None:
        await hands.kernel.announce(self.functions, self.subsystem, "add")


@dataclass(frozen=True)
class AnnounceAgain(Step):
    """Tell who follows udev that a card is there, which never went: a service that ended had announced its leave."""

    kind = "announce"
    optional = True
    functions: tuple[PciAddress, ...]
    subsystem: str

    @property
    def title(self) -> str:
        card = "sound card" if self.subsystem == "sound" else "display"
        return f"announce that the {card} of {' and '.join(map(str, self.functions))} is there"

    async def apply(self, hands: Hands) -> None:
        await hands.kernel.announce(self.functions, self.subsystem, "add")


class Reminder:
    """Tells those who have an announced card all the same that it is there, and a second later that it goes.

    Who hears of the leave just as he takes the card up misses it, and what he thinks is gone cannot go again: so does
    WirePlumber 0.4 when its session comes to the front, as one does when a display manager ends. Ever more rarely, for
    those who do not follow udev at all. `now` is the time of the event loop, in seconds.
    """

    def __init__(self, announced: Announced, now: float) -> None:
        self._announced = announced
        self._action = "add"
        self._pause = RESCAN_SECONDS
        self._due = now + RESCAN_SECONDS

    async def remind(self, hands: Hands, holders: Iterable[Holder], now: float) -> None:
        """Say the next word, if it is time and one of them has such a card."""
        nodes = [node for holder in holders for node in holder.nodes]
        taken = [each for each in self._announced if any(node.startswith(_NODES[each[0]]) for node in nodes)]
        if not taken or now < self._due:
            return
        for subsystem, functions in taken:
            await hands.kernel.announce(functions, subsystem, self._action)
        if self._action == "remove":
            self._pause *= 2
        self._action = "add" if self._action == "remove" else "remove"
        self._due = now + self._pause
