"""Which functions make one GPU, and who else lives in its IOMMU groups. Pure: facts in, values out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import HostFacts, Kind, PciFunction

_COMPANIONS = {Kind.AUDIO, Kind.USB, Kind.UCSI}
# Drivers under which a neighbour does not stop a group from being given away: they do no DMA of their own
# (`driver_managed_dma` in drivers/pci/pci-stub.c and pcie/portdrv.c). So does every vfio driver.
_HARMLESS_DRIVERS = {None, "pci-stub", "pcieport"}


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU: the functions that move together.

    `address` is its first display function (of an accelerator without one, that itself) and its name on the bus;
    `functions` are all of them in address order, these included.
    """

    address: PciAddress
    functions: tuple[PciAddress, ...]

    def in_detach_order(self, facts: HostFacts) -> tuple[PciAddress, ...]:
        """Companions first, display functions last: nothing of the GPU outlives the function that powers it."""
        return tuple(sorted(self.functions, key=lambda a: (_makes_gpu(facts, a), a)))

    def in_attach_order(self, facts: HostFacts) -> tuple[PciAddress, ...]:
        """The reverse: display functions first."""
        return tuple(reversed(self.in_detach_order(facts)))

    def present(self, facts: HostFacts) -> tuple[PciFunction, ...]:
        """Those of its functions that are on the bus."""
        there = facts.functions
        return tuple([there[a] for a in self.functions if a in there])

    def missing(self, facts: HostFacts) -> tuple[PciAddress, ...]:
        return tuple(a for a in self.functions if a not in facts.functions)

    def draws(self, facts: HostFacts) -> bool:
        """Whether it has a display function: what has none is an accelerator."""
        return any(f.kind is Kind.DISPLAY for f in self.present(facts))

    def groups(self, facts: HostFacts) -> tuple[int, ...]:
        """The numbers of its IOMMU groups, sorted."""
        return tuple(sorted({f.iommu_group for f in self.present(facts) if f.iommu_group is not None}))

    def adds(self, facts: HostFacts) -> tuple[str, ...]:
        """What its functions bring with them (`HostFacts.adds`), each once."""
        return tuple(dict.fromkeys(word for function in self.present(facts) for word in facts.adds(function)))

    def neighbours(self, facts: HostFacts) -> tuple[PciFunction, ...]:
        """Every other endpoint in its IOMMU groups.

        Bridges are not endpoints; but one with a driver that the kernel takes for an endpoint's (shpchp) counts as one.
        """
        return tuple(
            function
            for number in self.groups(facts)
            for function in facts.group(number)
            if function.address not in self.functions and (function.kind is not Kind.BRIDGE or not harmless(function))
        )


def harmless(neighbour: PciFunction) -> bool:
    """Whether a group stays viable with this neighbour in it: on a vfio driver already, or with no driver."""
    return neighbour.on_vfio or neighbour.driver_name in _HARMLESS_DRIVERS


def discover(facts: HostFacts, members: Mapping[PciAddress, Iterable[PciAddress]] | None = None) -> tuple[Gpu, ...]:
    """Every GPU of the host, in address order.

    `members` names, by a GPU's address, further functions that must move along; one that is the display function of
    another GPU brings that whole GPU. A function belongs to exactly one GPU: a configured member beats a companion.
    """
    own = _own_functions(facts)
    for address, named in sorted((members or {}).items()):
        gpu = _holder_of(own, address)
        if gpu is None:
            continue
        for member in named:
            other = _holder_of(own, member)
            if other is not None and other != gpu and _makes_gpu(facts, member):
                own[gpu] |= own.pop(other)
            elif other is not None:
                own[other].discard(member)
            own[gpu].add(member)
    return tuple(Gpu(address, tuple(sorted(functions))) for address, functions in sorted(own.items()))


