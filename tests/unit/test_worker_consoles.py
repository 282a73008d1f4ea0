"""Cards that are announced, text consoles, the boot's frame buffer: what can be told without a frame buffer.

tests/real_kernel/test_consoles.py does it on real ones.
"""

from __future__ import annotations

import errno
import os

import pytest

from gpuswitch.host.linux.kernel import LinuxKernel
from gpuswitch.model.facts import Consoles
from tests.harness.sysfs_tree import Tree
from tests.harness.workers import AUDIO, BOTH, GPU, refused


async def test_cards_are_announced(tree: Tree, kernel: LinuxKernel) -> None:
    """Cards only: neither their nodes, nor what else lies beside them; and nothing where there is none."""
    places = [(GPU, "drm/card1"), (GPU, "drm/renderD128"), (AUDIO, "sound/card2"), (AUDIO, "sound/card2/controlC2")]
    for function, place in places:
        (tree.path(str(function)) / place).mkdir(parents=True)
        (tree.path(str(function)) / place / "uevent").touch()

    def announced() -> list[str]:
        found = {place: (tree.path(str(function)) / place / "uevent") for function, place in places}
        told = [f"{path.read_text()} {place}" for place, path in found.items() if path.read_text()]
        for path in found.values():
            path.write_text("")
        return told

    await kernel.announce(BOTH, "sound", "remove")
    assert announced() == ["remove sound/card2"]
    await kernel.announce(BOTH, "sound", "add")
    # `add` stood there before it: udev's rules wait for the second word
    assert announced() == ["change sound/card2"]
    await kernel.announce(BOTH, "drm", "remove")
    assert announced() == ["remove drm/card1"]
    await kernel.announce([AUDIO], "drm", "remove")
    assert announced() == []


async def test_a_card_below_an_auxiliary_device_is_announced(tree: Tree, kernel: LinuxKernel) -> None:
    card = tree.path(str(GPU)) / "nova_core.nova-drm.0/drm/card0"
    card.mkdir(parents=True)
    (card / "uevent").touch()
    await kernel.announce([GPU], "drm", "remove")
    assert (card / "uevent").read_text() == "remove"


async def test_a_card_that_leaves_is_not_announced(tree: Tree, kernel: LinuxKernel) -> None:
    (tree.path(str(AUDIO)) / "sound/card2").mkdir(parents=True)
    await kernel.announce([AUDIO], "sound", "remove")


async def test_only_cards_come_and_go(kernel: LinuxKernel) -> None:
    for subsystem, action in [("net", "remove"), ("sound", "change"), ("../sound", "add"), ("sound", "add 1-2-3 A=1")]:
        assert (await refused(kernel.announce(BOTH, subsystem, action))).errno == errno.EINVAL


def vtconsole(tree: Tree, name: str, text: str, bound: bool) -> None:
    folder = tree.sys / "class/vtconsole" / name
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{text}\n")
    (folder / "bind").write_text(f"{int(bound)}\n")


async def test_without_a_frame_buffer_there_are_no_consoles(tree: Tree, kernel: LinuxKernel) -> None:
    assert await kernel.consoles() == Consoles()
    vtconsole(tree, "vtcon0", "(S) dummy device", True)
    (tree.sys / "class/graphics/fbcon").mkdir(parents=True)
    assert await kernel.consoles() == Consoles()
    error = await refused(kernel.map_consoles([1, 2], 0))
    assert (error.errno, str(error)) == (
        errno.ENOENT,
        "cannot show text consoles on /dev/fb0: No such file or directory",
    )


async def test_frame_buffers_that_show_no_text(tree: Tree, kernel: LinuxKernel) -> None:
    """Then no node is opened, and nothing is mapped: that would let the frame buffer show all terminals."""
    graphics = tree.sys / "class/graphics"
    vtconsole(tree, "vtcon0", "(S) dummy device", True)
    vtconsole(tree, "vtcon1", "(M) frame buffer device", False)
    device = tree.boot_framebuffer("efi-framebuffer")
    tree.iomem.write_text(f"c0000000-cfffffff : {AUDIO}\n  c0000000-c02fffff : efifb\n")
    for name, owner in [("fb0", tree.path(str(GPU))), ("fb1", device), ("fb10", tree.path(str(AUDIO))), ("fb2", None)]:
        (graphics / name).mkdir(parents=True)
        if owner is not None:
            (graphics / name / "device").symlink_to(owner)
    assert await kernel.consoles() == Consoles({0: GPU, 1: AUDIO, 2: None, 10: AUDIO}, {}, {"vtcon1": False})
    tree.node("fb0")
    error = await refused(kernel.map_consoles([1], 0))
    assert (error.errno, error.message) == (errno.ENODEV, "no frame buffer device is bound")


