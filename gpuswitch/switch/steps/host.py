"""The steps that make the host ready around a GPU, and put it right again: sleep, units, modules."""

from __future__ import annotations

import errno
from collections.abc import Collection, Coroutine, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gpuswitch.errors import KernelError
from gpuswitch.host.port import StartJob
from gpuswitch.model.address import PciAddress
from gpuswitch.model.holders import Unit
from gpuswitch.sentence import Sentence
from gpuswitch.switch.shared.awake import Why
from gpuswitch.switch.steps.step import Step, StepContext, StepError, side_by_side


@dataclass(frozen=True)
class InhibitSleep(Step):
    """Keep the machine from sleeping: a GPU between two drivers, or in a VM, may not survive it.

    The lock was asked for when the guards had let the switch pass, and is let go when it is over: this waits for it.
    """

    kind = "inhibit"
    optional = True

    @property
    def title(self) -> str:
        return Sentence("keep the machine from sleeping")

    async def apply(self, context: StepContext) -> None:
        context.waits_for("logind has not granted the inhibitor")
        awake = context.arbiter.awake
        awake.need(context.gpu, Why.SWITCH, needed=True)
        await awake.settled(context.gpu)

    async def revert(self, context: StepContext) -> None:
        """The switch does not need the machine awake any more; a virtual machine that owns the GPU may."""
        context.arbiter.awake.need(context.gpu, Why.SWITCH, needed=False)
        await context.arbiter.awake.settled(context.gpu)


@dataclass(frozen=True)
class StopUnits(Step):
    """Stop units, side by side: systemd knows what has to wait for what. Those in `active` are started again.

    Those in `restarted` look for their GPUs when they start, and may have been started while this one was away.
    """

    kind = "units"
    interruptible = True
    units: tuple[Unit, ...]
    active: tuple[Unit, ...]
    restarted: tuple[Unit, ...] = ()

    @property
    def title(self) -> str:
        return Sentence("stop {units}", units=_all(self.units))

    @property
    def stops(self) -> tuple[str, ...]:
        return tuple(map(str, self.active))

    async def apply(self, context: StepContext) -> None:
        context.waits_for(f"{_all(self.units)}: not stopped")
        await side_by_side(context.arbiter.stop(context.gpu, unit) for unit in self.units)

    async def revert(self, context: StepContext) -> None:
        await side_by_side(_start(context, self.active, self.restarted))


@dataclass(frozen=True)
class StartUnits(Step):
    """Start units that were stopped for this GPU's sake; one that another GPU still needs stopped comes with that.

    Those in `restarted` look for their GPUs when they start, and may have been started for another one meanwhile.
    """

    kind = "units"
    optional = True
    interruptible = True
    units: tuple[Unit, ...]
    restarted: tuple[Unit, ...] = ()

    @property
    def title(self) -> str:
        return Sentence("start {units}", units=_all(self.units))

    @property
    def starts(self) -> tuple[str, ...]:
        return tuple(map(str, self.units))

    async def apply(self, context: StepContext) -> None:
        context.waits_for(f"{_all(self.units)}: not started")
        await context.arbiter.arrive(context.gpu)
        await side_by_side(_start(context, self.units, self.restarted))


@dataclass(frozen=True)
class RestartUnits(Step):
    """Have units that serve other GPUs, too, find out that this one is home: they look when they start.

    nvidia-persistenced has open what there was when it started (`setup_devices` in nvidia-persistenced.c, 595.71.05),
    and refuses any other GPU later.
    """

    kind = "units"
    optional = True
    interruptible = True
    units: tuple[Unit, ...]

    @property
    def title(self) -> str:
        return Sentence("restart {units}", units=_all(self.units))

    @property
    def stops(self) -> tuple[str, ...]:
        return tuple(map(str, self.units))

    @property
    def starts(self) -> tuple[str, ...]:
        return tuple(map(str, self.units))

    async def apply(self, context: StepContext) -> None:
        context.waits_for(f"{_all(self.units)}: not restarted")
        await context.arbiter.arrive(context.gpu)
        await side_by_side(context.arbiter.restart(context.gpu, unit, wait=not context.leaving) for unit in self.units)


