"""The steps that move functions: what each one does, how it knows that it worked, and how it is taken back.

Each step stands whole in one place: `apply`, `verify`, `revert`, in that order. All three are idempotent, and `revert`
also puts right what an `apply` that failed half-way left behind, so the engine reverts the step that failed too.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from gpuswitch.errors import KernelError
from gpuswitch.log.fields import told
from gpuswitch.model.address import PciAddress
from gpuswitch.model.drivers import profile_of
from gpuswitch.model.facts import Driver, HostFacts, named_for_vfio
from gpuswitch.model.gpu import Gpu, harmless
from gpuswitch.model.holders import HolderQuery
from gpuswitch.sentence import Sentence
from gpuswitch.switch.holder_policy import in_the_way
from gpuswitch.switch.shared.books import in_the_books, machines_with
from gpuswitch.switch.shared.clearing_up import ClearingUp
from gpuswitch.switch.steps.step import DeviceError, Step, StepContext, StepError

_T = TypeVar("_T")
_log = logging.getLogger(__name__)

NO_GROUPS = Sentence("this kernel has no VFIO groups; use one with CONFIG_VFIO_GROUP")


@dataclass(frozen=True)
class LoadDriver(Step):
    """Have a driver registered, for these functions.

    Not taken back: a loaded driver moves nothing, and others may use it by then.
    """

    kind = "module"
    module: str
    driver: str
    functions: tuple[PciAddress, ...] = ()

    @property
    def title(self) -> str:
        return Sentence("load {modules}", modules=self.driver)

    async def heard(self, context: StepContext, mark: float) -> tuple[str, ...]:
        return await context.host.kernel_log.said(self.functions, {self.driver, self.module}, mark)

    async def apply(self, context: StepContext) -> None:
        try:
            await context.kernel.load(self.module)
        except KernelError as error:
            if error.errno == errno.ENODEV:
                # Its driver takes none of the devices that it is for, and there it loads no further.
                raise DeviceError(str(error)) from error
            raise

    async def verify(self, context: StepContext) -> None:
        await context.check(self._unmet)

    def _unmet(self, facts: HostFacts) -> str | None:
        if self.driver in facts.pci_drivers:
            # It shows only now, and nothing has been touched.
            return NO_GROUPS if named_for_vfio(self.driver) and facts.vfio_without_groups else None
        brought = sorted(name for name, module in facts.pci_drivers.items() if module == self.module)
        instead = f"; it has brought {', '.join(brought)}" if brought else ""
        return f"module {self.module} is loaded, but no PCI driver named {self.driver} is there{instead}"


@dataclass(frozen=True)
class DisableRuntimePm(Step):
    """Pin runtime power to `on`: a device that sleeps in D3 may not come back when its driver changes."""

    kind = "power"
    before: Mapping[PciAddress, str]

    @property
    def title(self) -> str:
        return Sentence("keep {functions} awake", functions=_all(self.before))

    async def apply(self, context: StepContext) -> None:
        await context.kernel.keep_awake(tuple(self.before))

    async def verify(self, context: StepContext) -> None:
        await context.check(self._unmet, self.before)

    def _unmet(self, facts: HostFacts) -> str | None:
        return next((f"{a} is still asleep" for a in self.before if _asleep(facts, a)), None)

    async def revert(self, context: StepContext) -> None:
        await context.kernel.set_power_control(_but_for(context.staying, self.before))


@dataclass(frozen=True)
class CheckRegisters(Step):
    """See that the functions are as the kernel had set them up, before any driver is bound that relies on it.

    Somebody may have reset them by the bus, which leaves their base addresses 0; a dead device does not answer.
    """

    kind = "capture"
    functions: tuple[PciAddress, ...]

    @property
    def title(self) -> str:
        return Sentence("check the registers of {functions}", functions=_all(self.functions))

    async def apply(self, context: StepContext) -> None:
        try:
            lost = await context.kernel.lost(self.functions)
        except KernelError as error:
            # Then their drivers find out.
            _log.warning("%s", error, extra=told(GPU=context.gpu))
            return
        if lost:
            raise DeviceError(
                f"{' and '.join(map(str, lost))} lost what the kernel had set up: no driver could work with that"
            )


@dataclass(frozen=True)
class RestorePower(Step):
    """Let runtime power management have the device again, where it had it before."""

    kind = "power"
    before: Mapping[PciAddress, str]

    @property
    def title(self) -> str:
        return Sentence("restore the power setting of {functions}", functions=_all(self.before))

    async def apply(self, context: StepContext) -> None:
        await context.kernel.set_power_control(self.before)

    async def revert(self, context: StepContext) -> None:
        await context.kernel.keep_awake(tuple(self.before))


@dataclass(frozen=True)
class AimOverrides(Step):
    """Aim driver_override, so that the next probe can bind one driver only. None clears an override.

    `returns`: at host drivers, which may bind as soon as their modules are there.
    """

    kind = "override"
    to: Mapping[PciAddress, str | None]
    before: Mapping[PciAddress, str | None]
    returns: bool = False

    @property
    def title(self) -> str:
        goals = sorted({driver for driver in self.to.values() if driver})
        if not goals:
            return Sentence("clear the driver override of {functions}", functions=_all(self.to))
        return Sentence(
            "aim the driver override of {functions} at {drivers}", functions=_all(self.to), drivers=", ".join(goals)
        )

    async def apply(self, context: StepContext) -> None:
        if self.returns:
            context.arbiter.returns(context.gpu)
        await context.kernel.set_override(self.to)

    async def revert(self, context: StepContext) -> None:
        await context.kernel.set_override(_but_for(context.staying, self.before))


@dataclass(frozen=True)
class Unbind(Step):
    """Take one function from its driver. There is no undo for an unbind that waits, hence all the care before it."""

    kind = "unbind"
    function: PciAddress
    driver: str
    patience: float = 0.0

    def deadline(self, deadlines: Mapping[str, float]) -> float:
        return max(deadlines[self.kind], self.patience)

    @property
    def title(self) -> str:
        return Sentence("unbind {device} from {driver}", device=self.function, driver=self.driver)

    @property
    def drivers(self) -> Mapping[PciAddress, str]:
        return {self.function: ""}

    async def apply(self, context: StepContext) -> None:
        await context.kernel.unbind(self.function, self.driver)

    async def verify(self, context: StepContext) -> None:
        await context.check(lambda facts: _not_on(facts, self.function, None), [self.function])

    async def revert(self, context: StepContext) -> None:
        now = (await context.look([self.function])).functions.get(self.function)
        if now is not None and now.driver_name == self.driver:
            return
        if now is not None and now.driver_name is not None:
            # The driver that it was aimed at came with its module, and took it before anybody bound it.
            await Bind(self.function, now.driver_name).revert(context)
        elif now is not None and not named_for_vfio(self.driver):
            # Perhaps since an unbind from a vfio driver that hung here, and ended later.
            context.staying.discard(self.function)
            await _release(context, now.iommu_group)
        await context.kernel.set_override({self.function: self.driver})
        await context.kernel.probe(self.function, self.driver)
        await context.check(lambda facts: _not_on(facts, self.function, self.driver), [self.function])


@dataclass(frozen=True)
class Bind(Step):
    """Probe one driverless function, and believe the driver link only: drivers_probe succeeds when nothing matched."""

    kind = "probe"
    function: PciAddress
    driver: str

    @property
    def title(self) -> str:
        return Sentence("bind {device} to {driver}", device=self.function, driver=self.driver)

    @property
    def drivers(self) -> Mapping[PciAddress, str]:
        return {self.function: self.driver}

    async def heard(self, context: StepContext, mark: float) -> tuple[str, ...]:
        module = (await context.look()).pci_drivers.get(self.driver)
        return await context.host.kernel_log.said([self.function], {self.driver, module or self.driver}, mark)

    def deadline_back(self, deadlines: Mapping[str, float]) -> float:
        return max(deadlines[self.kind], profile_of(Driver(self.driver, None)).unbind_seconds)

    async def apply(self, context: StepContext) -> None:
        try:
            await context.kernel.probe(self.function, self.driver)
        except KernelError as error:
            raise (StepError if error.errno == errno.ENODEV else self._refused)(str(error)) from error

    async def verify(self, context: StepContext) -> None:
        seen = await context.look([self.function])
        if (why := _not_on(seen, self.function, self.driver)) is not None:
            raise (self._refused if self.function in seen.functions else StepError)(why)

    @property
    def _refused(self) -> type[StepError]:
        # A vfio driver takes a device in any state.
        return StepError if named_for_vfio(self.driver) else DeviceError

    async def revert(self, context: StepContext) -> None:
        now = (await context.look([self.function])).functions.get(self.function)
        bound = now is not None and now.driver_name == self.driver
        if now is not None and (named_for_vfio(self.driver) or (bound and now.on_vfio)):
            await self._from_vfio(context, now.iommu_group, bound=bound)
        elif bound:
            await self._until_free(context)
            await context.kernel.unbind(self.function, self.driver)

    async def _from_vfio(self, context: StepContext, group: int | None, *, bound: bool) -> None:
        """A virtual machine may have taken it by now: only who holds the group may unbind."""
        if bound:
            context.staying.add(self.function)
            if group is not None:
                await context.kernel.hold_group(group)
            try:
                await context.kernel.unbind(self.function, self.driver)
            except KernelError:
                with suppress(KernelError):
                    await _release(context, group)
                raise
        context.staying.discard(self.function)
        # Where it is not bound, it may be held since an unbind that hung, and ended later.
        await _release(context, group)

    async def _until_free(self, context: StepContext) -> None:
        """It was on the host for a moment, and whoever waits for new cards may have opened it by now."""
        holders = await context.holders(HolderQuery((self.function,)))
        if holders:
            await context.kernel.announce([self.function], "sound", "remove")
        while holders:
            context.waits_for(in_the_way(self.function, holders))
            await context.wait_for_change(holders)
            # Of one that is pulled meanwhile, sysfs shows no node any more.
            holders = await context.holders(HolderQuery((self.function,), numbers=context.numbers))


@dataclass(frozen=True)
class HoldGroup(Step):
    """Hold /dev/vfio/GROUP open through the unbind: it proves that no VM has it, and nobody can take it meanwhile."""

    kind = "group"
    group: int

    @property
    def title(self) -> str:
        return Sentence("hold IOMMU group {group}", group=self.group)

    async def apply(self, context: StepContext) -> None:
        await context.kernel.hold_group(self.group)

    async def revert(self, context: StepContext) -> None:
        await context.kernel.release_group(self.group)


@dataclass(frozen=True)
class AwaitLibvirt(Step):
    """Wait until libvirt is done with the machine that had these functions: until then they stay on vfio (`books`)."""

    kind = "libvirt"
    interruptible = True
    functions: tuple[PciAddress, ...]
    seconds: float
    besides: str = ""

    @property
    def title(self) -> str:
        return Sentence("wait until libvirt is done with {functions}", functions=", ".join(map(str, self.functions)))

    def deadline(self, deadlines: Mapping[str, float]) -> float:
        return deadlines[self.kind] + self.seconds

    async def apply(self, context: StepContext) -> None:
        libvirt = context.host.libvirt
        try:
            if found := machines_with(libvirt, self.functions, besides=self.besides):
                context.waits_for(in_the_books(libvirt, found))
        except KernelError as error:
            context.waits_for(str(error))
        # Whoever cannot be had is not waited for for ever; nor is what hangs.
        clearing_up = ClearingUp(context.host, context.arbiter, lambda: self.functions, besides=self.besides)
        if not await clearing_up.wait(context.deadlines[self.kind]):
            raise StepError(context.waiting_for)


@dataclass(frozen=True)
class ReleaseGroup(Step):
    """Let /dev/vfio/GROUP go once nothing of ours is on a vfio driver any more."""

    kind = "group"
    group: int

    @property
    def title(self) -> str:
        return Sentence("release IOMMU group {group}", group=self.group)

    async def apply(self, context: StepContext) -> None:
        await context.kernel.release_group(self.group)


@dataclass(frozen=True)
class CheckGroup(Step):
    """See that a VM can have the group: vfio binds happily in a group that is not viable, and fails the VM later.

    What goes `along` with the GPU to the same machine is seen to by whoever moves that.
    """

    kind = "group"
    group: int
    gpu: Gpu
    along: frozenset[PciAddress] = frozenset()

    @property
    def title(self) -> str:
        return Sentence("check IOMMU group {group}", group=self.group)

    async def verify(self, context: StepContext) -> None:
        await context.until(self._unmet)

    def _unmet(self, facts: HostFacts) -> str | None:
        for function in facts.group(self.group):
            staying = function.address not in self.along
            if staying and function in self.gpu.neighbours(facts) and not harmless(function):
                return f"IOMMU group {self.group} is not viable: {function.address} is on {function.driver_name}"
        if str(self.group) not in facts.vfio_nodes:
            return f"/dev/vfio/{self.group} is not there"
        return None


@dataclass(frozen=True)
class AwaitNodes(Step):
    """Wait for the device nodes of a display function: whoever draws on it looks for them at once."""

    kind = "nodes"
    function: PciAddress

    @property
    def title(self) -> str:
        return Sentence("wait for the device nodes of {function}", function=self.function)

    async def verify(self, context: StepContext) -> None:
        await context.until(self._unmet, [self.function])

    def _unmet(self, facts: HostFacts) -> str | None:
        function = facts.functions.get(self.function)
        if function is None:
            return f"{self.function} left the bus"
        return f"the device nodes of {self.function} are not ready" if function.nodes_pending else None


async def _release(context: StepContext, group: int | None) -> None:
    if group is not None:
        await context.kernel.release_group(group)


def _not_on(facts: HostFacts, address: PciAddress, driver: str | None) -> str | None:
    function = facts.functions.get(address)
    if function is None:
        return f"{address} left the bus"
    if function.driver_name == driver:
        return None
    return f"{address} is on {function.driver_name or 'no driver'}, not on {driver or 'none'}"


def _asleep(facts: HostFacts, address: PciAddress) -> bool:
    function = facts.functions.get(address)
    return function is not None and function.asleep


def _but_for(staying: Collection[PciAddress], before: Mapping[PciAddress, _T]) -> dict[PciAddress, _T]:
    """What the others had before: these have what they need where they are."""
    return {a: value for a, value in before.items() if a not in staying}


def _all(functions: Collection[PciAddress]) -> str:
    match len(functions):
        case 1:
            return str(next(iter(functions)))
        case 2:
            return Sentence("both functions")
    return Sentence("all {count} functions", count=len(functions))
