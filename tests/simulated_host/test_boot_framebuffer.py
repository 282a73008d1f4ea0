"""The firmware's frame buffer in the memory of a GPU that no host driver has: somebody may draw on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpuswitch.errors import Busy as BusyError
from gpuswitch.errors import NotViable
from gpuswitch.host.simulated.catalogue import DISPLAY_3D, ETHERNET, MODULES, NVIDIA, REALTEK, VGA, Slot
from gpuswitch.host.simulated.faults import Delay, Errno
from gpuswitch.host.simulated.host import SimulatedHost
from gpuswitch.host.simulated.scenarios import DISPLAY_MANAGER, boot
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import BootFramebuffer
from gpuswitch.model.policy import Options
from gpuswitch.model.states import State
from gpuswitch.switch.record import Result
from tests.harness.simulated.harness import Harness, config

GPU = PciAddress.parse("0000:01:00.0")
LEFT = BootFramebuffer("simple-framebuffer.0", "simple-framebuffer", GPU)
RELEASE = "unbind simple-framebuffer.0 from simple-framebuffer"


def framebuffers(harness: Harness) -> list[str]:
    return [each.device for each in harness.machine.look().boot_framebuffers]


class TestOnVfio:
    """vfio-pci has had the GPU since the boot; then a driver takes what the firmware left in its memory."""

    def host(self, *neighbours: str) -> SimulatedHost:
        card = Slot("0000:01:00", 5).function(0, NVIDIA, 0x2484, VGA, boot_display=True)
        nics = [Slot(name, 5).function(0, REALTEK, 0x8168, ETHERNET) for name in neighbours]
        host = boot([card, *nics], vfio_ids=[(NVIDIA, 0x2484)])
        host.machine.frame_buffers.left(LEFT)
        return host

    @pytest.fixture
    async def harness(self, tmp_path: Path) -> Harness:
        # Who booted on it has had no picture of it for long: to have it on vfio is no news.
        return await Harness.start(self.host(), tmp_path, config(allow_boot_display=True))

    async def test_is_freed_before_a_machine_gets_it(self, harness: Harness) -> None:
        actor, functions = harness.fleet.find(""), harness.machine.look().functions
        plan = await actor.plan(State.VFIO)
        titles = [step.title for step in plan.steps]
        # Who has it open is told by number, also once it is released: whoever came since the plan was made.
        assert titles.index(RELEASE) < titles.index("see that nobody has it open")
        assert framebuffers(harness) == [LEFT.device]
        await harness.moved(actor, State.VFIO)
        assert framebuffers(harness) == []
        assert harness.machine.look().functions == functions
        assert not (await actor.plan(State.VFIO)).steps
        assert (await harness.switch(actor, State.VFIO)).count == 0

    async def test_comes_back_where_that_is_wanted(self, tmp_path: Path) -> None:
        own = config(allow_boot_display=True, restore_boot_framebuffer=True)
        harness = await Harness.start(self.host(), tmp_path, own)
        actor = harness.fleet.find("")
        await harness.moved(actor, State.VFIO)
        assert harness.pages
        switch = await harness.switch(actor, State.HOST)
        # Its driver has evicted it.
        assert (switch.result, LEFT.device in switch.reason) == (Result.DONE, True)
        assert harness.pages == []

    async def test_comes_back_after_a_failure(self, harness: Harness) -> None:
        harness.host.faults.add(Errno(5), operation="unbind_platform")
        actor, before = harness.fleet.find(""), harness.snapshot()
        switch = await harness.switch(actor, State.VFIO)
        assert (switch.result, actor.state) == (Result.REVERTED, State.VFIO)
        assert (harness.snapshot(), harness.pages) == (before, [])

    async def test_is_not_taken_from_who_draws_on_it(self, harness: Harness) -> None:
        harness.machine.run("Xorg")
        harness.machine.frame_buffers.open(LEFT.device, "Xorg")
        actor = harness.fleet.find("")
        for ask in (actor.plan, actor.request):
            with pytest.raises(BusyError, match=r"Xorg .* has /dev/fb0 open"):
                await ask(State.VFIO)
        assert framebuffers(harness) == [LEFT.device]

    async def test_nothing_is_done_to_a_gpu_that_a_machine_runs_with(self, harness: Harness) -> None:
        actor = harness.fleet.find("")
        harness.machine.start_vm("vm", actor.gpu.functions)
        with pytest.raises(BusyError, match=r"qemu-system-x86 .* has /dev/vfio/5 open"):
            await actor.request(State.VFIO)

    async def test_a_service_that_dies_meanwhile_leaves_the_gpu_on_vfio(self, harness: Harness) -> None:
        actor, functions = harness.fleet.find(""), harness.machine.look().functions
        harness.host.faults.add(Delay(1.0), operation="unbind_platform")
        await actor.request(State.VFIO)
        await harness.witness.until(lambda: harness.host.kernel(str(GPU)).pending is not None)
        again = await harness.crash(actor)
        assert again.fleet.find("").state is State.VFIO
        assert again.machine.look().functions == functions

    async def test_a_group_that_the_host_uses_is_of_no_use(self, tmp_path: Path) -> None:
        harness = await Harness.start(self.host("0000:02:00"), tmp_path, config(allow_boot_display=True))
        actor, before = harness.fleet.find(""), harness.snapshot()
        for ask in (actor.plan, actor.request):
            with pytest.raises(NotViable, match=r"0000:02:00\.0 .* stays on r8169"):
                await ask(State.VFIO)
        assert (harness.snapshot(), harness.pages) == (before, [])


class TestDriverless:
    @pytest.fixture
    async def harness(self, tmp_path: Path) -> Harness:
        return await Harness.of("driverless", tmp_path)

    async def test_is_not_taken_from_who_draws_on_it(self, harness: Harness) -> None:
        actor, before = harness.fleet.find("01:00.0"), harness.snapshot()
        assert [holder.command for holder in await actor.holders()] == ["Xorg"]
        for ask in (actor.plan, actor.request):
            with pytest.raises(BusyError, match=r"Xorg .* has /dev/fb0 open"):
                await ask(State.VFIO)
        assert (harness.snapshot(), harness.pages) == (before, [])

    async def test_shows_again_what_a_service_took_that_died_before_the_gpu_went(self, harness: Harness) -> None:
        actor, before = harness.fleet.find("01:00.0"), harness.snapshot()
        harness.host.faults.add(Delay(1.0), operation="keep_awake")
        await actor.request(State.VFIO, Options(stop_units=(str(DISPLAY_MANAGER),)))
        await harness.witness.until(lambda: not framebuffers(harness))
        again = await harness.crash(actor)
        await again.witness.until(lambda: not again.pages)
        assert again.snapshot() == before

    async def test_goes_once_he_is_gone(self, harness: Harness) -> None:
        actor = harness.fleet.find("01:00.0")
        await harness.moved(actor, State.VFIO, Options(stop_units=(str(DISPLAY_MANAGER),)))
        assert framebuffers(harness) == []
        assert harness.state(DISPLAY_MANAGER) == "inactive"
        await harness.moved(actor, State.HOST)
        assert harness.machine.look().functions[GPU].driver is None
        assert harness.state(DISPLAY_MANAGER) == "active"


async def test_what_nobody_draws_on_needs_nothing_stopped(tmp_path: Path) -> None:
    """No driver, and no frame buffer of the firmware's: then nobody can have it open."""
    card = Slot("0000:01:00", 5).function(0, NVIDIA, 0x20F1, DISPLAY_3D)
    harness = await Harness.start(
        boot([card], modules=[m for m in MODULES if m.name == "vfio_pci"]), tmp_path, config()
    )
    plan = await harness.fleet.find("").plan(State.VFIO, Options(stop_units=("nobody.service",)))
    assert "stop nobody.service" not in [step.title for step in plan.steps]
