"""The steps that make the host ready around a GPU, and put it right again: sleep, units, modules."""

from __future__ import annotations

import errno
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass
from typing import Any

from gpuswitch.errors import KernelError
from gpuswitch.model.address import PciAddress
from gpuswitch.model.holders import Unit
from gpuswitch.switch.awake import Why
from gpuswitch.switch.step import Hands, Step, StepError, side_by_side


@dataclass(frozen=True)
class KeepUp(Step):
    """Keep the machine from sleeping: a GPU between two drivers, or in a VM, may not survive it."""

    kind = "inhibit"
    optional = True

    @property
    def title(self) -> str:
        return "keep the machine from sleeping"

    async def apply(self, hands: Hands) -> None:
        hands.waiting_for = "logind has not granted the inhibitor"
        awake = hands.arbiter.awake
        awake.need(hands.gpu, Why.SWITCH, needed=True)
        await awake.settled(hands.gpu)

    async def revert(self, hands: Hands) -> None:
        await _let_sleep(hands)


@dataclass(frozen=True)
class LetSleep(Step):
    """Let the machine sleep again, unless a virtual machine has asked for the GPU meanwhile."""

    kind = "inhibit"
    optional = True

    @property
    def title(self) -> str:
        return "let the machine sleep again"

    async def apply(self, hands: Hands) -> None:
        await _let_sleep(hands)


async def _let_sleep(hands: Hands) -> None:
    """The switch needs it awake no more; a machine that owns the GPU may."""
    hands.arbiter.awake.need(hands.gpu, Why.SWITCH, needed=False)
    await hands.arbiter.awake.settled(hands.gpu)


@dataclass(frozen=True)
class StopUnits(Step):
    """Stop units, side by side: systemd knows what has to wait for what. Those in `active` are started again."""

    kind = "units"
    interruptible = True
    units: tuple[Unit, ...]
    active: tuple[Unit, ...]

    @property
    def title(self) -> str:
        return f"stop {_all(self.units)}"

    async def apply(self, hands: Hands) -> None:
        hands.waiting_for = f"{_all(self.units)}: not stopped"
        await side_by_side(hands.arbiter.stop(hands.gpu, unit) for unit in self.units)

    async def revert(self, hands: Hands) -> None:
        await side_by_side(hands.arbiter.start(hands.gpu, unit, wait=not hands.leaving) for unit in self.active)


@dataclass(frozen=True)
class StartUnits(Step):
    """Start units that were stopped for this GPU's sake; one that another GPU still needs stopped comes with that."""

    kind = "units"
    optional = True
    interruptible = True
    units: tuple[Unit, ...]

    @property
    def title(self) -> str:
        return f"start {_all(self.units)}"

    async def apply(self, hands: Hands) -> None:
        hands.waiting_for = f"{_all(self.units)}: not started"
        await side_by_side(hands.arbiter.start(hands.gpu, unit, wait=not hands.leaving) for unit in self.units)


@dataclass(frozen=True)
class ReleaseBootFramebuffer(Step):
    """Take the firmware's frame buffer from its driver: it lies in this GPU's memory."""

    kind = "console"
    device: str
    driver: str

    @property
    def title(self) -> str:
        return f"unbind {self.device} from {self.driver}"

    async def apply(self, hands: Hands) -> None:
        await hands.kernel.unbind_platform(self.device, self.driver)

    async def revert(self, hands: Hands) -> None:
        try:
            await hands.kernel.bind_platform(self.device, self.driver)
        except KernelError as error:
            # vfio-pci's probe removes the platform device for good (aperture_remove_conflicting_pci_devices).
            if error.errno != errno.ENODEV:
                raise


@dataclass(frozen=True)
class RestoreBootFramebuffer(Step):
    """Give the firmware's frame buffer its driver back, for who asked for it: on most machines it shows garbage."""

    kind = "console"
    optional = True
    device: str
    driver: str

    @property
    def title(self) -> str:
        return f"bind {self.device} to {self.driver}"

    async def apply(self, hands: Hands) -> None:
        await hands.kernel.bind_platform(self.device, self.driver)


@dataclass(frozen=True)
class Persistence(Step):
    """Turn nvidia's persistence mode off or on: in it, the driver keeps the device in use by itself."""

    kind = "module"
    function: PciAddress
    on: bool

    @property
    def title(self) -> str:
        return f"turn persistence mode of {self.function} {'on' if self.on else 'off'}"

    async def apply(self, hands: Hands) -> None:
        await hands.kernel.set_persistence(self.function, on=self.on)

    async def verify(self, hands: Hands) -> None:
        # nvidia-smi may say that it worked where it did not.
        if await hands.kernel.persistence(self.function) is not self.on:
            raise StepError(f"persistence mode of {self.function} is still {'off' if self.on else 'on'}")

    async def revert(self, hands: Hands) -> None:
        await hands.kernel.set_persistence(self.function, on=not self.on)


@dataclass(frozen=True)
class RestorePersistence(Persistence):
    """The same at the end of the way home: the GPU is there, and works without."""

    optional = True


@dataclass(frozen=True)
class UnloadModules(Step):
    """Detach the last device of a driver by unloading its modules.

    The kernel refuses that while anything, seen or unseen, has the card open, atomically and without waiting: no look
    followed by an unbind can promise as much. A refused unload loads again what was unloaded before it.
    """

    kind = "module"
    functions: tuple[PciAddress, ...]
    driver: str
    modules: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"unload {', '.join(self.modules)}"

    async def apply(self, hands: Hands) -> None:
        for module in self.modules:
            await hands.kernel.unload(module)

    async def verify(self, hands: Hands) -> None:
        if self.driver in (await hands.look()).pci_drivers:
            raise StepError(f"{self.modules[-1]} is unloaded, but the PCI driver {self.driver} is still there")

    async def revert(self, hands: Hands) -> None:
        # The override may be aimed at vfio-pci, and then the module would find no card of its own and not load.
        if away := await self._away(hands):
            await hands.kernel.set_override(dict.fromkeys(away, self.driver))
        *around, own = self.modules
        await hands.kernel.load(own)
        for function in await self._away(hands):
            await hands.kernel.probe(function)
        await _each(hands.kernel.load(module) for module in reversed(around))
        now = (await hands.look(self.functions)).functions
        lost = [str(a) for a in self.functions if a not in now or now[a].driver_name != self.driver]
        if lost:
            raise StepError(f"{', '.join(lost)} did not come back to {self.driver}")

    async def _away(self, hands: Hands) -> list[PciAddress]:
        now = (await hands.look(self.functions)).functions
        back = [a for a in self.functions if a in now and a not in hands.staying]
        return [a for a in back if now[a].driver_name != self.driver]


@dataclass(frozen=True)
class LoadModules(Step):
    """Load the modules around the host driver that were there before."""

    kind = "module"
    optional = True
    modules: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"load {', '.join(self.modules)}"

    async def apply(self, hands: Hands) -> None:
        await _each(hands.kernel.load(module) for module in self.modules)


async def _each(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    """One after the other, all of them, also past one that fails.

    Raises:
        StepError: with the sentences of all that failed.
    """
    faults = []
    for coroutine in work:
        try:
            await coroutine
        except KernelError as error:
            faults.append(str(error))
    if faults:
        raise StepError("; ".join(faults))


def _all(names: Iterable[object]) -> str:
    return ", ".join(map(str, names))
