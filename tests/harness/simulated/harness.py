"""A fleet on a simulated host, and a witness who checks after each event what must always hold."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from gpuswitch.config.kinds import checked_table
from gpuswitch.config.schema import Defaults
from gpuswitch.config.settings import Config, GpuConfig
from gpuswitch.fleet.fleet import Fleet
from gpuswitch.gpu.actor import Actor
from gpuswitch.gpu.gpu_record import GpuRecord
from gpuswitch.gpu.observer import Observer
from gpuswitch.host.simulated.consoles import VTCONSOLE
from gpuswitch.host.simulated.devices import Device
from gpuswitch.host.simulated.host import SimulatedHost
from gpuswitch.host.simulated.kernel import Machine
from gpuswitch.host.simulated.scenarios import SCENARIOS
from gpuswitch.model.address import PciAddress
from gpuswitch.model.drivers import NVIDIA
from gpuswitch.model.facts import named_for_vfio
from gpuswitch.model.gpu import Gpu
from gpuswitch.model.holders import Unit
from gpuswitch.model.policy import Options
from gpuswitch.model.states import State
from gpuswitch.switch.engine import Status, StepEvent
from gpuswitch.switch.journal.journal import Journal
from gpuswitch.switch.journal.store import DirectoryStore
from gpuswitch.switch.record import Drift, Result, Switch
from gpuswitch.switch.steps.pci import Unbind
from gpuswitch.switch.steps.step import Step

_AS_CONFIGURED = Options()
_SHARED = PciAddress.parse("0000:01:00.0")
GPUS = {
    "laptop": "0000:01:00.0",
    "plain": "0000:01:00.0",
    "server": "0000:31:00.0",
    "shared": str(_SHARED),
    "apu": "0000:04:00.0",
    "single": "0000:01:00.0",
}
"""The GPU to switch in each scenario."""


GENTLE: dict[str, Any] = {"reset_on_failure": False, "rescan_on_failure": False}
"""Rules by which what does not come home stays where it was."""


def config(scenario: str = "", **rules: object) -> Config:
    """Settings under which the GPU of the scenario may go, and these `rules` (`Defaults`) for all of them.

    Its screen may turn dark, its neighbour comes along, and the display manager is stopped.
    """
    display_manager = ("display-manager.service",) if scenario == "single" else ()
    own = checked_table(Defaults, {"allow_boot_display": True, "stop_units": display_manager} | rules)
    shared = GpuConfig(_SHARED, managed=True, rules=own, name="card", members=(PciAddress.parse("0000:02:00.0"),))
    return Config(gpus=(shared,) if scenario == "shared" else (), defaults=own)


class Settings(NamedTuple):
    """All that a switch may change of a function, and must give back."""

    link: str | None
    bound: str | None
    override: str | None
    power_control: str
    others: tuple[tuple[str, str], ...] = ()
    """What else was declared to be written, by its path (`gpuswitch.host.port.ATTRIBUTES`)."""


_TOLD = frozenset({"driver_override", "power/control"})
Snapshot = dict[object, object]


def settings_of(device: Device) -> Settings:
    return Settings(
        device.link.name if device.link else None,
        device.binding.driver.name if device.binding else None,
        device.override,
        device.power_control,
        tuple((path, value) for path, value in device.settings.items() if path not in _TOLD),
    )


def snapshot(machine: Machine) -> Snapshot:
    """Everything that a switch may change on this machine, by who or what it is.

    But the module of vfio-pci, which stays, and people's sessions, which nobody can bring back.
    """
    functions: Snapshot = {a: settings_of(device) for a, device in machine.devices.items()}
    groups: Snapshot = {n: (g.opened_by, g.dma_owner) for n, g in machine.groups() if g.opened_by or g.dma_owner}
    units: Snapshot = {u: r.state for u, r in machine.units._records.items() if not u.name.endswith(".scope")}
    around: Snapshot = {
        "modules": frozenset(machine.look().modules),
        "consoles": consoles(machine),
        "boot frame buffers": machine.look().boot_framebuffers,
        "persistent": frozenset(a for a, device in machine.devices.items() if device.persistent),
        "inhibitors": frozenset(machine.units.inhibitors),
        "access": frozenset(machine.access.entries),
        "opened by units": opened_by_units(machine),
    }
    return functions | groups | units | around


def opened_by_units(machine: Machine) -> dict[str, frozenset[PciAddress]]:
    """The functions that the driver's own units have open, by program: they look for them only when they start."""
    return {
        program.name: frozenset(function for function in machine.devices if program.name in machine.users(function))
        for program in machine.processes.running()
        if program.unit in NVIDIA.units
    }


