"""Cards and boards as people report them, each moved there and back."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpuswitch.config.settings import Config, GpuConfig
from gpuswitch.errors import NotViable
from gpuswitch.host.simulated.catalogue import INTEL, NVIDIA
from gpuswitch.host.simulated.scenarios import SCENARIOS
from gpuswitch.model.address import PciAddress
from gpuswitch.model.states import State
from tests.harness.simulated.harness import Harness, settings_of

FIRST, SECOND = (PciAddress.parse(address) for address in ("0000:01:00.0", "0000:41:00.0"))
ARC, ARCS_SOUND = PciAddress.parse("0000:03:00.0"), PciAddress.parse("0000:04:00.0")
H100, NVSWITCH, OTHER_H100 = (PciAddress.parse(address) for address in ("0000:2a:00.0", "0000:2b:00.0", "0000:3a:00.0"))


def bound(harness: Harness, address: PciAddress) -> str | None:
    return settings_of(harness.machine.devices[address]).bound


class TestWorkstation:
    """Two equal cards, and the screen on the management controller."""

    async def test_one_card_goes_while_the_other_computes(self, tmp_path: Path) -> None:
        harness = await Harness.start(SCENARIOS["workstation"](), tmp_path, Config())
        harness.machine.open(FIRST, "python3", "nvidia")
        before = harness.snapshot()
        await harness.moved(harness.fleet.find("41:00.0"), State.VFIO)
        assert (bound(harness, FIRST), bound(harness, SECOND)) == ("nvidia", "vfio-pci")
        await harness.moved(harness.fleet.find("41:00.0"), State.HOST)
        assert (harness.snapshot(), harness.pages) == (before, [])

    async def test_what_it_booted_on_is_the_controller(self, tmp_path: Path) -> None:
        harness = await Harness.start(SCENARIOS["workstation"](), tmp_path, Config())
        with pytest.raises(NotViable, match=r"0000:62:00\.0 is the display that this machine booted on"):
            await harness.fleet.find("62:00.0").plan(State.VFIO)

    async def test_ids_on_the_kernel_command_line_take_both(self, tmp_path: Path) -> None:
        host = SCENARIOS["workstation"](vfio_ids=[(NVIDIA, 0x2204), (NVIDIA, 0x1AEF)])
        harness = await Harness.start(host, tmp_path, Config())
        assert {bound(harness, FIRST), bound(harness, SECOND)} == {"vfio-pci"}
        await harness.moved(harness.fleet.find("01:00.0"), State.HOST)
        assert (bound(harness, FIRST), bound(harness, SECOND)) == ("nvidia", "vfio-pci")


class TestHybrid:
    """The panel hangs on graphics of class 0380."""

    async def test_the_panel_stays(self, tmp_path: Path) -> None:
        harness = await Harness.start(SCENARIOS["hybrid"](), tmp_path, Config())
        with pytest.raises(NotViable, match=r"0000:65:00\.0 is the display that this machine booted on"):
            await harness.fleet.find("65:00.0").plan(State.VFIO)

    async def test_the_other_card_goes(self, tmp_path: Path) -> None:
        harness = await Harness.start(SCENARIOS["hybrid"](), tmp_path, Config())
        before = harness.snapshot()
        await harness.moved(harness.fleet.find("64:00.0"), State.VFIO)
        await harness.moved(harness.fleet.find("64:00.0"), State.HOST)
        assert harness.snapshot() == before


async def test_an_arc_that_was_on_vfio_from_boot_on_goes_home_to_i915(tmp_path: Path) -> None:
    """Modules i915 and xe both say that they are for it, so both are loaded."""
    harness = await Harness.start(SCENARIOS["arc"](vfio_ids=[(INTEL, 0x56A1), (INTEL, 0x4F90)]), tmp_path, Config())
    assert {"i915", "xe"} <= harness.machine.look().pci_drivers.keys()
    actor = harness.fleet.find("03:00.0")
    assert actor.state is State.VFIO
    await harness.moved(actor, State.HOST)
    assert (bound(harness, ARC), bound(harness, ARCS_SOUND)) == ("i915", "snd_hda_intel")


class TestHgx:
    async def test_an_nvswitch_in_the_group_is_in_the_way(self, tmp_path: Path) -> None:
        harness = await Harness.start(SCENARIOS["hgx"](), tmp_path, Config())
        with pytest.raises(NotViable, match=r"the NVSwitch 0000:2b:00\.0 .* or move both: .* `members = "):
            await harness.fleet.find("2a:00.0").plan(State.VFIO)

    async def test_as_a_member_it_goes_along_while_another_gpu_computes(self, tmp_path: Path) -> None:
        harness = await Harness.start(
            SCENARIOS["hgx"](), tmp_path, Config(gpus=(GpuConfig(H100, managed=True, members=(NVSWITCH,)),))
        )
        harness.machine.open(OTHER_H100, "python3", "nvidia")
        before = harness.snapshot()
        await harness.moved(harness.fleet.find("2a:00.0"), State.VFIO)
        assert (bound(harness, H100), bound(harness, NVSWITCH), bound(harness, OTHER_H100)) == (
            "vfio-pci",
            "vfio-pci",
            "nvidia",
        )
        await harness.moved(harness.fleet.find("2a:00.0"), State.HOST)
        assert (harness.snapshot(), harness.pages) == (before, [])
