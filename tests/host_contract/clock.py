"""Cases about the clock that nobody can set."""

from __future__ import annotations

import asyncio

from tests.host_contract.harness import ContractHarness, case


@case
async def the_clock_has_come_when_it_is_waited_for(harness: ContractHarness) -> None:
    host = harness.host
    began = host.boottime()
    await host.until(began + 0.2)
    assert host.boottime() >= began + 0.2


@case
async def what_is_past_is_not_waited_for(harness: ContractHarness) -> None:
    host = harness.host
    for moment in (host.boottime(), 1.0, 0.0, -1.5):
        await host.until(moment)


@case
async def who_waits_no_longer_leaves_the_others_waiting(harness: ContractHarness) -> None:
    host = harness.host
    moment = host.boottime() + 0.2
    waiting, leaving = asyncio.create_task(host.until(moment)), asyncio.create_task(host.until(moment))
    await asyncio.sleep(0)
    leaving.cancel()
    await waiting
    assert leaving.cancelled()
    assert host.boottime() >= moment
