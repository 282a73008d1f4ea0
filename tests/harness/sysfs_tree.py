"""A fake sysfs under a temporary folder: laid out as a real one, and inert.

Links are relative and devices lie below their bridges, as in the kernel's own tree, since that is what is read. What
must never be opened is a FIFO without a writer: whoever opens it to read waits for ever.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path

from gpuswitch.host.linux.sysfs import Roots

# Each of these takes the device lock, or wakes the device, in some kernel (see gpuswitch/host/linux/sysfs.py).
FORBIDDEN = (
    "driver_override", "uevent", "config", "current_link_speed", "current_link_width", "enable", "vpd", "rom",
    "resource0", "remove", "rescan", "reset", "reset_method", "d3cold_allowed", "power_state", "power/control",
    "power/wakeup",
)  # fmt: skip


class Tree:
    """What there is of a host. Every method adds something; paths are returned for those who add more."""

    def __init__(self, root: Path) -> None:
        self.sys = root / "sys"
        self.dev = root / "dev"
        self.udev = root / "run-udev"
        self.modules = root / "modules"
        self.tools = root / "tools"
        self.iomem = root / "iomem"
        for folder in ("bus/pci/devices", "bus/pci/drivers", "kernel/iommu_groups", "module", "devices"):
            (self.sys / folder).mkdir(parents=True)
        for path in (self.dev, self.udev, self.tools, self.modules / platform.release()):
            path.mkdir(parents=True)

    @property
    def roots(self) -> Roots:
        return Roots(str(self.sys), str(self.dev), str(self.udev), str(self.modules), str(self.tools), str(self.iomem))

    def driver(self, name: str, module: str | None = None, *, built_in: bool = False) -> Path:
        """A driver on the PCI bus. `module` brought it; a built-in one has a module's folder and no `initstate`."""
        folder = self.sys / "bus/pci/drivers" / name
        folder.mkdir(exist_ok=True)
        (folder / "unbind").touch()
        if module is not None:
            (self.sys / "module" / module).mkdir(exist_ok=True)
            if not built_in:
                (self.sys / "module" / module / "initstate").write_text("live\n")
            link(folder / "module", self.sys / "module" / module)
        return folder

    def function(
        self,
        address: str,
        *,
        ids: str = "10de:2484",
        class_code: str = "030000",
        driver: str | None = None,
        group: int | None = None,
        under: Sequence[str] = (),
        root: str = "pci0000:00",
        status: str = "active",
    ) -> Path:
        """A function below the bridges `under`, which need not be there themselves."""
        path = self.sys.joinpath("devices", root, *under, address)
        (path / "power").mkdir(parents=True)
        vendor, device = ids.upper().split(":")
        base, sub, interface = class_code[0:2].upper(), class_code[2:4].upper(), class_code[4:6].upper()
        values = {
            "vendor": f"0x{vendor.lower()}",
            "device": f"0x{device.lower()}",
            "class": f"0x{class_code}",
            "modalias": f"pci:v0000{vendor}d0000{device}sv00001043sd000087C1bc{base}sc{sub}i{interface}",
            "power/runtime_status": status,
        }
        if class_code.startswith("0300"):
            values["boot_vga"] = "0"
        for name, value in values.items():
            (path / name).write_text(f"{value}\n")
        for name in FORBIDDEN:
            os.mkfifo(path / name)
        link(self.sys / "bus/pci/devices" / address, path)
        if group is not None:
            members = self.sys / "kernel/iommu_groups" / str(group) / "devices"
            members.mkdir(parents=True, exist_ok=True)
            link(path / "iommu_group", members.parent)
            link(members / address, path)
        if driver is not None:
            self.bind(address, driver)
        return path

    def bind(self, address: str, driver: str) -> None:
        link(self.path(address) / "driver", self.driver(driver))

    def unbind(self, address: str) -> None:
        (self.path(address) / "driver").unlink()

    def path(self, address: str) -> Path:
        return (self.sys / "bus/pci/devices" / address).resolve()

    def plain(self, address: str, attribute: str, value: str) -> Path:
        """Make an attribute a file, for the worker, which may read and write what a look may not."""
        path = self.path(address) / attribute
        path.unlink(missing_ok=True)
        path.write_text(value)
        return path

    def class_device(self, address: str, place: str, numbers: str) -> None:
        """A device that the function's driver registered, `place` being `drm/card0`."""
        path = self.path(address) / place
        path.mkdir(parents=True)
        (path / "dev").write_text(f"{numbers}\n")

    def memory(self, address: str, *ranges: tuple[int, int]) -> None:
        """The memory of a function, first and last address of each BAR; 64-bit ones, which a GPU may prefetch."""
        lines = [f"0x{first:016x} 0x{last:016x} 0x000000000014220c" for first, last in ranges]
        none = f"0x{0:016x} 0x{0:016x} 0x{0:016x}"
        lines += [none, "0x000000000000e000 0x000000000000e0ff 0x0000000000040101"]
        (self.path(address) / "resource").write_text("".join(f"{line}\n" for line in lines))

    def booted_on(self, base: int, size: int, kind: int = 0x70) -> None:
        """What the boot loader said of the screen (struct screen_info); `kind`: 0x70 EFI, 0x23 VESA, 0x01 VGA text."""
        screen = bytearray(4096)
        screen[0x0F] = kind
        screen[0x18:0x1C] = (base & 0xFFFFFFFF).to_bytes(4, "little")
        screen[0x1C:0x20] = size.to_bytes(4, "little")
        screen[0x36:0x3A] = (0b10 if base >> 32 else 0).to_bytes(4, "little")
        screen[0x3A:0x3E] = (base >> 32).to_bytes(4, "little")
        (self.sys / "kernel/boot_params").mkdir()
        (self.sys / "kernel/boot_params/data").write_bytes(screen)

    def node(self, name: str) -> None:
        """A device node; a file does as well for a look."""
        path = self.dev / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    def udev_entry(self, name: str, *lines: str) -> None:
        """What udev knows of a device: `c226:0`, `+pci:0000:01:00.0`."""
        (self.udev / "data").mkdir(exist_ok=True)
        (self.udev / "data" / name).write_text("".join(f"{line}\n" for line in ("I:1234", *lines)))

    def installed(self, index: str, text: str) -> None:
        """The text of `modules.dep` or `modules.builtin` of the running kernel."""
        (self.modules / platform.release() / index).write_text(text)

    def tool(self, name: str, script: str) -> None:
        """What stands in for a program: a shell script."""
        path = self.tools / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def loaded(self, module: str, references: int, *users: str) -> Path:
        """A module that is in the kernel."""
        folder = self.sys / "module" / module
        (folder / "holders").mkdir(parents=True)
        (folder / "initstate").write_text("live\n")
        (folder / "refcnt").write_text(f"{references}\n")
        for user in users:
            (folder / "holders" / user).symlink_to(f"../../{user}")
        return folder

    def boot_framebuffer(self, driver: str, place: str = "platform") -> Path:
        """The driver's first device, below /sys/devices at that place."""
        name = f"{driver}.0"
        device = self.sys / "devices" / place / name
        folder = self.sys / "bus/platform/drivers" / driver
        for path in (device, folder, self.sys / "bus/platform/devices"):
            path.mkdir(parents=True)
        for attribute in ("bind", "unbind"):
            (folder / attribute).touch()
        link(self.sys / "bus/platform/devices" / name, device)
        link(folder / name, device)
        link(device / "driver", folder)
        return device


