"""A GPU's kernel operations in a real worker process, over a fake sysfs: what is read, written and refused."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from gpuswitch.host.linux.kernel import LinuxKernel
from gpuswitch.host.operation import Words
from gpuswitch.host.port import Captured
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import Driver
from tests.harness.sysfs_tree import Tree
from tests.harness.workers import AUDIO, BOTH, GPU, refused


def attribute(tree: Tree, address: PciAddress, name: str) -> Path:
    return tree.path(str(address)) / name


async def test_what_was_there_is_captured(tree: Tree, kernel: LinuxKernel) -> None:
    tree.unbind(str(AUDIO))
    tree.plain(str(AUDIO), "driver_override", "vfio-pci\n")
    tree.plain(str(AUDIO), "power/control", "on\n")
    assert await kernel.capture(BOTH) == {
        GPU: Captured(Driver("nvidia", "nvidia"), None, "auto"),
        AUDIO: Captured(None, "vfio-pci", "on"),
    }


async def test_an_override_is_aimed_and_cleared_by_a_newline(tree: Tree, kernel: LinuxKernel) -> None:
    for address in BOTH:
        tree.plain(str(address), "driver_override", "")
    await kernel.set_override({GPU: "vfio-pci", AUDIO: None})
    assert attribute(tree, GPU, "driver_override").read_text() == "vfio-pci"
    assert attribute(tree, AUDIO, "driver_override").read_text() == "\n"


async def test_any_attribute_is_read_and_written(tree: Tree, kernel: LinuxKernel) -> None:
    tree.plain(str(GPU), "d3cold_allowed", "1\n")
    tree.plain(str(GPU), "reset_method", "flr bus\n")
    assert await kernel.attribute(GPU, "d3cold_allowed") == "1"
    assert await kernel.attribute(GPU, "driver_override") == ""
    assert await kernel.attribute(GPU, "no_such_attribute") is None
    await kernel.set_attribute(GPU, "d3cold_allowed", "0")
    assert attribute(tree, GPU, "d3cold_allowed").read_text() == "0\n"
    await kernel.set_attribute(GPU, "reset_method", "bus flr")
    assert attribute(tree, GPU, "reset_method").read_text() == "bus flr\n"


@pytest.mark.parametrize("path", ["", "..", "../0000:01:00.1/power/control", "power//control", "/power/control"])
async def test_what_is_no_attribute_of_the_function_is_refused(path: str, kernel: LinuxKernel) -> None:
    assert (await refused(kernel.attribute(GPU, path))).errno == errno.EINVAL
    assert (await refused(kernel.set_attribute(GPU, path, "on"))).errno == errno.EINVAL


@pytest.mark.parametrize("value", ["1\n", "\x1b[2J", "ü"])
async def test_what_is_no_text_of_one_line_is_not_written(value: str, tree: Tree, kernel: LinuxKernel) -> None:
    assert (await refused(kernel.set_attribute(GPU, "power/control", value))).errno == errno.EINVAL
    assert attribute(tree, GPU, "power/control").read_text() == "auto\n"


async def test_unbind_names_the_driver(tree: Tree, kernel: LinuxKernel) -> None:
    await kernel.unbind(GPU, "nvidia")
    assert (tree.sys / "bus/pci/drivers/nvidia/unbind").read_text() == str(GPU)


async def test_probe(tree: Tree, kernel: LinuxKernel) -> None:
    await kernel.probe(AUDIO)
    assert (tree.sys / "bus/pci/drivers_probe").read_text() == str(AUDIO)


async def test_power_is_set_and_given_back(tree: Tree, kernel: LinuxKernel) -> None:
    for address in BOTH:
        tree.plain(str(address), "power/control", "")
    await kernel.keep_awake(BOTH)
    assert attribute(tree, GPU, "power/control").read_text() == "on"
    await kernel.set_power_control({AUDIO: "auto"})
    assert attribute(tree, AUDIO, "power/control").read_text() == "auto"
    assert attribute(tree, GPU, "power/control").read_text() == "on"


async def test_a_device_that_does_not_wake_up(tree: Tree, kernel: LinuxKernel) -> None:
    """The write succeeds all the same: the kernel drops the result of the resume."""
    tree.plain(str(AUDIO), "power/runtime_status", "suspended\n")
    error = await refused(kernel.keep_awake(BOTH))
    assert (error.errno, error.subject) == (errno.EIO, str(AUDIO))
    assert "suspended" in str(error)


async def test_where_the_worker_cannot_tell_what_it_failed_at_the_request_does(tree: Tree, kernel: LinuxKernel) -> None:
    driver = attribute(tree, GPU, "driver")
    driver.unlink()
    driver.write_text("no link")
    error = await refused(kernel.capture([GPU]))
    assert (error.errno, error.subject) == (errno.EINVAL, str(GPU))


async def test_functions_and_drivers_that_are_not_there(tree: Tree, kernel: LinuxKernel) -> None:
    nobody = PciAddress.parse("0000:09:00.0")
    error = await refused(kernel.capture([GPU, nobody]))
    assert (error.errno, error.subject) == (errno.ENODEV, str(nobody))
    assert (await refused(kernel.set_override({nobody: None}))).errno == errno.ENODEV
    assert (await refused(kernel.unbind(GPU, "nobody"))).errno == errno.ENODEV
    attribute(tree, GPU, "driver_override").unlink()
    error = await refused(kernel.set_override({GPU: None}))
    assert (error.errno, str(error)) == (
        errno.ENOENT,
        f"cannot set driver_override of {GPU}: it has no driver_override",
    )


async def test_what_is_no_name_is_refused_and_nothing_is_written(tree: Tree, kernel: LinuxKernel) -> None:
    before = {path: path.read_bytes() for path in tree.sys.rglob("*") if path.is_file() and not path.is_symlink()}
    for driver in ("../nvidia", "nvidia/../nvidia", "nvidia\n", "-r", "nvidia driver", "nvidia\0", "ä", "x" * 99999):
        assert (await refused(kernel.unbind(GPU, driver))).errno == errno.EINVAL, driver
        assert (await refused(kernel.set_override({GPU: driver}))).errno == errno.EINVAL, driver
        assert (await refused(kernel.load(driver))).errno == errno.EINVAL, driver
    assert (await refused(kernel.set_power_control({GPU: "off"}))).errno == errno.EINVAL
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(
    "address",
    ["", "01:00.0", "0000:01:00", "0000:01:00.8", "0000:01:20.0", "0000:01:00.0/..", "../../0000:01", "0000:0A:00.0"],
)
async def test_the_worker_checks_addresses_itself(kernel: LinuxKernel, address: str) -> None:
    error = await refused(kernel._call(Words("probe", address), "probe", address, ""))
    assert (error.errno, error.message) == (errno.EINVAL, "this is not a PCI address")


@pytest.mark.parametrize("request_", ["_read", "__init__", "no_such_thing", ""])
async def test_the_worker_does_its_operations_only(kernel: LinuxKernel, request_: str) -> None:
    error = await refused(kernel._call(Words("do", "this"), request_, "0000:01:00.0", "uevent"))
    assert (error.errno, error.message) == (errno.EINVAL, "the worker knows no such operation")


async def test_a_link_in_place_of_an_attribute_is_not_followed(tree: Tree, kernel: LinuxKernel) -> None:
    victim = tree.sys / "victim"
    victim.write_text("as it was")
    override = attribute(tree, GPU, "driver_override")
    override.unlink()
    override.symlink_to(victim)
    assert (await refused(kernel.set_override({GPU: "vfio-pci"}))).errno == errno.ELOOP
    assert victim.read_text() == "as it was"
