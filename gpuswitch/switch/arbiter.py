"""The arbiter: what several GPUs share, serialised and counted.

Units that more than one switch needs stopped, and host drivers whose modules come and go with the last of their GPUs.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Iterable

from gpuswitch.model.address import PciAddress
from gpuswitch.model.holders import Unit
from gpuswitch.switch.host import Systemd

_log = logging.getLogger(__name__)


class Arbiter:
    """One for all GPUs."""

    def __init__(self, systemd: Systemd) -> None:
        self._systemd = systemd
        self._down: defaultdict[Unit, set[PciAddress]] = defaultdict(set)
        self._busy: defaultdict[Unit, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._whose: dict[str, PciAddress] = {}
        self.stuck: dict[PciAddress, str] = {}
        """The drivers that the kernel is in, and does not return from, by the GPU whose it was."""

    # Units ----------------------------------------------------------------------------------------------------------

    def claim(self, gpu: PciAddress, units: Iterable[Unit]) -> None:
        """These are stopped for this GPU's sake, since an earlier run of the service."""
        for unit in units:
            self._down[unit].add(gpu)

    def forget(self, gpu: PciAddress) -> None:
        """This GPU needs nothing stopped any more, and starts nothing."""
        for claims in self._down.values():
            claims.discard(gpu)

    def held_down(self, unit: Unit) -> bool:
        """Whether it is stopped for some GPU's sake: it was active before, and is owed."""
        return bool(self._down[unit])

    async def stop(self, gpu: PciAddress, unit: Unit) -> None:
        """Stop it for this GPU's sake; from the first moment on, nobody of us starts it.

        Raises:
            KernelError: what its manager says.
        """
        self._down[unit].add(gpu)
        async with self._busy[unit]:
            await self._systemd.stop(unit)

    async def start(self, gpu: PciAddress, unit: Unit) -> None:
        """This GPU does not need it stopped any more: start it, unless another one does, or the system goes down.

        Raises:
            KernelError: what its manager says.
        """
        self._down[unit].discard(gpu)
        async with self._busy[unit]:
            if self._down[unit]:
                _log.info("%s stays stopped: another GPU needs it so", unit)
            elif await self._systemd.stopping():
                _log.info("%s stays stopped: the system is going down", unit)
            else:
                await self._systemd.start(unit)

    # Drivers --------------------------------------------------------------------------------------------------------

    async def take_turn(self, gpu: PciAddress, driver: str) -> None:
        """Be the only one that moves a GPU of this driver, from here on: who is its last one is not to change."""
        await self._turns[driver].acquire()
        self._whose[driver] = gpu

    def end_turn(self, gpu: PciAddress) -> None:
        """Let the next one have all that this GPU has."""
        for driver in [d for d, owner in self._whose.items() if owner == gpu]:
            del self._whose[driver]
            self._turns[driver].release()

    def whose_turn(self, driver: str) -> PciAddress | None:
        """The GPU of this driver that is being moved."""
        return self._whose.get(driver)
