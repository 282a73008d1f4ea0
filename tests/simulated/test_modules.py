"""Modules and consoles: unloaded in order where that is the detach, and everything put back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from gpuswitch.errors import Busy as BusyError
from gpuswitch.errors import NotViable
from gpuswitch.host.simulated.catalogue import AMD, DISPLAY_3D, MODULES, NVIDIA, VGA, Slot, port
from gpuswitch.host.simulated.drivers import Module
from gpuswitch.host.simulated.faults import Delay, Errno, Hang, Silent
from gpuswitch.host.simulated.host import SimulatedHost
from gpuswitch.host.simulated.scenarios import apu, boot, laptop, plain, shared
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import BootFramebuffer
from gpuswitch.model.states import State
from gpuswitch.switch.actor import Actor
from gpuswitch.switch.engine import Status, StepEvent
from gpuswitch.switch.record import Result
from gpuswitch.switch.surroundings import UnloadModules
from tests.simulated.bed import Bed, config, consoles

DISPLAY = PciAddress.parse("0000:01:00.0")
CHAIN = ("nvidia_drm", "nvidia_modeset", "nvidia_uvm", "nvidia")


def of_version(version: str) -> tuple[Module, ...]:
    return tuple(replace(m, version=version) if m.name in CHAIN else m for m in MODULES)


def two_cards(version: str) -> SimulatedHost:
    slots = [Slot(f"0000:{n}1:00", n, f"0000:{n}0:01.0") for n in (1, 2)]
    cards = [slot.function(0, NVIDIA, 0x20F1, DISPLAY_3D) for slot in slots]
    return boot([*(port(f"0000:{n}0:01.0", 20 + n) for n in (1, 2)), *cards], modules=of_version(version))


async def reverted(bed: Bed, actor: Actor) -> str:
    """See that it begins, fails, and leaves no trace; the sentence."""
    before = bed.snapshot()
    switch = await bed.switch(actor, State.VFIO)
    assert (switch.result, actor.state) == (Result.REVERTED, State.HOST)
    assert (bed.snapshot(), bed.debts) == (before, [])
    return switch.reason


def at_unload(bed: Bed, then: Callable[[], None]) -> None:
    """Do something right before the modules are unloaded: no look for holders comes after it."""

    def hear(_: Actor, event: StepEvent) -> None:
        if isinstance(event.step, UnloadModules) and event.status is Status.RUNNING:
            then()

    bed.witness.on_step = hear


class TestLastCard:
    @pytest.fixture
    async def bed(self, tmp_path: Path) -> Bed:
        return await Bed.of("plain", tmp_path)

    @pytest.fixture
    def actor(self, bed: Bed) -> Actor:
        return bed.fleet.find("01:00.0")

    async def test_its_modules_are_unloaded_and_loaded_again(self, bed: Bed, actor: Actor) -> None:
        before = bed.snapshot()
        await bed.moved(actor, State.VFIO)
        assert set(CHAIN).isdisjoint(bed.machine.look().modules)
        await bed.moved(actor, State.HOST)
        assert bed.snapshot() == before
        assert set(CHAIN) <= bed.machine.look().modules.keys()

    async def test_what_was_not_loaded_is_not_loaded_either(self, bed: Bed, actor: Actor) -> None:
        await bed.host.kernel("somebody").unload("nvidia_uvm")
        before = bed.snapshot()
        await bed.moved(actor, State.VFIO)
        await bed.moved(actor, State.HOST)
        assert bed.snapshot() == before

    @pytest.mark.parametrize("module", CHAIN)
    async def test_an_unload_that_is_refused_loads_again_what_was_unloaded(
        self, module: str, bed: Bed, actor: Actor
    ) -> None:
        bed.host.faults.add(Errno(11), operation="unload", subject=module)
        assert await reverted(bed, actor) == f"cannot unload {module}: Resource temporarily unavailable"

    @pytest.mark.parametrize("module", CHAIN)
    async def test_an_unload_that_says_it_worked(self, module: str, bed: Bed, actor: Actor) -> None:
        bed.host.faults.add(Silent(), operation="unload", subject=module)
        reason = await reverted(bed, actor)
        assert "nvidia" in reason

    @pytest.mark.parametrize("kind", ["nvidia", "drm"])
    async def test_somebody_whom_no_look_saw(self, kind: str, bed: Bed, actor: Actor) -> None:
        """The kernel itself refuses, and nothing hangs."""
        at_unload(bed, lambda: bed.machine.hide(DISPLAY, kind))
        assert "Resource temporarily unavailable" in await reverted(bed, actor)

    async def test_modules_that_do_not_come_back_are_told_and_the_gpu_is_home(self, bed: Bed, actor: Actor) -> None:
        await bed.moved(actor, State.VFIO)
        bed.host.faults.add(Errno(2), operation="load", subject="nvidia_uvm")
        switch = await bed.switch(actor, State.HOST)
        assert (switch.result, actor.state, bed.debts) == (Result.DONE, State.HOST, [])
        assert switch.reason == "cannot load nvidia_uvm: No such file or directory"
        assert {"nvidia", "nvidia_modeset", "nvidia_drm"} <= bed.machine.look().modules.keys()

    async def test_a_driver_that_does_not_come_back_is_a_failure(self, bed: Bed, actor: Actor) -> None:
        await bed.moved(actor, State.VFIO)
        bed.host.faults.add(Errno(2), operation="load", subject="nvidia")
        before = bed.snapshot()
        switch = await bed.switch(actor, State.HOST)
        assert (switch.result, actor.state) == (Result.REVERTED, State.VFIO)
        assert bed.snapshot() == before

    async def test_a_module_that_took_the_card_already_gives_it_back(self, bed: Bed, actor: Actor) -> None:
        """The override is aimed when it is loaded, so nobody need bind the card; and then another one fails."""
        await bed.moved(actor, State.VFIO)
        await bed.host.kernel("somebody").unload("i2c_nvidia_gpu")
        bed.host.faults.add(Errno(2), operation="load", subject="i2c_nvidia_gpu")
        before = bed.snapshot()
        switch = await bed.switch(actor, State.HOST)
        assert (switch.result, switch.reason) == (
            Result.REVERTED,
            "cannot load i2c_nvidia_gpu: No such file or directory",
        )
        # what was loaded stays so, and moves nothing
        assert bed.snapshot() == before | {"modules": bed.machine.look().modules.keys()}
        assert bed.machine.devices[DISPLAY].override == "vfio-pci"
        await bed.moved(actor, State.HOST)

    async def test_a_crash_between_two_modules(self, bed: Bed, actor: Actor) -> None:
        before = bed.snapshot()
        await actor.request(State.VFIO)
        task = actor._task
        assert task is not None
        hang = bed.host.faults.add(Hang(), operation="unload", subject="nvidia_uvm")
        await hang.reached.wait()
        task.cancel()
        await asyncio.wait([task])
        hang.release()
        again = await bed.crash(actor)
        assert (again.fleet.find("01:00.0").state, again.snapshot(), again.debts) == (State.HOST, before, [])


class TestPolicy:
    async def test_never_unbinds(self, tmp_path: Path) -> None:
        bed = await Bed.of("plain", tmp_path, module_policy="never")
        actor, before = bed.fleet.find("01:00.0"), bed.snapshot()
        await bed.moved(actor, State.VFIO)
        assert set(CHAIN) <= bed.machine.look().modules.keys()
        await bed.moved(actor, State.HOST)
        assert bed.snapshot() == before

    async def test_never_with_a_driver_that_is_too_old(self, tmp_path: Path) -> None:
        host = plain(modules=of_version("580.95.05"))
        bed = await Bed.made(host, tmp_path, config(module_policy="never"))
        before = bed.snapshot()
        with pytest.raises(NotViable, match=r"nvidia 580\.95\.05 cannot let go .* since module_policy is never"):
            await bed.fleet.find("01:00.0").request(State.VFIO)
        assert (bed.snapshot(), bed.debts) == (before, [])

    async def test_always_unloads_what_it_may(self, tmp_path: Path) -> None:
        bed = await Bed.made(apu(), tmp_path, config(module_policy="always"))
        actor, before = bed.fleet.find("04:00.0"), bed.snapshot()
        await bed.moved(actor, State.VFIO)
        assert "amdgpu" not in bed.machine.look().modules
        # companions' drivers have other devices
        assert "snd_hda_intel" in bed.machine.look().modules
        await bed.moved(actor, State.HOST)
        assert bed.snapshot() == before

    async def test_old_drivers_let_the_last_card_go_by_their_modules(self, tmp_path: Path) -> None:
        bed = await Bed.made(plain(modules=of_version("470.256.02")), tmp_path)
        actor = bed.fleet.find("01:00.0")
        await bed.moved(actor, State.VFIO)
        await bed.moved(actor, State.HOST)


class TestTwoCards:
    async def test_the_first_leaves_the_modules_to_the_second(self, tmp_path: Path) -> None:
        bed = await Bed.made(two_cards("580.105.08"), tmp_path)
        first, second = bed.fleet.find("11:00.0"), bed.fleet.find("21:00.0")
        before = bed.snapshot()
        await bed.moved(first, State.VFIO)
        assert set(CHAIN) <= bed.machine.look().modules.keys()
        await bed.moved(second, State.VFIO)
        assert set(CHAIN).isdisjoint(bed.machine.look().modules)
        # the first one to come home has them loaded for both
        await bed.moved(first, State.HOST)
        assert set(CHAIN) <= bed.machine.look().modules.keys()
        await bed.moved(second, State.HOST)
        assert bed.snapshot() == before

    async def test_a_program_on_the_second_is_in_nobodys_way(self, tmp_path: Path) -> None:
        bed = await Bed.made(two_cards("580.105.08"), tmp_path)
        first, second = bed.fleet.find("11:00.0"), bed.fleet.find("21:00.0")
        bed.machine.run("blender", uid=1000)
        bed.machine.open(second.gpu.address, "blender", "nvidia")
        await bed.moved(first, State.VFIO)
        with pytest.raises(BusyError, match="blender"):
            await second.request(State.VFIO)
        assert "blender" in bed.machine.users(second.gpu.address)

    async def test_a_program_that_opens_one_which_somebody_else_unbinds(self, tmp_path: Path) -> None:
        """That unbind waits for the program, and sysfs shows no node any more. Ours would only wait behind it."""
        bed = await Bed.made(two_cards("580.105.08"), tmp_path)
        actor = bed.fleet.find("11:00.0")
        begun: list[asyncio.Task[None]] = []

        def meddle(_: Actor, event: StepEvent) -> None:
            if event.step.kind == "override" and event.status is Status.RUNNING:
                bed.machine.run("late", uid=1000)
                bed.machine.open(actor.gpu.address, "late", "nvidia")
                work = bed.host.kernel("somebody").unbind(actor.gpu.address, "nvidia")
                begun.append(asyncio.get_running_loop().create_task(work))

        bed.witness.on_step = meddle
        switch = await bed.switch(actor, State.VFIO)
        assert [step.kind for step in switch.steps if step.status is Status.FAILED] == ["holders"]
        bed.machine.processes.close_all("late")
        await asyncio.gather(*begun)

    async def test_a_driver_that_is_too_old_for_one_of_several(self, tmp_path: Path) -> None:
        bed = await Bed.made(two_cards("580.95.05"), tmp_path)
        before = bed.snapshot()
        with pytest.raises(
            NotViable, match=r"580\.95\.05 cannot let go .* since other GPUs stay on it: install nvidia"
        ):
            await bed.fleet.find("11:00.0").request(State.VFIO)
        assert (bed.snapshot(), bed.debts) == (before, [])


class TestConsoles:
    async def test_moved_to_the_other_screen_and_back(self, tmp_path: Path) -> None:
        """On a laptop, somebody shows two of them on the GeForce."""
        bed = await Bed.of("plain", tmp_path)
        actor = bed.fleet.find("01:00.0")
        own = next(n for n, fb in bed.machine.frame_buffers._there.items() if fb.function == DISPLAY)
        await bed.host.kernel("somebody").map_consoles([3, 4], own)
        before = bed.snapshot()
        await bed.moved(actor, State.VFIO)
        assert DISPLAY not in consoles(bed.machine).values()
        await bed.moved(actor, State.HOST)
        assert bed.snapshot() == before

    async def test_unbound_where_no_other_screen_is_left(self, tmp_path: Path) -> None:
        bed = await Bed.made(shared(), tmp_path, config("shared"))
        actor, before = bed.fleet.find("01:00.0"), bed.snapshot()
        assert consoles(bed.machine)[1] == DISPLAY
        await bed.moved(actor, State.VFIO)
        assert consoles(bed.machine)["vtcon1"] is False
        await bed.moved(actor, State.HOST)
        assert bed.snapshot() == before

    async def test_back_when_one_gpu_that_showed_nothing_any_more_was_left(self, tmp_path: Path) -> None:
        """The kernel is stuck with one GPU, whose terminals are on the other; that leaves, and fbcon goes with it."""
        bed = await self.two_screens(tmp_path)
        first, second, before = bed.fleet.find("03:00.0"), bed.fleet.find("01:00.0"), bed.snapshot()
        hang = bed.host.faults.add(Hang(), operation="set_override")
        assert (await bed.switch(first, State.VFIO)).result is Result.WEDGED
        await bed.moved(second, State.VFIO)
        assert consoles(bed.machine)["vtcon1"] is False
        hang.release()
        await bed.witness.until(lambda: first.state is State.HOST)
        assert consoles(bed.machine)["vtcon1"] is True
        await bed.moved(second, State.HOST)
        assert bed.snapshot() == before

    async def test_those_of_another_gpu_stay_on_it_when_it_came_home_before(self, tmp_path: Path) -> None:
        """One GPU has them on loan when the kernel is stuck with it; whose they are is home when it recovers."""
        bed = await self.two_screens(tmp_path)
        first, second, before = bed.fleet.find("03:00.0"), bed.fleet.find("01:00.0"), bed.snapshot()
        await bed.moved(first, State.VFIO)
        hang = bed.host.faults.add(Hang(), operation="set_override")
        assert (await bed.switch(second, State.VFIO)).result is Result.WEDGED
        await bed.moved(first, State.HOST)
        hang.release()
        await bed.witness.until(lambda: second.state is State.HOST)
        assert bed.snapshot() == before

    async def test_those_of_another_gpu_come_back_when_the_console_is_bound_again(self, tmp_path: Path) -> None:
        """One GPU is about to leave, so that the other unbinds the console; the kernel binds it to that one alone."""
        bed = await self.two_screens(tmp_path, module_policy="always")
        first, second = bed.fleet.find("03:00.0"), bed.fleet.find("01:00.0")
        # From here on the kernel takes the GeForce for the one that has the console.
        await bed.moved(first, State.VFIO)
        await bed.moved(first, State.HOST)
        before = bed.snapshot()
        hang = bed.host.faults.add(Hang(), operation="consoles", nth=2)
        assert (await bed.switch(first, State.VFIO)).result is Result.WEDGED
        bed.host.faults.add(Errno(5), operation="set_override", subject=second.gpu.address)
        assert (await bed.switch(second, State.VFIO)).result is Result.REVERTED
        assert consoles(bed.machine)[1] == first.gpu.address
        hang.release()
        await bed.witness.until(lambda: first.state is State.HOST)
        assert (bed.snapshot(), bed.debts) == (before, [])

    async def test_those_of_another_gpu_stay_on_it_when_both_are_on_their_way_home(self, tmp_path: Path) -> None:
        """Whose they are shows them again, and is not home before the machine may sleep."""
        bed = await self.two_screens(tmp_path, module_policy="always")
        first, second, before = bed.fleet.find("03:00.0"), bed.fleet.find("01:00.0"), bed.snapshot()
        hangs = []
        for actor in (first, second):
            hangs.append(bed.host.faults.add(Hang(), operation="set_override", subject=actor.gpu.address))
            assert (await bed.switch(actor, State.VFIO)).result is Result.WEDGED
        bed.host.faults.add(Delay(2), operation="release_inhibitor", subject=first.gpu.address)
        for hang in hangs:
            hang.release()
            await asyncio.sleep(1)
        await bed.witness.until(lambda: {first.state, second.state} == {State.HOST})
        assert (bed.snapshot(), bed.debts) == (before, [])

    @pytest.mark.parametrize("fails", [False, True])
    async def test_those_of_another_gpu_stay_on_it_when_frame_buffer_0_comes(
        self, tmp_path: Path, *, fails: bool
    ) -> None:
        """The kernel draws all terminals on that one. It is the GeForce's since that came home first."""
        bed = await self.two_screens(tmp_path, module_policy="always", boot_display=False)
        first, second = bed.fleet.find("03:00.0"), bed.fleet.find("01:00.0")
        for actor, state in (first, State.VFIO), (second, State.VFIO), (second, State.HOST), (first, State.HOST):
            await bed.moved(actor, state)
        before = bed.snapshot()
        assert consoles(bed.machine)[1] == first.gpu.address
        if fails:
            bed.host.faults.add(Errno(5), operation="probe", subject=second.gpu.address)
            assert (await bed.switch(second, State.VFIO)).result is Result.REVERTED
        else:
            await bed.moved(second, State.VFIO)
            await bed.moved(second, State.HOST)
        assert (bed.snapshot(), bed.debts) == (before, [])

    async def two_screens(self, directory: Path, module_policy: str = "never", *, boot_display: bool = True) -> Bed:
        """A Radeon that shows all terminals, and a GeForce."""
        slots = [Slot("0000:01:00", 11, "0000:00:01.0"), Slot("0000:03:00", 13, "0000:00:03.0")]
        geforce = slots[0].function(0, NVIDIA, 0x2484, VGA)
        radeon = slots[1].function(0, AMD, 0x73BF, VGA, boot_display=boot_display)
        host = boot([port("0000:00:01.0", 2), port("0000:00:03.0", 3), geforce, radeon])
        return await Bed.made(host, directory, config("", module_policy=module_policy, allow_boot_display=True))

    async def test_one_that_is_to_be_left_alone_stays_unbound(self, tmp_path: Path) -> None:
        """For a machine that freezes when its console is bound again: nobody tries, or it would be told here."""
        bed = await Bed.made(shared(), tmp_path, config("shared", leave_consoles=["vtcon1"]))
        actor = bed.fleet.find("01:00.0")
        await bed.moved(actor, State.VFIO)
        bed.host.faults.add(Errno(5), operation="bind_console", nth=None)
        await bed.moved(actor, State.HOST)

    @pytest.mark.parametrize("operation", ["map_consoles", "set_override", "unbind"])
    async def test_back_after_a_failure(self, operation: str, tmp_path: Path) -> None:
        bed = await Bed.of("plain", tmp_path)
        own = next(n for n, fb in bed.machine.frame_buffers._there.items() if fb.function == DISPLAY)
        await bed.host.kernel("somebody").map_consoles([3, 4], own)
        bed.host.faults.add(Errno(5), operation=operation)  # type: ignore[arg-type] # one of them
        await reverted(bed, bed.fleet.find("01:00.0"))

    async def test_one_that_does_not_come_back_takes_nothing_away(self, tmp_path: Path) -> None:
        bed = await Bed.made(shared(), tmp_path, config("shared"))
        actor = bed.fleet.find("01:00.0")
        await bed.moved(actor, State.VFIO)
        bed.host.faults.add(Errno(5), operation="map_consoles", nth=None)
        bed.host.faults.add(Errno(5), operation="bind_console", nth=None)
        switch = await bed.switch(actor, State.HOST)
        assert (switch.result, bed.debts) == (Result.DONE, [])
        assert "Input/output error" in switch.reason


