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
from tests.harness.simulated.harness import Harness, config

DISPLAY = PciAddress.parse("0000:01:00.0")
CHAIN = ("nvidia_drm", "nvidia_modeset", "nvidia_uvm", "nvidia")


def of_version(version: str) -> tuple[Module, ...]:
    return tuple(replace(m, version=version) if m.name in CHAIN else m for m in MODULES)


def two_cards(version: str) -> SimulatedHost:
    slots = [Slot(f"0000:{n}1:00", n, f"0000:{n}0:01.0") for n in (1, 2)]
    cards = [slot.function(0, NVIDIA, 0x20F1, DISPLAY_3D) for slot in slots]
    return boot([*(port(f"0000:{n}0:01.0", 20 + n) for n in (1, 2)), *cards], modules=of_version(version))


async def reverted(harness: Harness, actor: Actor) -> str:
    """See that it begins, fails, and leaves no trace; the sentence."""
    before = harness.snapshot()
    switch = await harness.switch(actor, State.VFIO)
    assert (switch.result, actor.state) == (Result.REVERTED, State.HOST)
    assert (harness.snapshot(), harness.pages) == (before, [])
    return switch.reason


def at_unload(harness: Harness, then: Callable[[], None]) -> None:
    """Do something right before the modules are unloaded: no look for holders comes after it."""

    def hear(_: Actor, event: StepEvent) -> None:
        if isinstance(event.step, UnloadModules) and event.status is Status.RUNNING:
            then()

    harness.witness.on_step = hear


async def test_modules_that_are_gone_from_disk_are_not_unloaded(tmp_path: Path) -> None:
    """As pacman leaves it after an upgrade of the kernel. What stays loaded comes home without."""
    harness = await Harness.start(two_kinds(), tmp_path, config())
    await harness.host.kernel("somebody").load("vfio_pci")
    harness.machine.drivers.modules = {}
    nvidia, amdgpu = (harness.fleet.find(f"0{n}:00.0") for n in (1, 2))
    before = harness.snapshot()
    for ask in (nvidia.plan, nvidia.request):
        with pytest.raises(NotViable, match=r"nvidia_drm would have to be unloaded .*: restart the machine first"):
            await ask(State.VFIO)
    await harness.moved(amdgpu, State.VFIO)
    await harness.moved(amdgpu, State.HOST)
    assert (harness.snapshot(), harness.pages) == (before, [])


async def test_a_module_that_modprobe_does_not_know_is_not_unloaded(tmp_path: Path) -> None:
    """Out of a container, as NVIDIA's operator for Kubernetes loads it."""
    harness = await Harness.of("plain", tmp_path)
    harness.machine.drivers.modules = {
        n: m for n, m in harness.machine.drivers.modules.items() if not n.startswith("nvidia")
    }
    actor, before = harness.fleet.find("01:00.0"), harness.snapshot()
    for ask in (actor.plan, actor.request):
        with pytest.raises(NotViable, match=r"nvidia would have to be unloaded .* finds no module of that name"):
            await ask(State.VFIO)
    assert (harness.snapshot(), harness.pages) == (before, [])


async def test_a_module_that_another_one_uses_is_not_unloaded(tmp_path: Path) -> None:
    harness = await Harness.start(plain(modules=(*MODULES, Module("nv_peer_mem", requires=("nvidia",)))), tmp_path)
    somebody = harness.host.kernel("somebody")
    await somebody.load("nv_peer_mem")
    actor, before = harness.fleet.find("01:00.0"), harness.snapshot()
    for ask in (actor.plan, actor.request):
        with pytest.raises(NotViable, match="nv_peer_mem uses nvidia, which would have to be unloaded"):
            await ask(State.VFIO)
    assert (harness.snapshot(), harness.pages) == (before, [])
    await somebody.unload("nv_peer_mem")
    await harness.moved(actor, State.VFIO)


def two_kinds() -> SimulatedHost:
    geforce, radeon = (Slot(f"0000:0{n}:00", n, f"0000:00:0{n}.0") for n in (1, 2))
    return boot([geforce.function(0, NVIDIA, 0x2484, VGA), radeon.function(0, AMD, 0x73BF, VGA)])


