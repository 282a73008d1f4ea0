"""The turn of one GPU at what it shares with others that are moved: its IOMMU groups, and its driver's modules."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from gpuswitch.errors import InProgress
from gpuswitch.gpu.gpu_record import GpuRecord
from gpuswitch.host.looking import seen
from gpuswitch.host.port import Host
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import Driver
from gpuswitch.sentence import Sentence
from gpuswitch.switch.planning.requirements import moves_in_turns
from gpuswitch.switch.shared.arbiter import Arbiter


class Turns:
    """Of one GPU."""

    def __init__(self, record: GpuRecord, host: Host, arbiter: Arbiter) -> None:
        self._record = record
        self._host = host
        self._arbiter = arbiter

    async def take(self, seconds: float | None) -> None:
        """Wait for the others that are being moved: those in its IOMMU groups, then those on its driver.

        Raises:
            InProgress: they still are, after this many seconds.
        """
        gpu = self._record.gpu
        groups = gpu.groups(self._record.facts)
        try:
            async with asyncio.timeout(seconds):
                await self._arbiter.take_groups(gpu, groups)
        except TimeoutError:
            if others := self._arbiter.in_groups(groups, besides=gpu.address):
                text = Sentence(
                    "{gpu} cannot be switched while {others} is: they share an IOMMU group; wait for that first: "
                    "{command}",
                    gpu=gpu.address,
                    others=", ".join(map(str, others)),
                    command=_wait(others),
                )
                raise InProgress(text) from None
            # At that very moment it was over.
            await self._arbiter.take_groups(gpu, groups)
        try:
            await self._take_at_driver(seconds)
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        """It is not moved any more."""
        self._arbiter.end_turn(self._record.gpu.address)

    async def _take_at_driver(self, seconds: float | None) -> None:
        """Where this switch may unload modules that other GPUs use: who is the last one is not to change meanwhile."""
        gpu, driver = self._record.gpu, self._record.host_driver
        if driver is None or not moves_in_turns(driver, self._record.rules.module_policy):
            return

        async def staying() -> set[PciAddress]:
            facts = await seen(self._host)
            own = Driver(driver, facts.pci_drivers.get(driver))
            others = {a: f.driver for a, f in facts.functions.items() if a not in self._record.gpu.functions}
            return {a for a, other in others.items() if other is not None and own.comes_with(other)}

        try:
            async with asyncio.timeout(seconds):
                await self._arbiter.take_turn(gpu, driver, staying)
        except TimeoutError:
            others = self._arbiter.moving(driver)
            text = Sentence(
                "{gpu} cannot be switched while {others} is: both are on {driver}; wait for that first: {command}",
                gpu=gpu.address,
                others=", ".join(map(str, others)),
                driver=driver,
                command=_wait(others),
            )
            raise InProgress(text) from None


def _wait(others: Iterable[PciAddress]) -> str:
    return f"gpuswitchctl wait {' '.join(map(str, others))}"