@dataclass(frozen=True)
class ReleaseBootFramebuffer(Step):
    """Take the firmware's frame buffer from its driver: it lies in this GPU's memory."""

    kind = "console"
    device: str
    driver: str

    @property
    def title(self) -> str:
        return Sentence("unbind {device} from {driver}", device=self.device, driver=self.driver)

    async def apply(self, context: StepContext) -> None:
        await context.kernel.unbind_platform(self.device, self.driver)

    async def revert(self, context: StepContext) -> None:
        try:
            await context.kernel.bind_platform(self.device, self.driver)
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
        return Sentence("bind {device} to {driver}", device=self.device, driver=self.driver)

    async def apply(self, context: StepContext) -> None:
        await context.kernel.bind_platform(self.device, self.driver)


@dataclass(frozen=True)
class Persistence(Step):
    """Turn nvidia's persistence mode off or on: in it, the driver keeps the device in use by itself."""

    kind = "module"
    function: PciAddress
    on: bool

    @property
    def title(self) -> str:
        if self.on:
            return Sentence("turn persistence mode of {function} on", function=self.function)
        return Sentence("turn persistence mode of {function} off", function=self.function)

    async def apply(self, context: StepContext) -> None:
        await context.kernel.set_persistence(self.function, on=self.on)

    async def verify(self, context: StepContext) -> None:
        # nvidia-smi may say that it worked where it did not.
        if await context.kernel.persistence(self.function) is not self.on:
            raise StepError(f"persistence mode of {self.function} is still {'off' if self.on else 'on'}")

    async def revert(self, context: StepContext) -> None:
        await context.kernel.set_persistence(self.function, on=not self.on)


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
        return Sentence("unload {modules}", modules=", ".join(self.modules))

    @property
    def drivers(self) -> Mapping[PciAddress, str]:
        return dict.fromkeys(self.functions, "")

    async def apply(self, context: StepContext) -> None:
        for module in self.modules:
            await context.kernel.unload(module)

    async def verify(self, context: StepContext) -> None:
        if self.driver in (await context.look()).pci_drivers:
            raise StepError(f"{self.modules[-1]} is unloaded, but the PCI driver {self.driver} is still there")

    async def revert(self, context: StepContext) -> None:
        # The override may be aimed at vfio-pci, and then the module would find no card of its own and not load.
        if away := await self._away(context):
            await context.kernel.set_override(dict.fromkeys(away, self.driver))
        *around, own = self.modules
        await context.kernel.load(own)
        for function in await self._away(context):
            await context.kernel.probe(function, self.driver)
        await _each(context.kernel.load(module) for module in reversed(around))
        now = (await context.look(self.functions)).functions
        lost = [str(a) for a in self.functions if a not in now or now[a].driver_name != self.driver]
        if lost:
            raise StepError(f"{', '.join(lost)} did not come back to {self.driver}")

    async def _away(self, context: StepContext) -> list[PciAddress]:
        now = (await context.look(self.functions)).functions
        back = [a for a in self.functions if a in now and a not in context.staying]
        return [a for a in back if now[a].driver_name != self.driver]


@dataclass(frozen=True)
class LoadModules(Step):
    """Load the modules around the host driver that were there before."""

    kind = "module"
    optional = True
    modules: tuple[str, ...]

    @property
    def title(self) -> str:
        return Sentence("load {modules}", modules=", ".join(self.modules))

    async def apply(self, context: StepContext) -> None:
        await _each(context.kernel.load(module) for module in self.modules)


def _start(
    context: StepContext, units: Iterable[Unit], restarted: Collection[Unit]
) -> Iterator[Coroutine[Any, Any, None]]:
    for unit in units:
        job = StartJob.RESTART if unit in restarted else StartJob.START
        yield context.arbiter.start(context.gpu, unit, job=job, wait=not context.leaving)


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
