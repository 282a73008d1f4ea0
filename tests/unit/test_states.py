"""The table of states: every edge of it from every state, and the page that is made from it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from transitions import MachineError

from gpuswitch.gpu.machine import GpuMachine
from gpuswitch.model.states import EDGES, State

ROOT = Path(__file__).parents[2]
TRIGGERS = sorted({edge.trigger for edge in EDGES})
TABLE = {(edge.source, edge.trigger): edge.target for edge in EDGES}
_REACHED_BY = {
    State.UNKNOWN: (),
    State.HOST: ("seen_host",),
    State.VFIO: ("seen_vfio",),
    State.ABSENT: ("seen_gone",),
    State.DETACHING: ("detach",),
    State.REATTACHING: ("reattach",),
    State.RECOVERING: ("detach", "fault"),
    State.FAILED: ("detach", "fault", "give_up"),
    State.WEDGED: ("stuck",),
}
"""How to get to each state from the first one."""


def machine_in(state: State) -> GpuMachine:
    machine = GpuMachine()
    for trigger in _REACHED_BY[state]:
        machine.fire(trigger)
    assert machine.state is state
    return machine


@pytest.mark.parametrize("state", State, ids=str)
@pytest.mark.parametrize("trigger", TRIGGERS)
def test_every_edge_from_every_state(state: State, trigger: str) -> None:
    machine = machine_in(state)
    target = TABLE.get((state, trigger))
    assert machine.can(trigger) is (target is not None)
    if target is None:
        with pytest.raises(MachineError):
            machine.fire(trigger)
        assert machine.state is state
    else:
        machine.fire(trigger)
        assert machine.state is target


def test_no_two_edges_say_different_things() -> None:
    assert len(TABLE) == len(EDGES)


def test_there_is_no_other_way_to_move() -> None:
    machine = GpuMachine()
    for state in State:
        assert not hasattr(machine, f"to_{state.name}")
    with pytest.raises(KeyError):
        machine.fire("to_HOST")


def test_each_gpu_has_a_state_of_its_own() -> None:
    one, other = GpuMachine(), GpuMachine()
    one.fire("seen_host")
    assert (one.state, other.state) == (State.HOST, State.UNKNOWN)


def test_the_words() -> None:
    words = "unknown host detaching vfio reattaching recovering failed wedged absent"
    assert [str(state) for state in State] == words.split()
    assert [state for state in State if state.stable] == [State.HOST, State.VFIO]
    assert [state for state in State if state.latched] == [State.FAILED, State.WEDGED]
    assert [state for state in State if state.moving] == [State.DETACHING, State.REATTACHING, State.RECOVERING]


@pytest.mark.parametrize("state", State, ids=str)
def test_each_state_says_what_it_is_and_what_a_crash_in_it_means(state: State) -> None:
    assert state.meaning
    assert state.after_crash


@pytest.mark.parametrize("state", State, ids=str)
def test_no_state_is_a_dead_end(state: State) -> None:
    """A known-good state can be reached from each."""
    reached, todo = {state}, [state]
    while todo:
        here = todo.pop()
        new = {edge.target for edge in EDGES if edge.source is here} - reached
        reached |= new
        todo += new
    assert {State.HOST, State.VFIO} <= reached


def test_only_a_switch_leads_from_host_to_vfio_and_back() -> None:
    """Where nobody looked at the kernel anew, there is no short way."""
    direct = {edge.trigger for edge in EDGES if edge.source.stable and edge.target.stable}
    assert direct == {"seen_host", "seen_vfio"}


def test_the_page_is_current(tmp_path: Path) -> None:
    fresh = tmp_path / "states.md"
    subprocess.run([sys.executable, "docs/generate_states.py", fresh], cwd=ROOT, check=True)
    assert (ROOT / "docs" / "states.md").read_text() == fresh.read_text(), "run `make docs`"
