"""The guards: every reason why a GPU must not be moved now, all at once, over frozen facts.

A guard changes nothing and asks nobody; it says who is in the way and what to do about it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from gpuswitch.errors import Busy, Failed, GpuswitchError, InProgress, NotViable, Owned, Wedged
from gpuswitch.model.address import PciAddress
from gpuswitch.model.drivers import vfio_available, vfio_drivers
from gpuswitch.model.facts import HostFacts, Kind, PciFunction, counted
from gpuswitch.model.gpu import Gpu, harmless
from gpuswitch.model.states import State
from gpuswitch.switch.steps.pci import NO_GROUPS


@dataclass(frozen=True, slots=True)
class Blocker:
    """One reason to refuse: its `kind` in a word, `sentence` for a person, `error` as clients and metrics have it."""

    kind: str
    sentence: str
    error: type[GpuswitchError] = NotViable


# Where several blockers meet, the first of these that occurs is the error's name; its text lists them all.
_PRECEDENCE: tuple[type[GpuswitchError], ...] = (Wedged, InProgress, Owned, Busy, NotViable, Failed)


def refusal(blockers: Iterable[Blocker]) -> GpuswitchError:
    """One error that names all blockers, a line each, and has them as data."""
    blockers = tuple(blockers)
    named = next(error for error in _PRECEDENCE if any(b.error is error for b in blockers))
    error = named("\n".join(b.sentence for b in blockers))
    error.blockers = tuple({"kind": b.kind, "text": b.sentence, "error": b.error.name} for b in blockers)
    return error


def blockers(
    gpu: Gpu,
    target: State,
    state: State,
    facts: HostFacts,
    *,
    allow_boot_display: bool = False,
    vfio_driver: str = "",
    along: Collection[PciAddress] = (),
) -> tuple[Blocker, ...]:
    """Everything that keeps `gpu`, now in `state`, from going to `target` (State.HOST or State.VFIO).

    On vfio already, it is of no use to a machine while its groups are not viable; all else is as it was taken there.
    `vfio_driver`: what the configuration names for its display functions. `along`: functions that the same machine
    gets, which are not in the way of each other.
    """
    if target is state is State.VFIO:
        return tuple(_groups(gpu, facts, along))
    found = [*_state(gpu, state), *_presence(gpu, facts), *without_groups(gpu, target, facts)]
    if target is State.VFIO:
        found += _immovable(gpu, facts)
        found += [
            *_host_ready(gpu, facts),
            *_drivers(gpu, facts, vfio_driver),
            *_groups(gpu, facts, along),
            *_shared_out(gpu, facts),
        ]
        if not allow_boot_display:
            found += _boot_display(gpu, facts)
    return tuple(found)


def _state(gpu: Gpu, state: State) -> Iterator[Blocker]:
    if state is State.WEDGED:
        yield Blocker(
            "wedged",
            f"{gpu.address} is wedged: an operation of the kernel on it has not returned, and a further one would "
            "only queue behind it",
            Wedged,
        )
    elif state.moving:
        yield Blocker("in_progress", f"{gpu.address} is {state}: wait until it is at rest", InProgress)


def _presence(gpu: Gpu, facts: HostFacts) -> Iterator[Blocker]:
    for address in gpu.missing(facts):
        yield Blocker("missing_function", f"function {address} is not on the PCI bus")


def _immovable(gpu: Gpu, facts: HostFacts) -> Iterator[Blocker]:
    """What only the config can have made part of a GPU."""
    for function in gpu.present(facts):
        if function.kind in _THE_BOARD:
            yield Blocker("member", f"{function.address} is a bridge: take it out of `members` of this GPU")
        elif function.physical_function is not None:
            yield Blocker(
                "member",
                f"{function.address} is a virtual function of {function.physical_function}: take it out of `members` "
                "of this GPU",
            )


def _host_ready(gpu: Gpu, facts: HostFacts) -> Iterator[Blocker]:
    if not facts.iommu:
        yield Blocker("no_iommu", f"the IOMMU is off: {_switch_on(facts)}")
    else:
        why = _LEFT_OUT.get(facts.processor, _LEFT_OUT_ANY)
        for function in gpu.present(facts):
            if function.iommu_group is None:
                yield Blocker("no_iommu", f"{function.address} has no IOMMU group: {why}")


def _drivers(gpu: Gpu, facts: HostFacts, named: str) -> Iterator[Blocker]:
    for driver in dict.fromkeys(vfio_drivers(gpu, facts, named).values()):
        if not vfio_available(driver, facts):
            why = "its kernel module is not installed" if facts.modules_on_disk else f"the {GONE}: restart the machine"
            yield Blocker("no_vfio", f"the driver {driver.name} is not available: {why}")


def without_groups(gpu: Gpu, target: State, facts: HostFacts) -> Iterator[Blocker]:
    """A kernel on which nobody can hold the GPU while it is taken from its vfio driver; known once vfio is loaded."""
    if facts.vfio_without_groups and (target is State.VFIO or any(f.on_vfio for f in gpu.present(facts))):
        yield Blocker(
            "no_vfio_groups", f"{gpu.address} cannot be kept from virtual machines while it moves: {NO_GROUPS}"
        )


def _groups(gpu: Gpu, facts: HostFacts, along: Collection[PciAddress]) -> Iterator[Blocker]:
    """What keeps its groups from being given to a machine, wherever the GPU is."""
    yield from _without_iommu(gpu, facts)
    yield from _neighbours(gpu, facts, along)
    yield from _reserved(gpu, facts)


def _switch_on(facts: HostFacts) -> str:
    return _SWITCH_ON.get(facts.hypervisor or facts.processor, _SWITCH_ON_ANY)


def _without_iommu(gpu: Gpu, facts: HostFacts) -> Iterator[Blocker]:
    """Such groups vfio makes when it has the device, so nobody is asked before; QEMU and libvirt cannot use them."""
    for number in gpu.groups(facts):
        if number in facts.groups_without_iommu:
            yield Blocker(
                "no_iommu",
                f"IOMMU group {number} is one of vfio's own, without an IOMMU (enable_unsafe_noiommu_mode), and no "
                f"virtual machine can have it; the IOMMU is off: {_switch_on(facts)}",
            )


def _neighbours(gpu: Gpu, facts: HostFacts, along: Collection[PciAddress]) -> Iterator[Blocker]:
    for neighbour in gpu.neighbours(facts):
        if not harmless(neighbour) and neighbour.address not in along:
            both = neighbour.kind not in _THE_BOARD and neighbour.physical_function is None
            remedy = "unbind it, or name it in `members` of this GPU to move both" if both else "unbind it"
            yield Blocker(
                "neighbour",
                f"{describe(neighbour)} is in IOMMU group {neighbour.iommu_group} too and stays on "
                f"{neighbour.driver_name}: {remedy}",
            )


def _reserved(gpu: Gpu, facts: HostFacts) -> Iterator[Blocker]:
    """The kernel lets vfio have such devices, and then refuses to give their group to a machine.

    On Intel at once (device_rmrr_is_relaxable in drivers/iommu/intel/iommu.c), on all since 6.6 (`require_direct` in
    drivers/iommu/iommu.c).
    """
    for number in gpu.groups(facts):
        if regions := facts.direct_regions.get(number):
            yield Blocker(
                "reserved_region",
                f"IOMMU group {number} has memory that the firmware claims for itself "
                f"({', '.join(regions)}, {_CLAIMED.get(facts.processor, 'RMRR')}), "
                "and no virtual machine can have it: put the card into another slot, or have the firmware claim none "
                "for this one (an update of it, or its settings for shared memory of devices)",
            )


def _shared_out(gpu: Gpu, facts: HostFacts) -> Iterator[Blocker]:
    for function in gpu.present(facts):
        if function.virtual_functions:
            yield Blocker(
                "virtual_functions",
                f"{function.address} has {counted(function.virtual_functions, 'virtual function')}: "
                "write 0 to its sriov_numvfs first",
            )
        if function.mediated_devices:
            yield Blocker(
                "mediated_devices",
                f"{function.address} has {counted(function.mediated_devices, 'mediated device')}: remove "
                f"{'it' if function.mediated_devices == 1 else 'them'} first",
            )


def _boot_display(gpu: Gpu, facts: HostFacts) -> list[Blocker]:
    return [
        Blocker(
            "boot_display",
            f"{function.address} is the display that this machine booted on, so its screen would go dark: "
            "set allow_boot_display for this GPU if that is what you want",
        )
        for function in gpu.present(facts)
        if function.boot_display
    ]


GONE = "modules of the running kernel are not on disk any more, as after an upgrade of it"
_SWITCH_ON = {
    "intel": "enable VT-d in the firmware, and add intel_iommu=on to the kernel command line",
    "amd": "enable AMD-Vi (often called IOMMU) in the firmware",
    "arm": "enable the SMMU in the firmware; a machine that has none before its PCIe slots cannot give a GPU away",
    "xen": "Xen has it, and this is a domain of Xen, where there is no vfio; give the GPU away with Xen's own tools",
    "machine": "this is a virtual machine; have its host give it a virtual IOMMU (libvirt: <iommu model='intel'>)",
}
_SWITCH_ON_ANY = (
    "enable it in the firmware (VT-d on Intel, AMD-Vi on AMD, the SMMU on ARM), and on Intel add intel_iommu=on to the "
    "kernel command line"
)
_LEFT_OUT = {
    "intel": "the kernel leaves it out; igfx_off on its command line does that, or the firmware (the DMAR table)",
    "arm": "there is no SMMU before its slot, and without one it cannot be given away",
}
_LEFT_OUT_ANY = "there is no IOMMU before its slot, or the firmware does not tell of one"
_CLAIMED = {"intel": "RMRR", "amd": "IVMD", "arm": "RMR"}
"""What the firmware's tables call such memory (DMAR, IVRS, IORT)."""

_THE_BOARD = frozenset({Kind.BRIDGE, Kind.CHIPSET})
"""Kinds that no machine can have."""
_KINDS: Mapping[Kind, str] = {
    Kind.DISPLAY: "GPU",
    Kind.ACCELERATOR: "accelerator",
    Kind.BRIDGE: "bridge",
    Kind.CHIPSET: "bridge",
    Kind.AUDIO: "audio device",
    Kind.USB: "USB controller",
    Kind.UCSI: "USB-C controller",
    Kind.NETWORK: "network card",
    Kind.STORAGE: "storage controller",
}


def describe(function: PciFunction) -> str:
    """`the network card 0000:02:00.0 (Realtek ...)`."""
    name = " ".join(filter(None, (function.maker, function.model)))
    what = "NVSwitch" if function.nvswitch else _KINDS.get(function.kind, "device")
    return f"the {what} {function.address}" + (f" ({name})" if name else "")
