"""Switches of the real service as its callers see them: signals, properties, results."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest

from tests.harness.service.peers import PeerError
from tests.harness.service.services import ANY_PORT, GPU, PROPERTIES, ROOT, Service, Signal, told_properties
from tests.real_bus.conftest import Start
from tests.real_bus.test_history import history
from tests.real_bus.test_metrics import samples, scrape, value

INTEGRATED, DISCRETE = f"{ROOT}/gpu/0000_00_02_0", f"{ROOT}/gpu/0000_01_00_0"
SOUND = "0000:01:00.1"
STUCK = f"the kernel has not returned from 'unbind {SOUND} from snd_hda_intel' within 0.2 s"
IMPATIENT = f"{ANY_PORT}[deadlines]\nunbind = 0.2\n"


def steps(signals: list[Signal]) -> list[tuple[Any, ...]]:
    """(index, count, title, status) of each StepChanged."""
    return [(*signal.body[1:3], *signal.body[4:6]) for signal in signals if signal.member == "StepChanged"]


async def refused(service: Service, target: str) -> str:
    with pytest.raises(PeerError) as raised:
        await service.move(DISCRETE, target)
    return str(raised.value).removeprefix("org.gpuswitch1.Error.")


async def test_a_switch_and_the_way_back_are_told_step_by_step(start: Start) -> None:
    service = await start("laptop")
    before = await service.properties(DISCRETE)
    for target, moving in (("vfio", "detaching"), ("host", "reattaching")):
        planned = await service.call(DISCRETE, f"{GPU}.Plan", "sa{sv}", target, {})
        known = await service.properties(DISCRETE)
        switch = await service.move(DISCRETE, target)
        signals = await service.signals_until("SwitchFinished")

        assert {signal.path for signal in signals} == {DISCRETE}
        assert signals[-1].body == (switch, "done", "")
        assert {signal.body[0] for signal in signals if signal.member == "StepChanged"} == {switch}
        titles = [step["title"][1] for step in planned]
        assert steps(signals) == [
            (index, len(titles), title, status)
            for index, title in enumerate(titles, 1)
            for status in ("running", "done")
        ]
        # What was told adds up to what is, and the state on the way was told too.
        after = await service.properties(DISCRETE)
        assert known | told_properties(signals) == after
        assert {name for name in after if after[name] != known[name]} == {
            "State", "Driver", "Functions", "Switch", "StateSince", "StoppedUnits"
        }  # fmt: skip  # one set
        assert told_properties(signals[:1])["State"] == moving
        assert after["State"] == target
    after = await service.properties(DISCRETE)
    assert after | {"Switch": {}, "StateSince": 0} == before | {"StateSince": 0}


async def test_a_step_that_takes_its_time_is_told_as_a_property_too(start: Start) -> None:
    service = await start("laptop", f"unbind@{SOUND}=hang")
    await service.move(DISCRETE, "vfio")
    told: dict[str, Any] = {}
    while told.get("Switch", {}).get("kind") != "unbind":
        told = told_properties([await service.signal()])
    assert told["Switch"] == (await service.properties(DISCRETE))["Switch"]


async def test_the_record_of_a_switch_says_how_it_went(start: Start) -> None:
    service = await start("laptop")
    planned = await service.call(DISCRETE, f"{GPU}.Plan", "sa{sv}", "vfio", {})
    switch = await service.move(DISCRETE, "vfio")
    record = await service.wait(DISCRETE, switch)
    assert record == (await service.properties(DISCRETE))["Switch"]
    assert record.pop("finished") >= record.pop("step_started") >= record.pop("started") > 0
    asker = record.pop("asker")
    assert (asker["service"], asker["pid"], asker["uid"]) == (False, os.getpid(), os.getuid())
    assert record == {
        "id": switch,
        "target": "vfio",
        "plan": 1,
        "index": len(planned),
        "count": len(planned),
        "kind": planned[-1]["kind"][1],
        "title": planned[-1]["title"][1],
        "deadline": planned[-1]["deadline"][1],
        "waiting_for": "",
        "waiting_until": 0.0,
        "result": "done",
        "reason": "",
        "error": "",
        "forgone": [],
        "returned": {},
    }


async def test_a_switch_can_be_waited_for_before_and_after_its_end(start: Start) -> None:
    service = await start("laptop", "unbind=0.1s")
    switch = await service.move(DISCRETE, "vfio")
    assert (await service.properties(DISCRETE))["State"] == "detaching"
    assert (await service.wait(DISCRETE, switch))["result"] == "done"
    await service.wait(DISCRETE, await service.move(DISCRETE, "host"))
    assert (await service.wait(DISCRETE, switch))["target"] == "vfio"
    with pytest.raises(PeerError, match=r"InvalidArgument: 0000:00:02\.0 knows of no switch"):
        await service.wait(INTEGRATED, switch)


async def test_a_gpu_that_is_there_already_takes_no_step(start: Start) -> None:
    """It is answered, and kept nowhere: the last switch is still the one that did something."""
    service = await start("laptop", config=f"{ANY_PORT}[history]\nkeep = 2\n")
    last = await service.move(DISCRETE, "vfio")
    await service.wait(DISCRETE, last)
    for _ in range(20):
        record = await service.wait(DISCRETE, await service.move(DISCRETE, "vfio"))
        assert (record["result"], record["count"]) == ("done", 0)
    assert (await service.properties(DISCRETE))["Switch"]["id"] == last
    assert (await service.wait(DISCRETE, last))["count"] > 0
    assert [each["id"] for each in await history(service)] == [last]
    assert (
        value(samples(await scrape(service)), "switches_total", gpu="0000:01:00.0", result="done", target="vfio") == 1
    )


async def test_while_a_switch_runs_its_functions_are_told_as_they_are_now(start: Start) -> None:
    service = await start("laptop", f"probe@{SOUND}=hang")
    await service.move(DISCRETE, "vfio")
    told: dict[str, Any] = {}
    while not (told.get("Switch", {}).get("kind") == "probe" and SOUND in told["Switch"]["title"]):
        told = told_properties([await service.signal()])
    now = await service.properties(DISCRETE)
    assert now["State"] == "detaching"
    assert {address: driver for address, _, driver in now["Functions"]}[SOUND] == "vfio-pci"


async def test_while_a_switch_runs_the_same_request_joins_it_and_another_is_refused(start: Start) -> None:
    service = await start("laptop", "unbind=0.2s")
    switch = await service.move(DISCRETE, "vfio")
    assert await service.move(DISCRETE, "vfio") == switch
    assert await refused(service, "host") == (
        f"InProgress: 0000:01:00.0 cannot go to host while it is on its way to vfio (switch {switch}): "
        "wait for that first, or cancel it: gpuswitchctl cancel 0000:01:00.0"
    )
    assert (await service.wait(DISCRETE, switch))["result"] == "done"


async def test_two_gpus_switch_at_once(start: Start) -> None:
    service = await start("server", "probe=0.2s")
    paths = [f"{ROOT}/gpu/0000_{slot}_00_0" for slot in ("11", "21")]
    switches = [await service.move(path, "vfio") for path in paths]
    assert [(await service.properties(path))["State"] for path in paths] == ["detaching"] * 2
    for path, switch in zip(paths, switches, strict=True):
        assert (await service.wait(path, switch))["result"] == "done"
    assert [(await service.properties(path))["State"] for path in paths] == ["vfio"] * 2


async def test_a_step_that_fails_is_told_and_everything_before_it_reverted(start: Start) -> None:
    service = await start("laptop", f"probe@{SOUND}#1=EINVAL")
    before = await service.properties(DISCRETE)
    switch = await service.move(DISCRETE, "vfio")
    signals = await service.signals_until("SwitchFinished")
    told = steps(signals)
    [failed] = [index for index, _, _, status in told if status == "failed"]
    assert signals[-1].body == (switch, "reverted", f"cannot bind {SOUND} to vfio-pci: Invalid argument")
    taken_back = [index for index, _, _, status in told if status == "reverting"]
    assert [index for index, _, _, status in told if status == "reverted"] == taken_back
    # Of looks, and of what stays for the next time, there is nothing to take back.
    assert taken_back == sorted(taken_back, reverse=True)
    assert (taken_back[0], len(taken_back) > 1) == (failed, True)
    after = await service.properties(DISCRETE)
    assert after["Reason"] == f"cannot bind {SOUND} to vfio-pci: Invalid argument"
    assert "recovering" in [told_properties([signal]).get("State") for signal in signals]
    changed = {"Reason", "Switch", "StateSince"}
    assert {name for name in after if after[name] != before[name]} == changed
    assert (await service.wait(DISCRETE, await service.move(DISCRETE, "vfio")))["result"] == "done"
    assert (await service.properties(DISCRETE))["Reason"] == ""


async def test_a_refused_switch_names_every_blocker_and_changes_nothing(start: Start) -> None:
    service = await start("shared")
    before = await service.properties(DISCRETE)
    error = await refused(service, "vfio")
    assert error.startswith("NotViable: the network card 0000:02:00.0")
    assert "stays on r8169" in error
    assert await service.properties(DISCRETE) == before


async def test_a_kernel_that_does_not_return_wedges_one_gpu_and_nothing_else(start: Start) -> None:
    service = await start("laptop", f"unbind@{SOUND}=hang", config=IMPATIENT)
    record = await service.wait(DISCRETE, await service.move(DISCRETE, "vfio"))
    assert record["result"] == "wedged"
    assert re.fullmatch(rf"{re.escape(STUCK)} \(process \d+ is in state D\)", record["reason"])
    shown = await service.properties(DISCRETE)
    assert (shown["State"], shown["Driver"]) == ("wedged", "nvidia")
    assert shown["Reason"].startswith(STUCK)
    for target in ("vfio", "host"):
        assert (await refused(service, target)).startswith("Wedged: 0000:01:00.0 is wedged")
    assert (await service.call(INTEGRATED, f"{PROPERTIES}.Get", "ss", GPU, "State"))[1] == "host"


async def test_a_gpu_whose_kernel_returns_after_all_comes_home(start: Start) -> None:
    service = await start("laptop", f"unbind@{SOUND}#1=1s", config=IMPATIENT)
    before = await service.properties(DISCRETE)
    await service.move(DISCRETE, "vfio")
    await service.until_state(DISCRETE, "wedged")
    await service.until_state(DISCRETE, "recovering")
    await service.until_state(DISCRETE, "host")
    after = await service.properties(DISCRETE)
    assert after["Functions"] == before["Functions"]
    assert (await service.wait(DISCRETE, await service.move(DISCRETE, "vfio")))["result"] == "done"