class TestLastCard:
    @pytest.fixture
    async def harness(self, tmp_path: Path) -> Harness:
        return await Harness.of("plain", tmp_path)

    @pytest.fixture
    def actor(self, harness: Harness) -> Actor:
        return harness.fleet.find("01:00.0")

    async def test_its_modules_are_unloaded_and_loaded_again(self, harness: Harness, actor: Actor) -> None:
        before = harness.snapshot()
        await harness.moved(actor, State.VFIO)
        assert set(CHAIN).isdisjoint(harness.machine.look().modules)
        await harness.moved(actor, State.HOST)
        assert harness.snapshot() == before
        assert set(CHAIN) <= harness.machine.look().modules.keys()

    async def test_what_was_not_loaded_is_not_loaded_either(self, harness: Harness, actor: Actor) -> None:
        await harness.host.kernel("somebody").unload("nvidia_uvm")
        before = harness.snapshot()
        await harness.moved(actor, State.VFIO)
        await harness.moved(actor, State.HOST)
        assert harness.snapshot() == before

    @pytest.mark.parametrize("module", CHAIN)
    async def test_an_unload_that_is_refused_loads_again_what_was_unloaded(
        self, module: str, harness: Harness, actor: Actor
    ) -> None:
        harness.host.faults.add(Errno(11), operation="unload", subject=module)
        assert await reverted(harness, actor) == f"cannot unload {module}: Resource temporarily unavailable"

    @pytest.mark.parametrize("module", CHAIN)
    async def test_an_unload_that_says_it_worked(self, module: str, harness: Harness, actor: Actor) -> None:
        harness.host.faults.add(Silent(), operation="unload", subject=module)
        reason = await reverted(harness, actor)
        assert "nvidia" in reason

    @pytest.mark.parametrize("kind", ["nvidia", "drm"])
    async def test_somebody_whom_no_look_saw(self, kind: str, harness: Harness, actor: Actor) -> None:
        """The kernel itself refuses, and nothing hangs."""
        at_unload(harness, lambda: harness.machine.hide(DISPLAY, kind))
        assert "Resource temporarily unavailable" in await reverted(harness, actor)

    async def test_modules_that_do_not_come_back_are_told_and_the_gpu_is_home(
        self, harness: Harness, actor: Actor
    ) -> None:
        await harness.moved(actor, State.VFIO)
        harness.host.faults.add(Errno(2), operation="load", subject="nvidia_uvm")
        switch = await harness.switch(actor, State.HOST)
        assert (switch.result, actor.state, harness.pages) == (Result.DONE, State.HOST, [])
        assert switch.reason == "cannot load nvidia_uvm: No such file or directory"
        assert {"nvidia", "nvidia_modeset", "nvidia_drm"} <= harness.machine.look().modules.keys()

    async def test_a_driver_that_does_not_come_back_is_a_failure(self, harness: Harness, actor: Actor) -> None:
        await harness.moved(actor, State.VFIO)
        harness.host.faults.add(Errno(2), operation="load", subject="nvidia")
        before = harness.snapshot()
        switch = await harness.switch(actor, State.HOST)
        assert (switch.result, actor.state) == (Result.REVERTED, State.VFIO)
        assert harness.snapshot() == before

    async def test_a_module_that_took_the_card_already_gives_it_back(self, harness: Harness, actor: Actor) -> None:
        """The override is aimed when it is loaded, so nobody need bind the card; and then another one fails."""
        await harness.moved(actor, State.VFIO)
        await harness.host.kernel("somebody").unload("i2c_nvidia_gpu")
        harness.host.faults.add(Errno(2), operation="load", subject="i2c_nvidia_gpu")
        before = harness.snapshot()
        switch = await harness.switch(actor, State.HOST)
        assert (switch.result, switch.reason) == (
            Result.REVERTED,
            "cannot load i2c_nvidia_gpu: No such file or directory",
        )
        # what was loaded stays so, and moves nothing
        assert harness.snapshot() == before | {"modules": harness.machine.look().modules.keys()}
        assert harness.machine.devices[DISPLAY].override == "vfio-pci"
        await harness.moved(actor, State.HOST)

    async def test_a_crash_between_two_modules(self, harness: Harness, actor: Actor) -> None:
        before = harness.snapshot()
        await actor.request(State.VFIO)
        task = actor.runner.task
        assert task is not None
        hang = harness.host.faults.add(Hang(), operation="unload", subject="nvidia_uvm")
        await hang.reached.wait()
        task.cancel()
        await asyncio.wait([task])
        hang.release()
        again = await harness.crash(actor)
        assert (again.fleet.find("01:00.0").state, again.snapshot(), again.pages) == (State.HOST, before, [])


