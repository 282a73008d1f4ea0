"""What a service tells, as long as it lives; and which step its operations belong to."""

from __future__ import annotations

from gpuswitch.switch.actor import Actor
from gpuswitch.switch.engine import Status, StepEvent
from gpuswitch.switch.observer import Observer
from gpuswitch.switch.record import Drift, Switch
from tests.simulation.faces import AT, At
from tests.simulation.judge import BEGINS, Judge
from tests.simulation.loop import Life


class Ear(Observer):
    """Passes on to the judge what is told by a service that lives: nobody hears a dead one."""

    def __init__(self, life: Life, judge: Judge) -> None:
        self._life = life
        self._judge = judge

    def appeared(self, actor: Actor) -> None:
        if self._life.alive:
            self._judge.changed(actor)

    def vanished(self, actor: Actor) -> None:
        """Its functions belong to another GPU now."""

    def changed(self, actor: Actor) -> None:
        if self._life.alive:
            self._judge.changed(actor)

    def stepped(self, actor: Actor, switch: Switch, event: StepEvent) -> None:
        if event.status in BEGINS:
            # The step runs in this very task: whatever it sends to the kernel inherits this.
            AT.set(At(str(actor.gpu.address), type(event.step).__name__, event.status is Status.REVERTING))
        if self._life.alive:
            self._judge.stepped(actor, switch, event)

    def finished(self, actor: Actor, switch: Switch) -> None:
        if self._life.alive:
            self._judge.finished(actor, switch)

    def drifted(self, actor: Actor, drift: Drift) -> None:
        if self._life.alive:
            self._judge.drifted(actor, drift)

    def recovered(self, actor: Actor, outcome: str) -> None:
        """It is told by the state, too."""
