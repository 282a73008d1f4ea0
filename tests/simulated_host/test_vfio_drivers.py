"""GPUs that have a vfio driver of their own, and companions that have not."""

from __future__ import annotations

from collections.abc import Callable
from errno import EIO
from pathlib import Path

import pytest

from gpuswitch.errors import NotViable, Owned
from gpuswitch.gpu.actor import Actor
from gpuswitch.host.simulated.catalogue import AUDIO, DISPLAY_3D, GRACE_HOPPER, NVIDIA, Slot, port
from gpuswitch.host.simulated.faults import Errno
from gpuswitch.host.simulated.host import SimulatedHost
from gpuswitch.host.simulated.scenarios import boot, plain, superchip
from gpuswitch.model.address import PciAddress
from gpuswitch.model.states import State
from gpuswitch.switch.record import Result
from tests.harness.simulated.harness import GENTLE, Harness, config

GPU, SOUND = PciAddress.parse("0009:01:00.0"), PciAddress.parse("0009:01:00.1")
VARIANT = "nvgrace-gpu-vfio-pci"


async def start_harness(directory: Path, **rules: object) -> tuple[Harness, Actor]:
    """A superchip, and sound in the same slot."""
    slot = Slot("0009:01:00", 21, "0009:00:00.0")
    card = [slot.function(0, NVIDIA, GRACE_HOPPER, DISPLAY_3D, "GH100"), slot.function(1, NVIDIA, 0x228B, AUDIO)]
    harness = await Harness.start(boot([port("0009:00:00.0", 20), *card]), directory, config("superchip", **rules))
    return harness, harness.fleet.find(str(GPU))


def drivers(harness: Harness) -> tuple[str | None, str | None]:
    seen = harness.host.look().functions
    return seen[GPU].driver_name, seen[SOUND].driver_name


async def test_each_function_goes_to_the_driver_that_fits_it_best_and_comes_home(tmp_path: Path) -> None:
    harness, actor = await start_harness(tmp_path)
    before = harness.snapshot()
    await harness.moved(actor, State.VFIO)
    assert drivers(harness) == (VARIANT, "vfio-pci")
    harness.machine.start_vm("vm", [GPU, SOUND])
    harness.machine.end("vm")
    await harness.moved(actor, State.HOST)
    assert drivers(harness) == ("nvidia", "snd_hda_intel")
    assert harness.pages == []
    assert harness.snapshot() == before


async def test_all_go_to_vfio_pci_where_the_configuration_says_so(tmp_path: Path) -> None:
    harness, actor = await start_harness(tmp_path, vfio_driver="vfio-pci")
    await harness.moved(actor, State.VFIO)
    assert drivers(harness) == ("vfio-pci", "vfio-pci")
    assert "nvgrace_gpu_vfio_pci" not in harness.host.look().pci_drivers.values()


async def test_a_driver_that_is_not_there_is_told_before_anything_is_touched(tmp_path: Path) -> None:
    harness, actor = await start_harness(tmp_path, vfio_driver="xe-vfio-pci")
    before = harness.snapshot()
    with pytest.raises(NotViable, match="the driver xe-vfio-pci is not available"):
        await actor.request(State.VFIO)
    assert (harness.snapshot(), harness.pages) == (before, [])


async def test_a_plan_loads_nothing(tmp_path: Path) -> None:
    harness, actor = await start_harness(tmp_path)
    before = harness.snapshot()
    titles = [step.title for step in (await actor.plan(State.VFIO)).steps]
    assert titles[0] == "load nvgrace_gpu_vfio_pci"
    assert harness.snapshot() == before


@pytest.mark.parametrize("function", [GPU, SOUND], ids=str)
async def test_what_fails_leads_back(tmp_path: Path, function: PciAddress) -> None:
    harness, actor = await start_harness(tmp_path)
    before = harness.snapshot()
    harness.host.faults.add(Errno(EIO), operation="probe", subject=function)
    switch = await harness.switch(actor, State.VFIO)
    assert (switch.result, actor.state) == (Result.REVERTED, State.HOST)
    assert harness.snapshot() == before


@pytest.mark.parametrize("function", [GPU, SOUND], ids=str)
async def test_what_fails_on_the_way_home_leads_back_to_the_same_drivers(tmp_path: Path, function: PciAddress) -> None:
    harness, actor = await start_harness(tmp_path, **GENTLE)
    await harness.moved(actor, State.VFIO)
    harness.host.faults.add(Errno(EIO), operation="probe", subject=function)
    switch = await harness.switch(actor, State.HOST)
    assert (switch.result, actor.state) == (Result.REVERTED, State.VFIO)
    assert drivers(harness) == (VARIANT, "vfio-pci")
    await harness.moved(actor, State.HOST)


