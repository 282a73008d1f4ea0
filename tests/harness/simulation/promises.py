"""What was promised of GPUs that are tried, as whoever asked for that knows it: when nobody has them, they go home."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from gpuswitch.gpu.actor import Actor
from gpuswitch.model.address import PciAddress
from gpuswitch.model.states import State
from gpuswitch.switch.record import Result, Switch
from tests.harness.simulation.invariants import Ask

if TYPE_CHECKING:
    from tests.harness.simulation.world import World


class _Promise(NamedTuple):
    """`due` on the simulated clock, None while `switch` is on its way there."""

    seconds: float
    switch: str
    due: float | None = None


class Promises:
    """Checks invariant 5: a GPU whose trial is over, and that nobody has, is home, or says why it is not."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._given: dict[PciAddress, _Promise] = {}
        self._in_doubt: dict[PciAddress, _Promise] = {}
        """Somebody has asked for the GPU: who is refused has changed nothing."""

    def asked(self, ask: Ask) -> None:
        if ask.target is State.VFIO:
            for gpu in _gpus(ask):
                if promise := self._given.pop(gpu, None):
                    self._in_doubt[gpu] = promise
        elif ask.what == "cancel":
            # Of a way home: whoever cancels that keeps it.
            self._forget(ask.actor.gpu.address)

    def refused(self, ask: Ask) -> None:
        for gpu in _gpus(ask) if ask.target is State.VFIO else ():
            promise = self._in_doubt.pop(gpu, None)
            # What ended in the meantime was not seen.
            if promise is not None and promise.due is not None:
                self._given[gpu] = promise

    def answered(self, ask: Ask, answer: object) -> None:
        for gpu in _gpus(ask) if ask.target is State.VFIO else ():
            self._forget(gpu)
        if (seconds := ask.options.trial_seconds) is not None and isinstance(answer, Switch):
            there = answer.result is Result.DONE
            due = self._world.loop.time() + seconds if there else None
            self._given[ask.actor.gpu.address] = _Promise(seconds, answer.id, due)

    def finished(self, actor: Actor, switch: Switch) -> None:
        promise = self._given.get(actor.gpu.address)
        if promise is None or promise.switch != switch.id or promise.due is not None:
            return
        if switch.result is Result.DONE and not switch.recovery:
            self._given[actor.gpu.address] = promise._replace(due=self._world.loop.time() + promise.seconds)
        else:
            self._forget(actor.gpu.address)

    def changed(self, actor: Actor) -> None:
        if actor.state in {State.HOST, State.ABSENT, State.FAILED, State.UNKNOWN}:
            self._forget(actor.gpu.address)

    def killed(self) -> None:
        """What had not come to vfio goes home at the next start; whoever waited for an answer has none."""
        self._in_doubt.clear()
        self._given = {gpu: promise for gpu, promise in self._given.items() if promise.due is not None}

    def at_rest(self, actor: Actor) -> None:
        gpu, checker = actor.gpu, self._world.checker
        promise = self._given.get(gpu.address)
        if promise is None or promise.due is None or checker.lately(gpu.address) or checker.torn:
            return
        held = any(checker.users(function) for function in gpu.functions)
        if checker.now > promise.due and actor.state is State.VFIO and not held and not actor.reason:
            checker.broken(5, f"the trial of {gpu.address} is over, nobody has it, and it is on vfio for no reason")

    def _forget(self, gpu: PciAddress) -> None:
        self._given.pop(gpu, None)
        self._in_doubt.pop(gpu, None)


def _gpus(ask: Ask) -> list[PciAddress]:
    return [actor.gpu.address for actor in (ask.actor, *ask.others)]
