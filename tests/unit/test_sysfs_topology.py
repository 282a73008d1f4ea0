"""A look at what is not just a card in a slot, over a fake sysfs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gpuswitch.host.linux.sysfs import Sysfs
from tests.harness.facts import at
from tests.harness.sysfs_tree import Tree

GPU = "0000:01:00.0"


def test_an_accelerator_has_nodes_of_two_classes(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    tree.function(GPU, class_code="120000", driver="amdgpu")
    for place, number in (("drm/card0", "226:0"), ("accel/accel3", "261:3")):
        tree.class_device(GPU, place, number)
    tree.node("dri/card0")
    tree.node("accel/accel3")
    seen = Sysfs(tree.roots).look().functions[at(GPU)]
    assert (seen.kind, seen.nodes) == ("accelerator", ("/dev/accel/accel3", "/dev/dri/card0"))


REGIONS = """0x00000000bdf6e000 0x00000000bdf6efff direct
0x00000000bdf83000 0x00000000bdf84fff direct-relaxable
0x00000000fee00000 0x00000000feefffff msi
"""


def test_of_reserved_regions_the_direct_ones_count(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    for address, group in ((GPU, 13), ("0000:02:00.0", 14)):
        tree.function(address, group=group)
        (tree.sys / f"kernel/iommu_groups/{group}/reserved_regions").write_text(REGIONS[53 * (group == 14) :])
    assert Sysfs(tree.roots).look().direct_regions == {13: ("0xbdf6e000-0xbdf6efff",)}


def test_they_are_read_again_when_a_device_joins_the_group(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    tree.function(GPU, group=13)
    regions = tree.sys / "kernel/iommu_groups/13/reserved_regions"
    regions.write_text("")
    sysfs = Sysfs(tree.roots)
    assert sysfs.look().direct_regions == {}
    regions.write_text(REGIONS)
    assert sysfs.look().direct_regions == {}
    tree.function("0000:01:00.1", class_code="040300", group=13)
    assert list(sysfs.look().direct_regions) == [13]


@pytest.mark.parametrize(
    ("cpuinfo", "processor"),
    [
        ("processor\t: 0\nvendor_id\t: GenuineIntel\n", "intel"),
        ("processor\t: 0\nvendor_id\t: AuthenticAMD\n", "amd"),
        ("processor\t: 0\nBogoMIPS\t: 50.00\nCPU implementer\t: 0x41\n", "arm"),
        ("processor\t: 0\nhart\t\t: 1\nisa\t\t: rv64imafdc\n", ""),
    ],
)
def test_whose_processor_it_is(cpuinfo: str, processor: str, tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(cpuinfo)
    assert Sysfs(replace(tree.roots, proc=str(tmp_path / "proc"))).look().processor == processor


@pytest.mark.parametrize(
    ("flags", "kind", "hypervisor"),
    [("fpu lahf_lm", "", ""), ("fpu hypervisor lahf_lm", "", "machine"), ("fpu hypervisor", "xen", "xen")],
)
def test_what_the_kernel_runs_on(flags: str, kind: str, hypervisor: str, tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(f"vendor_id\t: GenuineIntel\nflags\t\t: {flags}\nbugs\t\t:\n")
    if kind:
        (tree.sys / "hypervisor").mkdir()
        (tree.sys / "hypervisor/type").write_text(f"{kind}\n")
    assert Sysfs(replace(tree.roots, proc=str(tmp_path / "proc"))).look().hypervisor == hypervisor


@pytest.mark.parametrize(
    ("command_line", "barred"),
    [
        ("quiet splash", set()),
        ("quiet module_blacklist=nouveau,nvidiafb", {"nouveau", "nvidiafb"}),
        ("module_blacklist=nouveau module_blacklist=i915 modprobe.blacklist=xe", {"i915"}),
    ],
)
def test_which_modules_the_kernel_refuses(command_line: str, barred: set[str], tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cmdline").write_text(f"{command_line}\n")
    assert Sysfs(replace(tree.roots, proc=str(tmp_path / "proc"))).look().barred == barred


def test_a_group_that_vfio_made_without_an_iommu(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    for address, group, name in ((GPU, 0, "vfio-noiommu"), ("0000:02:00.0", 1, ""), ("0000:03:00.0", 2, None)):
        tree.function(address, group=group)
        if name is not None:
            (tree.sys / f"kernel/iommu_groups/{group}/name").write_text(f"{name}\n")
    assert Sysfs(tree.roots).look().groups_without_iommu == {0}
