"""Which display the machine booted on, as a look tells it."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpuswitch.host.linux.framebuffers import BOOT_DRIVERS
from gpuswitch.host.linux.sysfs import Sysfs
from gpuswitch.model.address import PciAddress
from tests.harness.sysfs_tree import Tree

CARD = "0000:64:00.0"
PANEL = "0000:65:00.0"
SOUND = "0000:65:00.1"
PORT = "0000:00:08.1"
OTHER = "038000"
"""A display that is not compatible with VGA: processors of AMD have such."""
BAR = (0x7C_0000_0000, 0x7C_0FFF_FFFF)
BASE, SIZE = BAR[0] + 0x10_0000, 0x80_0000


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """A card, and the panel of a laptop on another display, whose class has no `boot_vga`."""
    tree = Tree(tmp_path)
    tree.function(CARD, driver="nvidia")
    tree.function(PANEL, class_code=OTHER, driver="amdgpu", under=[PORT])
    tree.function(SOUND, class_code="040300", driver="snd_hda_intel", under=[PORT])
    for address in (CARD, PANEL):
        tree.class_device(address, f"drm/card{address[6]}", f"226:{address[6]}")
    return tree


def says(tree: Tree, address: str) -> Path:
    file = tree.path(address) / f"drm/card{address[6]}/boot_display"
    file.write_text("1\n")
    return file


def boot_vga(tree: Tree, address: str, value: str = "1") -> None:
    (tree.path(address) / "boot_vga").write_text(f"{value}\n")


def booted(sysfs: Sysfs) -> list[str]:
    return [str(address) for address, function in sysfs.look().functions.items() if function.boot_display]


def test_nobody_knows(tree: Tree) -> None:
    assert booted(Sysfs(tree.roots)) == []


def test_the_card_says_so(tree: Tree) -> None:
    """Since Linux 7.0; it beats the others."""
    says(tree, PANEL)
    boot_vga(tree, CARD)
    tree.booted_on(BASE, SIZE)
    tree.memory(CARD, BAR)
    assert booted(Sysfs(tree.roots)) == [PANEL]


def test_the_function_says_so(tree: Tree) -> None:
    (tree.path(PANEL) / "boot_display").write_text("1\n")
    boot_vga(tree, CARD)
    assert booted(Sysfs(tree.roots)) == [PANEL]


def test_of_two_that_say_so_it_is_not_the_one_for_vga(tree: Tree) -> None:
    """Linux 7.0 says it of the default VGA device, and of the one that has the frame buffer."""
    says(tree, CARD)
    says(tree, PANEL)
    boot_vga(tree, CARD)
    assert booted(Sysfs(tree.roots)) == [PANEL]
    boot_vga(tree, CARD, "0")
    assert booted(Sysfs(tree.roots)) == [CARD, PANEL]


def test_a_card_that_is_gone_has_said_so(tree: Tree) -> None:
    """On vfio-pci there is no card; the look that found one is remembered as long as the function is there."""
    says(tree, PANEL)
    boot_vga(tree, CARD)
    sysfs = Sysfs(tree.roots)
    assert booted(sysfs) == [PANEL]
    (says(tree, PANEL)).unlink()
    tree.unbind(PANEL)
    assert booted(sysfs) == [PANEL]
    assert sysfs.look([PciAddress.parse(PANEL)]).functions[PciAddress.parse(PANEL)].boot_display
    link = tree.sys / "bus/pci/devices" / PANEL
    away = link.rename(tree.sys / PANEL)
    assert booted(sysfs) == [CARD]
    away.rename(link)
    assert booted(sysfs) == [PANEL]


def test_a_card_that_says_so_now_beats_one_that_did(tree: Tree) -> None:
    file = says(tree, PANEL)
    sysfs = Sysfs(tree.roots)
    assert booted(sysfs) == [PANEL]
    file.unlink()
    says(tree, CARD)
    assert booted(sysfs) == [CARD]


@pytest.mark.parametrize("driver", sorted(BOOT_DRIVERS))
@pytest.mark.parametrize("bound", [True, False])
def test_the_device_of_the_frame_buffer_lies_below_it(tree: Tree, driver: str, bound: bool) -> None:
    boot_vga(tree, CARD)
    device = tree.boot_framebuffer(driver, f"pci0000:00/{PORT}/{PANEL}")
    if not bound:
        (tree.sys / "bus/platform/drivers" / driver / device.name).unlink()
    sysfs = Sysfs(tree.roots)
    assert booted(sysfs) == [PANEL]
    # Its own driver takes the function, and the frame buffer is gone.
    device.rename(tree.sys / device.name)
    (tree.sys / "bus/platform/drivers" / driver / device.name).unlink(missing_ok=True)
    assert booted(sysfs) == [PANEL]


def test_the_memory_of_the_frame_buffer_is_its_own(tree: Tree) -> None:
    """Before 6.9: only /proc/iomem tells."""
    tree.boot_framebuffer("simple-framebuffer")
    tree.iomem.write_text(f"7c00000000-7c0fffffff : {PANEL}\n  7c00100000-7c008fffff : BOOTFB\n")
    boot_vga(tree, CARD)
    assert booted(Sysfs(tree.roots)) == [PANEL]


@pytest.mark.parametrize(
    ("base", "size", "kind"), [(BASE, SIZE, 0x70), (BASE, SIZE >> 16, 0x23), (BAR[0], BAR[1] - BAR[0] + 1, 0x70)]
)
def test_the_machine_was_booted_with_a_frame_buffer_in_its_memory(tree: Tree, base: int, size: int, kind: int) -> None:
    tree.booted_on(base, size, kind)
    tree.memory(CARD, (0x6000_0000, 0x6FFF_FFFF))
    tree.memory(PANEL, (0x8000_0000, 0x8FFF_FFFF), BAR)
    boot_vga(tree, CARD)
    assert booted(Sysfs(tree.roots)) == [PANEL]


@pytest.mark.parametrize(
    ("base", "size", "kind"),
    [
        pytest.param(BAR[0] - 1, SIZE, 0x70, id="it begins before"),
        pytest.param(BAR[0] + 1, BAR[1] - BAR[0] + 1, 0x70, id="it ends behind"),
        pytest.param(BAR[0] & 0xFFFF_FFFF, SIZE, 0x70, id="half the address"),
        pytest.param(BASE, 0, 0x70, id="empty"),
        pytest.param(BASE, SIZE, 0x01, id="text"),
        pytest.param(0xE000, 0x10, 0x70, id="ports are no memory"),
    ],
)
def test_a_frame_buffer_that_is_not_in_its_memory(tree: Tree, base: int, size: int, kind: int) -> None:
    tree.booted_on(base, size, kind)
    tree.memory(PANEL, BAR)
    boot_vga(tree, CARD)
    assert booted(Sysfs(tree.roots)) == [CARD]


def test_boot_params_that_end_too_soon_tell_nothing(tree: Tree) -> None:
    tree.booted_on(BASE, SIZE)
    tree.memory(PANEL, BAR)
    (tree.sys / "kernel/boot_params/data").write_bytes(b"")
    boot_vga(tree, CARD)
    assert booted(Sysfs(tree.roots)) == [CARD]


def test_a_partial_look_knows_it_too(tree: Tree) -> None:
    says(tree, PANEL)
    panel = PciAddress.parse(PANEL)
    assert Sysfs(tree.roots).look([panel]).functions[panel].boot_display
