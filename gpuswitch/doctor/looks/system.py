"""The distribution, how it boots, and what the kernel was told."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping

from gpuswitch.doctor.machine import Files
from gpuswitch.doctor.seen import System

_FAMILIES: Mapping[str, str] = {
    "ubuntu": "ubuntu",
    "debian": "debian",
    "fedora": "fedora",
    "rhel": "fedora",
    "arch": "arch",
    "suse": "suse",
    "opensuse": "suse",
    "nixos": "nixos",
}
_UPDATE_INITRAMFS = "update-initramfs"
_INITRAMFS = ((_UPDATE_INITRAMFS, "initramfs-tools"), ("mkinitcpio", "mkinitcpio"), ("dracut", "dracut"))
_EFI_VARIABLES = "/sys/firmware/efi/efivars"
_SECURE_BOOT = f"{_EFI_VARIABLES}/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"
_LOADER_INFO = f"{_EFI_VARIABLES}/LoaderInfo-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"
"""https://systemd.io/BOOT_LOADER_INTERFACE: four bytes of attributes, then UTF-16."""
_STUB_INFO = f"{_EFI_VARIABLES}/StubInfo-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"
"""Set by the stub of a unified kernel image alone (systemd-stub(7))."""
_SELINUX = "/sys/fs/selinux"


def look(files: Files) -> System:
    release = _release(files)
    family = _family(files, release)
    options = shlex_words(files.text("/proc/cmdline"))
    unconfined = files.text(f"{_SELINUX}/booleans/virt_hooks_unconfined").split()
    return System(
        name=release.get("PRETTY_NAME", ""),
        family=family,
        loader=_loader(files, family),
        initramfs=_initramfs(files, family),
        kernel=files.text("/proc/sys/kernel/osrelease").strip() or os.uname().release,
        command_line=options,
        grub_files=_grub_files(files, family),
        kernel_cmdline=files.there("/etc/kernel/cmdline"),
        update_initramfs=bool(files.program(_UPDATE_INITRAMFS)),
        unified=files.there(_STUB_INFO),
        tables=_tables(files),
        secure_boot=_secure_boot(files),
        lockdown=_lockdown(files.text("/sys/kernel/security/lockdown")),
        selinux_enforcing=files.text(f"{_SELINUX}/enforce").strip() == "1",
        # What is in force, and what will be: sel_read_bool in security/selinux/selinuxfs.c.
        selinux_hooks_unconfined=unconfined[0] == "1" if unconfined else None,
        apparmor=files.text("/sys/module/apparmor/parameters/enabled").strip() == "Y",
    )


def shlex_words(command_line: str) -> tuple[str, ...]:
    """The words of the kernel's command line; a quoted value is one of them."""
    try:
        return tuple(shlex.split(command_line))
    except ValueError:  # a quote without an end
        return tuple(command_line.split())


def _release(files: Files) -> Mapping[str, str]:
    """os-release(5)."""
    lines = files.text("/etc/os-release") or files.text("/usr/lib/os-release")
    found = {}
    for name, value in re.findall(r"^([A-Z_]+)=(.*)$", lines, re.MULTILINE):
        found[name] = value.strip().strip("\"'")
    return found


def _family(files: Files, release: Mapping[str, str]) -> str:
    if files.there("/usr/bin/pveversion"):
        return "proxmox"
    if files.there("/run/ostree-booted") and files.program("rpm-ostree"):
        return "ostree"
    names = [release.get("ID", ""), *release.get("ID_LIKE", "").split()]
    return next((_FAMILIES[name.partition("-")[0]] for name in names if name.partition("-")[0] in _FAMILIES), "")


def _loader(files: Files, family: str) -> str:
    """What writes the kernel's command line. The one that booted says so (LoaderInfo), where it can."""
    booted = files.text(_LOADER_INFO).replace("\0", "")
    if family == "nixos":
        return "nixos"
    if family == "ostree":
        return "rpm-ostree"
    if files.program("kernelstub"):
        return "kernelstub"
    if family == "proxmox" and "systemd-boot" in booted and files.there("/etc/kernel/proxmox-boot-uuids"):
        return "proxmox-boot-tool"
    if family == "fedora" and files.program("grubby"):
        return "grubby"
    if "systemd-boot" in booted:
        return "systemd-boot"
    if files.there("/etc/default/grub"):
        return "grub"
    return "systemd-boot" if files.there("/boot/loader/loader.conf") else ""


def _grub_files(files: Files, family: str) -> tuple[str, ...]:
    """Debian's grub-mkconfig reads a folder, too (its patch default-grub-d)."""
    more = files.below(["/etc/default/grub.d"], ".cfg") if family in {"debian", "ubuntu", "proxmox"} else ()
    return ("/etc/default/grub", *more)


def _initramfs(files: Files, family: str) -> str:
    if family == "nixos":
        return "nixos"
    if family == "ostree":
        return ""  # made with the image
    if "dracut" in files.text(files.program(_UPDATE_INITRAMFS)):
        return "dracut"  # whose package brings a script of that name (Debian 13 and later)
    return next((name for program, name in _INITRAMFS if files.program(program)), "")


def _tables(files: Files) -> frozenset[str] | None:
    """Their names alone: the tables themselves are for root."""
    folder = "/sys/firmware/acpi/tables"
    return frozenset(files.names(folder)) if files.there(folder) else None


def _secure_boot(files: Files) -> bool | None:
    said = files.text(_SECURE_BOOT)
    if said:
        return said[-1] == "\x01"
    return None if files.there("/sys/firmware/efi") else False


def _lockdown(text: str) -> str:
    """`none [integrity] confidentiality` (lockdown_read in security/lockdown/lockdown.c)."""
    found = re.search(r"\[(\w+)\]", text)
    return found[1] if found else ""
