"""libvirt's books: which machine libvirt is not done with, and when they change.

What is in them stays on vfio. libvirt resets by the bus what it finds on a host driver when it clears up after a
machine, in use or not, and restores the config space of one function only: the other loses its BARs under its driver.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from gpuswitch.errors import KernelError
from gpuswitch.model.address import PciAddress
from gpuswitch.model.owner import Owner
from gpuswitch.switch.host import Libvirt
from gpuswitch.switch.pause import Pause, within

_log = logging.getLogger(__name__)


def machines_with(libvirt: Libvirt, functions: Collection[PciAddress]) -> dict[PciAddress, Owner]:
    """Those of these functions that a machine in the books has.

    Raises:
        KernelError: nobody can tell.
    """
    machines = libvirt.machines()
    return {function: machines[function] for function in functions if function in machines}


def sentence(found: dict[PciAddress, Owner]) -> str:
    """What is in the books, to a person."""
    owner = next(iter(found.values()))
    return f"libvirt has {owner} in its books, with {' and '.join(map(str, found))}, and would reset that on the host"


class Change:
    """A change of the books, or of whether libvirt's daemon is there, after this was made: wait for it with `come`."""

    def __init__(self, pause: Pause, *, watched: bool) -> None:
        self._pause = pause
        self._watched = watched
        self.event = asyncio.Event()

    async def come(self) -> None:
        """Until it comes; where no event would tell, for a while."""
        if self._watched:
            await self.event.wait()
        else:
            await self.within_a_while()

    async def within_a_while(self) -> None:
        """Until it comes, or something may be otherwise that makes no event."""
        await within(self._pause.seconds(), self.event)


@contextmanager
def watching(libvirt: Libvirt, pause: Pause) -> Iterator[Change]:
    """From before a look at the books until what follows from it: nothing that comes meanwhile is missed."""
    change = Change(pause, watched=True)
    try:
        unwatch = libvirt.watch(change.event.set)
    except KernelError as error:
        _log.warning("%s", error)
        yield Change(pause, watched=False)
        return
    try:
        yield change
    finally:
        unwatch()
