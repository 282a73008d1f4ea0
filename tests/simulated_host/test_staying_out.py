"""A GPU that stays out: who may bring it home, after what, and what takes that away."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from gpuswitch.config.settings import Config, GpuConfig
from gpuswitch.errors import GpuswitchError, Wedged
from gpuswitch.gpu.actor import Actor
from gpuswitch.host.simulated.catalogue import AMD, NVIDIA, VGA, Slot
from gpuswitch.host.simulated.devices import Trouble
from gpuswitch.host.simulated.faults import Call, Delay, Hang
from gpuswitch.host.simulated.scenarios import SCENARIOS, boot
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import BootFramebuffer
from gpuswitch.model.holders import Unit
from gpuswitch.model.owner import Owner
from gpuswitch.model.policy import Release
from gpuswitch.model.states import State
from gpuswitch.switch.engine import Status, StepEvent
from gpuswitch.switch.record import Requester, Result
from tests.harness.simulated.harness import GENTLE, Harness, config
from tests.simulated_host.test_device_trouble import ACCELERATOR, GPU, on_vfio, reload, somebody_opens

OTHER = PciAddress.parse("0000:26:00.0")
GROUP = 10
OWNER = Owner("win11", "11111111-1111-1111-1111-111111111111")
HOOK = Requester(0, 4711, command="dbus-send")
DISPLAY_MANAGER = Unit("display-manager.service")


def managed(**rules: object) -> Config:
    own = config("instinct", **rules)
    gpus = tuple(GpuConfig(gpu, managed=True, rules=own.defaults) for gpu in (ACCELERATOR, OTHER))
    return replace(own, gpus=gpus)


def spoiled(harness: Harness, trouble: Trouble | None = Trouble.UNKNOWN) -> None:
    harness.machine.devices[ACCELERATOR].trouble = trouble


async def out(directory: Path, **rules: object) -> tuple[Harness, Actor]:
    harness = await Harness.start(SCENARIOS["instinct"](), directory, managed(**rules))
    actor = harness.fleet.find("05:00.0")
    await harness.moved(actor, State.VFIO)
    spoiled(harness)
    await harness.switch(actor, State.HOST)
    assert actor.record.stays_out
    await asyncio.sleep(60)
    return harness, actor


async def with_machine(harness: Harness) -> None:
    """A machine has it open."""
    await harness.fleet.owners.acquire(OWNER, {ACCELERATOR}, HOOK)
    harness.machine.start_vm("qemu", [ACCELERATOR])
    harness.fleet.owners.adopt(OWNER, {ACCELERATOR})
    await asyncio.sleep(60)


def machine_ends(harness: Harness) -> None:
    harness.machine.end("qemu")
    harness.fleet.owners.release(OWNER, "shutdown")


async def comes_home(harness: Harness, actor: Actor) -> None:
    await harness.witness.until(lambda: actor.state is State.HOST)
    await asyncio.sleep(60)
    assert (actor.record.stays_out, harness.pages) == ("", [])


class TestAfterAMachine:
    async def test_its_module_is_loaded_anew(self, tmp_path: Path) -> None:
        harness = await Harness.start(SCENARIOS["instinct"](), tmp_path, managed())
        actor = harness.fleet.find("05:00.0")
        await with_machine(harness)
        spoiled(harness)
        machine_ends(harness)
        await asyncio.sleep(600)
        assert (bool(actor.record.stays_out), actor.record.owned) == (True, False)
        spoiled(harness, None)
        await reload(harness)
        await comes_home(harness, actor)

    async def test_another_user_is_gone(self, tmp_path: Path) -> None:
        harness = await Harness.start(SCENARIOS["instinct"](), tmp_path, managed())
        actor = harness.fleet.find("05:00.0")
        await with_machine(harness)
        spoiled(harness)
        somebody_opens(harness, GROUP)
        machine_ends(harness)
        await asyncio.sleep(600)
        assert harness.machine.group(GROUP).taken
        spoiled(harness, None)
        harness.machine.close_group(GROUP, "somebody")
        await comes_home(harness, actor)

    @pytest.mark.parametrize("trouble", [Trouble.HUNG, Trouble.LOST], ids=str)
    async def test_of_a_libvirt_that_is_dead(self, trouble: Trouble, tmp_path: Path) -> None:
        """What is allowed without it is allowed to a reset and a rescan as well."""
        harness = await Harness.start(SCENARIOS["instinct"](), tmp_path, managed())
        actor = harness.fleet.find("05:00.0")
        harness.machine.libvirt.enter(OWNER, (ACCELERATOR,))
        await with_machine(harness)
        spoiled(harness, trouble)
        harness.machine.end("qemu")
        await asyncio.sleep(3600)
        assert actor.state is State.HOST

    async def test_that_has_had_it_since_nothing_is_owed_to_the_last_attempt(self, tmp_path: Path) -> None:
        """Where it is to stay then, it stays, whoever starts anew."""
        harness, actor = await out(tmp_path, on_release=Release.STAY)
        harness.host.faults.add(Delay(3), operation="reset")
        await reload(harness)
        await harness.witness.until(lambda: actor.state is State.RECOVERING)
        await with_machine(harness)
        machine_ends(harness)
        await asyncio.sleep(60)
        spoiled(harness, None)
        again = await harness.again()
        assert again.fleet.find("05:00.0").state is State.VFIO

    async def test_that_did_not_get_it_all_is_as_before(self, tmp_path: Path) -> None:
        harness, _ = await out(tmp_path)
        harness.machine.run("user")
        harness.machine.open(OTHER, "user")
        with pytest.raises(GpuswitchError, match="user"):
            await harness.fleet.owners.acquire(OWNER, {ACCELERATOR, OTHER}, HOOK)
        await asyncio.sleep(60)
        spoiled(harness, None)
        again = await harness.again()
        assert again.fleet.find("05:00.0").state is State.HOST


class TestSomebodyAsks:
    @pytest.mark.parametrize("event", ["a start", "its module"])
    async def test_for_vfio_and_there_it_stays(self, event: str, tmp_path: Path) -> None:
        harness, actor = await out(tmp_path)
        assert (await harness.switch(actor, State.VFIO)).result is Result.DONE
        assert (actor.record.stays_out, actor.reason) == ("", "")
        spoiled(harness, None)
        if event == "a start":
            harness = await harness.again()
        else:
            await reload(harness)
        await asyncio.sleep(600)
        assert harness.fleet.find("05:00.0").state is State.VFIO

    async def test_for_a_recovery_which_tries_home(self, tmp_path: Path) -> None:
        harness, actor = await out(tmp_path)
        spoiled(harness, None)
        switch = await actor.recover()
        await switch.wait()
        assert (switch.result, actor.state) == (Result.DONE, State.HOST)

    async def test_for_a_recovery_of_one_that_nobody_saw_at_home(self, tmp_path: Path) -> None:
        harness = await Harness.start(SCENARIOS["instinct"](vfio_ids=[(AMD, 0x74A1)]), tmp_path, config("instinct"))
        actor = harness.fleet.find("05:00.0")
        spoiled(harness)
        await harness.switch(actor, State.HOST)
        switch = await actor.recover()
        await switch.wait()
        assert (switch.result, actor.state) == (Result.REVERTED, State.VFIO)
        assert "the kernel says" in switch.reason
        spoiled(harness, None)
        await (await actor.recover()).wait()
        assert (actor.state, harness.pages) == (State.HOST, [])

    async def test_in_vain_and_then_a_user_is_gone(self, tmp_path: Path) -> None:
        harness, actor = await out(tmp_path)
        somebody_opens(harness, GROUP)
        await harness.switch(actor, State.HOST)
        assert harness.machine.group(GROUP).taken
        await asyncio.sleep(600)
        spoiled(harness, None)
        harness.machine.close_group(GROUP, "somebody")
        await comes_home(harness, actor)

    async def test_and_what_that_loads_is_no_event(self, tmp_path: Path) -> None:
        harness, actor = await out(tmp_path)
        await harness.moved(harness.fleet.find("26:00.0"), State.VFIO)
        await harness.machine.modules.unload("amdgpu", Call("unload", "amdgpu"))
        await asyncio.sleep(600)
        before = len(actor.record.recent)
        await harness.switch(actor, State.HOST)
        await asyncio.sleep(600)
        assert len(actor.record.recent) == before + 1


class TestAnAttempt:
    async def test_that_is_refused_is_made_later(self, tmp_path: Path) -> None:
        """A twin's way home loads the module, and nobody else of the driver moves until that is over."""
        harness = await Harness.of("workstation", tmp_path)
        first, second = harness.fleet.find("01:00.0"), harness.fleet.find("41:00.0")
        for actor in (first, second):
            await harness.moved(actor, State.VFIO)
        harness.machine.devices[second.gpu.address].trouble = Trouble.UNKNOWN
        await harness.switch(second, State.HOST)
        await asyncio.sleep(60)
        harness.machine.devices[second.gpu.address].trouble = None
        harness.host.faults.add(Delay(14), operation="nodes")
        await harness.moved(first, State.HOST)
        await asyncio.sleep(3600)
        assert second.state is State.HOST

    async def test_that_the_end_of_the_service_cuts_short_is_made_at_the_next_start(self, tmp_path: Path) -> None:
        harness, actor = await out(tmp_path)
        harness.host.faults.add(Delay(3), operation="unbind")
        await reload(harness)
        await harness.witness.until(lambda: actor.state.moving)
        await harness.fleet.stop("the service is stopping")
        spoiled(harness, None)
        again = await harness.again()
        assert again.fleet.find("05:00.0").state is State.HOST

    async def test_is_no_fault_of_who_watches(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        harness, actor = await out(tmp_path)
        before = len(actor.record.recent)

        async def broken() -> None:
            raise ValueError("a fault")

        monkeypatch.setattr(actor, "holders", broken)
        await reload(harness)
        await asyncio.sleep(5 * 3600)
        assert len(actor.record.recent) == before + 1

    async def test_for_one_that_nobody_saw_at_home(self, tmp_path: Path) -> None:
        """Nothing is owed to it; its driver is known since it was to get it."""
        harness = await Harness.start(SCENARIOS["instinct"](vfio_ids=[(AMD, 0x74A1)]), tmp_path, config("instinct"))
        actor = harness.fleet.find("05:00.0")
        spoiled(harness)
        await harness.switch(actor, State.HOST)
        assert actor.record.stays_out
        spoiled(harness, None)
        await reload(harness)
        await harness.witness.until(lambda: actor.state is State.HOST)

    async def test_after_its_function_was_another_gpus_for_a_while(self, tmp_path: Path) -> None:
        host = SCENARIOS["instinct"](vfio_ids=[(AMD, 0x74A1)])
        own = config("instinct")
        plain = replace(own, gpus=(GpuConfig(ACCELERATOR, managed=True, rules=own.defaults, host_driver="amdgpu"),))
        harness = await Harness.start(host, tmp_path, plain)
        spoiled(harness)
        await harness.switch(harness.fleet.find("05:00.0"), State.HOST)
        member = GpuConfig(OTHER, managed=True, rules=own.defaults, members=(ACCELERATOR,))
        for settings in (replace(own, gpus=(member,)), plain):
            await asyncio.sleep(60)
            harness.fleet.reconfigure(settings)
        actor = harness.fleet.find("05:00.0")
        spoiled(harness, None)
        await asyncio.sleep(60)
        await reload(harness)
        await harness.witness.until(lambda: actor.state is State.HOST)


class TestTheStrategies:
    async def test_a_removal_that_ends_after_its_time_is_found_again(self, tmp_path: Path) -> None:
        harness, actor = await on_vfio(tmp_path, Trouble.LOST)
        before = harness.witness.home
        hang = harness.host.faults.add(Hang(), operation="remove")
        await (await actor.request(State.HOST)).wait()
        await asyncio.sleep(100)
        hang.release()
        await harness.witness.until(lambda: actor.state is State.HOST and not actor.bound)
        assert harness.snapshot() | before == harness.snapshot()
        assert harness.pages == []

    async def test_what_it_made_ready_for_a_reset_is_put_right_where_that_does_not_help(self, tmp_path: Path) -> None:
        card = Slot("0000:01:00", 5).function(0, NVIDIA, 0x2484, VGA, boot_display=True)
        host = boot([card], vfio_ids=[(NVIDIA, 0x2484)])
        host.machine.frame_buffers.left(BootFramebuffer("simple-framebuffer.0", "simple-framebuffer", GPU))
        host.machine.run("Xorg", unit=DISPLAY_MANAGER)
        settings = config(allow_boot_display=True, stop_units=(str(DISPLAY_MANAGER),), rescan_on_failure=False)
        harness = await Harness.start(host, tmp_path, settings)
        harness.machine.devices[GPU].trouble = Trouble.LOST
        before = harness.state(DISPLAY_MANAGER), harness.machine.look().boot_framebuffers
        assert (await harness.switch(harness.fleet.find(""), State.HOST)).result is Result.REVERTED
        assert (harness.state(DISPLAY_MANAGER), harness.machine.look().boot_framebuffers) == before

    async def test_is_not_begun_while_the_service_stops(self, tmp_path: Path) -> None:
        harness, actor = await on_vfio(tmp_path, Trouble.HUNG)
        stopping: list[asyncio.Task[None]] = []

        def stop(_: Actor, event: StepEvent) -> None:
            if event.status is Status.REVERTING and not stopping:
                stopping.append(asyncio.create_task(actor.stop("the service is stopping")))

        harness.witness.on_step = stop
        switch = await actor.request(State.HOST)
        await switch.wait()
        assert (switch.result, actor.state) == (Result.REVERTED, State.VFIO)
        await asyncio.wait(stopping)

    async def test_a_fault_in_what_the_kernel_said_is_in_nobodys_way(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        harness, actor = await on_vfio(tmp_path, Trouble.UNKNOWN, **GENTLE)

        async def said(*_: object) -> tuple[str, ...]:
            raise RuntimeError("a fault")

        monkeypatch.setattr(harness.host.kernel_log, "said", said)
        switch = await actor.request(State.HOST)
        await switch.wait()
        assert (switch.result, actor.state) == (Result.REVERTED, State.VFIO)


async def test_one_that_failed_says_so_whoever_has_it_open(tmp_path: Path) -> None:
    harness, actor = await on_vfio(tmp_path, None)
    actor.record.page.write(replace(actor.record.page.entry, failed="it was failed", stays_out="it was failed"))
    actor.record.note("it was failed")
    actor.record.let_stay()
    assert (actor.reason, actor.record.stays_out) == ("it was failed", "")
    assert harness.fleet.find("01:00.0") is actor


async def test_one_that_failed_and_was_moved_by_hand_while_nobody_looked_stays_there(tmp_path: Path) -> None:
    harness, actor = await on_vfio(tmp_path, None)
    actor.record.page.write(replace(actor.record.page.entry, failed="it was failed", stays_out="it was failed"))
    again = await harness.again()
    assert again.fleet.find("01:00.0").state is State.VFIO


@pytest.mark.parametrize("anew", [False, True], ids=["", "after-a-restart"])
async def test_a_question_that_hangs_meanwhile_takes_nothing_away(*, anew: bool, tmp_path: Path) -> None:
    """Nothing had begun, so when the kernel returns it is where it was, and for the same reason."""
    harness, actor = await out(tmp_path)
    why = actor.record.stays_out
    if anew:
        harness = await harness.again()
        actor = harness.fleet.find("05:00.0")
        await asyncio.sleep(600)
        assert actor.record.switch is None or actor.state is State.VFIO
    hang = harness.host.faults.add(Hang(), operation="capture", subject=ACCELERATOR)
    with pytest.raises(Wedged):
        await actor.request(State.HOST)
    hang.release()
    await harness.witness.until(lambda: actor.state is State.VFIO)
    await asyncio.sleep(60)
    assert (actor.record.stays_out, actor.record.reason) == (why, why)
    spoiled(harness, None)
    await reload(harness)
    await comes_home(harness, actor)