def _own_functions(facts: HostFacts) -> dict[PciAddress, set[PciAddress]]:
    """Each slot's GPU by its first display function, before the config has its say. Virtual functions are nobody's."""
    switches = _switches(facts)
    slots: dict[tuple[int, ...], list[PciFunction]] = {}
    for address, function in sorted(facts.functions.items()):
        if function.physical_function is None:
            slots.setdefault(address[:-1], []).append(function)
    own = {}
    for functions in slots.values():
        hearts = sorted((f for f in functions if f.makes_gpu), key=lambda f: (f.kind is not Kind.DISPLAY, f.address))
        if hearts:
            elsewhere = switches.get(_own_switch(hearts[0], facts), [])
            together = [*hearts, *_companions(hearts[0], functions), *elsewhere]
            own[hearts[0].address] = {f.address for f in together}
    return own


def _companions(display: PciFunction, slot: Iterable[PciFunction]) -> list[PciFunction]:
    """The functions of the display's slot that belong to it.

    A processor's graphics shares its slot with the host's own USB controllers and sound (an AMD APU puts its security
    processor there too): of a root-complex device only the audio that its own maker built for it comes along. USB of
    another maker than the display's is the host's: AMD's graphics (1002) have the processor's (1022) beside them.
    """
    siblings = [f for f in slot if not f.makes_gpu]
    if _root_complex(display, siblings):
        return [f for f in siblings if f.kind is Kind.AUDIO and f.vendor == display.vendor]
    return [f for f in siblings if f.kind in _COMPANIONS]


def _switches(facts: HostFacts) -> dict[PciAddress | None, list[PciFunction]]:
    """The companions below PCIe switches that are part of a card, each by its upstream port.

    Intel's Arc cards have their sound behind a downstream port of its own, so on another bus than the picture. A switch
    with more than one card below it is the board's.
    """
    found: dict[PciAddress | None, list[PciFunction]] = {}
    slots: dict[PciAddress, set[tuple[int, ...]]] = {}
    for function in facts.functions.values():
        if function.physical_function is not None:
            continue
        if function.makes_gpu:
            for bridge in above(function, facts):
                slots.setdefault(bridge, set()).add(function.address[:-1])
        elif function.kind in _COMPANIONS and (port := _own_switch(function, facts)) is not None:
            found.setdefault(port, []).append(function)
    return {port: functions for port, functions in found.items() if port and len(slots.get(port, ())) == 1}


def _own_switch(function: PciFunction, facts: HostFacts) -> PciAddress | None:
    """The upstream port of the switch that is on one card with this function; None where it is on none.

    It is two bridges further up, below a port of the board, and of the function's own maker: there are switches on
    boards, in docks and in chipsets, too, with functions of the host below them.
    """
    ports = list(above(function, facts))[:2]
    bridges = [facts.functions[port] for port in ports]
    ours = all(f.kind is Kind.BRIDGE and f.vendor == function.vendor for f in bridges)
    return ports[1] if len(ports) == 2 and ours and bridges[1].parent is not None else None


def above(function: PciFunction, facts: HostFacts) -> Iterator[PciAddress]:
    """The bridges above it, nearest first, as far as a look shows them."""
    parent, seen = function.parent, {function.address}
    while parent is not None and parent in facts.functions and parent not in seen:
        yield parent
        seen.add(parent)
        parent = facts.functions[parent].parent


def _root_complex(display: PciFunction, siblings: Iterable[PciFunction]) -> bool:
    """On a root bus (Intel), or in a slot that also holds what no graphics card has (an AMD APU's)."""
    return display.parent is None or any(not _of_a_card(display, sibling) for sibling in siblings)


def _of_a_card(display: PciFunction, sibling: PciFunction) -> bool:
    return sibling.kind is Kind.AUDIO or (sibling.kind in _COMPANIONS and sibling.vendor == display.vendor)


def _holder_of(own: Mapping[PciAddress, set[PciAddress]], function: PciAddress) -> PciAddress | None:
    return next((gpu for gpu, functions in own.items() if function in functions), None)


def _makes_gpu(facts: HostFacts, address: PciAddress) -> bool:
    function = facts.functions.get(address)
    return function is not None and function.makes_gpu
