"""Which PCI function the boot's frame buffer belongs to. For the look and for the worker: imports next to nothing.

The firmware's frame buffer is a platform device of the kernel's own (drivers/firmware/sysfb.c; where coreboot left it,
drivers/firmware/google/framebuffer-coreboot.c). From 6.9 on it lies below the PCI function, and coreboot's since there
is corebootdrm. Before, only the memory tells: its driver claims it, as a function claims that of its BARs, and
/proc/iomem has both by name. Who may not know addresses reads zeros there, and finds nobody.
"""

import os

_FB_MAX = 32
BOOT_DRIVERS: dict[str, tuple[str, ...]] = {
    # efifb and vesafb claim it themselves (drivers/video/fbdev/efifb.c, vesafb.c). efidrm and vesadrm go by the same
    # names (drivers/gpu/drm/sysfb), in kernels where nobody has to ask the memory.
    "efi-framebuffer": ("efifb",),
    "vesa-framebuffer": ("vesafb",),
    # sysfb claims it for simplefb and simpledrm (drivers/firmware/sysfb_simplefb.c); both drivers are called this. The
    # device has claimed what coreboot left, where that is not for corebootdrm.
    "simple-framebuffer": ("BOOTFB", "Coreboot Framebuffer"),
    # corebootdrm.
    "coreboot-framebuffer": (),
}
"""Drivers of the boot's frame buffer, by their names on the platform bus, with the names that its memory may have."""


def function_of(device: str, driver: str, iomem: str) -> str:
    """The address of the PCI function whose frame buffer it is, "" where that cannot be told.

    `device` is a link to the platform device, `driver` the name of the driver that has it.
    """
    if driver not in BOOT_DRIVERS:
        return ""
    above = _target(device).rpartition("/")[0].rpartition("/")[2]
    if _is_function(above):
        return above
    ranges = _ranges(iomem)
    memory = [(first, last) for first, last, name in ranges if name in BOOT_DRIVERS[driver]]
    if len(memory) != 1 or memory[0] == (0, 0):
        return ""
    [(begin, end)] = memory
    return next((name for first, last, name in ranges if _is_function(name) and first <= begin and end <= last), "")


def console_map(command_line: str) -> frozenset[int] | None:
    """The frame buffers that `fbcon=map:` names, by a digit each, on the kernel's command line; None: it is not there.

    As fb_console_setup reads it (drivers/video/fbdev/core/fbcon.c).
    """
    options = [o for word in command_line.split() if word.startswith("fbcon=") for o in word[6:].split(",")]
    maps = [option[4:] for option in options if option.startswith("map:") and option[4:]]
    return frozenset((ord(digit) - ord("0")) % _FB_MAX for digit in maps[-1]) if maps else None


def _is_function(name: str) -> bool:
    """Functions are called by their addresses, and nothing else has two colons (`AMDIF030:00`, `pci0000:00`)."""
    return name.count(":") == 2


def _ranges(iomem: str) -> list[tuple[int, int, str]]:
    """First and last address and name of every range (`  e0000000-e02fffff : efifb`)."""
    ranges = []
    for line in _text(iomem).splitlines():
        addresses, _, name = line.strip().partition(" : ")
        first, _, last = addresses.partition("-")
        ranges.append((int(first, 16), int(last, 16), name))
    return ranges


def _target(link: str) -> str:
    try:
        return os.readlink(link)  # noqa: PTH115 - pathlib would double the time that the worker takes to start
    except OSError:
        return ""


def _text(path: str) -> str:
    """All of it: the kernel hands it out by the page."""
    parts = []
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except (FileNotFoundError, PermissionError):
        return ""
    try:
        while part := os.read(descriptor, 65536):
            parts.append(part)
    finally:
        os.close(descriptor)
    return b"".join(parts).decode(errors="replace")
