"""The agent with something wrong at any request and at any step; `make kubernetes` goes on for longer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from gpuswitch_kubernetes import agent as agent_module
from gpuswitch_kubernetes import decide as decide_module
from gpuswitch_kubernetes.cluster import condition_of
from gpuswitch_kubernetes.decide import Limits, tainted
from gpuswitch_kubernetes.names import DESIRED, HANDLED, STATE, TAINT
from gpuswitch_kubernetes.service import ServiceError

from tests.harness.kubernetes.campaign import (
    ADDRESSES,
    FAULTS_EACH,
    NODE,
    Violation,
    World,
    annotate,
    budget,
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


def want(world: World, desire: str, card: str = CARD) -> None:
    world.api.change(("nodes", "", NODE), lambda each: annotate(each, card, desire))


def said(world: World) -> str:
    """By the condition."""
    told = condition_of(world.api.store.get(("nodes", "", NODE)))
    return "" if told is None else f"{told['reason']}: {told['message']}"


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


def test_a_pod_that_cannot_be_evicted_is_in_the_way_of_its_gpu_alone(world: World) -> None:
    other = ADDRESSES[1]
    world.service.cards[other].state = "vfio"
    world.api.add(budget(1, "second"))
    world.api.add(pod("work", labels={"app": "guarded"}))
    want(world, "vfio")
    want(world, "host", other)
    for _ in range(3):
        world.turn()
    assert world.service.cards[other].state == "reattaching"
    assert "more than one PodDisruptionBudget" in said(world)


def test_a_begin_that_is_tried_again_is_of_the_node_that_was_looked_at(world: World) -> None:
    world.service.cards[CARD].refusal = "busy"
    want(world, "vfio")
    world.turn()
    world.turn()
    assert written(world)[HANDLED + PART].startswith("vfio begun")
    world.service.cards[CARD].refusal = ""
    world.now += 60

    def untaint(node: Any) -> None:
        node["spec"]["taints"] = [taint for taint in node["spec"]["taints"] if taint["key"] != TAINT]

    def between(words: Sequence[str]) -> str:
        if words[1] == "plan":
            world.api.change(("nodes", "", NODE), untaint)
        return ""

    world.service.fault = between
    before = list(world.service.cards[CARD].history)
    world.turn()
    assert (world.service.cards[CARD].state, world.service.cards[CARD].history) == ("host", before)


def silent(world: World, card: str) -> None:
    """The service never gets done with the plan of this one."""

    def fault(words: Sequence[str]) -> str:
        if words[1:3] == ["plan", card]:
            raise ServiceError("the service did not answer within 90 s")
        return ""

    world.service.fault = fault


def test_a_gpu_whose_plan_never_comes_is_in_the_way_of_no_other(world: World) -> None:
    silent(world, CARD)
    want(world, "vfio")
    want(world, "vfio", ADDRESSES[1])
    for _ in range(3):
        world.turn()
    assert world.service.cards[ADDRESSES[1]].state == "detaching"
    assert said(world).startswith(f"Refused: {CARD}: cannot go to vfio: the service did not answer within 90 s")


def test_a_plan_that_does_not_come_any_more_leaves_the_taint_until_the_desire_is_given_up(world: World) -> None:
    world.api.change(
        ("poddisruptionbudgets", "default", "guard"), lambda each: each["status"].update(disruptionsAllowed=0)
    )
    world.api.add(pod("work", labels={"app": "guarded"}))
    want(world, "vfio")
    world.turn()
    world.turn()
    silent(world, CARD)
    world.turn()
    assert (said(world).partition(":")[0], tainted(world.api.store.get(("nodes", "", NODE)))) == ("Refused", True)
    world.now += 700
    world.turn()
    assert (said(world).partition(":")[0], tainted(world.api.store.get(("nodes", "", NODE)))) == ("GivenUp", False)
    assert "did not answer" in said(world)


def test_the_steps_of_a_switch_are_no_writes_to_the_node(world: World) -> None:
    want(world, "vfio")
    while world.service.cards[CARD].state != "detaching":
        world.turn()
    world.turn()
    before = world.api.store.version
    switch = world.service.cards[CARD].switch
    assert switch is not None
    for title in ("stop units", "unbind", "bind"):
        switch["title"] = title
        world.turn()
    assert world.api.store.version == before
    assert [event["reason"] for event in world.api.store.list("events")].count("Switching") == 1
