"""Who hears of what happens to GPUs: the bus, the metrics, the log."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from gpuswitch.switch.engine import StepEvent
from gpuswitch.switch.record import Drift, Switch

if TYPE_CHECKING:
    from gpuswitch.switch.actor import Actor


class Observer(Protocol):
    """Who hears of what happens to GPUs. Called on the event loop, in order; must return at once and not raise.

    `recovered`: a recovery is over; `outcome` is where the GPU is now: `home`, `vfio` or, known-good nowhere, `failed`.
    """

    def appeared(self, actor: Actor) -> None: ...
    def vanished(self, actor: Actor) -> None: ...
    def changed(self, actor: Actor) -> None: ...
    def stepped(self, actor: Actor, switch: Switch, event: StepEvent) -> None: ...
    def finished(self, actor: Actor, switch: Switch) -> None: ...
    def drifted(self, actor: Actor, drift: Drift) -> None: ...
    def recovered(self, actor: Actor, outcome: str) -> None: ...
