"""Each step of each plan with everything that can go wrong at it, and every two of these in the shortest plans."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from gpuswitch.model.states import State
from tests.harness.simulation.exhaustive import PLANS, SHORTEST, TARGETS, Trial, booted, boots, pairs, singles, tried
from tests.harness.simulation.world import Mishap


def broken(trials: Iterable[Trial]) -> dict[str, str]:
    return {str(trial): str(violations[0]) for trial in trials if (violations := tried(trial).outcome.violations)}


@pytest.mark.parametrize(("machine_name", "target"), PLANS, ids=str)
def test_whatever_goes_wrong_at_any_step(machine_name: str, target: State) -> None:
    assert broken(singles(machine_name, target, thorough=False)) == {}


@pytest.mark.parametrize("machine_name", ["bare", "plain", "shared"])
def test_whatever_goes_wrong_at_boot(machine_name: str) -> None:
    ends = booted(machine_name).outcome.ends
    assert ends["vfio", "done"] == 1
    found = {
        str(mishap): violations for mishap in boots(machine_name) if (violations := _of_boot(machine_name, mishap))
    }
    assert found == {}


def _of_boot(machine_name: str, mishap: Mishap) -> list[str]:
    return [str(violation) for violation in booted(machine_name, mishap).outcome.violations]


def test_a_trial_can_be_written_down() -> None:
    trials = list(singles(SHORTEST, State.VFIO, thorough=True))
    assert [Trial.read(str(trial)) for trial in trials] == trials


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_any_two_things_go_wrong(target: State, part: int) -> None:
    trials = [trial for number, trial in enumerate(pairs(SHORTEST, target, thorough=False)) if number % 4 == part]
    assert broken(trials) == {}
