"""GPUs in the hands of a process: it has them until it has ended, and nobody has them open."""

from __future__ import annotations

import asyncio
import errno
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpuswitch.config.settings import Config, GpuConfig
from gpuswitch.errors import Busy as BusyError
from gpuswitch.errors import Failed, NotViable, Owned
from gpuswitch.gpu.actor import Actor
from gpuswitch.host.simulated.faults import Errno
from gpuswitch.host.simulated.scenarios import SCENARIOS
from gpuswitch.model.address import PciAddress
from gpuswitch.model.holders import Unit
from gpuswitch.model.owner import Owner
from gpuswitch.model.policy import AS_CONFIGURED, Busy, Options, Release
from gpuswitch.model.states import State
from gpuswitch.switch.record import Requester
from tests.harness.simulated.harness import Harness, config
from tests.simulated_host.test_owners import GROUP, WIN11, home

ALICE = Requester(1000, 4711, command="gpuswitchctl")


async def start_harness(directory: Path, scenario: str = "laptop", **rules: object) -> Harness:
    return await Harness.start(SCENARIOS[scenario](), directory, config(scenario, **rules))


@pytest.fixture
async def harness(tmp_path: Path) -> Harness:
    return await start_harness(tmp_path)


@pytest.fixture
def actor(harness: Harness) -> Actor:
    return harness.fleet.find("01:00.0")


async def acquire(harness: Harness, *actors: Actor, name: str = "qemu", options: Options = AS_CONFIGURED) -> Owner:
    process = harness.machine.run(name)
    owner = Owner(f"{name} (pid {process.pid})", f"uuid of {name}", process)
    await harness.fleet.owners.acquire_for_process(owner, actors, ALICE, options)
    return owner


async def somebody_moves(harness: Harness, function: PciAddress) -> None:
    """Home, by hand."""
    kernel = harness.host.kernel("somebody")
    await kernel.set_override({function: None})
    await kernel.unbind(function, "vfio-pci")
    await kernel.probe(function)


async def settled() -> None:
    await asyncio.sleep(10_000)


class TestThereAndBack:
    async def test_it_comes_home_with_the_end_of_the_process(self, harness: Harness, actor: Actor) -> None:
        before = harness.snapshot()
        owner = await acquire(harness, actor)
        assert (actor.state, actor.owner) == (State.VFIO, owner)
        assert actor.switch is not None
        assert actor.switch.requester == replace(ALICE, vm=owner.name, for_process=True)
        harness.machine.open_group(GROUP, "qemu")
        await settled()
        assert actor.state is State.VFIO
        harness.machine.end("qemu")
        await home(harness, actor)
        assert (actor.owner, harness.snapshot(), harness.pages) == (None, before, [])
        assert str(actor.switch.requester) == f"the service itself, for process {owner.name}"

    async def test_one_that_never_opens_it_has_it_all_the_same(self, harness: Harness, actor: Actor) -> None:
        owner = await acquire(harness, actor)
        await settled()
        assert (actor.state, actor.owner) == (State.VFIO, owner)
        assert owner.process is not None
        with pytest.raises(Owned, match=rf"with whose end it comes home: end that first: kill {owner.process.pid}"):
            await actor.request(State.HOST)
        harness.machine.end("qemu")
        await home(harness, actor)

    async def test_whoever_it_left_is_waited_for(self, harness: Harness, actor: Actor) -> None:
        await acquire(harness, actor)
        harness.machine.open_group(GROUP, "a child")
        harness.machine.end("qemu")
        await settled()
        assert actor.state is State.VFIO
        assert actor.owner is not None
        harness.machine.end("a child")
        await home(harness, actor)

    async def test_where_it_stays_the_configuration_says(self, tmp_path: Path) -> None:
        harness = await start_harness(tmp_path, on_release=Release.STAY)
        actor = harness.fleet.find("01:00.0")
        await acquire(harness, actor)
        harness.machine.end("qemu")
        await settled()
        assert (actor.state, actor.owner) == (State.VFIO, None)

    async def test_all_or_none(self, tmp_path: Path) -> None:
        harness = await start_harness(tmp_path, "server")
        before = harness.snapshot()
        gpus = [harness.fleet.find(address) for address in ("11:00.0", "21:00.0")]
        await acquire(harness, *gpus)
        assert {gpu.state for gpu in gpus} == {State.VFIO}
        harness.machine.end("qemu")
        for gpu in gpus:
            await home(harness, gpu)
        assert harness.snapshot() == before

        harness.host.faults.add(Errno(errno.EINVAL), operation="probe", subject=gpus[1].gpu.address, nth=1)
        with pytest.raises(Failed):
            await acquire(harness, *gpus, name="another")
        for gpu in gpus:
            await home(harness, gpu)
        assert {gpu.owner for gpu in gpus} == {None}


