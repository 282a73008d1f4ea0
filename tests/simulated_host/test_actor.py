"""The actor: a GPU goes to vfio and comes home, on every machine, and whoever asks gets an answer."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from gpuswitch.config.schema import Defaults
from gpuswitch.config.settings import Config
from gpuswitch.errors import Busy as BusyError
from gpuswitch.errors import Failed, InProgress, NotViable, Owned
from gpuswitch.host.simulated.catalogue import AMD, DISPLAY_OTHER, NVIDIA, VGA, Slot, port
from gpuswitch.host.simulated.faults import Delay, Errno
from gpuswitch.host.simulated.host import SimulatedHost
from gpuswitch.host.simulated.scenarios import SCENARIOS, boot, server
from gpuswitch.model.address import PciAddress
from gpuswitch.model.policy import Busy, Options
from gpuswitch.model.states import State
from gpuswitch.switch.record import Result
from gpuswitch.switch.steps.step import Step
from tests.harness.simulated.harness import GPUS, Harness

SCENARIO_NAMES = list(GPUS)


def four_radeons() -> SimulatedHost:
    slots = [Slot(f"0000:{n}1:00", n, f"0000:{n}0:01.0") for n in range(1, 5)]
    ports = [port(f"0000:{n}0:01.0", 20 + n) for n in range(1, 5)]
    return boot([*ports, *(slot.function(0, AMD, 0x73DF, VGA, "Navi 22 [Radeon RX 6700 XT]") for slot in slots)])


@pytest.fixture
async def laptop(tmp_path: Path) -> Harness:
    return await Harness.of("laptop", tmp_path)


class TestThereAndBack:
    @pytest.mark.parametrize("scenario", SCENARIO_NAMES)
    async def test_on_every_machine_three_times(self, scenario: str, tmp_path: Path) -> None:
        harness = await Harness.of(scenario, tmp_path)
        actor = harness.fleet.find(GPUS[scenario])
        before = harness.snapshot()
        for _ in range(3):
            await harness.moved(actor, State.VFIO)
            assert {f.driver_name for f in actor.gpu.present(actor.record.facts)} == {"vfio-pci"}
            assert harness.pages == [f"{actor.gpu.address.identifier}.json"]
            await harness.moved(actor, State.HOST)
            assert harness.snapshot() == before
            assert harness.pages == []

    async def test_tells_each_step_and_each_state(self, laptop: Harness) -> None:
        actor = laptop.fleet.find("01:00.0")
        count = len((await actor.plan(State.VFIO)).steps)
        laptop.witness.words.clear()
        switch = await laptop.switch(actor, State.VFIO)
        steps = [f"0000:01:00.0 {n + 1}/{count} {status}" for n in range(count) for status in ("running", "done")]
        assert laptop.witness.words == [
            "0000:01:00.0 detaching",
            *steps,
            "0000:01:00.0 done",
            "0000:01:00.0 vfio",
        ]
        assert (switch.index, switch.count, switch.step) == (count, count, switch.steps[-1].title)

    async def test_says_how_people_see_host(self, laptop: Harness) -> None:
        actor = laptop.fleet.find("01:00.0")
        assert actor.record.host_driver == "nvidia"
        await laptop.moved(actor, State.VFIO)
        assert actor.record.host_driver == "nvidia"

    async def test_already_there_is_done_without_a_step(self, laptop: Harness) -> None:
        actor = laptop.fleet.find("01:00.0")
        before = laptop.snapshot()
        switch = await laptop.switch(actor, State.HOST)
        assert (switch.result, switch.count, actor.state) == (Result.DONE, 0, State.HOST)
        assert laptop.snapshot() == before
        assert (await actor.plan(State.HOST)).steps == ()

    async def test_a_driverless_companion_comes_back_driverless(self, laptop: Harness) -> None:
        actor = laptop.fleet.find("01:00.0")
        ucsi = PciAddress.parse("0000:01:00.3")
        await laptop.host.kernel("somebody").unbind(ucsi, "nvidia-gpu")
        laptop.witness.home.clear()
        laptop.fleet.look()
        before = laptop.snapshot()
        await laptop.moved(actor, State.VFIO)
        await laptop.moved(actor, State.HOST)
        assert laptop.snapshot() == before


class TestTwoAtOnce:
    async def test_the_same_request_joins(self, laptop: Harness) -> None:
        actor = laptop.fleet.find("01:00.0")
        first, second, third = await asyncio.gather(*(actor.request(State.VFIO) for _ in range(3)))
        assert first is second is third
        await first.wait()
        assert first.result is Result.DONE

    async def test_the_same_request_with_other_options_is_refused(self, laptop: Harness) -> None:
        """What it asks for besides would not be done, and whoever asked would believe that it is."""
        actor = laptop.fleet.find("01:00.0")
        laptop.machine.run("blender")
        laptop.machine.open(PciAddress.parse("01:00.0"), "blender", "nvidia")
        switch = await actor.request(State.VFIO, Options(Busy.WAIT, 30))
        for options, said in (
            (Options(Busy.KILL), "busy=kill"),
            (Options(wait_seconds=600), "wait_seconds=600"),
            (Options(Busy.WAIT, 30, ("ollama.service",)), "stop_units=ollama.service"),
        ):
            with pytest.raises(InProgress, match=rf"\(switch {switch.id}\), and not with {said}: ask without"):
                await actor.request(State.VFIO, options)
        for options in (Options(), Options(Busy.WAIT), Options(wait_seconds=30)):
            assert await actor.request(State.VFIO, options) is switch
        laptop.machine.end("blender")
        await switch.wait()
        assert switch.result is Result.DONE

    async def test_another_is_refused_with_the_id(self, laptop: Harness) -> None:
        actor = laptop.fleet.find("01:00.0")
        switch = await actor.request(State.VFIO)
        with pytest.raises(InProgress, match=switch.id):
            await actor.request(State.HOST)
        with pytest.raises(InProgress, match=r"gpuswitchctl watch .* gpuswitchctl cancel 0000:01:00\.0 takes it back"):
            await actor.plan(State.HOST)
        await switch.wait()
        assert switch.result is Result.DONE

    async def test_asking_all_the_while_disturbs_nothing(self, laptop: Harness) -> None:
        """Not even between two operations of the kernel, and not while a group is held."""
        actor = laptop.fleet.find("01:00.0")
        before = laptop.snapshot()
        asked: list[asyncio.Task[object]] = []
        counts: list[int] = []
        laptop.witness.on_step = lambda actor, _: asked.append(asyncio.create_task(actor.plan(State.HOST)))
        for target in (State.VFIO, State.HOST):
            await laptop.moved(actor, target)
            assert actor.switch is not None
            counts.append(actor.switch.count)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert len(answers) == 2 * sum(counts)
        assert laptop.snapshot() == before
        await laptop.switch(actor, State.HOST)

    async def test_different_gpus_go_in_parallel(self, tmp_path: Path) -> None:
        harness = await Harness.start(four_radeons(), tmp_path)
        harness.host.faults.add(Delay(3), operation="unbind", nth=None)
        before = harness.snapshot()
        actors = list(harness.fleet.actors.values())
        for target in (State.VFIO, State.HOST):
            started = asyncio.get_running_loop().time()
            switches = await asyncio.gather(*(harness.switch(actor, target) for actor in actors))
            assert [switch.result for switch in switches] == [Result.DONE] * 4
            assert asyncio.get_running_loop().time() - started < 4 * 3
        assert harness.snapshot() == before

    async def test_of_gpus_whose_driver_may_be_unloaded_the_last_one_goes_alone(self, tmp_path: Path) -> None:
        """Who of them is the last one would change under their feet."""
        harness = await Harness.start(server(), tmp_path)
        before = harness.snapshot()
        actors = list(harness.fleet.actors.values())
        moving: list[int] = []
        harness.witness.on_step = lambda *_: moving.append(sum(actor.state.moving for actor in actors))
        for target in (State.VFIO, State.HOST):
            switches = await asyncio.gather(*(harness.switch(actor, target) for actor in actors))
            assert [switch.result for switch in switches] == [Result.DONE] * 8
        assert max(moving) == 7
        assert harness.snapshot() == before

    async def test_a_look_meanwhile_changes_nothing(self, laptop: Harness) -> None:
        actor = laptop.fleet.find("01:00.0")
        before = laptop.snapshot()
        laptop.witness.on_step = lambda *_: laptop.fleet.look()
        await laptop.moved(actor, State.VFIO)
        await laptop.moved(actor, State.HOST)
        assert laptop.snapshot() == before


class TestRefusals:
    async def test_change_nothing_and_name_every_blocker(self, tmp_path: Path) -> None:
        host = SCENARIOS["shared"]()
        harness = await Harness.start(host, tmp_path, Config())
        actor = harness.fleet.find("01:00.0")
        before = harness.snapshot()
        with pytest.raises(NotViable, match=r"0000:02:00\.0 .* stays on r8169"):
            await actor.request(State.VFIO)
        assert (harness.snapshot(), harness.pages, actor.state, actor.switch) == (before, [], State.HOST, None)

    async def test_the_screen_stays_on(self, tmp_path: Path) -> None:
        harness = await Harness.start(SCENARIOS["single"](), tmp_path, Config(defaults=Defaults()))
        # the desktop that draws on it is named as well
        with pytest.raises(BusyError, match=r"(?s)allow_boot_display.* has .* open"):
            await harness.fleet.find("").request(State.VFIO)

    async def test_the_screen_of_a_processor_that_is_no_vga_stays_on(self, tmp_path: Path) -> None:
        """Its class is 0380, and the card beside it has the class for which the firmware draws, usually."""
        slots = [Slot("0000:64:00", 20, "0000:00:01.1"), Slot("0000:65:00", 21, "0000:00:08.1")]
        panel = slots[1].function(0, AMD, 0x150E, DISPLAY_OTHER, boot_display=True)
        ports = [port("0000:00:01.1", 1), port("0000:00:08.1", 2)]
        harness = await Harness.start(
            boot([*ports, slots[0].function(0, NVIDIA, 0x2D58, VGA), panel]), tmp_path, Config()
        )
        with pytest.raises(NotViable, match=r"0000:65:00\.0 is the display that this machine booted on"):
            await harness.fleet.find("65:00.0").request(State.VFIO)
        await harness.moved(harness.fleet.find("64:00.0"), State.VFIO)

    @pytest.mark.parametrize("target", [State.VFIO, State.HOST], ids=str)
    async def test_a_value_that_cannot_be_read(self, target: State, laptop: Harness) -> None:
        actor = laptop.fleet.find("01:00.0")
        if target is State.HOST:
            await laptop.moved(actor, State.VFIO)
        laptop.host.faults.add(Errno(5), operation="capture")
        before = laptop.snapshot()
        with pytest.raises(Failed, match=r"cannot read the settings of .*; nothing was changed"):
            await actor.request(target)
        assert laptop.snapshot() == before

    async def test_a_journal_that_cannot_be_written(self, tmp_path: Path) -> None:
        harness = await Harness.of("laptop", tmp_path / "run")
        actor = harness.fleet.find("01:00.0")
        (tmp_path / "run").write_text("in the way")
        before = harness.snapshot()
        with pytest.raises(Failed, match="cannot write the journal"):
            await actor.request(State.VFIO)
        assert (harness.snapshot(), actor.state) == (before, State.HOST)
        (tmp_path / "run").unlink()
        await harness.moved(actor, State.VFIO)
        (tmp_path / "run").rename(tmp_path / "moved")
        (tmp_path / "run").write_text("in the way")
        before = harness.snapshot()
        with pytest.raises(Failed, match="cannot write the journal"):
            await actor.request(State.HOST)
        # the group that was held for it is let go again
        assert (harness.snapshot(), actor.state) == (before, State.VFIO)

    async def test_a_gpu_that_a_vm_has(self, laptop: Harness) -> None:
        actor = laptop.fleet.find("01:00.0")
        await laptop.moved(actor, State.VFIO)
        laptop.machine.start_vm("win11", actor.gpu.functions)
        before = laptop.snapshot()
        with pytest.raises(
            Owned, match=r"^qemu-system-x86 \(pid \d+, user root\) has /dev/vfio/13 open; .* shut it down "
        ):
            await actor.request(State.HOST)
        assert (laptop.snapshot(), actor.state) == (before, State.VFIO)
        # A plan that is only shown touches nobody's group.
        assert (await actor.plan(State.HOST)).steps
        assert laptop.snapshot() == before
        laptop.machine.end("win11")
        await laptop.moved(actor, State.HOST)

    async def test_of_two_groups_the_first_is_let_go_when_the_second_is_taken(self, tmp_path: Path) -> None:
        harness = await Harness.of("apu", tmp_path)
        actor = harness.fleet.find("04:00.0")
        await harness.moved(actor, State.VFIO)
        harness.machine.open_group(11, "win11")
        before = harness.snapshot()
        with pytest.raises(Owned, match=r"^win11 .* has /dev/vfio/11 open"):
            await actor.request(State.HOST)
        assert harness.snapshot() == before
        assert before[11] == ("win11", None)


class TestPlan:
    @pytest.mark.parametrize("scenario", SCENARIO_NAMES)
    async def test_changes_nothing_and_tells_what_will_happen(self, scenario: str, tmp_path: Path) -> None:
        harness = await Harness.of(scenario, tmp_path)
        actor = harness.fleet.find(GPUS[scenario])
        for target in (State.VFIO, State.HOST):
            before, restore_state, words = harness.snapshot(), harness.pages, list(harness.witness.words)
            plan = await actor.plan(target)
            assert (harness.snapshot(), harness.pages, harness.witness.words) == (before, restore_state, words)
            told: list[Step] = []
            harness.witness.on_step = lambda _, event, told=told: told.append(event.step)
            await harness.moved(actor, target)
            assert told[::2] == list(plan.steps)

    async def test_refuses_as_a_switch_would(self, tmp_path: Path) -> None:
        harness = await Harness.start(SCENARIOS["shared"](), tmp_path, Config())
        with pytest.raises(NotViable, match="r8169"):
            await harness.fleet.find("").plan(State.VFIO)
