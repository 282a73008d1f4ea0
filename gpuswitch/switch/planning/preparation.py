"""What comes before the first step: guards, the values to give back, who is in the way, and out of them a plan.

Changes nothing but what `held_groups` names: once that is reverted, the host is as it was.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from gpuswitch.config.settings import Config, GpuConfig
from gpuswitch.errors import Failed, InProgress, KernelError, NotViable, Owned, Wedged
from gpuswitch.host.looking import seen_within
from gpuswitch.host.operation import seconds_for
from gpuswitch.host.port import Captured, Host, Kernel
from gpuswitch.model.address import PciAddress
from gpuswitch.model.drivers import (
    around,
    from_module,
    from_name,
    host_drivers,
    kernel_name,
    named_surely,
    profile_of,
    shown_by,
    vfio_drivers,
)
from gpuswitch.model.facts import VFIO_DRIVER, Driver, HostFacts, PciFunction
from gpuswitch.model.gpu import Gpu
from gpuswitch.model.holders import HolderQuery, Scan, Unit
from gpuswitch.model.policy import Busy, Options
from gpuswitch.model.states import State
from gpuswitch.runtime.pause import answered
from gpuswitch.sentence import Sentence
from gpuswitch.switch.holder_policy import in_the_way
from gpuswitch.switch.planning.guards import GONE, Blocker, blockers, refusal, without_groups
from gpuswitch.switch.planning.plan import HomeOptions, Plan, to_host, to_quiesced, to_vfio
from gpuswitch.switch.planning.remedies import to_set
from gpuswitch.switch.planning.requirements import cannot_load, everything
from gpuswitch.switch.planning.survey import DetachSurvey
from gpuswitch.switch.restore_state import Baseline, RestoreState
from gpuswitch.switch.shared.arbiter import Arbiter
from gpuswitch.switch.shared.awake import Why
from gpuswitch.switch.shared.books import in_the_books, machines_with
from gpuswitch.switch.steps.pci import HoldGroup
from gpuswitch.switch.steps.step import Step

_GOING_DOWN = Sentence("the system is going down")


@dataclass(frozen=True)
class Preparation:
    """Everything that a plan for one GPU is computed from; `restore_state` is left to restore by an earlier switch.

    `starting`: the service is, and no systemd job may be waited for. `along`: functions that the virtual
    machine that has the GPU, or asks for it, is to have with it.
    `machine`: the one for whose sake it is asked, by name. `asking`: nothing is to follow from it, so nothing is held,
    and who reads for it is not who works on the GPU. `at_boot`: systemd may be waiting for us with its jobs, so no unit
    is started or stopped, nobody ended or waited for. `held_groups` are the groups that `plan` took, or began to take:
    with no switch to follow, they are to be reverted.
    """

    gpu: Gpu
    state: State
    facts: HostFacts
    restore_state: RestoreState
    config: Config
    options: Options
    host: Host
    arbiter: Arbiter
    starting: bool = False
    along: frozenset[PciAddress] = frozenset()
    machine: str = ""
    asking: bool = False
    at_boot: bool = False
    held_groups: list[HoldGroup] = field(default_factory=list)

    async def plan(self, target: State) -> Plan:
        """The plan that takes the GPU to `target`. For a way to the host, the GPU's groups are held from here on; the
        machine is kept awake, which whoever begins no switch then lets go (`Why.SWITCH`).

        Raises:
            GpuswitchError: a guard refuses; the sentences name every blocker.
            KernelError: a value could not be read.
            LateError: the worker did not answer.
        """
        # The worker's start costs more than the guards do: they run meanwhile.
        self.kernel.prepare()
        rules = self._own.rules
        found = self._blockers(target)
        # Nobody is asked about a GPU that the kernel has, or that is on its way.
        if found and (target is not State.VFIO or any(blocker.error in {Wedged, InProgress} for blocker in found)):
            raise refusal(found)
        if await self.arbiter.system_stopping():
            raise Failed(Sentence("cannot switch {gpu}: {why}", gpu=self.gpu.address, why=_GOING_DOWN))
        if not found and not self.asking and not self.at_boot:
            # systemd-inhibit takes longer to start than all that is looked at from here on: it does so meanwhile. At
            # boot a refusal is to be on record at once: a service that dies before does not try again.
            self.arbiter.awake.need(self.gpu.address, Why.SWITCH, needed=True)
        if target is State.VFIO:
            now, requirements = await self._survey.run(found)
            if self.starting and requirements.waits:
                raise Failed(
                    Sentence("nobody is waited for, and no unit is stopped, before the service has started: try again")
                )
            requirements = replace(requirements, along=self.along, vfio_driver=rules.vfio_driver)
            facts = self.facts if self.asking else await self._with_names()
            return to_vfio(self.gpu, facts, now, self.restore_state, requirements)
        async with answered(self.config.deadlines.capture):
            now = await self.kernel.capture(self.gpu.functions)
            baseline = await self._baseline(now)
            shows = await self._without_which_it_shows_nothing(baseline)
        waits = self.options.policy(rules.busy) is Busy.WAIT and not (self.starting or self.at_boot)
        if not self.asking and not waits:
            await self._hold_groups()
        if not waits:
            self._refuse_in_the_books()
        if not self.asking:
            baseline = await self._with_true_names(baseline)
        back = HomeOptions(
            Unit(rules.after_host) if rules.after_host else None,
            rules.leave_consoles,
            rules.restore_boot_framebuffer,
            wait_seconds=(self.options.wait_seconds or rules.wait_seconds) if waits else None,
            machine=self.machine,
            units_later=self.starting or self.at_boot,
            restarted=await self._to_restart(baseline),
            vtconsoles=self.arbiter.unbound(),
        )
        return to_host(
            self.gpu, self.facts, now, RestoreState(baseline, modules=shows).and_before(self.restore_state), back
        )

    def _blockers(self, target: State) -> tuple[Blocker, ...]:
        return blockers(
            self.gpu,
            target,
            self.state,
            self.facts,
            self.config,
            along=self.along,
        )

    async def plan_destructive(self, steps: Sequence[Step]) -> Plan:
        """The plan of a strategy's destructive steps, which come before its way to the host. Raises as `plan` does."""
        if await self.arbiter.system_stopping():
            raise Failed(_GOING_DOWN)
        self._refuse_in_the_books()
        _, requirements = await self._survey.run()
        return to_quiesced(
            self.gpu, self.facts, self.restore_state, requirements, everything(self.gpu, self.facts), steps
        )

    def _refuse_in_the_books(self) -> None:
        """What libvirt is not done with stays on vfio. Its owner has waited for that itself."""
        if not any(function.on_vfio for function in self.gpu.present(self.facts)):
            return
        libvirt = self.host.libvirt
        try:
            found = machines_with(libvirt, self.gpu.functions, besides=self.machine)
        except KernelError as error:
            if self.machine:
                return
            sentence = Sentence(
                "nobody can tell whether libvirt is done with {gpu}: {error}", gpu=self.gpu.address, error=error
            )
            raise Failed(sentence) from error
        if found:
            raise Owned(in_the_books(libvirt, found))

    def is_still_valid(self, gpu: Gpu, state: State, facts: HostFacts, restore_state: RestoreState) -> bool:
        """Whether a plan made before is right for what is so now: nobody has moved anything that it depends on."""
        before = self.gpu, self.state, self.restore_state, self._drivers(self.gpu, self.facts)
        return before == (gpu, state, restore_state, self._drivers(gpu, facts))

    def _drivers(self, gpu: Gpu, facts: HostFacts) -> Mapping[PciAddress, str | None]:
        """What depends on them; what moves along does so at its own time."""
        staying = (f for f in gpu.neighbours(facts) if f.address not in self.along)
        return {f.address: f.driver_name for f in (*gpu.present(facts), *staying)}

    @property
    def kernel(self) -> Kernel:
        gpu = str(self.gpu.address)
        return self.host.reader(gpu) if self.asking else self.host.kernel(gpu)

    @property
    def _survey(self) -> DetachSurvey:
        return DetachSurvey(
            self.gpu,
            self.facts,
            self.config,
            self.options,
            self.host,
            self.kernel,
            self.arbiter,
            at_boot=self.at_boot,
        )

    @property
    def _own(self) -> GpuConfig:
        return self.config.gpu(self.gpu.address)

    async def _baseline(self, now: Baseline) -> Baseline:
        kept = self.restore_state.functions
        baseline = {a: kept.get(a) or await self._first_seen(a, now) for a in self.gpu.functions}
        home = dict.fromkeys(captured.driver for captured in baseline.values() if captured.driver)
        if found := tuple(cannot_load(home, self.facts)):
            raise refusal(found)
        return baseline

    async def _to_restart(self, baseline: Baseline) -> tuple[Unit, ...]:
        """The units of the drivers it comes home to which run, or are to run again."""
        drivers = {captured.driver for captured in baseline.values() if captured.driver}
        units = tuple(dict.fromkeys(unit for driver in drivers for unit in profile_of(driver).units))
        if not units or self.at_boot:
            return self.restore_state.restarted
        try:
            async with asyncio.timeout(self.config.deadlines.inhibit):
                running = await self.host.systemd.active(units)
        except (KernelError, TimeoutError):
            return self.restore_state.restarted
        return tuple(unit for unit in units if unit in running or self.arbiter.is_to_be_started(unit))

    async def _first_seen(self, function: PciAddress, now: Mapping[PciAddress, Captured]) -> Captured:
        """The baseline of a function that nobody saw on the host: what it has, or the only driver that fits it."""
        captured = now[function]
        seen = self.facts.functions[function]
        if seen.driver != captured.driver:
            seen = replace(seen, driver=captured.driver, vfio_device=False)
        if not seen.on_vfio:
            return captured
        if seen.makes_gpu and self._own.host_driver:
            driver = await self._named_in_the_config(self._own.host_driver)
        else:
            found = host_drivers(seen, await self.kernel.candidates(function), self.facts)
            if not found and not seen.makes_gpu:
                return replace(captured, driver=None, override=None)
            if not found and not self.facts.modules_on_disk:
                raise NotViable(
                    Sentence(
                        "{function} was on a vfio driver before gpuswitch looked, and its driver cannot be loaded: the "
                        "{gone}: restart the machine first",
                        function=function,
                        gone=GONE,
                    )
                )
            driver = self._only(found, seen)
        # Whoever put it on its vfio driver before us may have aimed the override there; at home it would be in the way.
        return replace(captured, driver=driver, override=None)

    def _only(self, found: Sequence[Driver], function: PciFunction) -> Driver:
        if len(found) == 1:
            return found[0]
        what, driver = Sentence("no installed driver fits it"), "DRIVER"
        if found:
            names = [driver.name for driver in found]
            what, driver = Sentence("several drivers fit it ({names})", names=", ".join(names)), names[0]
        if function.makes_gpu:
            remedy = Sentence("say which one it is to have, such as: {set}", set=self._to_set_host_driver(driver))
        else:
            remedy = Sentence(
                "bind it to the right one yourself first: echo {driver} > /sys/bus/pci/devices/{function}/"
                "driver_override, then echo {function} to unbind of its driver and to /sys/bus/pci/drivers_probe",
                driver=driver,
                function=function.address,
            )
        raise NotViable(
            Sentence(
                "{function} was on a vfio driver before gpuswitch looked, and {what}: {remedy}",
                function=function.address,
                what=what,
                remedy=remedy,
            )
        )

    async def _without_which_it_shows_nothing(self, baseline: Baseline) -> tuple[str, ...]:
        """Modules around the drivers of functions that nobody saw on the host: what was loaded there is not known."""
        first = {c.driver for a, c in baseline.items() if c.driver and a not in self.restore_state.functions}
        here = {f.driver for f in self.gpu.present(self.facts)}
        wanted = dict.fromkeys(module for driver in first - here for module in shown_by(driver))
        found = await self.kernel.loadable(tuple(wanted)) if wanted else ()
        # By one name each, the kernel's where modprobe knows it.
        return tuple({kernel_name(module): module for module in reversed(found)}.values())

    async def _named_in_the_config(self, name: str) -> Driver:
        registered = self.facts.pci_drivers
        if driver := around(name, registered):
            sentence = Sentence(
                "`host_driver` of {gpu} is {name}, which is a module around the driver {driver} and no driver of the "
                "PCI bus: {set}",
                gpu=self.gpu.address,
                name=name,
                driver=driver,
                set=self._to_set_host_driver(driver),
            )
            raise NotViable(sentence)
        named = from_name(name, registered)
        if named.name not in registered and named.module and not await self._is_installed(named.module):
            sentence = Sentence(
                "`host_driver` of {gpu} is {name}, which is not there and cannot be loaded: {why}; install the driver, "
                "or have the only one taken that fits: {set}",
                gpu=self.gpu.address,
                name=name,
                why=Sentence("modprobe finds no module for it")
                if self.facts.modules_on_disk
                else Sentence("the {gone}", gone=GONE),
                set=self._to_set_host_driver(""),
            )
            raise NotViable(sentence)
        return named

    def _to_set_host_driver(self, name: str) -> Sentence:
        return to_set(self.config, self.gpu, "host_driver", f'"{name}"')

    async def _is_installed(self, module: str) -> bool:
        """Where nobody can tell, it is tried: should it not load, all is taken back."""
        try:
            return bool(await self.kernel.loadable((module,), by_name=True))
        except KernelError:
            return True

    async def _with_true_names(self, baseline: Baseline) -> Baseline:
        """The same, once the modules are loaded whose drivers' names nobody knows before.

        What does not load while the GPU is on vfio may do so once it is free, and is looked at then. The GPU is aimed
        at its vfio driver, or that has it: no driver that comes with such a module takes it.
        """
        first = {a: c.driver for a, c in baseline.items() if c.driver and a not in self.restore_state.functions}
        named = {*self.facts.pci_drivers, self._own.host_driver}
        unsure = {a: d for a, d in first.items() if d.module and not named_surely(d, named)}
        if not unsure:
            return baseline
        async with answered(seconds_for(Kernel.load, self.config.deadlines)):
            for module in dict.fromkeys(str(driver.module) for driver in unsure.values()):
                with suppress(KernelError):
                    await self.kernel.load(module)
        registered = (await seen_within(self.config.deadlines.capture, self.host)).pci_drivers
        classes = {a: self.facts.functions[a].class_code for a in unsure}
        true = {a: from_module(str(d.module), registered, classes[a]) for a, d in unsure.items()}
        return {a: replace(c, driver=true.get(a, c.driver)) for a, c in baseline.items()}

    async def _with_names(self) -> HostFacts:
        """The facts, once the modules are loaded that alone tell what the wanted vfio drivers are called.

        A driver of vfio's takes what a driver override gives it, and nothing by itself.
        """
        wanted = vfio_drivers(self.gpu, self.facts, self._own.rules.vfio_driver).values()
        named = {VFIO_DRIVER, *self.facts.pci_drivers}
        if not (unnamed := [driver.module for driver in wanted if driver.module and driver.name not in named]):
            return self.facts
        async with answered(seconds_for(Kernel.load, self.config.deadlines)):
            for module in unnamed:
                await self.kernel.load(module)
        seen = await seen_within(self.config.deadlines.capture, self.host)
        if found := tuple(without_groups(self.gpu, State.VFIO, seen)):
            raise refusal(found)
        return replace(self.facts, pci_drivers=seen.pci_drivers)

    async def _hold_groups(self) -> None:
        """Open the groups now: EBUSY is the kernel's own word that a VM has one, and holding it keeps it so."""
        on_vfio = [f for f in self.gpu.present(self.facts) if f.on_vfio]
        for group in sorted({f.iommu_group for f in on_vfio if f.iommu_group is not None}):
            self.held_groups.append(HoldGroup(group))
            try:
                async with answered(self.config.deadlines.capture):
                    await self.kernel.hold_group(group)
            except KernelError as error:
                if error.errno == errno.EBUSY:
                    raise Owned(await self._who_has(group)) from error
                raise

    async def _who_has(self, group: int) -> Sentence:
        """The sentence that names who has the group, where that can be told."""
        try:
            async with asyncio.timeout(self.config.deadlines.holders):
                scan = await self.host.processes.scan(HolderQuery(self.gpu.functions, (f"vfio/{group}",)))
        except (KernelError, TimeoutError):
            scan = Scan()
        if scan.holders:
            return in_the_way(self.gpu.address, scan.holders)
        return Sentence(
            "{gpu} is in use: something has /dev/vfio/{group} open, most likely a virtual machine: shut it down first",
            gpu=self.gpu.address,
            group=group,
        )
