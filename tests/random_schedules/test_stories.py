"""A few thousand stories, the same each time, and what makes a story worth believing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.simulation.play import Outcome, replayed
from tests.harness.simulation.shrink import read, shrunk, written
from tests.harness.simulation.story import Event, told

STORIES = 2400
PARTS = 12
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("part", range(PARTS))
def test_no_invariant_is_broken(part: int) -> None:
    size = STORIES // PARTS
    broken = {}
    for seed in range(part * size, (part + 1) * size):
        if violations := replayed(seed).violations:
            broken[seed] = str(violations[0])
    assert broken == {}


def test_a_seed_replays_exactly() -> None:
    """Down to each operation, also in a process that sorts its sets in another order."""
    whole = Outcome()
    for seed in range(12):
        first, second = replayed(seed, trace=True), replayed(seed, trace=True)
        assert first.trace == second.trace
        whole.trace += first.trace
    traces = "for s in range(12): print(*replayed(s, trace=True).trace, sep='\\n')"
    program = f"from tests.harness.simulation.play import *\n{traces}"
    other = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONHASHSEED": "1234", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert other.stdout.splitlines() == whole.trace


def test_a_story_can_be_written_down() -> None:
    for seed in range(50):
        assert read(written(told(seed))) == told(seed)


def test_what_is_no_story_is_refused() -> None:
    with pytest.raises(ValueError, match="no story"):
        read("[1, 2, 3]")


def test_a_story_is_made_as_short_as_it_can_be() -> None:
    """Of a story that breaks something when a GPU is pulled after somebody asked for it, these two are left."""
    story = told(0)._replace(
        events=(
            Event("plan", 0, "host", 0, 3),
            Event("ask", 0, "vfio", 2, 7),
            Event("storm", 0, "", 4, 0, 6.0),
            Event("pull", 0, "", 0, 9),
            Event("ask", 0, "host"),
        )
    )

    def breaks(shorter: object) -> set[str]:
        whats = [event.what for event in getattr(shorter, "events", ())]
        return {"pulled"} if "pull" in whats and "ask" in whats[: whats.index("pull")] else set()

    assert shrunk(story, "pulled", play=breaks).events == (Event("ask", 0, "vfio"), Event("pull"))
