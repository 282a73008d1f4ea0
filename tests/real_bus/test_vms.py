"""Virtual machines that ask for GPUs over the bus: what is refused, who owns what, and callers that leave."""

from __future__ import annotations

import asyncio
import signal
from typing import Any

import pytest

from tests.harness.buses.private import PrivateBus
from tests.harness.service.peers import Peer, PeerError
from tests.harness.service.services import ANY_PORT, GPU, MANAGER, NAME, ROOT, Service, told_properties
from tests.real_bus.conftest import Start

DISCRETE = f"{ROOT}/gpu/0000_01_00_0"
WIN11 = ("win11", "5b0f6c9a-1c43-4d8c-9d4e-1d2f3a4b5c6d")
LINUX = ("linux", "0b0f6c9a-1c43-4d8c-9d4e-1d2f3a4b5c6d")
MANAGED = f'{ANY_PORT}[[gpu]]\naddress = "0000:01:00.0"\n'
WHOLE = [f"0000:01:00.{n}" for n in range(4)]


async def owner(service: Service) -> tuple[str, str]:
    name, uuid = (await service.properties(DISCRETE))["Owner"]
    return name, uuid


async def acquire(service: Service, machine: tuple[str, str] = WIN11, functions: Any = WHOLE) -> Any:
    return await service.ask("AcquireForVm", "ssas", *machine, functions)


async def test_it_owns_what_it_gets_and_everybody_is_told(start: Start) -> None:
    service = await start("laptop", config=MANAGED)
    assert await acquire(service) == ["0000:01:00.0"]
    assert await owner(service) == WIN11
    told = told_properties(await service.until_state(DISCRETE, "vfio"))
    assert tuple(told["Owner"]) == WIN11
    with pytest.raises(PeerError, match=r"Owned.*belongs to the virtual machine win11"):
        await acquire(service, LINUX)
    await service.ask("ReleaseFromVm", "sss", *LINUX, "shutdown")
    assert await owner(service) == WIN11
    await service.ask("ReleaseFromVm", "sss", *WIN11, "shutdown")
    await service.until_state(DISCRETE, "host")
    assert await owner(service) == ("", "")


async def test_the_history_knows_for_which_machine(start: Start) -> None:
    service = await start("laptop", config=MANAGED)
    await acquire(service)
    [entry] = await service.ask("History", "u", 1)
    assert entry["asker"][1]["vm"] == ("s", "win11")


@pytest.mark.parametrize(
    ("machine", "functions", "words"),
    [
        (("", WIN11[1]), WHOLE, "'' is not the name of a virtual machine"),
        (("x" * 256, WIN11[1]), WHOLE, "is not the name of a virtual machine"),
        (("win11", ""), WHOLE, "'' is not the UUID of a virtual machine"),
        (("win11", "win11"), WHOLE, "'win11' is not the UUID of a virtual machine"),
        (WIN11, ["0000:01:00.0", "rm -rf"], "'rm -rf'"),
        (WIN11, ["0000:01:00.0"] * 1025, "no virtual machine has 1025 PCI functions"),
    ],
)
async def test_what_makes_no_sense_changes_nothing(
    machine: tuple[str, str], functions: list[str], words: str, start: Start
) -> None:
    service = await start("laptop", config=MANAGED)
    before = await service.properties(DISCRETE)
    for method in ("AcquireForVm", "AdoptVm"):
        with pytest.raises(PeerError) as raised:
            await service.ask(method, "ssas", *machine, functions)
        assert str(raised.value).startswith("org.gpuswitch1.Error.InvalidArgument")
        assert words in str(raised.value)
    assert await service.properties(DISCRETE) == before


async def test_a_caller_that_leaves_has_asked_for_nothing(start: Start, private_bus: PrivateBus) -> None:
    service = await start("laptop", "unbind=1s", config=MANAGED)
    async with Peer.on(private_bus.address) as hook:
        asking = asyncio.create_task(hook.call(NAME, ROOT, f"{MANAGER}.AcquireForVm", "ssas", *WIN11, WHOLE))
        await service.until_state(DISCRETE, "detaching")
        assert await owner(service) == WIN11
    asking.cancel()
    signals = await service.signals_until("SwitchFinished")
    assert signals[-1].body[1] == "cancelled"
    while await owner(service) != ("", ""):
        await service.signal()
    assert (await service.properties(DISCRETE))["State"] == "host"


async def test_a_service_that_stops_says_so_to_who_waits(start: Start) -> None:
    service = await start("laptop", "unbind=1s", config=MANAGED)
    asking = asyncio.create_task(acquire(service))
    await service.until_state(DISCRETE, "detaching")
    assert await service.end(signal.SIGTERM) == 0
    with pytest.raises(PeerError):
        await asking


async def test_to_host_does_not_take_it_from_a_machine_that_starts(start: Start) -> None:
    service = await start("laptop", config=MANAGED)
    await acquire(service)
    with pytest.raises(PeerError, match=r"Owned.*win11, which is about to open it"):
        await service.call(DISCRETE, f"{GPU}.ToHost", "a{sv}", {})
