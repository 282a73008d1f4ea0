"""libvirt's books: which machine libvirt is not done with, and when they change.

What is in them stays on vfio. libvirt resets by the bus what it finds on a host driver when it clears up after a
machine, in use or not, and restores the config space of one function only: the other loses its BARs under its driver.
"""

from __future__ import annotations

import asyncio
import logging
import shlex
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

from gpuswitch.errors import KernelError
from gpuswitch.host.port import Libvirt
from gpuswitch.model.address import PciAddress
from gpuswitch.model.owner import Owner
from gpuswitch.runtime.pause import Pause, within
from gpuswitch.sentence import Sentence

_log = logging.getLogger(__name__)
LOOK_SECONDS = 60.0
"""For how long an event is relied on, where much hangs on it."""


def machines_with(
    libvirt: Libvirt, functions: Collection[PciAddress], *, besides: str = ""
) -> Mapping[Owner, tuple[PciAddress, ...]]:
    """The machines in the books that have any of these functions, and which; `besides`: without the one of this name.

    Raises:
        KernelError: nobody can tell.
    """
    found = {owner: tuple(f for f in functions if f in has) for owner, has in libvirt.machines().items()}
    return {owner: has for owner, has in found.items() if has and owner.name != besides}


def in_the_books(libvirt: Libvirt, found: Mapping[Owner, tuple[PciAddress, ...]]) -> Sentence:
    """What is in the books, to a person."""
    owner, functions = next(iter(found.items()))
    return Sentence(
        "libvirt has {owner} in its books, with {functions}, and would reset that on the host: shut the machine down "
        "first: virsh shutdown {name}; where it has ended, have libvirt started, which then clears up after it; where "
        "libvirt runs and knows no such machine: rm {file}",
        owner=owner.words,
        functions=", ".join(map(str, functions)),
        name=shlex.quote(owner.name),
        file=shlex.quote(str(libvirt.file_of(owner))),
    )


class Change:
    """A change of the books, or of whether libvirt's daemon is there, from here on. `watched`: an event tells."""

    def __init__(self, pause: Pause, *, watched: bool) -> None:
        self._pause = pause
        self._watched = watched
        self.event = asyncio.Event()

    async def come(self, seconds: float | None = None) -> None:
        """Until it comes, this long at most; where no event would tell, for a while."""
        if not self._watched:
            await within(self._pause.seconds(), self.event)
        elif seconds is None:
            await self.event.wait()
        else:
            await within(seconds, self.event)


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
