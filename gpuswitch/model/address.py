"""PCI addresses: `domain:bus:slot.function`, in every spelling that people use, and nothing else."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple, Self

from gpuswitch.errors import InvalidArgument
from gpuswitch.sentence import Sentence

# Domains are four digits, or up to eight behind Intel VMD (drivers/pci/controller/vmd.c starts at 0x10000).
_PCI = re.compile(r"(?:([0-9a-f]{4,8}):)?([0-9a-f]{2}):([01][0-9a-f])\.([0-7])", re.IGNORECASE | re.ASCII)
_LIBVIRT = re.compile(r"pci_([0-9a-f]{4,8})_([0-9a-f]{2})_([01][0-9a-f])_([0-7])", re.IGNORECASE | re.ASCII)


class PciAddress(NamedTuple):
    """One PCI function's address. Sorts as the kernel numbers: domain, bus, slot, function."""

    domain: int
    bus: int
    slot: int
    function: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `0000:01:00.0`, `01:00.0` (domain 0) or libvirt's `pci_0000_01_00_0`; hex digits in either case.

        Raises:
            InvalidArgument: for anything else.
        """
        match = _PCI.fullmatch(text) or _LIBVIRT.fullmatch(text)
        if match is None:
            raise InvalidArgument(
                Sentence("{text} is not a PCI address; write it like 0000:01:00.0", text=repr(text[:80]))
            )
        domain, bus, slot, function = match.groups()
        return cls(int(domain or "0", 16), int(bus, 16), int(slot, 16), int(function, 16))

    @property
    def slot_name(self) -> str:
        """The slot that this function shares with its siblings, `0000:01:00`."""
        return f"{self.domain:04x}:{self.bus:02x}:{self.slot:02x}"

    @property
    def identifier(self) -> str:
        """The address with underscores only, `0000_01_00_0`: for D-Bus paths and file names."""
        return str(self).replace(":", "_").replace(".", "_")

    def __str__(self) -> str:
        return _written(*self)


@lru_cache(maxsize=1024)
def _written(domain: int, bus: int, slot: int, function: int) -> str:
    """Addresses are written far more often than there are any."""
    return f"{domain:04x}:{bus:02x}:{slot:02x}.{function}"
