"""A trial as its callers see it: the method, the property, and how it ends by itself."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest

from tests.harness.service.peers import PeerError
from tests.harness.service.services import GPU, ROOT, Service, told_properties
from tests.real_bus.conftest import Start
from tests.real_bus.test_history import entry, history
from tests.real_bus.test_metrics import samples, scrape, value

DISCRETE = f"{ROOT}/gpu/0000_01_00_0"
METRIC = "trial_ends_timestamp_seconds"


async def begin(service: Service, seconds: float, options: dict[str, Any] | None = None) -> str:
    return str(await service.call(DISCRETE, f"{GPU}.Trial", "da{sv}", seconds, options or {}))


async def test_it_is_told_when_it_ends_and_then_it_does(start: Start) -> None:
    service = await start("laptop")
    before = await service.properties(DISCRETE)
    assert before["TrialEnds"] == 0.0
    switch = await begin(service, 1.0)
    told = told_properties(await service.until_state(DISCRETE, "vfio"))
    finished = (await service.wait(DISCRETE, switch))["finished"]
    assert told["TrialEnds"] == (await service.properties(DISCRETE))["TrialEnds"] == pytest.approx(finished + 1, abs=1)
    home = told_properties(await service.until_state(DISCRETE, "host"))
    assert home["TrialEnds"] == 0.0
    assert time.time() >= told["TrialEnds"]
    after = await service.properties(DISCRETE)
    assert after | {"Switch": {}, "StateSince": 0} == before | {"StateSince": 0}
    there, back = [await entry(service, each["id"]) for each in reversed(await history(service))]
    assert (there["id"], there["target"], there["options"]) == (switch, "vfio", {"trial_seconds": 1.0})
    assert (back["target"], back["result"], back["asker"]["trial"]) == ("host", "done", True)


@pytest.mark.parametrize("seconds", [0.0, 0.99, -60.0, 86400.5, math.inf, math.nan])
async def test_of_no_such_length(start: Start, seconds: float) -> None:
    service = await start("laptop")
    before = await service.properties(DISCRETE)
    with pytest.raises(PeerError, match=rf"InvalidArgument: a trial lasts from 1 to 86400 seconds, not {seconds}$"):
        await begin(service, seconds)
    assert await service.properties(DISCRETE) == before


async def test_its_options_are_those_of_a_switch(start: Start) -> None:
    service = await start("laptop")
    with pytest.raises(PeerError, match="InvalidArgument: unknown option 'seconds'"):
        await begin(service, 60.0, {"seconds": ("d", 60.0)})
    switch = await begin(service, 86400.0, {"busy": ("s", "wait"), "wait_seconds": ("u", 5)})
    assert (await service.wait(DISCRETE, switch))["result"] == "done"


async def test_whoever_asks_for_vfio_keeps_it_and_all_are_told(start: Start) -> None:
    service = await start("laptop")
    await service.wait(DISCRETE, await begin(service, 600.0))
    ends = (await service.properties(DISCRETE))["TrialEnds"]
    assert value(samples(await scrape(service)), METRIC, gpu="0000:01:00.0") == pytest.approx(ends, abs=1)
    await service.signals_until("SwitchFinished")
    await service.wait(DISCRETE, await service.move(DISCRETE, "vfio"))
    told: dict[str, Any] = {}
    while told.get("TrialEnds") != 0.0:
        told = told_properties([await service.signal()])
    assert (await service.properties(DISCRETE))["TrialEnds"] == 0.0
    assert f"{METRIC}{{" not in await scrape(service)


async def test_what_belongs_to_a_machine_is_not_tried(start: Start) -> None:
    service = await start("laptop", config='[[gpu]]\naddress = "0000:01:00.0"\n')
    uuid = "5b0f6c9a-1c43-4d8c-9d4e-1d2f3a4b5c6d"
    await service.ask("AcquireForVm", "ssas", "win11", uuid, ["0000:01:00.0"])
    with pytest.raises(PeerError, match=r"Owned: 0000:01:00\.0 belongs to the virtual machine win11"):
        await begin(service, 60.0)
    assert (await service.properties(DISCRETE))["TrialEnds"] == 0.0