def consoles(machine: Machine) -> dict[int | str, object]:
    """On whose frame buffer each virtual terminal is shown, and whether the console is bound."""
    buffers = machine.frame_buffers
    shown: dict[int | str, object] = {vt: buffers._there[n].function for vt, n in buffers._mapped.items()}
    return shown | {VTCONSOLE: buffers._bound}


def is_step(step: Step | None, kind: type[Step], **having: object) -> bool:
    """Whether it is a step of this kind that has these attributes."""
    return isinstance(step, kind) and all(getattr(step, name) == value for name, value in having.items())


@dataclass
class Witness(Observer):
    """Keeps what it hears, and checks the invariants."""

    broken: ClassVar[list[str]] = []
    """What was seen that must never be so, by any witness: who called it may not have lived to tell."""
    machine: Machine
    words: list[str] = field(default_factory=list)
    """What was told, in order: `0000:01:00.0 detaching`, `0000:01:00.0 3/9 running`, `0000:01:00.0 done`."""
    on_step: Callable[[Actor, StepEvent], None] | None = None
    home: dict[PciAddress, Settings] = field(default_factory=dict)
    """What each function had at home, when it was first seen there."""
    at: dict[PciAddress, Step] = field(default_factory=dict)
    """The step that each GPU's switch is at, or was at last."""
    told: asyncio.Event = field(default_factory=asyncio.Event)
    waited: list[str] = field(default_factory=list)
    """What switches waited for, in order."""
    _actors: dict[PciAddress, Actor] = field(default_factory=dict)

    def appeared(self, actor: Actor) -> None:
        self._actors[actor.gpu.address] = actor
        self._heard(actor.record, f"appeared {actor.state}")

    def vanished(self, actor: Actor) -> None:
        self._heard(actor.record, "vanished")

    def changed(self, record: GpuRecord) -> None:
        self._heard(record, str(record.state))

    def stepped(self, record: GpuRecord, switch: Switch, event: StepEvent) -> None:
        self._holds(record, switch is record.switch and switch.result is None, "a step of a switch that is over")
        if event.status is Status.RUNNING and isinstance(event.step, Unbind):
            self._check_unbind(record, event.step)
        self.at[record.gpu.address] = event.step
        self._heard(record, f"{event.index}/{event.count} {event.status}")
        if self.on_step is not None:
            self.on_step(self._actors[record.gpu.address], event)

    def waits(self, record: GpuRecord) -> None:
        switch = record.switch
        self._holds(record, switch is not None and switch.result is None, "a switch that is over waits")
        if switch is not None:
            self.waited.append(switch.waiting_for)
            self.told.set()

    def finished(self, record: GpuRecord, switch: Switch) -> None:
        done = switch.result is Result.DONE
        self._holds(record, switch.result is not None, "finished without a result")
        self._holds(record, not done or record.state is switch.target, f"done, and it is {record.state}")
        self._heard(record, str(switch.result))

    def returned(self, record: GpuRecord, switch: Switch) -> None:
        self._holds(record, switch.returned is not None, "returned, and it does not say so")
        self._heard(record, f"returned: {record.state}")

    def drifted(self, record: GpuRecord, drift: Drift) -> None:
        self._holds(record, drift.before is not drift.after, "a drift to where it was")
        self._heard(record, f"drifted from {drift.before} to {drift.after}")

    def recovered(self, record: GpuRecord) -> None:
        self._heard(record, f"recovered: {record.state}")

    async def until(self, wanted: Callable[[], bool]) -> None:
        """Wait for the event after which it is so."""
        while not wanted():
            self.told.clear()
            await self.told.wait()

    async def until_step(self, gpu: Gpu, kind: type[Step], **having: object) -> None:
        """Wait until a switch of the GPU is at a step of this kind that has these attributes."""
        await self.until(lambda: is_step(self.at.get(gpu.address), kind, **having))

    def _heard(self, record: GpuRecord, word: str) -> None:
        self.words.append(f"{record.gpu.address} {word}")
        self.told.set()
        self._check(record)

    def _holds(self, record: GpuRecord, so: bool, what: str) -> None:
        if not so:
            self.broken.append(f"{record.gpu.address}, after {self.words[-1:]}: {what}")

    def _check(self, record: GpuRecord) -> None:
        """Invariants 2, 3 and 6 of a GPU."""
        on_vfio = {f.on_vfio for f in record.gpu.present(self.machine.look())}
        if record.state.stable:
            self._holds(record, on_vfio == {record.state is State.VFIO}, "split between vfio and host drivers")
        if record.state is State.HOST and not self._actors[record.gpu.address].bound:
            for function in record.gpu.functions:
                now = settings_of(self.machine.devices[function])
                kept = self.home.setdefault(function, now)
                # A link that is gone before its driver: somebody is pulling the card.
                left = now.link is None and now.bound is not None
                self._holds(record, left or kept == now, f"not all of it came back: {kept} is {now}")
        at_once = sum(switch.result is None for switch in record.recent)
        self._holds(record, at_once <= 1, "two switches at once")

    def _check_unbind(self, record: GpuRecord, step: Unbind) -> None:
        """What must be so before an unbind, for which there is no undo (invariants 1 and 7)."""
        device = self.machine.devices.get(step.function)
        if device is None:
            # Pulled a moment ago.
            return
        if named_for_vfio(step.driver):
            group = self.machine.group(device.shape.iommu_group or 0)
            held = group.opened_by == f"the worker of {record.gpu.address}"
            self._holds(record, held, f"unbound from {step.driver} while {group.opened_by} has its group")
            return
        overrides = {self.machine.devices[f.address].override for f in record.gpu.present(self.machine.look())}
        aimed = all(override and named_for_vfio(override) for override in overrides)
        self._holds(record, aimed, f"unbound with overrides {overrides}")
        users = self.machine.users(step.function)
        self._holds(record, not users, f"{step.title} while {', '.join(users)} has it open")


