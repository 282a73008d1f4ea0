"""Whoever breaks an invariant is found out."""

from __future__ import annotations

import pytest

from tests.harness.simulation import (  # noqa: F401 -- they add to them
    mutations_of_access,
    mutations_of_at_boot,
    mutations_of_commands,
    mutations_of_groups,
    mutations_of_shared,
    mutations_of_trials,
)
from tests.harness.simulation.invariants import INVARIANTS
from tests.harness.simulation.mutations import ALL, Mutation
from tests.harness.simulation.play import played
from tests.harness.simulation.story import told

SEEDS = 200
"""Within so many stories."""


@pytest.mark.parametrize("mutation", ALL, ids=lambda mutation: mutation.name)
def test_a_fault_in_the_heart_is_found(mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    mutation.put_in(monkeypatch)
    stories = [mutation.story] if mutation.story is not None else [told(seed) for seed in range(SEEDS)]
    for story in stories:
        if mutation.numbers & {violation.number for violation in played(story).violations}:
            return
    pytest.fail(f"{len(stories)} stories, and nobody noticed that {mutation.name.replace('_', ' ')}")


def test_there_is_one_for_each_invariant() -> None:
    # The other one is that the program has no fault of its own; that is what it shows itself.
    assert {number for mutation in ALL for number in mutation.numbers} == set(INVARIANTS) - {0}
