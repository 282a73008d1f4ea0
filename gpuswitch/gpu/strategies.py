"""The recovery strategies: ways to a known-good state, in order, for a GPU that a switch or a crash left without one.

Each is tried once. The destructive ones, which reset the GPU or take it off the bus for a moment, are there unless the
configuration says otherwise, and only while nobody has the GPU open.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from gpuswitch.config.schema import Attempt, Defaults
from gpuswitch.model.facts import HostFacts, PciFunction
from gpuswitch.model.gpu import Gpu
from gpuswitch.model.states import State
from gpuswitch.sentence import Sentence, template
from gpuswitch.switch.record import Result
from gpuswitch.switch.steps.reset import RemoveFunctions, Rescan, ResetFunction
from gpuswitch.switch.steps.step import Step, StepError

OUTCOMES = (State.HOST, State.VFIO, State.FAILED)
"""The states that a recovery ends in."""

_SINCE = template("and since then: {reason}")
"""A line of its own, below why it failed first."""
_WORDS = {
    State.HOST: template("cannot get it on the host: {failure}"),
    State.VFIO: template("cannot get it on vfio: {failure}"),
}


@dataclass(frozen=True)
class RecoveryStrategy:
    """One way: the `destructive_steps`, if any, then the plan of a switch to `target`, made of what is there by then.

    `words` are the template of what did not work, should it lead nowhere.
    """

    words: str
    target: State
    destructive_steps: Callable[[Gpu, HostFacts], tuple[Step, ...]] | None = None

    def failed(self, failure: Exception) -> Sentence:
        """What is told of it, once it has led nowhere for this reason."""
        return Sentence(self.words, failure=failure)


def after_failure(target: State, rules: Defaults) -> tuple[RecoveryStrategy, ...]:
    """For a switch to `target` whose way back failed."""
    # It came from the other state, and could not get back there.
    return (_onward(target), *_destructive(rules))


def after_crash(rules: Defaults, *, starting: bool = False) -> tuple[RecoveryStrategy, ...]:
    """For a GPU that was left between two states, or in none. `starting`: the service is, and there is more to come."""
    return (_onward(State.HOST), _onward(State.VFIO), *(() if starting else _destructive(rules)))


def summary(wanted: State, reached: State, place: str, story: list[str]) -> tuple[Result, str]:
    """How a switch that wanted one state and reached this one ended, and why; `place`: where it is, in words."""
    if reached is wanted:
        return Result.DONE, story_of(story)
    return Result.REVERTED, story_of([*story, Sentence("in the end it is {place} now", place=place)])


def story_of(sentences: Iterable[str]) -> str:
    """What happened, a sentence a line; those that say nothing are left out."""
    return "\n".join(filter(None, sentences))


def still_failed(story: str, reason: str) -> str:
    """Why it is `failed`: the `story` of how it came to be, and what became of the last attempt since."""
    since = _SINCE.partition("{")[0]
    first = story.partition(f"\n{since}")[0]
    return f"{first}\n{since}{reason}" if first and first != reason else reason


def _onward(target: State) -> RecoveryStrategy:
    return RecoveryStrategy(_WORDS[target], target)


def after_refusal(rules: Defaults) -> tuple[RecoveryStrategy, ...]:
    """For a way to the host that ended back on vfio since the host driver could not take the GPU."""
    return _destructive(rules)


def back_on_vfio() -> tuple[RecoveryStrategy, ...]:
    """For a GPU that was on vfio, and that no reset nor rescan has brought to the host: it is left where it was."""
    return (_onward(State.VFIO),)


def _destructive(rules: Defaults) -> tuple[RecoveryStrategy, ...]:
    strategies = []
    if rules.reset_on_failure:
        strategies.append(
            RecoveryStrategy(
                template("cannot get it on the host after a reset: {failure}"),
                State.HOST,
                partial(_reset, rules.reset_on_failure),
            )
        )
    if rules.rescan_on_failure:
        strategies.append(
            RecoveryStrategy(
                template("cannot get it on the host after a removal and a rescan: {failure}"),
                State.HOST,
                partial(_rescan, rules.rescan_on_failure),
            )
        )
    return tuple(strategies)


def more_to_allow(gpu: Gpu, facts: HostFacts, rules: Defaults) -> Iterator[tuple[str, str]]:
    """Keys of its table, each with the value as TOML has it, that let a recovery try more than these `rules` do, as the
    GPU is now; the milder one first.
    """
    wanted = '"auto"' if not any(map(_on_host, gpu.present(facts))) else "true"
    if not any(_on_host(f) for f in gpu.present(facts) if f.makes_gpu) and not _suffices(
        rules.reset_on_failure, wanted
    ):
        yield "reset_on_failure", wanted
    if not _suffices(rules.rescan_on_failure, wanted):
        yield "rescan_on_failure", wanted


def _suffices(attempt: Attempt, wanted: str) -> bool:
    return attempt is True or (attempt is not False and wanted != "true")


def _reset(attempt: Attempt, gpu: Gpu, facts: HostFacts) -> tuple[Step, ...]:
    """A reset takes the state of a device away from under its driver: none but those for vfio expect that."""
    displays = [f for f in gpu.present(facts) if f.makes_gpu]
    _refuse_on_host(displays if attempt is True else gpu.present(facts))
    return tuple(ResetFunction(f.address) for f in displays)


def _rescan(attempt: Attempt, gpu: Gpu, facts: HostFacts) -> tuple[Step, ...]:
    if attempt is not True:
        _refuse_on_host(gpu.present(facts))
    return (RemoveFunctions(gpu.functions), Rescan(gpu.functions))


def _refuse_on_host(functions: Iterable[PciFunction]) -> None:
    if busy := [f for f in functions if _on_host(f)]:
        raise StepError(
            Sentence(
                "{function} is on {driver}, which would lose it without a warning",
                function=busy[0].address,
                driver=busy[0].driver_name,
            )
        )


def _on_host(function: PciFunction) -> bool:
    return function.driver is not None and not function.on_vfio
