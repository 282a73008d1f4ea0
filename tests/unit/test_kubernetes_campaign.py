"""The agent with something wrong at any request and at any step; `make kubernetes` goes on for longer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from gpuswitch_kubernetes import agent as agent_module
from gpuswitch_kubernetes import decide as decide_module
from gpuswitch_kubernetes.cluster import condition_of
from gpuswitch_kubernetes.decide import Limits, tainted
from gpuswitch_kubernetes.names import DESIRED, HANDLED, STATE

from tests.harness.kubernetes.campaign import (
    ADDRESSES,
    FAULTS_EACH,
    NODE,
    Violation,
    World,
    annotate,
    one_world,
    pod,
)
from tests.harness.kubernetes.server import ApiServer, serving

PART = "0000_01_00_0"
CARD = ADDRESSES[0]


@pytest.fixture
def world() -> Iterator[World]:
    """Where nothing goes wrong by itself."""
    api = ApiServer()
    with serving(api) as address:
        yield World(0, api, address, faults=0.0)


def want(world: World, desire: str) -> None:
    world.api.change(("nodes", "", NODE), lambda each: annotate(each, CARD, desire))


def written(world: World) -> dict[str, str]:
    return dict(world.api.store.get(("nodes", "", NODE))["metadata"].get("annotations") or {})


@pytest.mark.parametrize("seed", range(5))
def test_whatever_goes_wrong_no_gpu_is_lost_and_none_moves_twice(seed: int) -> None:
    assert one_world(seed) >= FAULTS_EACH


def test_a_move_without_the_taint_would_be_found(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (agent_module, decide_module):
        monkeypatch.setattr(module, "tainted", lambda _node: True)
    want(world, "vfio")
    with pytest.raises(Violation, match="moves without the taint"):
        world.turn()


def test_a_pod_that_is_left_there_would_be_found(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decide_module, "users", lambda *_: [])
    world.api.add(pod("work"))
    want(world, "vfio")
    world.turn()
    with pytest.raises(Violation, match=r"moves away from \['work'\]"):
        world.turn()


def test_a_taint_that_goes_from_a_wedged_gpu_would_be_found(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decide_module, "LOST", frozenset())
    wedge(world)
    with pytest.raises(Violation, match="taint goes while a GPU is wedged"):
        world.turn()


def test_a_second_move_for_one_desire_would_be_found(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decide_module._Judge, "_outcome", lambda _self, _gpu, _desire, note: note)
    world.service.cards[CARD].ends = "reverted"
    want(world, "vfio")
    world.turn()
    world.turn()
    for _ in range(3):
        world.service.advance()
    with pytest.raises(Violation, match="moves once more for vfio"):
        world.turn()


def wedge(world: World) -> None:
    """The kernel does not return from what the agent has begun."""
    world.service.cards[CARD].ends = "wedged"
    want(world, "vfio")
    while world.service.cards[CARD].state != "wedged":
        world.turn()
        world.service.advance()


def test_a_wedged_gpu_keeps_the_taint_until_the_kernel_returns_and_is_not_moved_again(world: World) -> None:
    wedge(world)
    world.turn()
    world.turn()
    node = world.api.store.get(("nodes", "", NODE))
    condition = condition_of(node)
    assert condition is not None
    assert (tainted(node), condition["status"], condition["reason"]) == (True, "False", "Wedged")
    world.service.free(world.service.cards[CARD])
    world.rest()
    assert written(world)[HANDLED + PART] == "vfio failed"


def test_an_api_that_answers_500_for_an_hour_moves_no_gpu_and_is_not_asked_all_the_time(world: World) -> None:
    want(world, "vfio")
    while world.service.cards[CARD].state == "host":
        world.turn()
    world.api.fault = lambda _request: "500"
    world.api.requests.clear()
    before, begun = world.now, dict(world._began)
    while world.now < before + 3600:
        world.turn()
        world.service.advance()
    assert len(world.api.requests) < 240
    assert world._began == begun
    world.api.fault = lambda _request: ""
    world.rest()
    assert (written(world)[STATE + PART], written(world)[HANDLED + PART]) == ("vfio", "vfio done")


def test_two_controllers_that_want_opposite_things_do_not_make_a_gpu_flap(world: World) -> None:
    world.agent._limits = Limits(switches=6, window_seconds=1e6)
    words = []
    for number in range(30):
        want(world, f"{('vfio', 'host')[number % 2]}/{number}")
        for _ in range(6):
            world.turn()
            world.service.advance()
        told = condition_of(world.api.store.get(("nodes", "", NODE)))
        words.append(told["reason"] if told else "")
    assert sum(world._began.values()) == 6
    assert "TooManySwitches" in words


def test_a_clock_that_jumps_moves_nothing_and_gives_nothing_up(world: World) -> None:
    """Points in time of the wall are only written, never read."""
    want(world, "vfio")
    world.turn()
    world.agent = world._new_agent()
    world.rest()
    assert written(world)[HANDLED + PART] == "vfio done"


def test_a_desire_that_is_taken_back_leaves_nothing(world: World) -> None:
    world.service.cards[CARD].refusal = "busy"
    want(world, "vfio")
    for _ in range(3):
        world.turn()
    assert tainted(world.api.store.get(("nodes", "", NODE)))
    world.api.change(("nodes", "", NODE), lambda each: annotate(each, CARD, None))
    world.turn()
    assert not tainted(world.api.store.get(("nodes", "", NODE)))
    assert [key for key in written(world) if key.startswith((DESIRED, HANDLED))] == []
