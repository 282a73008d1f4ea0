"""Modules and consoles: unloaded in order where that is the detach, and everything put back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from gpuswitch.errors import Busy as BusyError
from gpuswitch.errors import NotViable
from gpuswitch.gpu.actor import Actor
from gpuswitch.host.simulated.catalogue import AMD, DISPLAY_3D, MODULES, NVIDIA, VGA, Slot, port
from gpuswitch.host.simulated.drivers import Module
from gpuswitch.host.simulated.faults import Errno, Hang, Silent
from gpuswitch.host.simulated.host import SimulatedHost
from gpuswitch.host.simulated.scenarios import apu, boot, laptop, plain
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import BootFramebuffer
from gpuswitch.model.states import State
from gpuswitch.switch.engine import Status, StepEvent
from gpuswitch.switch.record import Result
from gpuswitch.switch.steps.host import UnloadModules
from tests.simulated.bed import Bed, config

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
    assert (bed.snapshot(), bed.pages) == (before, [])
    return switch.reason


def at_unload(bed: Bed, then: Callable[[], None]) -> None:
    """Do something right before the modules are unloaded: no look for holders comes after it."""

    def hear(_: Actor, event: StepEvent) -> None:
        if isinstance(event.step, UnloadModules) and event.status is Status.RUNNING:
            then()

    bed.witness.on_step = hear


async def test_modules_that_are_gone_from_disk_are_not_unloaded(tmp_path: Path) -> None:
    """As pacman leaves it after an upgrade of the kernel. What stays loaded comes home without."""
    bed = await Bed.made(two_kinds(), tmp_path, config())
    await bed.host.kernel("somebody").load("vfio_pci")
    bed.machine.drivers.modules = {}
    nvidia, amdgpu = (bed.fleet.find(f"0{n}:00.0") for n in (1, 2))
    before = bed.snapshot()
    for ask in (nvidia.plan, nvidia.request):
        with pytest.raises(NotViable, match=r"nvidia_drm would have to be unloaded .*: restart the machine first"):
            await ask(State.VFIO)
    await bed.moved(amdgpu, State.VFIO)
    await bed.moved(amdgpu, State.HOST)
    assert (bed.snapshot(), bed.pages) == (before, [])


async def test_a_module_that_modprobe_does_not_know_is_not_unloaded(tmp_path: Path) -> None:
    """Out of a container, as NVIDIA's operator for Kubernetes loads it."""
    bed = await Bed.of("plain", tmp_path)
    bed.machine.drivers.modules = {n: m for n, m in bed.machine.drivers.modules.items() if not n.startswith("nvidia")}
    actor, before = bed.fleet.find("01:00.0"), bed.snapshot()
    for ask in (actor.plan, actor.request):
        with pytest.raises(NotViable, match=r"nvidia would have to be unloaded .* finds no module of that name"):
            await ask(State.VFIO)
    assert (bed.snapshot(), bed.pages) == (before, [])


async def test_a_module_that_another_one_uses_is_not_unloaded(tmp_path: Path) -> None:
    bed = await Bed.made(plain(modules=(*MODULES, Module("nv_peer_mem", requires=("nvidia",)))), tmp_path)
    somebody = bed.host.kernel("somebody")
    await somebody.load("nv_peer_mem")
    actor, before = bed.fleet.find("01:00.0"), bed.snapshot()
    for ask in (actor.plan, actor.request):
        with pytest.raises(NotViable, match="nv_peer_mem uses nvidia, which would have to be unloaded"):
            await ask(State.VFIO)
    assert (bed.snapshot(), bed.pages) == (before, [])
    await somebody.unload("nv_peer_mem")
    await bed.moved(actor, State.VFIO)


def two_kinds() -> SimulatedHost:
    geforce, radeon = (Slot(f"0000:0{n}:00", n, f"0000:00:0{n}.0") for n in (1, 2))
    return boot([geforce.function(0, NVIDIA, 0x2484, VGA), radeon.function(0, AMD, 0x73BF, VGA)])


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
        assert (switch.result, actor.state, bed.pages) == (Result.DONE, State.HOST, [])
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
        task = actor.runner.task
        assert task is not None
        hang = bed.host.faults.add(Hang(), operation="unload", subject="nvidia_uvm")
        await hang.reached.wait()
        task.cancel()
        await asyncio.wait([task])
        hang.release()
        again = await bed.crash(actor)
        assert (again.fleet.find("01:00.0").state, again.snapshot(), again.pages) == (State.HOST, before, [])


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
        assert (bed.snapshot(), bed.pages) == (before, [])

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
        assert (bed.snapshot(), bed.pages) == (before, [])


class TestBootFramebuffer:
    """What the firmware left on the card, and no driver of the card took away: it has none."""

    SHAPE = BootFramebuffer("efi-framebuffer.0", "efi-framebuffer", DISPLAY)

    def host(self) -> SimulatedHost:
        modules = tuple(m for m in MODULES if m.name not in CHAIN and m.name != "nouveau")
        return laptop(modules=modules, boot_framebuffers=(self.SHAPE,))

    @pytest.mark.parametrize("restore", [False, True])
    async def test_is_freed(self, restore: bool, tmp_path: Path) -> None:
        bed = await Bed.made(self.host(), tmp_path, config(restore_boot_framebuffer=restore))
        assert [each.device for each in bed.machine.look().boot_framebuffers] == [self.SHAPE.device]
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
