"""What `gpuswitchctl setup boot` has written for the initrd, and whether the initrd is newer than that."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping

from gpuswitch.doctor.machine import Files
from gpuswitch.doctor.seen import Early, EarlyFunction

SCRIPTS: Mapping[str, str] = {
    "initramfs-tools": "/etc/initramfs-tools/scripts/init-top/gpuswitch",
    "dracut": "/usr/lib/dracut/modules.d/90gpuswitch/gpuswitch.sh",
    "mkinitcpio": "/etc/initcpio/gpuswitch.sh",
}
"""The script that the initrd runs before udev, by what makes the initrd."""
PENDING = "/var/lib/gpuswitch/setup-boot-pending"
"""There from before files are changed until the initrd has been made of them."""
_FUNCTION = re.compile(r"^\s*(?:if )?is (\S+) 0x([0-9a-f]{4}) 0x([0-9a-f]{4})\b", re.MULTILINE)


def look(files: Files) -> Early:
    script = next((place for place in SCRIPTS.values() if files.there(place)), "")
    pending = files.there(PENDING)
    if not script:
        return Early(pending=pending)
    functions = tuple(
        EarlyFunction(place, f"{vendor}:{device}", _found(files, place))
        for place, vendor, device in _FUNCTION.findall(files.text(script))
    )
    initrd = initrd_of(files)
    made = files.status(initrd) if initrd else None
    written = files.status(script)
    return Early(
        script, functions, written.st_mtime if written else 0.0, initrd, made.st_mtime if made else 0.0, pending
    )


def _found(files: Files, place: str) -> str:
    ids = [files.text(f"/sys/devices/{place}/{name}").strip().removeprefix("0x") for name in ("vendor", "device")]
    return ":".join(ids) if all(ids) else ""


def initrd_of(files: Files) -> str:
    """That of the running kernel, "" where nobody knows it: the boot loader alone knows which it has read."""
    kernel = files.text("/proc/sys/kernel/osrelease").strip() or os.uname().release
    return next((place for place in _initrds(files, kernel) if files.there(place)), "")


def _initrds(files: Files, kernel: str) -> Iterator[str]:
    """As Debian, Fedora, openSUSE and Arch name it, and as kernel-install does (its plugin 90-loaderentry)."""
    yield from (f"/boot/initrd.img-{kernel}", f"/boot/initramfs-{kernel}.img", f"/boot/initrd-{kernel}")
    if package := files.text(f"/usr/lib/modules/{kernel}/pkgbase").strip():
        yield f"/boot/initramfs-{package}.img"
    if machine := files.text("/etc/machine-id").strip():
        yield from (f"{boot}/{machine}/{kernel}/initrd" for boot in ("/boot", "/efi", "/boot/efi"))
