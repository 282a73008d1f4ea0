"""Which display the machine booted on: the one place that says so.

Three sources, the first that knows wins (docs/adr/0017-the-booted-display-has-the-firmwares-frame-buffer.md):

1. The DRM card of the function says so by a file `boot_display`, which is there for no other card (since Linux 7.0;
   boot_display_show in drivers/gpu/drm/drm_sysfs.c). A card is there only while a DRM driver has the function.
2. The firmware's frame buffer lies in the memory of the function. Its platform device lies below the function (since
   6.9, drivers/firmware/sysfb.c), until the function's own driver takes it away; what the boot loader told the kernel
   stays (x86; `screen_info` at the begin of `boot_params`, arch/x86/kernel/ksysfs.c).
3. `boot_vga`, which functions of class 0300 alone have (boot_vga_show in drivers/pci/pci-sysfs.c). Where the frame
   buffer lies in a function of class 0380, it names some other one.

What a look opens for that prints a constant, or fields of a structure; no device lock is taken, no device is woken.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterable, Iterator, Mapping

from gpuswitch.host.linux.framebuffers import BOOT_DRIVERS
from gpuswitch.host.linux.scanning.files import contents, names, says_nothing, text

# struct screen_info in include/uapi/linux/screen_info.h, of which boot_params begins with one: orig_video_isVGA,
# lfb_base, lfb_size, capabilities, ext_lfb_base.
_SCREEN_INFO = struct.Struct("<15xB8xII22xII2x")
_VIDEO_TYPE_VLFB, _VIDEO_TYPE_EFI = 0x23, 0x70
_VIDEO_CAPABILITY_64BIT_BASE = 1 << 1
_IORESOURCE_MEM = 0x00000200
_DEVICES = frozenset(f"{driver}.0" for driver in BOOT_DRIVERS)


class BootDisplay:
    """Remembers what a source has said of a function for as long as that is on the bus, though it says so no more."""

    def __init__(self, sysfs: str) -> None:
        self._devices = f"{sysfs}/bus/pci/devices"
        self._screen = _screen(f"{sysfs}/kernel/boot_params/data")
        self._by_card: dict[str, int] = {}
        self._by_memory: dict[str, int] = {}

    def among(self, displays: Mapping[str, int], framebuffers: Collection[str]) -> frozenset[str]:
        """The booted one of these display functions; none where nobody knows, several where `boot_vga` says so.

        `displays`: the address of each with what changes when it leaves the bus and another comes. `framebuffers`: the
        functions in whose memory a driver of the firmware's frame buffer has it.
        """
        cards = self._cards(displays)
        memory = [] if cards else self._memory(displays, framebuffers)
        for known, found in ((self._by_card, cards), (self._by_memory, memory)):
            if found:
                known.clear()
                known.update((name, displays[name]) for name in found)
            if there := frozenset(name for name, token in known.items() if displays.get(name) == token):
                return there
        return frozenset(name for name in displays if self._boot_vga(name))

    def _cards(self, displays: Iterable[str]) -> list[str]:
        """Linux 7.0 and 7.1 have the file for the default VGA device as well, wherever the frame buffer lies."""
        said = [name for name in displays if self._says(name)]
        return [name for name in said if not self._boot_vga(name)] or said

    def _says(self, name: str) -> bool:
        """The card, or the function itself, as in release candidates of 6.17 and what was made of them."""
        path = f"{self._devices}/{name}"
        places = [f"{path}/drm/{card}" for card in names(f"{path}/drm") if card.startswith("card")]
        return any(text(f"{place}/boot_display") == "1" for place in (*places, path))

    def _memory(self, displays: Iterable[str], framebuffers: Collection[str]) -> list[str]:
        return [name for name in displays if name in framebuffers or self._has_device(name) or self._has_screen(name)]

    def _has_device(self, name: str) -> bool:
        """A driver may have it, or none."""
        return not _DEVICES.isdisjoint(names(f"{self._devices}/{name}"))

    def _has_screen(self, name: str) -> bool:
        if self._screen is None:
            return False
        begin, end = self._screen
        resources = _memory_of(text(f"{self._devices}/{name}/resource"))
        return any(first <= begin and end <= last for first, last in resources)

    def _boot_vga(self, name: str) -> bool:
        return text(f"{self._devices}/{name}/boot_vga") == "1"


def _screen(boot_params: str) -> tuple[int, int] | None:
    """First and last address of the frame buffer that the machine was booted with; None: text, none, or not told."""
    try:
        kind, base, size, capabilities, more = _SCREEN_INFO.unpack(contents(boot_params)[: _SCREEN_INFO.size])
    except struct.error:
        return None
    except OSError as error:
        if says_nothing(error):
            return None
        raise
    if capabilities & _VIDEO_CAPABILITY_64BIT_BASE:
        base |= more << 32
    if kind == _VIDEO_TYPE_VLFB:
        size <<= 16
    elif kind != _VIDEO_TYPE_EFI:
        return None
    return (base, base + size - 1) if base and size else None


def _memory_of(resource: str) -> Iterator[tuple[int, int]]:
    """First and last address of each memory range: a line each has begin, end and flags (resource_show)."""
    for line in resource.splitlines():
        first, last, flags = (int(number, 16) for number in line.split())
        if flags & _IORESOURCE_MEM:
            yield first, last
