"""Whether a switch can be cancelled, and in words why not."""

from __future__ import annotations

from gpuswitch.errors import Failed, InProgress, Wedged
from gpuswitch.model.address import PciAddress
from gpuswitch.model.states import State
from gpuswitch.sentence import Sentence
from gpuswitch.switch.engine import Engine
from gpuswitch.switch.record import Result, Switch


def can_be_cancelled(state: State, engine: Engine | None) -> bool:
    """Whether the switch under way, which this engine runs, can still be taken back."""
    return state is not State.RECOVERING and engine is not None and engine.stoppable


def cancellable(gpu: PciAddress, state: State, place: str, switch: Switch, engine: Engine | None) -> Engine:
    """The engine that runs `switch`, if it can still be taken back; `engine` runs whatever is under way.

    `place`: where the GPU is now, in words.

    Raises:
        Wedged: the kernel has not returned from it.
        InProgress: it is being taken back already, or is at its last steps.
        Failed: it is over.
    """
    if switch.result is Result.WEDGED and state is State.WEDGED:
        sentence = Sentence(
            "cannot cancel switch {id}: {gpu} is wedged, and nothing is written to it until the kernel returns; "
            "gpuswitchctl status {gpu} says what may make it return",
            id=switch.id,
            gpu=gpu,
        )
        raise Wedged(sentence)
    if switch.result is not None:
        raise Failed(
            Sentence("cannot cancel switch {id}: it is over already ({result})", id=switch.id, result=switch.result)
        )
    if state is State.RECOVERING:
        raise InProgress(
            Sentence(
                "cannot cancel switch {id}: {gpu} is recovering, and nothing else is safe now", id=switch.id, gpu=gpu
            )
        )
    if engine is None or not engine.stoppable:
        raise InProgress(
            Sentence(
                "cannot cancel switch {id}: {gpu} is {place} already, and only its last steps are left",
                id=switch.id,
                gpu=gpu,
                place=place,
            )
        )
    return engine
