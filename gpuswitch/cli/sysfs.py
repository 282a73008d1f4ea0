"""What the kernel shows anybody of graphics cards. Nothing is read that takes a device's lock, so nothing waits."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path

SYS = Path("/sys")
_CLASSES = ("0x03", "0x12")
"""Displays and accelerators."""
_MODULES = (
    "amdgpu",
    "i915",
    "nouveau",
    "nvidia",
    "nvidia_drm",
    "nvidia_modeset",
    "nvidia_uvm",
    "radeon",
    "xe",
    "vfio_pci",
)
_PARAMETERS = (("vfio_pci", "ids"), ("vfio_pci", "disable_vga"), ("nvidia_drm", "modeset"), ("kvm", "ignore_msrs"))


def functions(sys: Path = SYS) -> dict[str, Path]:
    """The functions of the slots that have a display function or an accelerator, and all in their IOMMU groups."""
    devices = {path.name: path for path in sorted((sys / "bus/pci/devices").glob("*"))}
    drawing = [path for path in devices.values() if _text(path / "class").startswith(_CLASSES)]
    found = {other for path in drawing for other in (*_in_slot(path, devices), *_in_group(path))}
    return {name: devices[name] for name in sorted(found) if name in devices}


def described(path: Path) -> str:
    """One function in a line."""
    driver, group = _target(path / "driver"), _target(path / "iommu_group")
    ids = ":".join(_text(path / name).removeprefix("0x") for name in ("vendor", "device"))
    power = _text(path / "power" / "runtime_status")
    boot = " boot_vga" if _text(path / "boot_vga") == "1" else ""
    return (
        f"{path.name} class {_text(path / 'class')} [{ids}] driver {driver or '-'} group {group or '-'} "
        f"power {power or '-'}{boot}"
    )


def modules(sys: Path = SYS) -> Iterator[str]:
    """Those that are loaded, with their versions where they have one, and the settings that matter here."""
    for name in _MODULES:
        folder = sys / "module" / name
        if folder.is_dir():
            yield f"{name} {_text(folder / 'version')}".rstrip()
    for module, parameter in _PARAMETERS:
        if value := _text(sys / "module" / module / "parameters" / parameter):
            yield f"{module}.{parameter} = {value}"


def _in_slot(path: Path, devices: Collection[str]) -> Iterator[str]:
    slot = path.name.rpartition(".")[0] + "."
    return (name for name in devices if name.startswith(slot))


def _in_group(path: Path) -> Iterator[str]:
    return (other.name for other in (path / "iommu_group" / "devices").glob("*"))


def _target(link: Path) -> str:
    try:
        return Path(os.readlink(link)).name  # noqa: PTH115 -- of the link itself: it may lead nowhere
    except OSError:
        return ""


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
