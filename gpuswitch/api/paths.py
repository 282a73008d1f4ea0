"""Our names on the bus."""

from __future__ import annotations

from gpuswitch.model.address import PciAddress

NAME = "org.gpuswitch1"
ROOT = "/org/gpuswitch1"


def path_of(address: PciAddress) -> str:
    """The object path of a GPU."""
    return f"{ROOT}/gpu/{address.identifier}"