@dataclass
class Harness:
    """A fleet that runs on a simulated host."""

    host: SimulatedHost
    fleet: Fleet
    witness: Witness
    directory: Path

    @classmethod
    async def start(
        cls, host: SimulatedHost, directory: Path, settings: Config | None = None, *, restore_deferred: bool = True
    ) -> Harness:
        """Start a service on this host. `restore_deferred`: and let it give back what its start could not wait for."""
        witness = Witness(host.machine)
        fleet = Fleet(host, settings or config(), Journal(DirectoryStore(directory)), witness)
        await fleet.start()
        if restore_deferred:
            await fleet.restore_deferred()
        return cls(host, fleet, witness, directory)

    @classmethod
    async def of(cls, scenario: str, directory: Path, **rules: object) -> Harness:
        return await cls.start(SCENARIOS[scenario](), directory, config(scenario, **rules))

    @property
    def machine(self) -> Machine:
        return self.host.machine

    @property
    def pages(self) -> list[str]:
        """Whose journal there is."""
        return sorted(path.name for path in self.directory.glob("*.json"))

    def snapshot(self) -> Snapshot:
        return snapshot(self.machine)

    def state(self, unit: Unit) -> str:
        return self.machine.units.state(unit)

    def replug(self, slot: str) -> None:
        """Put a card back into its slot. udev loads what its functions ask for, and what belongs on top of that."""
        machine = self.machine
        machine.replug(slot)
        for address in [a for a in machine.devices if a.slot_name == slot]:
            for each in machine.drivers.candidates(machine.devices[address].shape.modalias):
                machine.modules.at_boot(each.module)
        for module in machine.drivers.modules.values():
            if any(machine.drivers.loaded(name) is not None for name in module.requires):
                machine.modules.at_boot(module.name)
        machine.changed(None, uevent=True)

    async def switch(self, actor: Actor, target: State, options: Options = _AS_CONFIGURED) -> Switch:
        """Ask for it, and wait for its end, and until the machine may sleep again."""
        switch = await actor.request(target, options)
        await switch.wait()
        await self.witness.until(lambda: not actor.state.moving)
        await self.may_sleep(actor)
        return switch

    async def may_sleep(self, actor: Actor) -> None:
        """Until the machine is kept awake no more for this GPU, where nothing of it needs that: nobody waits for it."""
        await self.fleet._arbiter.awake.settled_if_possible(actor.gpu.address)

    async def moved(self, actor: Actor, target: State, options: Options = _AS_CONFIGURED) -> None:
        """Switch, successfully."""
        switch = await self.switch(actor, target, options)
        assert (switch.result, switch.reason, actor.state) == (Result.DONE, "", target)

    async def crash(self, *actors: Actor, restore_deferred: bool = True) -> Harness:
        """The service is killed while these are at work. What it had sent to the kernel goes on; a new one starts."""
        tasks = [actor.runner.task for actor in actors if actor.runner.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for actor in actors:
            await self.host.kernel(str(actor.gpu.address)).returned()
        return await self.again(restore_deferred=restore_deferred)

    async def again(self, *, restore_deferred: bool = True) -> Harness:
        """The next service on the same machine; the workers of this one, if they are idle, are gone."""
        self.fleet._arbiter.awake.stop()
        for retry in self.fleet._retries.values():
            retry.stop()
        self.fleet._trials.stop()
        await self.host.close()
        return await Harness.start(
            SimulatedHost(self.machine), self.directory, self.fleet.config, restore_deferred=restore_deferred
        )
