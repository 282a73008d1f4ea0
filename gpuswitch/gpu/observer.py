"""Who hears of what happens to GPUs: the bus, the metrics, the log."""

from __future__ import annotations

from typing import Protocol

from gpuswitch.gpu.actor import Actor
from gpuswitch.gpu.gpu_record import GpuObserver


class Observer(GpuObserver, Protocol):
    """Who hears of what happens to any GPU, and which there are (`GpuObserver` says how it is called)."""

    def appeared(self, actor: Actor) -> None: ...
    def vanished(self, actor: Actor) -> None: ...