async def test_one_that_was_on_its_variant_before_goes_home_too(tmp_path: Path) -> None:
    """Nobody saw it on the host; the variant is no host driver."""
    harness, actor = await start_harness(tmp_path)
    await harness.moved(actor, State.VFIO)
    await harness.host.close()
    (tmp_path / "anew").mkdir()
    again = await Harness.start(harness.host, tmp_path / "anew", config("superchip"))
    actor = again.fleet.find(str(GPU))
    assert actor.state is State.VFIO
    await again.moved(actor, State.HOST)
    assert drivers(again) == ("nvidia", "snd_hda_intel")


async def test_a_crash_on_the_way_is_brought_home(tmp_path: Path) -> None:
    harness, actor = await start_harness(tmp_path)
    before = harness.snapshot()
    await actor.request(State.VFIO)
    await harness.witness.until(lambda: harness.host.look().functions[SOUND].driver_name == "vfio-pci")
    harness = await harness.crash(actor)
    assert harness.fleet.find(str(GPU)).state is State.HOST
    assert harness.snapshot() == before


async def test_a_machine_that_has_it_is_told_by_name(tmp_path: Path) -> None:
    harness, actor = await start_harness(tmp_path)
    await harness.moved(actor, State.VFIO)
    harness.machine.start_vm("vm", [GPU, SOUND])
    with pytest.raises(Owned, match="qemu-system-x86"):
        await actor.request(State.HOST)
    assert drivers(harness) == (VARIANT, "vfio-pci")


class TestAKernelWithoutGroups:
    @pytest.mark.parametrize("machine", [plain, superchip])
    async def test_is_found_out_before_anything_is_moved(
        self, tmp_path: Path, machine: Callable[..., SimulatedHost]
    ) -> None:
        """It shows when vfio is loaded."""
        harness = await Harness.start(machine(vfio_groups=False), tmp_path, config())
        actor = harness.fleet.find("0000:01:00.0" if machine is plain else str(GPU))
        before = harness.snapshot()
        for _ in range(2):
            told = ""
            try:
                switch = await harness.switch(actor, State.VFIO)
                told = switch.reason
            except NotViable as error:
                told = str(error)
            assert "this kernel has no VFIO groups" in told
            assert (actor.state, harness.snapshot(), harness.pages) == (State.HOST, before, [])

    async def test_leaves_a_gpu_alone_that_is_on_vfio(self, tmp_path: Path) -> None:
        harness = await Harness.start(plain(vfio_groups=False, vfio_ids=[(NVIDIA, 0x2484)]), tmp_path, config())
        actor = harness.fleet.find("0000:01:00.0")
        before = harness.snapshot()
        with pytest.raises(NotViable, match="this kernel has no VFIO groups"):
            await actor.request(State.HOST)
        assert (harness.snapshot(), harness.pages) == (before, [])


class TestNodesOfDevices:
    """A machine may open /dev/vfio/devices/vfioN and bind it to an iommufd, and never open the group."""

    async def test_a_machine_that_has_them_has_the_gpu(self, tmp_path: Path) -> None:
        harness = await Harness.start(plain(vfio_devices=True), tmp_path, config())
        actor = harness.fleet.find("0000:01:00.0")
        before = harness.snapshot()
        await harness.moved(actor, State.VFIO)
        harness.machine.start_vm("vm", actor.gpu.functions, iommufd=True)
        with pytest.raises(Owned, match=r"qemu-system-x86 .* has /dev/vfio/devices/vfio0, .* open"):
            await actor.request(State.HOST)
        harness.machine.end("vm")
        await harness.moved(actor, State.HOST)
        assert (harness.snapshot(), harness.pages) == (before, [])

    async def test_who_has_one_open_and_not_bound_is_seen_before_the_unbind(self, tmp_path: Path) -> None:
        """The group can be had then, and the unbind would wait."""
        harness = await Harness.start(plain(vfio_devices=True), tmp_path, config())
        actor = harness.fleet.find("0000:01:00.0")
        await harness.moved(actor, State.VFIO)
        harness.machine.open(actor.gpu.address, "somebody", "vfio")
        switch = await harness.switch(actor, State.HOST)
        assert (switch.result, actor.state) == (Result.REVERTED, State.VFIO)
        assert "somebody" in switch.reason
        harness.machine.end("somebody")
        await harness.moved(actor, State.HOST)
