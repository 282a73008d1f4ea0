"""What a service tells, as long as it lives; and which step its operations belong to."""

from __future__ import annotations

from gpuswitch.gpu.actor import Actor
from gpuswitch.gpu.gpu_record import GpuRecord
from gpuswitch.gpu.observer import Observer
from gpuswitch.model.address import PciAddress
from gpuswitch.switch.engine import Status, StepEvent
from gpuswitch.switch.record import Drift, Switch
from tests.harness.simulation.checker import BEGINS, InvariantChecker
from tests.harness.simulation.doubles import AT, At
from tests.harness.simulation.loop import Life


class ServiceListener(Observer):
    """Passes on to the checker what is told by a service that lives: nobody hears a dead one."""

    def __init__(self, life: Life, checker: InvariantChecker) -> None:
        self._life = life
        self._checker = checker
        self._actors: dict[PciAddress, Actor] = {}

    def appeared(self, actor: Actor) -> None:
        self._actors[actor.gpu.address] = actor
        if self._life.alive:
            self._checker.changed(actor)

    def vanished(self, actor: Actor) -> None:
        """Its functions belong to another GPU now."""

    def changed(self, record: GpuRecord) -> None:
        if self._life.alive:
            self._checker.changed(self._actors[record.gpu.address])

    def stepped(self, record: GpuRecord, switch: Switch, event: StepEvent) -> None:
        if event.status in BEGINS:
            # The step runs in this very task: whatever it sends to the kernel inherits this.
            AT.set(At(str(record.gpu.address), type(event.step).__name__, event.status is Status.REVERTING))
        if self._life.alive:
            self._checker.stepped(self._actors[record.gpu.address], switch, event)

    def waits(self, record: GpuRecord) -> None:
        """Nothing to check: it is told when the step ends."""

    def finished(self, record: GpuRecord, switch: Switch) -> None:
        if self._life.alive:
            self._checker.finished(self._actors[record.gpu.address], switch)

    def returned(self, record: GpuRecord, switch: Switch) -> None:
        """It is told by the state, too."""

    def drifted(self, record: GpuRecord, drift: Drift) -> None:
        if self._life.alive:
            self._checker.drifted(self._actors[record.gpu.address], drift)

    def recovered(self, record: GpuRecord) -> None:
        """It is told by the state, too."""