class TestSomethingHappens:
    async def test_it_ends_while_it_is_being_handed_over(self, harness: Harness, actor: Actor) -> None:
        asking = asyncio.create_task(acquire(harness, actor))
        await harness.witness.until(lambda: actor.state is State.DETACHING)
        harness.machine.end("qemu")
        await asking
        await home(harness, actor)

    async def test_whoever_asked_leaves(self, harness: Harness, actor: Actor) -> None:
        before = harness.snapshot()
        asking = asyncio.create_task(acquire(harness, actor))
        await harness.witness.until(lambda: actor.state is State.DETACHING)
        asking.cancel()
        await home(harness, actor)
        assert (actor.owner, harness.snapshot()) == (None, before)

    async def test_two_at_once(self, harness: Harness, actor: Actor) -> None:
        first, second = await asyncio.gather(
            acquire(harness, actor), acquire(harness, actor, name="another"), return_exceptions=True
        )
        assert isinstance(first, Owner)
        assert isinstance(second, Owned)
        assert str(second) == f"0000:01:00.0 belongs to process {first.name}: end that first"

    async def test_a_machine_that_wants_it_meanwhile(self, harness: Harness, actor: Actor) -> None:
        rules = harness.fleet.config.defaults
        managed = GpuConfig(actor.gpu.address, managed=True, rules=rules)
        harness.fleet.reconfigure(replace(harness.fleet.config, gpus=(managed,)))
        await acquire(harness, actor)
        with pytest.raises(Owned, match="belongs to process qemu"):
            await harness.fleet.owners.acquire(WIN11, set(actor.gpu.functions), ALICE)

    async def test_the_next_one_waits_for_its_way_home(self, harness: Harness, actor: Actor) -> None:
        await acquire(harness, actor)
        harness.machine.end("qemu")
        await harness.witness.until(lambda: actor.state is State.REATTACHING)
        owner = await acquire(harness, actor, name="another")
        assert (actor.state, actor.owner) == (State.VFIO, owner)

    @pytest.mark.parametrize("alive", [True, False])
    async def test_the_service_starts_anew(self, harness: Harness, actor: Actor, *, alive: bool) -> None:
        owner = await acquire(harness, actor)
        if not alive:
            harness.machine.run("its child")
            harness.machine.open_group(GROUP, "its child")
            harness.machine.end("qemu")
        harness.fleet.owners.stop()
        harness = await harness.again()
        harness.fleet.owners.ready()
        actor = harness.fleet.find("01:00.0")
        await settled()
        assert (actor.state, actor.owner, actor.owner and actor.owner.process) == (State.VFIO, owner, owner.process)
        for name in ("qemu", "its child"):
            harness.machine.end(name)
        await home(harness, actor)

    async def test_who_goes_there_already_for_another_reason_is_waited_for(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """And not asked again and again: whoever waits for a program may do so for a day."""
        harness = await start_harness(tmp_path)
        actor = harness.fleet.find("01:00.0")
        harness.machine.open(actor.gpu.address, "game")
        waits = Options(busy=Busy.WAIT, wait_seconds=60)
        await actor.request(State.VFIO, waits, ALICE)
        asked, request = 0, actor.request

        async def counted(*arguments: Any) -> Any:
            nonlocal asked
            asked += 1
            return await request(*arguments)

        monkeypatch.setattr(actor, "request", counted)
        acquiring = asyncio.create_task(acquire(harness, actor, options=replace(waits, wait_seconds=59)))
        await asyncio.sleep(30)
        harness.machine.end("game")
        await acquiring
        assert (actor.state, asked < 4) == (State.VFIO, True)

    @pytest.mark.parametrize("how", ["pulled", "home", "half-way"])
    async def test_somebody_takes_the_gpu_from_vfio(self, how: str, tmp_path: Path) -> None:
        """The process has nothing any more, and runs on; nothing of the host waits for it."""
        harness = await start_harness(tmp_path, "single")
        actor = harness.fleet.find("01:00.0")
        before = harness.snapshot()
        await acquire(harness, actor)
        machine, functions = harness.machine, list(actor.gpu.functions)
        if how == "pulled":
            await machine.unplug(actor.gpu.address.slot_name)
        for function in functions if how == "home" else functions[:1] if how == "half-way" else []:
            await somebody_moves(harness, function)
        await settled()
        assert actor.owner is None
        assert not machine.units.inhibitors
        assert harness.state(Unit("display-manager.service")) == "active"
        if how != "pulled":
            assert (actor.state, harness.snapshot()) == (State.HOST, before)


async def test_what_was_asked_for_besides_holds(harness: Harness, actor: Actor) -> None:
    harness.machine.open(actor.gpu.address, "game")
    with pytest.raises(BusyError):
        await acquire(harness, actor)
    await settled()
    assert (actor.owner, actor.state) == (None, State.HOST)
    await acquire(harness, actor, name="another", options=Options(busy=Busy.TERMINATE))
    assert (actor.state, harness.machine.processes.named("game")) == (State.VFIO, None)


async def test_a_refusal_changes_nothing(tmp_path: Path) -> None:
    harness = await Harness.start(SCENARIOS["shared"](), tmp_path, Config())
    before, actor = harness.snapshot(), harness.fleet.find("01:00.0")
    with pytest.raises(NotViable):
        await acquire(harness, actor)
    harness.machine.end("qemu")
    await settled()
    assert (actor.owner, harness.snapshot(), harness.pages) == (None, before, [])