class TestPolicy:
    async def test_never_unbinds(self, tmp_path: Path) -> None:
        harness = await Harness.of("plain", tmp_path, module_policy="never")
        actor, before = harness.fleet.find("01:00.0"), harness.snapshot()
        await harness.moved(actor, State.VFIO)
        assert set(CHAIN) <= harness.machine.look().modules.keys()
        await harness.moved(actor, State.HOST)
        assert harness.snapshot() == before

    async def test_never_with_a_driver_that_is_too_old(self, tmp_path: Path) -> None:
        host = plain(modules=of_version("580.95.05"))
        harness = await Harness.start(host, tmp_path, config(module_policy="never"))
        before = harness.snapshot()
        with pytest.raises(NotViable, match=r"nvidia 580\.95\.05 cannot let go .* since module_policy is never"):
            await harness.fleet.find("01:00.0").request(State.VFIO)
        assert (harness.snapshot(), harness.pages) == (before, [])

    async def test_always_unloads_what_it_may(self, tmp_path: Path) -> None:
        harness = await Harness.start(apu(), tmp_path, config(module_policy="always"))
        actor, before = harness.fleet.find("04:00.0"), harness.snapshot()
        await harness.moved(actor, State.VFIO)
        assert "amdgpu" not in harness.machine.look().modules
        # companions' drivers have other devices
        assert "snd_hda_intel" in harness.machine.look().modules
        await harness.moved(actor, State.HOST)
        assert harness.snapshot() == before

    async def test_old_drivers_let_the_last_card_go_by_their_modules(self, tmp_path: Path) -> None:
        harness = await Harness.start(plain(modules=of_version("470.256.02")), tmp_path)
        actor = harness.fleet.find("01:00.0")
        await harness.moved(actor, State.VFIO)
        await harness.moved(actor, State.HOST)


