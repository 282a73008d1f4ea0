"""What a report has of the kernel's own view of graphics cards, out of a tree that is made here."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpuswitch.cli.sysfs import described, functions, modules

LOCKED = ("driver_override", "sriov_numvfs", "config", "reset_method")
"""Attributes that take the device's lock, or wake the device: who reads one may wait as long as the kernel does."""


def device(sys: Path, address: str, kind: str, *, driver: str = "", group: int | None = None) -> None:
    folder = sys / "bus/pci/devices" / address
    (folder / "power").mkdir(parents=True)
    for name, text in (("class", kind), ("vendor", "0x10de"), ("device", "0x2484"), ("power/runtime_status", "active")):
        (folder / name).write_text(f"{text}\n")
    for name in LOCKED:
        (folder / name).mkdir()  # which cannot be read
    if driver:
        (folder / "driver").symlink_to(f"../../../bus/pci/drivers/{driver}")
    if group is not None:
        members = sys / "kernel/iommu_groups" / str(group) / "devices"
        members.mkdir(parents=True, exist_ok=True)
        (members / address).symlink_to(folder)
        (folder / "iommu_group").symlink_to(members.parent)


@pytest.fixture
def sys(tmp_path: Path) -> Path:
    device(tmp_path, "0000:00:1f.6", "0x020000", driver="e1000e", group=9)
    device(tmp_path, "0000:01:00.0", "0x030000", driver="nvidia", group=14)
    device(tmp_path, "0000:01:00.1", "0x040300")
    device(tmp_path, "0000:02:00.0", "0x010802", driver="nvme", group=14)
    for name, version in (("nvidia", "580.105.08"), ("vfio_pci", "")):
        (tmp_path / "module" / name / "parameters").mkdir(parents=True)
        if version:
            (tmp_path / "module" / name / "version").write_text(f"{version}\n")
    (tmp_path / "module/vfio_pci/parameters/ids").write_text("10de:2484\n")
    return tmp_path


def test_cards_what_is_in_their_slots_and_in_their_groups(sys: Path) -> None:
    assert list(functions(sys)) == ["0000:01:00.0", "0000:01:00.1", "0000:02:00.0"]


def test_a_function_in_a_line(sys: Path) -> None:
    lines = {name: described(path) for name, path in functions(sys).items()}
    assert lines["0000:01:00.0"] == "0000:01:00.0 class 0x030000 [10de:2484] driver nvidia group 14 power active"
    assert " driver - group - " in lines["0000:01:00.1"]


def test_modules_with_what_matters_of_their_settings(sys: Path) -> None:
    assert list(modules(sys)) == ["nvidia 580.105.08", "vfio_pci", "vfio_pci.ids = 10de:2484"]


def test_a_system_without_any(tmp_path: Path) -> None:
    assert (functions(tmp_path), list(modules(tmp_path))) == ({}, [])
