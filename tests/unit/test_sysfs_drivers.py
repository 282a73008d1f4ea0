"""A look at what drivers do with a bus and with their devices."""

from __future__ import annotations

import platform
from dataclasses import replace
from pathlib import Path

import pytest

from gpuswitch.host.linux.sysfs import Sysfs
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import PciFunction
from tests.harness.sysfs_tree import Tree

GPU = "0000:01:00.0"


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def seen(tree: Tree) -> PciFunction:
    return Sysfs(tree.roots).look().functions[PciAddress.parse(GPU)]


def test_the_nodes_of_a_card_that_lies_below_an_auxiliary_device(tree: Tree) -> None:
    """As nova-drm's does, which nova-core's driver has made a device for."""
    tree.function(GPU, driver="nova-core")
    assert (seen(tree).nodes, seen(tree).nodes_pending) == ((), False)
    tree.class_device(GPU, "nova_core.nova-drm.0/drm/card0", "226:0")
    assert (seen(tree).nodes, seen(tree).nodes_pending) == ((), True)
    tree.node("dri/card0")
    assert (seen(tree).nodes, seen(tree).nodes_pending) == (("/dev/dri/card0",), False)


@pytest.mark.parametrize(("text", "autoprobe"), [("1\n", True), ("0\n", False), (None, True)])
def test_whether_drivers_take_what_they_match_by_themselves(tree: Tree, text: str | None, autoprobe: bool) -> None:
    if text is not None:
        (tree.sys / "bus/pci/drivers_autoprobe").write_text(text)
    assert Sysfs(tree.roots).look().autoprobe is autoprobe


def test_the_nodes_of_the_firmwares_frame_buffer(tree: Tree) -> None:
    """Simpledrm's DRM device has a frame buffer as well; both lie in the folder of the platform device."""
    tree.function(GPU)
    device = tree.boot_framebuffer("simple-framebuffer", f"pci0000:00/{GPU}")
    [found] = Sysfs(tree.roots).look().boot_framebuffers
    assert found.nodes == ()
    for place, numbers in (("drm/card0", "226:0"), ("graphics/fb0", "29:0")):
        (device / place).mkdir(parents=True)
        (device / place / "dev").write_text(f"{numbers}\n")
    [found] = Sysfs(tree.roots).look().boot_framebuffers
    assert found.nodes == ("dri/card0", "fb0")


def test_the_modules_of_the_running_kernel_may_be_gone_from_disk(tree: Tree) -> None:
    sysfs = Sysfs(tree.roots)
    assert not sysfs.look().modules_on_disk
    tree.installed("modules.dep", "")
    assert sysfs.look().modules_on_disk
    (tree.modules / platform.release() / "modules.dep").unlink()
    assert not sysfs.look().modules_on_disk


@pytest.mark.parametrize(
    ("index", "line", "module"),
    [
        ("modules.dep", "updates/dkms/nvidia.ko.xz: kernel/drivers/video/backlight.ko.xz", "nvidia"),
        ("modules.dep", "nvidia-current.ko:", "nvidia"),
        ("modules.dep", "updates/nvidia-current-drm.ko:", "nvidia_drm"),
        ("modules.dep", "kernel/drivers/i2c/i2c-nvidia-gpu.ko.zst:", "i2c_nvidia_gpu"),
        ("modules.builtin", "kernel/drivers/gpu/drm/i915/i915.ko", "i915"),
    ],
)
def test_a_module_is_found_by_what_the_kernel_calls_it(tree: Tree, index: str, line: str, module: str) -> None:
    sysfs = Sysfs(tree.roots)
    assert not sysfs.installed(module)
    tree.installed(index, f"{line}\n")
    assert sysfs.installed(module)
    assert not sysfs.installed("amdgpu")


def test_a_module_of_which_nobody_can_tell_counts_as_installed(tree: Tree) -> None:
    (tree.modules / platform.release() / "modules.dep").mkdir()
    assert Sysfs(tree.roots).installed("nvidia")


def test_modules_may_lie_in_another_folder(tree: Tree) -> None:
    elsewhere = Sysfs(replace(tree.roots, modules=f"{tree.sys}/nowhere:{tree.modules}"))
    assert not elsewhere.look().modules_on_disk
    tree.installed("modules.dep", "kernel/drivers/vfio/pci/vfio-pci.ko.zst:\n")
    found = elsewhere.look()
    assert (found.modules_on_disk, found.vfio_available) == (True, True)