class TestTwoCards:
    async def test_the_first_leaves_the_modules_to_the_second(self, tmp_path: Path) -> None:
        harness = await Harness.start(two_cards("580.105.08"), tmp_path)
        first, second = harness.fleet.find("11:00.0"), harness.fleet.find("21:00.0")
        before = harness.snapshot()
        await harness.moved(first, State.VFIO)
        assert set(CHAIN) <= harness.machine.look().modules.keys()
        await harness.moved(second, State.VFIO)
        assert set(CHAIN).isdisjoint(harness.machine.look().modules)
        # the first one to come home has them loaded for both
        await harness.moved(first, State.HOST)
        assert set(CHAIN) <= harness.machine.look().modules.keys()
        await harness.moved(second, State.HOST)
        assert harness.snapshot() == before

    async def test_a_program_on_the_second_is_in_nobodys_way(self, tmp_path: Path) -> None:
        harness = await Harness.start(two_cards("580.105.08"), tmp_path)
        first, second = harness.fleet.find("11:00.0"), harness.fleet.find("21:00.0")
        harness.machine.run("blender", uid=1000)
        harness.machine.open(second.gpu.address, "blender", "nvidia")
        await harness.moved(first, State.VFIO)
        with pytest.raises(BusyError, match="blender"):
            await second.request(State.VFIO)
        assert "blender" in harness.machine.users(second.gpu.address)

    async def test_a_program_that_opens_one_which_somebody_else_unbinds(self, tmp_path: Path) -> None:
        """That unbind waits for the program, and sysfs shows no node any more. Ours would only wait behind it."""
        harness = await Harness.start(two_cards("580.105.08"), tmp_path)
        actor = harness.fleet.find("11:00.0")
        begun: list[asyncio.Task[None]] = []

        def meddle(_: Actor, event: StepEvent) -> None:
            if event.step.kind == "override" and event.status is Status.RUNNING:
                harness.machine.run("late", uid=1000)
                harness.machine.open(actor.gpu.address, "late", "nvidia")
                work = harness.host.kernel("somebody").unbind(actor.gpu.address, "nvidia")
                begun.append(asyncio.get_running_loop().create_task(work))

        harness.witness.on_step = meddle
        switch = await harness.switch(actor, State.VFIO)
        assert [step.kind for step in switch.steps if step.status is Status.FAILED] == ["holders"]
        harness.machine.processes.close_all("late")
        await asyncio.gather(*begun)

    async def test_a_driver_that_is_too_old_for_one_of_several(self, tmp_path: Path) -> None:
        harness = await Harness.start(two_cards("580.95.05"), tmp_path)
        before = harness.snapshot()
        with pytest.raises(
            NotViable, match=r"580\.95\.05 cannot let go .* since other GPUs stay on it: install nvidia"
        ):
            await harness.fleet.find("11:00.0").request(State.VFIO)
        assert (harness.snapshot(), harness.pages) == (before, [])


class TestBootFramebuffer:
    """What the firmware left on the card, and no driver of the card took away: it has none."""

    SHAPE = BootFramebuffer("efi-framebuffer.0", "efi-framebuffer", DISPLAY)

    def host(self) -> SimulatedHost:
        modules = tuple(m for m in MODULES if m.name not in CHAIN and m.name != "nouveau")
        return laptop(modules=modules, boot_framebuffers=(self.SHAPE,))

    @pytest.mark.parametrize("restore", [False, True])
    async def test_is_freed(self, restore: bool, tmp_path: Path) -> None:
        harness = await Harness.start(self.host(), tmp_path, config(restore_boot_framebuffer=restore))
        assert [each.device for each in harness.machine.look().boot_framebuffers] == [self.SHAPE.device]
        actor = harness.fleet.find("01:00.0")
        await harness.moved(actor, State.VFIO)
        assert harness.machine.look().boot_framebuffers == ()
        switch = await harness.switch(actor, State.HOST)
        assert switch.result is Result.DONE
        # vfio-pci evicted it, and the kernel has no such device any more
        assert harness.machine.look().boot_framebuffers == ()
        assert ("efi-framebuffer.0" in switch.reason) is restore

    async def test_comes_back_after_a_failure(self, tmp_path: Path) -> None:
        harness = await Harness.start(self.host(), tmp_path)
        harness.host.faults.add(Errno(5), operation="set_override")
        await reverted(harness, harness.fleet.find("01:00.0"))


async def test_a_kernel_that_unloads_no_modules(tmp_path: Path) -> None:
    """It is not asked to; that the driver is unbound instead is for the configuration to say."""
    harness = await Harness.of("plain", tmp_path)
    harness.machine.set_unloading(on=False)
    before = harness.snapshot()
    with pytest.raises(NotViable, match=r"nvidia would have to be unloaded, .*CONFIG_MODULE_UNLOAD") as refused:
        await harness.fleet.find("01:00.0").request(State.VFIO)
    assert '`module_policy = "never"`' in str(refused.value)
    assert (harness.snapshot(), harness.pages) == (before, [])


async def test_a_kernel_that_unloads_no_modules_and_a_policy_that_does_not(tmp_path: Path) -> None:
    harness = await Harness.of("plain", tmp_path, module_policy="never")
    harness.machine.set_unloading(on=False)
    before, actor = harness.snapshot(), harness.fleet.find("01:00.0")
    await harness.moved(actor, State.VFIO)
    await harness.moved(actor, State.HOST)
    assert (harness.snapshot(), harness.pages) == (before, [])
