"""What a card is told by, where its address is no matter: that moves with the numbers of the buses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from gpuswitch.model.facts import HostFacts
from gpuswitch.model.gpu import Gpu, above


@dataclass(frozen=True, slots=True)
class Match:
    """What has to be so of a GPU, all of it; "" is no matter. False where it says nothing.

    `vendor` and `device` are four hex digits in lower case, `subsystem` two such numbers (`1043:87c1`): the numbers of
    its display function (of an accelerator, its own). `serial` is its serial number (`PciFunction.serial`), `slot` the
    name of its physical slot, `port` the address of a bridge above it.
    """

    vendor: str = ""
    device: str = ""
    subsystem: str = ""
    serial: str = ""
    slot: str = ""
    port: str = ""

    def says(self) -> dict[str, str]:
        """What it says, by key."""
        return {each.name: value for each in fields(self) if (value := getattr(self, each.name))}

    def __bool__(self) -> bool:
        return bool(self.says())

    def fits(self, gpu: Gpu, facts: HostFacts) -> bool:
        """Whether all of it is so of this GPU."""
        has = traits(gpu, facts)
        return all(value in has.get(key, ()) for key, value in self.says().items())

    def __str__(self) -> str:
        return ",".join(f"{key}={value}" for key, value in self.says().items())


def traits(gpu: Gpu, facts: HostFacts) -> Mapping[str, tuple[str, ...]]:
    """What a `Match` may say of this GPU, by key, the best first: none for a key where nothing is known of that.

    Of the bridges above it, the one on the root bus is the best: its own address does not move.
    """
    function = facts.functions.get(gpu.address)
    if function is None:
        return {}
    bridges = tuple(reversed(tuple(above(function, facts))))
    places = {address.slot_name for address in (*bridges, gpu.address)}
    # Without the number of the device where the slot has room for several (address_read_file in drivers/pci/slot.c).
    places |= {place.rpartition(":")[0] for place in places}
    found = {
        "vendor": (f"{function.vendor:04x}",),
        "device": (f"{function.device:04x}",),
        "subsystem": (function.subsystem,),
        "serial": (function.serial,),
        "slot": tuple(name for name, place in facts.slots.items() if place in places),
        "port": tuple(map(str, bridges)),
    }
    return {key: known for key, values in found.items() if (known := tuple(filter(None, values)))}