def link(path: Path, target: Path) -> None:
    path.symlink_to(os.path.relpath(target, path.parent))


def big_host(tree: Tree) -> None:
    """300 functions: bridges, cards with sound, network cards with virtual functions, asleep and awake."""
    for module in ("nvidia", "nvidia_modeset", "nvidia_drm", "nvidia_uvm", "snd_hda_intel"):
        tree.loaded(module, 60)
    tree.driver("nvidia", "nvidia")
    tree.driver("snd_hda_intel", "snd_hda_intel")
    for bus in range(1, 61):
        port = f"0000:00:{bus // 8:02x}.{bus % 8}"
        tree.function(port, ids="8086:a70d", class_code="060400", group=bus)
        for function, (code, driver) in enumerate([("030000", "nvidia"), ("040300", "snd_hda_intel")]):
            address = f"0000:{bus:02x}:00.{function}"
            tree.function(address, class_code=code, driver=driver, group=100 + bus, under=[port], status="suspended")
        tree.class_device(f"0000:{bus:02x}:00.0", f"drm/card{bus}", f"226:{bus}")
        tree.memory(f"0000:{bus:02x}:00.0", (bus << 32, (bus << 32) + 0xFFFF))
        tree.class_device(f"0000:{bus:02x}:00.1", f"sound/card{bus}/controlC{bus}", f"116:{bus}")
        network = tree.function(f"0000:{bus:02x}:01.0", class_code="020000", group=200 + bus, under=[port])
        virtual = tree.function(f"0000:{bus:02x}:01.1", class_code="020000", group=200 + bus, under=[port])
        os.mkfifo(network / "sriov_numvfs")
        (network / "virtfn0").symlink_to(f"../{virtual.name}")
