"""Reset, removal and rescan in a real worker process, over a fake sysfs: what is written, and what that says."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from asyncinotify import Inotify, Mask

from gpuswitch.host.linux.kernel import LinuxKernel
from gpuswitch.model.address import PciAddress
from tests.harness.sysfs_tree import Tree, link
from tests.harness.workers import AUDIO, BOTH, GPU, refused

BRIDGE = "0000:00:01.0"


def bus(tree: Tree, name: str, *parent: str) -> Path:
    """The folder of a bus, below the bridge `parent` or a root; its `rescan` is a file."""
    above = tree.sys.joinpath("devices/pci0000:00", *parent)
    folder = above / "pci_bus" / name
    folder.mkdir(parents=True)
    (folder / "rescan").touch()
    (folder / "device").symlink_to(f"../../../{above.name}")  # as the kernel writes it, with the name
    (tree.sys / "class/pci_bus").mkdir(parents=True, exist_ok=True)
    link(tree.sys / "class/pci_bus" / name, folder)
    return folder


def bridge(tree: Tree, control: str) -> Path:
    """The bridge above the GPU, with that in power/control; returns its folder."""
    path = tree.function(BRIDGE, class_code="060400", driver=None)
    tree.plain(BRIDGE, "power/control", control)
    return path


def written(folder: Path) -> str:
    return (folder / "rescan").read_text()


async def test_a_function_is_reset(tree: Tree, kernel: LinuxKernel) -> None:
    attribute = tree.plain(str(GPU), "reset", "")
    await kernel.reset(GPU)
    assert attribute.read_text() == "1"


async def test_no_reset_method_and_no_function_are_told_apart(tree: Tree, kernel: LinuxKernel) -> None:
    (tree.path(str(AUDIO)) / "reset").unlink()
    error = await refused(kernel.reset(AUDIO))
    assert (error.errno, str(error)) == (errno.ENOENT, f"cannot reset {AUDIO}: it has no reset method")
    nobody = PciAddress.parse("0000:09:00.0")
    error = await refused(kernel.reset(nobody))
    assert (error.errno, str(error)) == (errno.ENODEV, f"cannot reset {nobody}: it is not on the PCI bus")


async def test_functions_are_removed_and_one_that_is_gone_is_passed_over(tree: Tree, kernel: LinuxKernel) -> None:
    attributes = [tree.plain(str(function), "remove", "") for function in BOTH]
    await kernel.remove([PciAddress.parse("0000:09:00.0"), *BOTH])
    assert [attribute.read_text() for attribute in attributes] == ["1", "1"]


async def test_a_function_that_somebody_else_removes_is_not_waited_for(tree: Tree, kernel: LinuxKernel) -> None:
    """The kernel takes the file away before the driver lets go."""
    (tree.path(str(AUDIO)) / "remove").unlink()
    error = await refused(kernel.remove([AUDIO]))
    assert error.errno == errno.EBUSY
    assert str(error).endswith(f"{AUDIO}: somebody else is removing it")


async def test_a_rescan_is_of_the_bus_and_of_no_other(tree: Tree, kernel: LinuxKernel) -> None:
    bridge(tree, "on\n")
    own, other = bus(tree, "0000:01", BRIDGE), bus(tree, "0000:02", "0000:00:02.0")
    everything = tree.sys / "bus/pci/rescan"
    everything.touch()
    await kernel.rescan(BOTH)
    assert (written(own), written(other), everything.read_text()) == ("1", "", "")


async def test_functions_of_a_root_bus(tree: Tree, kernel: LinuxKernel) -> None:
    """There is no bridge above it that could sleep."""
    root = bus(tree, "0000:00")
    await kernel.rescan([PciAddress.parse("0000:00:02.0")])
    assert written(root) == "1"


@pytest.mark.parametrize(("control", "writes"), [("on", ["rescan"]), ("auto", ["control", "rescan", "control"])])
async def test_the_bridge_is_kept_awake_meanwhile_and_has_its_setting_back(
    tree: Tree, kernel: LinuxKernel, control: str, writes: list[str]
) -> None:
    path = bridge(tree, f"{control}\n")
    own = bus(tree, "0000:01", BRIDGE)
    with Inotify(sync_timeout=0) as inotify:
        inotify.add_watch(path / "power/control", Mask.CLOSE_WRITE)
        inotify.add_watch(own / "rescan", Mask.CLOSE_WRITE)
        await kernel.rescan(BOTH)
        assert [event.path.name for event in iter(inotify.sync_get, None) if event.path] == writes
    assert (path / "power/control").read_text().strip() == control


async def test_the_bridge_has_its_power_setting_back_after_a_rescan_that_failed(
    tree: Tree, kernel: LinuxKernel
) -> None:
    path = bridge(tree, "auto\n")
    own = bus(tree, "0000:01", BRIDGE)
    (own / "rescan").unlink()
    (own / "rescan").symlink_to("/dev/null")
    assert (await refused(kernel.rescan(BOTH))).errno == errno.ELOOP
    assert (path / "power/control").read_text().strip() == "auto"


async def test_a_bus_that_is_gone(kernel: LinuxKernel) -> None:
    error = await refused(kernel.rescan([GPU]))
    assert (error.errno, str(error)) == (
        errno.ENODEV,
        "cannot rescan the bus of 0000:01: there is no such bus any more",
    )


RESOURCE = """\
0x00000000f0000000 0x00000000f0ffffff 0x000000000014220c
0x0000000000000000 0x0000000000000000 0x0000000000000000
0x0000006000000000 0x000000600fffffff 0x000000000014220c
0x0000000000000000 0x0000000000000000 0x0000000000000000
0x0000000000000000 0x0000000000000000 0x0000000000000000
0x000000000000e000 0x000000000000e07f 0x0000000000040101
0x00000000f1000000 0x00000000f107ffff 0x0000000000046200
"""
"""Two base addresses of 64 bits, each in two registers, one of I/O, and the ROM."""


class TestLost:
    """What the kernel set up in a function, and somebody else has reset."""

    @pytest.fixture(autouse=True)
    def _set_up(self, tree: Tree) -> None:
        tree.plain(str(GPU), "resource", RESOURCE)
        tree.plain(str(GPU), "config", "")
        tree.plain(str(GPU), "enable", "1\n")
        configured(tree, GPU)

    async def test_nothing(self, kernel: LinuxKernel) -> None:
        assert await kernel.lost([GPU]) == ()

    @pytest.mark.parametrize(
        ("command", "first"),
        [(0x0, 0xF000000C), (0x7, 0xC), (0xFFFF, 0xFFFFFFFF)],
        ids=["command", "base address", "no answer"],
    )
    async def test_registers(self, command: int, first: int, tree: Tree, kernel: LinuxKernel) -> None:
        configured(tree, GPU, command, first)
        assert await kernel.lost([GPU]) == (GPU,)

    async def test_any_of_its_registers(self, tree: Tree, kernel: LinuxKernel) -> None:
        configured(tree, GPU, second=0xC)
        assert await kernel.lost([GPU]) == (GPU,)

    async def test_what_nobody_enabled_may_be_switched_off(self, tree: Tree, kernel: LinuxKernel) -> None:
        configured(tree, GPU, 0)
        tree.plain(str(GPU), "enable", "0\n")
        assert await kernel.lost([GPU]) == ()

    @pytest.mark.parametrize(("command", "first"), [(0x0, 0xC), (0xFFFF, 0xFFFFFFFF)], ids=["address", "no answer"])
    async def test_and_has_its_base_addresses(self, command: int, first: int, tree: Tree, kernel: LinuxKernel) -> None:
        configured(tree, GPU, command, first)
        tree.plain(str(GPU), "enable", "0\n")
        assert await kernel.lost([GPU]) == (GPU,)

    async def test_a_virtual_function_has_none(self, tree: Tree, kernel: LinuxKernel) -> None:
        configured(tree, GPU, first=0, second=0)
        (tree.path(str(GPU)) / "physfn").symlink_to(tree.path(str(AUDIO)))
        assert await kernel.lost([GPU]) == ()

    @pytest.mark.parametrize("flag", [0x10, 0x20, 0x20000000], ids=["fixed", "enhanced allocation", "unset"])
    async def test_nor_has_memory_that_is_elsewhere(self, flag: int, tree: Tree, kernel: LinuxKernel) -> None:
        configured(tree, GPU, first=0xC)
        resource = tree.path(str(GPU)) / "resource"
        lines = resource.read_text().splitlines()
        start, end, flags = lines[0].split()
        lines[0] = f"{start} {end} {int(flags, 16) | flag:#018x}"
        resource.write_text("\n".join(lines) + "\n")
        assert await kernel.lost([GPU]) == ()

    async def test_who_is_not_there(self, kernel: LinuxKernel) -> None:
        assert (await refused(kernel.lost([PciAddress.parse("0000:09:00.0")]))).errno == errno.ENODEV


def configured(
    tree: Tree, address: PciAddress, command: int = 0x7, first: int = 0xF000000C, second: int = 0x600000000C
) -> None:
    """A configuration space: two base addresses of 64 bits, the second one a multiple of 4 GiB."""
    header = bytearray(256)
    header[0x04:0x06] = command.to_bytes(2, "little")
    header[0x10:0x18] = first.to_bytes(8, "little")
    header[0x18:0x20] = second.to_bytes(8, "little")
    (tree.path(str(address)) / "config").write_bytes(header)
