"""What the agent of a Kubernetes node decides: pure, from what was seen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from gpuswitch_kubernetes.decide import Decision, Facts, Limits, Memory, decide, wanting
from gpuswitch_kubernetes.gpus import Gpu, Refusal, Switch
from gpuswitch_kubernetes.names import DESIRED, HANDLED, REASON, STATE, TAINT, address_of, part_of
from gpuswitch_kubernetes.users import Rules

from tests.harness.kubernetes.campaign import node, pod

CARD = "0000:01:00.0"
PART = "0000_01_00_0"
HOST = Gpu(CARD, "nvidia", "host")
VFIO = replace(HOST, state="vfio")
BEGUN = Switch("s2", "vfio", "")
OURS = {"key": TAINT, "effect": "NoSchedule"}


def facts(
    gpu: Gpu, desired: str = "", *, tainted: bool = False, note: str = "", now: float = 0.0, **more: Any
) -> Facts:
    annotations = {DESIRED + PART: desired} if desired else {}
    if note:
        annotations[HANDLED + PART] = note
    labels = more.pop("labels", {})
    there = node(annotations=annotations)
    there["metadata"]["labels"] |= labels
    if tainted:
        there["spec"]["taints"].append(OURS)
    return Facts(there, (gpu,), now, **more)


def judged(seen: Facts, memory: Memory | None = None, rules: Rules = Rules()) -> Any:  # noqa: B008 -- it is frozen
    return decide(seen, memory or Memory(), rules).verdicts[0]


def note(decision: Decision) -> str | None:
    assert decision.annotations is not None
    return decision.annotations.get(HANDLED + PART)


@pytest.mark.parametrize("address", [CARD, "10000:e1:1f.7"])
def test_an_address_is_the_end_of_a_name_and_the_other_way(address: str) -> None:
    assert address_of(part_of(address)) == address


@pytest.mark.parametrize("part", ["", "0000_01_00", "0000_01_00_8", "0000:01:00.0", "pci_0000_01_00_0"])
def test_what_is_no_address_names_no_gpu(part: str) -> None:
    assert address_of(part) is None


def test_a_node_of_which_nothing_is_wanted_says_where_its_gpus_are() -> None:
    decision = decide(facts(HOST), Memory())
    assert (decision.status, decision.word, decision.tainted) == ("True", "AsDesired", False)
    assert decision.annotations == {STATE + PART: "host"}


def test_the_taint_comes_first() -> None:
    verdict = judged(facts(HOST, "vfio", pods=[pod("work")]))
    assert (verdict.word, verdict.taint, verdict.evicts, verdict.begins) == ("Draining", True, (), "")


def test_pods_go_before_the_gpu_does() -> None:
    work, ending, over = pod("work", uid="1"), pod("ending", uid="2", deletionTimestamp="now"), pod("over", uid="3")
    over["status"]["phase"] = "Succeeded"
    verdict = judged(facts(HOST, "vfio", tainted=True, pods=[work, ending, over]))
    assert verdict.evicts == (work,)
    assert verdict.text == "waits for pods that use it: default/work, default/ending (it is ending)"
    assert verdict.begins == ""


def test_a_budget_that_is_waited_for_is_named() -> None:
    memory = Memory(pods={"1": (5.0, "the budget guard needs 1 healthy pod")})
    seen = facts(HOST, "vfio", tainted=True, pods=[pod("work", uid="1")])
    verdict = judged(seen, memory)
    assert verdict.evicts == ()
    assert verdict.text.endswith("default/work (the budget guard needs 1 healthy pod)")
    assert judged(replace(seen, now=5.0), memory).evicts != ()


def test_a_static_pod_is_waited_for_and_not_evicted() -> None:
    static = pod("static", uid="1", annotations={"kubernetes.io/config.mirror": "x"})
    verdict = judged(facts(HOST, "vfio", tainted=True, pods=[static]))
    assert verdict.evicts == ()
    assert "take its file away" in verdict.text


def test_what_is_begun_is_noted_with_the_switches_that_there_were() -> None:
    gpu = replace(
        HOST, switch=Switch("s1", "host", "done"), past=(Switch("s1", "host", "done"), Switch("s0", "vfio", "done"))
    )
    decision = decide(facts(gpu, "vfio", tainted=True), Memory())
    assert decision.verdicts[0].begins == "vfio"
    assert note(decision) == "vfio begun after s1"


@pytest.mark.parametrize(
    ("gpu", "becomes"),
    [
        pytest.param(VFIO, "vfio done", id="it came there"),
        pytest.param(replace(HOST, switch=Switch("s2", "vfio", "reverted")), "vfio failed", id="it was taken back"),
        pytest.param(
            replace(HOST, past=(Switch("s2", "vfio", "cancelled"),)), "vfio failed", id="the service started anew"
        ),
        pytest.param(
            replace(HOST, past=(Switch("s3", "host", "done"), Switch("s2", "vfio", "done"))),
            "vfio done",
            id="somebody moved it on",
        ),
        pytest.param(
            replace(HOST, past=(Switch("s1", "vfio", "done"),)),
            "vfio begun after s1",
            id="the service never heard of it",
        ),
    ],
)
def test_an_agent_that_was_killed_in_the_midst_finds_out_what_came_of_it(gpu: Gpu, becomes: str) -> None:
    assert note(decide(facts(gpu, "vfio", tainted=True, note="vfio begun after s1"), Memory())) == becomes


@pytest.mark.parametrize("stage", ["done", "failed", "given-up"])
def test_one_desire_moves_a_gpu_once(stage: str) -> None:
    seen = facts(HOST, "vfio", tainted=True, note=f"vfio {stage}")
    verdict = judged(seen)
    assert (verdict.begins, verdict.taint, verdict.healthy) == ("", False, False)
    assert wanting(seen.node, (HOST,)) == []
    again = judged(facts(HOST, "vfio/2", tainted=True, note=f"vfio {stage}"))
    assert again.begins == "vfio"


def test_a_gpu_on_its_way_keeps_the_taint() -> None:
    moving = replace(HOST, state="detaching", switch=BEGUN)
    verdict = judged(facts(moving, "vfio", tainted=True, note="vfio begun after s1"))
    assert (verdict.word, verdict.taint, verdict.text) == ("Switching", True, "is on its way to vfio")
    assert judged(facts(moving)).taint is False, "what is moved by hand is no business of the cluster"


@pytest.mark.parametrize("state", ["wedged", "failed"])
def test_a_lost_gpu_keeps_the_taint(state: str) -> None:
    lost = replace(HOST, state=state, reason="the kernel has not returned", switch=replace(BEGUN, result=""))
    decision = decide(facts(lost, "vfio", tainted=True, note="vfio begun after s1"), Memory())
    assert (decision.status, decision.tainted) == ("False", True)
    assert "the kernel has not returned" in decision.text
    assert decision.verdicts[0].begins == ""


def test_a_gpu_with_mixed_drivers_taints_no_node_by_itself_and_can_be_moved() -> None:
    mixed = replace(HOST, state="unknown")
    assert judged(facts(mixed)).taint is False
    assert judged(facts(mixed, "host", tainted=True)).begins == "host"


def test_a_service_that_cannot_be_reached_moves_nothing() -> None:
    decision = decide(replace(facts(HOST, "vfio"), gpus=None, unreachable="nobody is there"), Memory())
    assert (decision.status, decision.word) == ("Unknown", "ServiceUnreachable")
    assert (decision.annotations, decision.tainted) == (None, None)
    assert "nobody is there" in decision.text


def test_what_the_service_refuses_costs_no_pod() -> None:
    verdict = judged(facts(HOST, "vfio", pods=[pod("work")], refusals={CARD: Refusal("a NIC is in its group")}))
    assert (verdict.word, verdict.taint) == ("Refused", False)
    assert verdict.text == "cannot go to vfio: a NIC is in its group"
    for_use = judged(facts(HOST, "vfio", refusals={CARD: Refusal("work has it open", for_use=True)}))
    assert for_use.taint


def test_what_could_not_be_begun_in_time_is_given_up() -> None:
    memory = Memory(since={(CARD, "vfio"): 0.0})
    decision = decide(
        facts(HOST, "vfio", tainted=True, pods=[pod("work", uid="1")], now=601.0),
        memory,
        limits=Limits(deadline_seconds=600),
    )
    assert (note(decision), decision.tainted, decision.word) == ("vfio given-up", False, "GivenUp")
    assert "default/work" in decision.text


def test_two_controllers_that_want_opposite_things_are_told() -> None:
    memory = Memory(begun={CARD: [0.0, 10.0, 20.0]})
    limits = Limits(switches=3, window_seconds=100)
    seen = facts(HOST, "vfio/9", tainted=True, note="host/8 done", now=50.0)
    decision = decide(seen, memory, limits=limits)
    assert (decision.word, decision.tainted, decision.verdicts[0].begins) == ("TooManySwitches", False, "")
    assert "one controller alone" in decision.text
    later = decide(replace(seen, now=101.0), memory, limits=limits)
    assert later.verdicts[0].begins == "vfio"


@pytest.mark.parametrize(
    ("annotations", "said"),
    [
        (
            {DESIRED + PART: "passthrough"},
            f"cannot use 'passthrough' of the annotation {DESIRED}{PART}: write vfio, host",
        ),
        ({DESIRED + "card": "vfio"}, f"cannot use the annotation {DESIRED}card: it ends in no address"),
        ({DESIRED + "0000_02_00_0": "vfio"}, f"0000:02:00.0: is no GPU of this node, which has {CARD}"),
        (
            {DESIRED + PART: "vfio", HANDLED + PART: "mine"},
            f"cannot read 'mine' of the annotation {HANDLED}{PART}: remove the annotation",
        ),
    ],
)
def test_bad_input_is_named_and_moves_nothing(annotations: dict[str, str], said: str) -> None:
    decision = decide(Facts(node(annotations=annotations), (HOST,), 0.0), Memory())
    assert (decision.status, decision.tainted) == ("False", False)
    assert said in decision.text
    assert not any(verdict.begins for verdict in decision.verdicts)


NVIDIA = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "x", "namespace": "gpu-operator", "labels": {"name": "nvidia-vfio-manager"}},
    "spec": {"containers": []},
}


@pytest.mark.parametrize(
    "more",
    [
        pytest.param({"labels": {"nvidia.com/gpu.workload.config": "vm-passthrough"}}, id="the label of people"),
        pytest.param({"labels": {"nvidia.com/gpu.deploy.vfio-manager": "true"}}, id="the label of the operator"),
        pytest.param({"pods": [NVIDIA]}, id="its pod"),
    ],
)
def test_a_gpu_of_the_vfio_manager_is_left_to_it(more: dict[str, Any]) -> None:
    verdict = judged(facts(HOST, "vfio", **more))
    assert (verdict.word, verdict.taint) == ("OwnedElsewhere", False)
    assert judged(facts(replace(HOST, vendor="amd"), "vfio", **more)).word == "Draining"


def slices(driver: str, attributes: dict[str, Any] | None, *, basic: bool = False) -> list[dict[str, Any]]:
    inner = {} if attributes is None else {"attributes": attributes}
    device = {"name": "gpu-0", **({"basic": inner} if basic else inner)}
    return [{"spec": {"nodeName": "gpu1", "driver": driver, "pool": {"name": "gpu1"}, "devices": [device]}}]


def claim(driver: str = "gpu.nvidia.com") -> dict[str, Any]:
    results = [{"request": "gpu", "driver": driver, "pool": "gpu1", "device": "gpu-0"}]
    return {
        "metadata": {"namespace": "lab", "name": "train"},
        "status": {"allocation": {"devices": {"results": results}}},
    }


@pytest.mark.parametrize(
    ("seen", "driver", "owned"),
    [
        pytest.param(
            slices("gpu.nvidia.com", {"resource.kubernetes.io/pciBusID": {"string": CARD}}),
            "gpu.nvidia.com",
            True,
            id="v1",
        ),
        pytest.param(
            slices("gpu.nvidia.com", {"resource.kubernetes.io/pciBusID": {"string": CARD}}, basic=True),
            "gpu.nvidia.com",
            True,
            id="v1beta1",
        ),
        pytest.param(
            slices("gpu.nvidia.com", {"resource.kubernetes.io/pciBusID": {"string": "0000:41:00.0"}}),
            "gpu.nvidia.com",
            False,
            id="another card",
        ),
        pytest.param(slices("gpu.nvidia.com", None), "gpu.nvidia.com", True, id="any card of its maker"),
        pytest.param(slices("gpu.amd.com", None), "gpu.amd.com", False, id="a card of another maker"),
    ],
)
def test_a_gpu_that_a_claim_has_is_left_to_it(seen: Any, driver: str, owned: bool) -> None:
    verdict = judged(facts(HOST, "vfio", slices=seen, claims=[claim(driver), {"metadata": {}, "status": {}}]))
    assert (verdict.word == "OwnedElsewhere") is owned
    assert ("lab/train" in verdict.text) is owned


@pytest.mark.parametrize(
    ("resource", "metadata", "rules", "target", "goes"),
    [
        ("nvidia.com/gpu", {}, Rules(), "vfio", True),
        ("nvidia.com/mig-1g.10gb", {}, Rules(), "vfio", True),
        ("cpu", {}, Rules(), "vfio", False),
        ("cpu", {}, Rules(everything=True), "vfio", True),
        ("cpu", {"ownerReferences": [{"kind": "DaemonSet"}]}, Rules(everything=True), "vfio", False),
        ("cpu", {"annotations": {"kubernetes.io/config.mirror": "x"}}, Rules(everything=True), "vfio", False),
        ("cpu", {}, Rules(everything=True), "host", False),
        ("nvidia.com/GA102", {}, Rules(everything=True, vfio_resources=("nvidia.com/GA102",)), "host", True),
        ("cpu", {"labels": {"app": "dcgm"}}, Rules(labels=(("app", "dcgm"),)), "vfio", True),
        ("lab/half-a-gpu", {}, Rules(resources=("lab/half-a-gpu",)), "vfio", True),
        ("amd.com/gpu", {}, Rules(), "vfio", False),
        ("nvidia.com/gpu", {}, Rules(), "host", False),
        ("nvidia.com/GA102", {}, Rules(vfio_resources=("nvidia.com/GA102",)), "host", True),
    ],
)
def test_who_uses_a_gpu_is_told_by_what_its_pod_asks_for(
    resource: str, metadata: dict[str, Any], rules: Rules, target: str, goes: bool
) -> None:
    gpu = HOST if target == "vfio" else VFIO
    verdict = judged(facts(gpu, target, tainted=True, pods=[pod("it", resource, uid="1", **metadata)]), rules=rules)
    assert bool(verdict.evicts) is goes
    assert bool(verdict.begins) is not goes


def test_a_reason_is_no_longer_than_an_annotation_may_be() -> None:
    decision = decide(facts(HOST, "vfio", refusals={CARD: Refusal("x" * 5000)}), Memory())
    assert decision.annotations is not None
    assert len(decision.annotations[REASON + PART]) == 1000
