"""What the collection for Ansible makes of the command's JSON. tests/real_system/test_fleet.py runs it over ssh."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import pytest

from gpuswitch import __version__
from tests.harness.json_schemas import check
from tests.unit.test_house import ROOT

COLLECTION = ROOT / "contrib/ansible"


def load(path: str) -> ModuleType:
    """A file of the collection that needs no Ansible."""
    spec = importlib.util.spec_from_file_location(f"collection_{path.rpartition('/')[2]}", COLLECTION / f"{path}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


ctl = load("plugins/module_utils/gpuswitchctl")

AT = "2026-11-30T08:21:26.294882Z"


def gpu(address: str, name: str = "", model: str = "NVIDIA Corporation GA104 [GeForce RTX 3070]", **more: Any) -> Any:
    """One as `list` shows it."""
    record = {
        "address": address,
        "name": name,
        "model": model,
        "vendor": "nvidia",
        "managed": bool(name),
        "at_boot": "keep",
        "state": "host",
        "state_label": "host-nvidia",
        "state_since": AT,
        "trial_ends": None,
        "driver": "nvidia",
        "host_driver": "nvidia",
        "iommu_groups": [13],
        "adds": [],
        "match": {},
        "owner": None,
        "switch": None,
        "reason": "",
        "stays_out": False,
        "remedies": [],
        "stopped_units": [],
        "functions": [
            {"address": address, "kind": "display", "driver": "nvidia"},
            {"address": f"{address[:-1]}1", "kind": "audio", "driver": "snd_hda_intel"},
        ],
        **more,
    }
    check("common.schema.json#/$defs/gpu", record)
    return record


def on_vfio(record: Any) -> Any:
    moved = copy.deepcopy(record) | {"state": "vfio", "state_label": "vfio", "driver": "vfio-pci"}
    for function in moved["functions"]:
        function["driver"] = "vfio-pci"
    return moved


SPARE = gpu("0000:01:00.0", "spare")
OTHER = gpu("0000:41:00.0")
FIRST = gpu("0000:00:02.0", model="Intel Corporation Alder Lake-P GT2 [Iris Xe Graphics]")


def switch(of: Any, result: str, *, changed: bool, reason: str = "") -> Any:
    told = {
        "version": 1,
        "event": "result",
        "at": AT,
        "gpu": of["address"],
        "name": of["name"],
        "id": "4c60a4b2",
        "target": "vfio",
        "plan": 1,
        "index": 18,
        "count": 18,
        "kind": "group",
        "title": "check IOMMU group 13",
        "step_started": AT,
        "deadline_seconds": 5.0,
        "waiting_for": "",
        "waiting_until": None,
        "started": AT,
        "finished": AT,
        "result": result,
        "reason": reason,
        "error_kind": "",
        "forgone": [],
        "returned": None,
        "seconds": 0.2,
        "changed": changed,
        "joined": False,
        "requester": None,
    }
    check("to-vfio", told)
    return told


def error(of: Any, kind: str, text: str, *blockers: Mapping[str, str]) -> Any:
    told = {
        "version": 1,
        "event": "error",
        "at": AT,
        "gpu": of and of["address"],
        "name": of["name"] if of else "",
        "changed": False,
        "error": {"kind": kind, "text": text, "exit_status": 3},
        "blockers": list(blockers),
    }
    check("to-vfio", told)
    return told


def plan(of: Any, target: str, *drivers: Mapping[str, str]) -> Any:
    steps = [
        {"kind": "probe", "title": "x", "deadline_seconds": 30.0, "stops": [], "starts": [], "ends_programs": False}
        | {"drivers": each}
        for each in drivers
    ]
    named = {"gpu": of["address"], "name": of["name"], "target": target, "state": of["state"]}
    told = {"version": 1, "plans": [{**named, "steps": steps, "in_the_way": []}]}
    check("plan", told)
    return told


class Host:
    """A gpuswitchctl that answers in turn, and knows what it was asked."""

    def __init__(self, *answers: tuple[int, Sequence[Any] | str]) -> None:
        self.asked: list[list[str]] = []
        self._answers = list(answers)

    def __call__(self, words: list[str]) -> tuple[int, str, str]:
        self.asked.append(words)
        status, answer = self._answers.pop(0)
        if isinstance(answer, str):
            return status, "", answer
        return status, "\n".join(map(json.dumps, answer)), "for people\n"


def listed(*gpus: Any) -> tuple[int, list[Any]]:
    told = {"version": 1, "gpus": list(gpus), "warnings": []}
    check("list", told)
    return 0, [told]


def move(host: Host, state: str, words: Sequence[str], *options: str) -> Any:
    one = ctl.Move(ctl.Ctl(host), state, options)
    one.look(words)
    return one


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["0000:01:00.0"], [SPARE]),
        (["01:00.0"], [SPARE]),
        (["pci_0000_01_00_0"], [SPARE]),
        (["01:00.1"], [SPARE]),
        (["spare"], [SPARE]),
        (["Intel Corporation Alder Lake-P GT2 [Iris Xe Graphics]"], [FIRST]),
        (["iris xe"], [FIRST]),
        (["all"], [SPARE]),
        (["spare", "01:00.0", "iris"], [SPARE, FIRST]),
    ],
)
def test_a_gpu_is_found_by_what_people_call_it(words: list[str], found: list[Any]) -> None:
    assert ctl.select([FIRST, SPARE, OTHER], words) == found


def test_the_only_gpu_needs_no_name() -> None:
    assert ctl.select([OTHER], []) == [OTHER]


@pytest.mark.parametrize(
    ("gpus", "words", "sentence"),
    [
        ([FIRST, OTHER], [], "this host has 2 GPUs: say which, by `gpu`: 0000:00:02.0, Intel"),
        ([], [], "this host has no GPU"),
        ([SPARE], ["09:00.0"], "'09:00.0' is no GPU of this host: this host has spare (0000:01:00.0), NVIDIA"),
        ([SPARE], [""], "'' is no GPU of this host"),
        (
            [SPARE, OTHER],
            ["RTX 3070"],
            "the model 'RTX 3070' is that of 2 GPUs of this host; name one by its address: ",
        ),
        (
            [OTHER],
            ["all"],
            "`all` is no GPU of this host: none has a [[gpu]] table in its configuration; this host has ",
        ),
    ],
)
def test_one_that_is_not_found_is_a_sentence(gpus: list[Any], words: list[str], sentence: str) -> None:
    with pytest.raises(ctl.CtlError) as refused:
        ctl.select(gpus, words)
    assert str(refused.value).startswith(sentence)


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ((0, [{"version": 2, "gpus": []}]), "its JSON has version 2, and this collection reads version 1"),
        (
            (1, "Traceback:\nKeyError: 'State'"),
            "ended with status 1 and printed no JSON that this collection knows: KeyErr",
        ),
        ((0, [[1]]), "printed no JSON that this collection knows: for people"),
        ((5, [error(None, "unreachable", "cannot connect")]), "gpuswitchctl list: cannot connect"),
    ],
)
def test_what_cannot_be_read_is_a_sentence(answer: Any, sentence: str) -> None:
    with pytest.raises(ctl.CtlError, match=sentence.replace("(", r"\(")):
        ctl.Ctl(Host(answer)).gpus()


def test_what_has_moved_is_told_with_its_drivers() -> None:
    done = (0, [{"version": 1, "event": "news"}, switch(SPARE, "done", changed=True)])
    host = Host(listed(SPARE), done, listed(on_vfio(SPARE)))
    one = move(host, "vfio", ["spare"], "--busy", "terminate")
    one.run(timeout=60)
    assert host.asked[1] == [
        "gpuswitchctl",
        "to-vfio",
        "0000:01:00.0",
        "--busy",
        "terminate",
        "--timeout",
        "60",
        "--json",
    ]
    assert (one.changed, one.failures, one.sentence()) == (True, [], "")
    assert one.diff == {
        "before": {"spare (0000:01:00.0)": {"0000:01:00.0": "nvidia", "0000:01:00.1": "snd_hda_intel"}},
        "after": {"spare (0000:01:00.0)": {"0000:01:00.0": "vfio-pci", "0000:01:00.1": "vfio-pci"}},
    }


def test_what_was_there_is_not_changed() -> None:
    host = Host(listed(SPARE), (0, [switch(SPARE, "done", changed=False)]), listed(SPARE))
    one = move(host, "host", [])
    one.run()
    assert host.asked[1][1] == "to-host"
    assert (one.changed, one.failures) == (False, [])


def test_a_refusal_has_all_blockers_with_their_gpu_and_others_go_on() -> None:
    blockers = [
        {"kind": "neighbour", "text": f"0000:0{n}:00.0 is in the way", "error_kind": "not_viable"} for n in (2, 3)
    ]
    moved = (3, [error(SPARE, "not_viable", "both are in the way", *blockers), switch(OTHER, "done", changed=True)])
    one = move(Host(listed(SPARE, OTHER), moved, listed(SPARE, on_vfio(OTHER))), "vfio", ["spare", "41:00.0"])
    one.run()
    told = one.as_dict()
    assert [(each["gpu"], each["text"]) for each in told["blockers"]] == [
        ("0000:01:00.0", "0000:02:00.0 is in the way"),
        ("0000:01:00.0", "0000:03:00.0 is in the way"),
    ]
    assert one.sentence() == "spare (0000:01:00.0): both are in the way"
    assert (told["changed"], told["wedged"]) == (True, [])


@pytest.mark.parametrize(
    "told", [switch(SPARE, "wedged", changed=True, reason="stuck"), error(SPARE, "wedged", "stuck")]
)
def test_a_wedged_one_is_named(told: Any) -> None:
    one = move(Host(listed(SPARE), (7, [told]), listed(SPARE)), "vfio", [])
    one.run()
    assert (one.as_dict()["wedged"], one.sentence()) == (["0000:01:00.0"], "spare (0000:01:00.0): stuck")


def test_a_service_that_is_lost_meanwhile_is_why_it_failed() -> None:
    lost = (5, [error(None, "unreachable", "the service was lost")])
    one = move(Host(listed(SPARE), lost, (5, [error(None, "unreachable", "cannot connect")])), "vfio", [])
    one.run()
    assert one.sentence() == "the service was lost"


def test_check_mode_is_the_plan_of_the_service() -> None:
    planned = plan(SPARE, "vfio", {"0000:01:00.0": ""}, {}, {"0000:01:00.0": "nvgrace_gpu_vfio_pci"})
    host = Host(listed(SPARE), (0, [planned]))
    one = move(host, "vfio", [], "--wait", "5")
    one.plan()
    assert host.asked[1:] == [["gpuswitchctl", "plan", "0000:01:00.0", "vfio", "--wait", "5", "--json"]]
    assert one.changed
    assert one.diff["after"] == {
        "spare (0000:01:00.0)": {"0000:01:00.0": "nvgrace_gpu_vfio_pci", "0000:01:00.1": "snd_hda_intel"}
    }


def test_check_mode_asks_for_all_gpus_and_tells_every_refusal() -> None:
    host = Host(listed(SPARE, OTHER), (3, [error(SPARE, "busy", "in use")]), (3, [error(OTHER, "busy", "in use, too")]))
    one = move(host, "host", ["spare", "41:00.0"])
    one.plan()
    assert one.sentence() == "spare (0000:01:00.0): in use; 0000:41:00.0: in use, too"


def test_a_recovery_of_one_that_is_well_is_nothing() -> None:
    host = Host(listed(SPARE))
    one = move(host, "recovered", [])
    one.plan()
    assert (one.changed, len(host.asked)) == (False, 1)


def test_a_recovery_that_would_be_begun_is_told_by_the_way_home() -> None:
    failed = SPARE | {"state": "failed"}
    host = Host(listed(failed), (0, [plan(SPARE, "host", {"0000:01:00.0": "nvidia"})]))
    one = move(host, "recovered", [])
    one.plan()
    assert host.asked[1][1:4] == ["plan", "0000:01:00.0", "host"]
    assert one.changed


def test_the_collection_is_of_this_version() -> None:
    assert f"version: {__version__}" in (COLLECTION / "galaxy.yml").read_text().splitlines()