async def test_what_is_no_frame_buffer_cannot_be_asked(tree: Tree, kernel: LinuxKernel) -> None:
    vtconsole(tree, "vtcon1", "(M) frame buffer device", True)
    (tree.sys / "class/graphics/fb0").mkdir(parents=True)
    error = await refused(kernel.consoles())
    assert (error.errno, str(error)) == (
        errno.ENOENT,
        "cannot read the console map from /dev/fb0: No such file or directory",
    )
    tree.node("fb0")
    assert (await refused(kernel.consoles())).errno == errno.ENOTTY
    error = await refused(kernel.map_consoles([1], 0))
    assert (error.errno, error.subject) == (errno.ENOTTY, "/dev/fb0")


async def test_a_vtconsole_is_bound_and_unbound(tree: Tree, kernel: LinuxKernel) -> None:
    vtconsole(tree, "vtcon1", "(M) frame buffer device", True)
    bind = tree.sys / "class/vtconsole/vtcon1/bind"
    await kernel.bind_console("vtcon1", bound=False)
    assert bind.read_text().startswith("0")
    await kernel.bind_console("vtcon1", bound=True)
    assert bind.read_text().startswith("1")


async def test_a_vtconsole_that_is_so_is_left_alone(tree: Tree, kernel: LinuxKernel) -> None:
    vtconsole(tree, "vtcon1", "(M) frame buffer device", True)
    bind = tree.sys / "class/vtconsole/vtcon1/bind"
    os.utime(bind, ns=(0, 0))
    await kernel.bind_console("vtcon1", bound=True)
    assert bind.stat().st_mtime_ns == 0


async def test_what_is_no_vtconsole(kernel: LinuxKernel) -> None:
    assert (await refused(kernel.bind_console("vtcon7", bound=False))).errno == errno.ENOENT
    for name in ("vtcon", "../vtcon1", "vtcon1/..", "ttyS0"):
        assert (await refused(kernel.bind_console(name, bound=False))).errno == errno.EINVAL


async def test_the_boots_frame_buffer_leaves_and_comes_back(tree: Tree, kernel: LinuxKernel) -> None:
    device = tree.boot_framebuffer("efi-framebuffer")
    folder = tree.sys / "bus/platform/drivers/efi-framebuffer"
    await kernel.bind_platform(device.name, "efi-framebuffer")
    assert (folder / "bind").read_text() == ""
    await kernel.unbind_platform(device.name, "efi-framebuffer")
    assert (folder / "unbind").read_text() == "efi-framebuffer.0"
    (folder / device.name).unlink()
    await kernel.bind_platform(device.name, "efi-framebuffer")
    assert (folder / "bind").read_text() == "efi-framebuffer.0"


async def test_a_boot_driver_that_is_not_there(kernel: LinuxKernel) -> None:
    await kernel.unbind_platform("vesa-framebuffer.0", "vesa-framebuffer")
    error = await refused(kernel.bind_platform("vesa-framebuffer.0", "vesa-framebuffer"))
    assert (error.errno, error.message) == (errno.ENODEV, "there is no driver vesa-framebuffer")


@pytest.mark.parametrize(
    ("device", "driver"),
    [
        ("efi-framebuffer.0", "pcspkr"),
        ("efi-framebuffer.0", "../../pci/drivers/nvidia"),
        ("../efi-framebuffer.0", "efi-framebuffer"),
        ("efi-framebuffer", "efi-framebuffer"),
        ("efi-framebuffer.0\n", "efi-framebuffer"),
        (".0", "efi-framebuffer"),
    ],
)
async def test_only_a_boot_frame_buffer_is_moved(tree: Tree, kernel: LinuxKernel, device: str, driver: str) -> None:
    tree.boot_framebuffer("efi-framebuffer")
    for call in (kernel.unbind_platform, kernel.bind_platform):
        error = await refused(call(device, driver))
        assert (error.errno, error.message) == (errno.EINVAL, f"it is not a boot frame buffer of {driver}")
