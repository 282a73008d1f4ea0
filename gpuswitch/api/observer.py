"""Keeps what the bus shows true to the fleet."""

from __future__ import annotations

from gpuswitch.api.bus import Bus
from gpuswitch.api.callers import Callers
from gpuswitch.api.gpu import GpuObject
from gpuswitch.api.metrics import Refusals
from gpuswitch.api.paths import path_of
from gpuswitch.gpu.actor import Actor
from gpuswitch.gpu.gpu_record import GpuRecord
from gpuswitch.model.address import PciAddress
from gpuswitch.switch.engine import StepEvent
from gpuswitch.switch.record import Drift, Switch


class BusObserver:
    """Keeps the objects on the bus true to the fleet. An `Observer` (`gpuswitch.gpu.observer`)."""

    def __init__(self, bus: Bus, refusals: Refusals) -> None:
        self._bus = bus
        self._refusals = refusals
        self._callers = Callers(bus)
        self._objects: dict[PciAddress, GpuObject] = {}

    def appeared(self, actor: Actor) -> None:
        gpu = self._objects[actor.gpu.address] = GpuObject(actor, self._callers, self._refusals)
        self._bus.export(path_of(actor.gpu.address), gpu)
        gpu.remember()

    def vanished(self, actor: Actor) -> None:
        del self._objects[actor.gpu.address]
        self._bus.unexport(path_of(actor.gpu.address))

    def changed(self, record: GpuRecord) -> None:
        if gpu := self._objects.get(record.gpu.address):
            gpu.tell_soon()

    def stepped(self, record: GpuRecord, switch: Switch, event: StepEvent) -> None:
        gpu = self._objects[record.gpu.address]
        gpu.step_changed(
            switch.id, event.index, event.count, event.step.kind, event.step.title, event.status, event.seconds
        )
        gpu.tell_in_a_moment()

    def waits(self, record: GpuRecord) -> None:
        self._objects[record.gpu.address].tell_in_a_moment()

    def finished(self, record: GpuRecord, switch: Switch) -> None:
        gpu = self._objects[record.gpu.address]
        # Whoever hears of the end and then reads the properties must find the end there, too.
        gpu.tell()
        gpu.switch_finished(switch.id, str(switch.result), switch.reason)

    def returned(self, record: GpuRecord, switch: Switch) -> None:
        """Nothing to tell: the property that changed is."""

    def drifted(self, record: GpuRecord, drift: Drift) -> None:
        """Nothing to tell: the properties that changed are."""

    def recovered(self, record: GpuRecord) -> None:
        """Nothing to tell, as above."""
