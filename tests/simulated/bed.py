"""A fleet on a simulated host, and a witness who checks after each event what must always hold."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from gpuswitch.config import Config, Defaults, GpuConfig
from gpuswitch.host.simulated.devices import Device
from gpuswitch.host.simulated.host import SimulatedHost
from gpuswitch.host.simulated.kernel import Machine
from gpuswitch.host.simulated.scenarios import SCENARIOS
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import VFIO_DRIVER
from gpuswitch.model.states import State
from gpuswitch.switch.actor import Actor, Observer
from gpuswitch.switch.engine import Status, StepEvent
from gpuswitch.switch.fleet import Fleet
from gpuswitch.switch.journal import Journal
from gpuswitch.switch.record import Result, Switch
from gpuswitch.switch.steps import Unbind

_SHARED = PciAddress.parse("0000:01:00.0")
GPUS = {
    "laptop": "0000:01:00.0",
    "server": "0000:31:00.0",
    "shared": str(_SHARED),
    "apu": "0000:04:00.0",
    "single": "0000:01:00.0",
}
"""The GPU to switch in each scenario."""


def config(scenario: str = "") -> Config:
    """Settings under which the GPU of the scenario may go: its screen may turn dark, its neighbour comes along."""
    shared = GpuConfig(
        _SHARED, managed=True, allow_boot_display=True, name="card", members=(PciAddress.parse("0000:02:00.0"),)
    )
    return Config(gpus=(shared,) if scenario == "shared" else (), defaults=Defaults(allow_boot_display=True))


class Settings(NamedTuple):
    """All that a switch may change of a function, and must give back."""

    link: str | None
    bound: str | None
    override: str | None
    power_control: str


Snapshot = dict[PciAddress | int, object]


def settings_of(device: Device) -> Settings:
    return Settings(
        device.link.name if device.link else None,
        device.binding.driver.name if device.binding else None,
        device.override,
        device.power_control,
    )


def snapshot(machine: Machine) -> Snapshot:
    """Everything that a switch may change on this machine, loaded modules apart."""
    functions: Snapshot = {a: settings_of(device) for a, device in machine.devices.items()}
    groups: Snapshot = {n: (g.opened_by, g.dma_owner) for n, g in machine._groups.items() if g.opened_by or g.dma_owner}
    return functions | groups


@dataclass
class Witness(Observer):
    """Keeps what it hears, and checks the invariants."""

    machine: Machine
    words: list[str] = field(default_factory=list)
    """What was told, in order: `0000:01:00.0 detaching`, `0000:01:00.0 3/9 running`, `0000:01:00.0 done`."""
    on_step: Callable[[Actor, StepEvent], None] | None = None
    home: dict[PciAddress, Settings] = field(default_factory=dict)
    """What each function had at home, when it was first seen there."""
    told: asyncio.Event = field(default_factory=asyncio.Event)

    def appeared(self, actor: Actor) -> None:
        self._heard(actor, f"appeared {actor.state}")

    def vanished(self, actor: Actor) -> None:
        self._heard(actor, "vanished")

    def changed(self, actor: Actor) -> None:
        self._heard(actor, str(actor.state))

    def stepped(self, actor: Actor, switch: Switch, event: StepEvent) -> None:
        assert switch is actor.switch
        assert switch.result is None
        if event.status is Status.RUNNING and isinstance(event.step, Unbind):
            self._check_unbind(actor, event.step)
        self._heard(actor, f"{event.index}/{event.count} {event.status}")
        if self.on_step is not None:
            self.on_step(actor, event)

    def finished(self, actor: Actor, switch: Switch) -> None:
        assert switch.result is not None
        if switch.result is Result.DONE:
            assert actor.state is switch.target
        self._heard(actor, str(switch.result))

    async def until(self, wanted: Callable[[], bool]) -> None:
        """Wait for the event after which it is so."""
        while not wanted():
            self.told.clear()
            await self.told.wait()

    def _heard(self, actor: Actor, word: str) -> None:
        self.words.append(f"{actor.gpu.address} {word}")
        self.told.set()
        self._check(actor)

    def _check(self, actor: Actor) -> None:
        """Invariants 2, 3 and 6 of a GPU."""
        on_vfio = {f.on_vfio for f in actor.gpu.present(self.machine.look())}
        if actor.state.stable:
            assert on_vfio == {actor.state is State.VFIO}, "split between vfio and host drivers"
        if actor.state is State.HOST and not actor.bound:
            for function in actor.gpu.functions:
                now = settings_of(self.machine.devices[function])
                assert self.home.setdefault(function, now) == now, "not all of it came back"
        assert sum(switch.result is None for switch in actor.recent) <= 1, "two switches at once"

    def _check_unbind(self, actor: Actor, step: Unbind) -> None:
        """What must be so before an unbind, for which there is no undo (invariant 1, as far as it is built)."""
        if step.driver == VFIO_DRIVER:
            group = self.machine.devices[step.function].shape.iommu_group
            assert group is not None
            assert self.machine._groups[group].opened_by == f"the worker of {actor.gpu.address}"
        else:
            overrides = {self.machine.devices[f.address].override for f in actor.gpu.present(self.machine.look())}
            assert overrides == {VFIO_DRIVER}


@dataclass
class Bed:
    """A fleet that runs on a simulated host."""

    host: SimulatedHost
    fleet: Fleet
    witness: Witness
    directory: Path

    @classmethod
    async def made(cls, host: SimulatedHost, directory: Path, settings: Config | None = None) -> Bed:
        """Start a service on this host."""
        witness = Witness(host.machine)
        fleet = Fleet(host, settings or config(), Journal(directory), witness)
        await fleet.start()
        return cls(host, fleet, witness, directory)

    @classmethod
    async def of(cls, scenario: str, directory: Path) -> Bed:
        return await cls.made(SCENARIOS[scenario](), directory, config(scenario))

    @property
    def machine(self) -> Machine:
        return self.host.machine

    @property
    def debts(self) -> list[str]:
        """Whose journal there is."""
        return sorted(path.name for path in self.directory.iterdir()) if self.directory.exists() else []

    def snapshot(self) -> Snapshot:
        return snapshot(self.machine)

    async def switch(self, actor: Actor, target: State) -> Switch:
        """Ask for it, and wait for its end."""
        switch = await actor.request(target)
        await switch.wait()
        await self.witness.until(lambda: not actor.state.moving)
        return switch

    async def moved(self, actor: Actor, target: State) -> None:
        """Switch, successfully."""
        switch = await self.switch(actor, target)
        assert (switch.result, switch.reason, actor.state) == (Result.DONE, "", target)

    async def crash(self, *actors: Actor) -> Bed:
        """The service is killed while these are at work. What it had sent to the kernel goes on; a new one starts."""
        tasks = [actor._task for actor in actors if actor._task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for actor in actors:
            await self.host.kernel(str(actor.gpu.address)).returned()
        return await self.again()

    async def again(self) -> Bed:
        """The next service on the same machine; the workers of this one, if they are idle, are gone."""
        await self.host.close()
        return await Bed.made(SimulatedHost(self.machine), self.directory, self.fleet.config)
