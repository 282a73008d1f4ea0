"""Whether a switch can be cancelled, and in words why not."""

from __future__ import annotations

from gpuswitch.errors import Failed, InProgress, Wedged
from gpuswitch.model.address import PciAddress
from gpuswitch.model.states import State
from gpuswitch.switch.engine import Engine
from gpuswitch.switch.record import Result, Switch


def cancellable(gpu: PciAddress, state: State, place: str, switch: Switch, engine: Engine | None) -> Engine:
    """The engine that runs `switch`, if it can still be taken back; `engine` runs whatever is under way.

    `place`: where the GPU is now, in words.

    Raises:
        Wedged: the kernel has not returned from it.
        InProgress: it is being taken back already, or is at its last steps.
        Failed: it is over.
    """
    cannot = f"cannot cancel switch {switch.id}"
    if switch.result is Result.WEDGED and state is State.WEDGED:
        raise Wedged(f"{cannot}: {gpu} is wedged, and nothing is written to it until the kernel returns")
    if switch.result is not None:
        raise Failed(f"{cannot}: it is over already ({switch.result})")
    if state is State.RECOVERING:
        raise InProgress(f"{cannot}: {gpu} is recovering, and nothing else is safe now")
    if engine is None or not engine.stoppable:
        raise InProgress(f"{cannot}: {gpu} is {place} already, and only its last steps are left")
    return engine
