"""A user whose command has a GPU, and a service that is killed at every instant of that."""

from __future__ import annotations

import itertools

import pytest

from tests.harness.simulation.doubles import SEND, WRITTEN
from tests.harness.simulation.play import played
from tests.harness.simulation.story import Event, Story

_RUNS, _ENDS = Event("vm", 0, "runs", 1), Event("vm", 0, "ends", 1, seconds=20.0)
_A_WHILE = Event("storm", 0, "", 2, seconds=50.0)


@pytest.mark.parametrize("point", [SEND, WRITTEN])
@pytest.mark.parametrize("rules", ["refuse", "stay"])
def test_nobody_may_open_what_no_command_of_his_has(rules: str, point: str) -> None:
    """Before each word that it sends, and after each that it writes, until there are no more of them."""
    for number in itertools.count(1):
        outcome = played(Story("bare", rules, (Event("crash", 0, point, number), _RUNS, _ENDS, _A_WHILE)), trace=True)
        assert [str(violation) for violation in outcome.violations] == []
        # Later, all come home, and are killed once more.
        last = next(at for at, line in enumerate(outcome.trace) if "event" in line and "storm" in line)
        if not any(line.endswith(" killed") for line in outcome.trace[:last]):
            assert number > 10
            return
