"""Each step of each plan with everything that can go wrong at it, and every two of these in the shortest plans."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from gpuswitch.model.states import State
from tests.harness.simulation.exhaustive import PLANS, SHORTEST, TARGETS, Trial, pairs, singles, tried


def broken(trials: Iterable[Trial]) -> dict[str, str]:
    return {str(trial): str(violations[0]) for trial in trials if (violations := tried(trial).outcome.violations)}


@pytest.mark.parametrize(("machine_name", "target"), PLANS, ids=str)
def test_whatever_goes_wrong_at_any_step(machine_name: str, target: State) -> None:
    assert broken(singles(machine_name, target, thorough=False)) == {}


def test_a_trial_can_be_written_down() -> None:
    trials = list(singles(SHORTEST, State.VFIO, thorough=True))
    assert [Trial.read(str(trial)) for trial in trials] == trials


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_any_two_things_go_wrong(target: State, part: int) -> None:
    trials = [trial for number, trial in enumerate(pairs(SHORTEST, target, thorough=False)) if number % 4 == part]
    assert broken(trials) == {}