class TestBootFramebuffer:
    """What the firmware left on the card, and no driver of the card took away: it has none."""

    SHAPE = BootFramebuffer("efi-framebuffer.0", "efi-framebuffer", DISPLAY)

    def host(self) -> SimulatedHost:
        modules = tuple(m for m in MODULES if m.name not in CHAIN and m.name != "nouveau")
        return laptop(modules=modules, boot_framebuffers=(self.SHAPE,))

    @pytest.mark.parametrize("restore", [False, True])
    async def test_is_freed(self, restore: bool, tmp_path: Path) -> None:
        bed = await Bed.made(self.host(), tmp_path, config(restore_boot_framebuffer=restore))
        assert bed.machine.look().boot_framebuffers == (self.SHAPE,)
        actor = bed.fleet.find("01:00.0")
        await bed.moved(actor, State.VFIO)
        assert bed.machine.look().boot_framebuffers == ()
        switch = await bed.switch(actor, State.HOST)
        assert switch.result is Result.DONE
        # vfio-pci evicted it, and the kernel has no such device any more
        assert bed.machine.look().boot_framebuffers == ()
        assert ("efi-framebuffer.0" in switch.reason) is restore

    async def test_comes_back_after_a_failure(self, tmp_path: Path) -> None:
        bed = await Bed.made(self.host(), tmp_path)
        bed.host.faults.add(Errno(5), operation="set_override")
        await reverted(bed, bed.fleet.find("01:00.0"))
