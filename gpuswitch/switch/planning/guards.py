"""The guards: every reason why a GPU must not be moved now, all at once, over frozen facts.

A guard changes nothing and asks nobody; it says who is in the way and what to do about it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from gpuswitch.config.settings import Config
from gpuswitch.errors import Busy, Failed, GpuswitchError, InProgress, NotViable, Owned, Wedged
from gpuswitch.model.address import PciAddress
from gpuswitch.model.drivers import vfio_available, vfio_drivers
from gpuswitch.model.facts import VFIO_DRIVER, HostFacts, Kind, PciFunction
from gpuswitch.model.gpu import Gpu, harmless
from gpuswitch.model.states import State
from gpuswitch.sentence import Sentence
from gpuswitch.switch.planning.remedies import to_set, to_set_members
from gpuswitch.switch.steps.pci import NO_GROUPS


@dataclass(frozen=True, slots=True)
class Blocker:
    """One reason to refuse: its `kind` in a word, `sentence` for a person, `error` as clients and metrics have it."""

    kind: str
    sentence: Sentence
    error: type[GpuswitchError] = NotViable


# Where several blockers meet, the first of these that occurs is the error's name; its text lists them all.
_PRECEDENCE: tuple[type[GpuswitchError], ...] = (Wedged, InProgress, Owned, Busy, NotViable, Failed)


def refusal(blockers: Iterable[Blocker]) -> GpuswitchError:
    """One error that names all blockers, a line each, and has them as data."""
    blockers = tuple(blockers)
    named = next(error for error in _PRECEDENCE if any(b.error is error for b in blockers))
    error = named(Sentence.joined("\n", (b.sentence for b in blockers)))
    error.blockers = tuple({"kind": b.kind, "text": b.sentence, "error": b.error.name} for b in blockers)
    return error


def blockers(
    gpu: Gpu,
    target: State,
    state: State,
    facts: HostFacts,
    config: Config,
    *,
    along: Collection[PciAddress] = (),
) -> tuple[Blocker, ...]:
    """Everything that keeps `gpu`, now in `state`, from going to `target` (State.HOST or State.VFIO).

    On vfio already, it is refused only for what keeps any machine from having it (`_viability`); all else is as it was
    taken there.
    `along`: functions that the same machine gets, which are not in the way of each other.
    """
    if target is state is State.VFIO:
        return tuple(_viability(gpu, facts, config, along))
    found = [*_state(gpu, state), *_presence(gpu, facts, config), *without_groups(gpu, target, facts)]
    if target is State.VFIO:
        found += _immovable(gpu, facts, config)
        found += [
            *_host_ready(gpu, facts),
            *_drivers(gpu, facts, config),
            *_viability(gpu, facts, config, along),
            *_shared_out(gpu, facts),
        ]
        if not config.gpu(gpu.address).rules.allow_boot_display:
            found += _boot_display(gpu, facts, config)
    return tuple(found)


def _state(gpu: Gpu, state: State) -> Iterator[Blocker]:
    if state is State.WEDGED:
        sentence = Sentence(
            "{gpu} is wedged: an operation of the kernel on it has not returned, and a further one would only queue "
            "behind it; gpuswitchctl status {gpu} says which, and what may make it return",
            gpu=gpu.address,
        )
        yield Blocker("wedged", sentence, Wedged)
    elif state.moving:
        sentence = Sentence(
            "{gpu} is {state}: wait until it is at rest: gpuswitchctl wait {gpu}",
            gpu=gpu.address,
            state=state,
        )
        yield Blocker("in_progress", sentence, InProgress)


def _presence(gpu: Gpu, facts: HostFacts, config: Config) -> Iterator[Blocker]:
    members = config.gpu(gpu.address).members
    for address in gpu.missing(facts):
        look = Sentence(
            "function {function} is not on the PCI bus: have it looked for: {command}",
            function=address,
            command=_RESCAN,
        )
        if address in members:
            look = Sentence(
                "{look}; or, where there is none: {set}", look=look, set=to_set_members(config, gpu, less=[address])
            )
        yield Blocker("missing_function", look)


def _immovable(gpu: Gpu, facts: HostFacts, config: Config) -> Iterator[Blocker]:
    """What only the config can have made part of a GPU."""
    for function in gpu.present(facts):
        out = to_set_members(config, gpu, less=[function.address])
        if function.kind in _THE_BOARD:
            sentence = Sentence(
                "{function} is a bridge, and cannot be a member of a GPU: {set}", function=function.address, set=out
            )
            yield Blocker("member", sentence)
        elif function.physical_function is not None:
            sentence = Sentence(
                "{function} is a virtual function of {physical}, and cannot be a member of a GPU: {set}",
                function=function.address,
                physical=function.physical_function,
                set=out,
            )
            yield Blocker("member", sentence)


def _host_ready(gpu: Gpu, facts: HostFacts) -> Iterator[Blocker]:
    if not facts.iommu:
        yield Blocker("no_iommu", Sentence("the IOMMU is off: {remedy}", remedy=switch_on(facts)))
    else:
        why = _LEFT_OUT.get(facts.processor, _LEFT_OUT_ANY)
        for function in gpu.present(facts):
            if function.iommu_group is None:
                sentence = Sentence("{function} has no IOMMU group: {why}", function=function.address, why=why)
                yield Blocker("no_iommu", sentence)


def _drivers(gpu: Gpu, facts: HostFacts, config: Config) -> Iterator[Blocker]:
    named = config.gpu(gpu.address).rules.vfio_driver
    for driver in dict.fromkeys(vfio_drivers(gpu, facts, named).values()):
        if vfio_available(driver, facts):
            continue
        if not facts.modules_on_disk:
            sentence = Sentence(
                "the driver {driver} is not available: {why}: restart the machine", driver=driver.name, why=GONE
            )
        else:
            sentence = Sentence(
                "the driver {driver} is not available, its kernel module is not installed: install what has it for the "
                "running kernel, so that this works: modprobe {module}",
                driver=driver.name,
                module=driver.module or driver.name,
            )
        if named and driver.name != VFIO_DRIVER:
            other = to_set(config, gpu, "vfio_driver", '""')
            sentence = Sentence("{install}; or use another one: {set}", install=sentence, set=other)
        yield Blocker("no_vfio", sentence)


def without_groups(gpu: Gpu, target: State, facts: HostFacts) -> Iterator[Blocker]:
    """A kernel on which nobody can hold the GPU while it is taken from its vfio driver; known once vfio is loaded."""
    if facts.vfio_without_groups and (target is State.VFIO or any(f.on_vfio for f in gpu.present(facts))):
        sentence = Sentence(
            "{gpu} cannot be kept from virtual machines while it moves: {why}", gpu=gpu.address, why=NO_GROUPS
        )
        yield Blocker("no_vfio_groups", sentence)


def _viability(gpu: Gpu, facts: HostFacts, config: Config, along: Collection[PciAddress]) -> Iterator[Blocker]:
    """What keeps any machine from having the GPU, wherever that is: its groups are not viable, above all."""
    yield from _without_iommu(gpu, facts)
    yield from _neighbours(gpu, facts, config, along)
    yield from _reserved(gpu, facts)


def switch_on(facts: HostFacts) -> Sentence:
    return _SWITCH_ON.get(facts.hypervisor or facts.processor, _SWITCH_ON_ANY)


def _without_iommu(gpu: Gpu, facts: HostFacts) -> Iterator[Blocker]:
    """Such groups vfio makes when it has the device, so nobody is asked before; QEMU and libvirt cannot use them."""
    for number in gpu.groups(facts):
        if number in facts.groups_without_iommu:
            sentence = Sentence(
                "IOMMU group {group} is one of vfio's own, without an IOMMU (enable_unsafe_noiommu_mode), and no "
                "virtual machine can have it; the IOMMU is off: {remedy}",
                group=number,
                remedy=switch_on(facts),
            )
            yield Blocker("no_iommu", sentence)


def _unbind(neighbour: PciFunction) -> Sentence:
    """With what somebody would lose who did as they are told."""
    command = f"echo {neighbour.address} > /sys/bus/pci/drivers/{neighbour.driver_name}/unbind"
    match neighbour.kind:
        case Kind.NETWORK:
            return Sentence("unbind it, which ends its network connections: {command}", command=command)
        case Kind.STORAGE:
            return Sentence("unbind it, which takes the disks behind it away: {command}", command=command)
        case _:
            return Sentence("unbind it: {command}", command=command)


def _neighbours(gpu: Gpu, facts: HostFacts, config: Config, along: Collection[PciAddress]) -> Iterator[Blocker]:
    for neighbour in gpu.neighbours(facts):
        if not harmless(neighbour) and neighbour.address not in along:
            remedy = _unbind(neighbour)
            if neighbour.kind not in _THE_BOARD and neighbour.physical_function is None:
                both = Sentence("move both: {set}", set=to_set_members(config, gpu, more=[neighbour.address]))
                # The driver of a GPU waits, perhaps for ever, for whoever has it open.
                remedy = both if neighbour.makes_gpu else Sentence("{unbind}; or {both}", unbind=remedy, both=both)
            if neighbour.kind in {Kind.NETWORK, Kind.STORAGE}:
                remedy = Sentence("put one of the two into another slot; or {remedy}", remedy=remedy)
            sentence = Sentence(
                "{function} is in IOMMU group {group} too and stays on {driver}: {remedy}",
                function=describe(neighbour),
                group=neighbour.iommu_group,
                driver=neighbour.driver_name,
                remedy=remedy,
            )
            yield Blocker("neighbour", sentence)


def _reserved(gpu: Gpu, facts: HostFacts) -> Iterator[Blocker]:
    """The kernel lets vfio have such devices, and then refuses to give their group to a machine.

    On Intel at once (device_rmrr_is_relaxable in drivers/iommu/intel/iommu.c), on all since 6.6 (`require_direct` in
    drivers/iommu/iommu.c).
    """
    for number in gpu.groups(facts):
        if regions := facts.direct_regions.get(number):
            sentence = Sentence(
                "IOMMU group {group} has memory that the firmware claims for itself ({regions}, {called}), "
                "and no virtual machine can have it: put the card into another slot, or have the firmware claim none "
                "for this one (an update of it, or its settings for shared memory of devices)",
                group=number,
                regions=", ".join(regions),
                called=_CLAIMED.get(facts.processor, "RMRR"),
            )
            yield Blocker("reserved_region", sentence)


def _shared_out(gpu: Gpu, facts: HostFacts) -> Iterator[Blocker]:
    for function in gpu.present(facts):
        if number := function.virtual_functions:
            remedy = Sentence(
                "remove what it is shared out to: echo 0 > /sys/bus/pci/devices/{function}/sriov_numvfs",
                function=function.address,
            )
            sentence = Sentence(
                "{function} has 1 virtual function: {remedy}"
                if number == 1
                else "{function} has {count} virtual functions: {remedy}",
                function=function.address,
                count=number,
                remedy=remedy,
            )
            yield Blocker("virtual_functions", sentence)
        if number := function.mediated_devices:
            remedy = Sentence(
                "remove what it is shared out to: mdevctl list --parent {function} shows each UUID, for which: "
                "mdevctl stop --uuid UUID",
                function=function.address,
            )
            sentence = Sentence(
                "{function} has 1 mediated device: {remedy}"
                if number == 1
                else "{function} has {count} mediated devices: {remedy}",
                function=function.address,
                count=number,
                remedy=remedy,
            )
            yield Blocker("mediated_devices", sentence)


def _boot_display(gpu: Gpu, facts: HostFacts, config: Config) -> Iterator[Blocker]:
    for function in gpu.present(facts):
        if function.boot_display:
            sentence = Sentence(
                "{function} is the display that this machine booted on, so its screen would go dark: if that is what "
                "you want, {set}",
                function=function.address,
                set=to_set(config, gpu, "allow_boot_display", "true"),
            )
            yield Blocker("boot_display", sentence)


GONE = Sentence("modules of the running kernel are not on disk any more, as after an upgrade of it")
_RESCAN = "echo 1 > /sys/bus/pci/rescan"
_INTEL = Sentence(
    "add intel_iommu=on to the kernel command line (with GRUB on Debian: to GRUB_CMDLINE_LINUX in /etc/default/grub, "
    "then run: update-grub) and restart the machine"
)
_SWITCH_ON = {
    "intel": Sentence("enable VT-d in the firmware, and {command_line}", command_line=_INTEL),
    "amd": Sentence("enable AMD-Vi (often called IOMMU) in the firmware"),
    "arm": Sentence(
        "enable the SMMU in the firmware; a machine that has none before its PCIe slots cannot give a GPU away"
    ),
    "xen": Sentence(
        "Xen has it, and this is a domain of Xen, where there is no vfio; give the GPU away with Xen's own tools"
    ),
    "machine": Sentence(
        "this is a virtual machine; have its host give it a virtual IOMMU (libvirt: <iommu model='intel'>)"
    ),
}
_SWITCH_ON_ANY = Sentence(
    "enable it in the firmware (VT-d on Intel, AMD-Vi on AMD, the SMMU on ARM), and on Intel {command_line}",
    command_line=_INTEL,
)
_LEFT_OUT = {
    "intel": Sentence(
        "the kernel leaves it out; igfx_off on its command line does that, or the firmware (the DMAR table): take "
        "igfx_off off the kernel command line, else update the firmware"
    ),
    "arm": Sentence("there is no SMMU before its slot, and without one it cannot be given away"),
}
_LEFT_OUT_ANY = Sentence(
    "there is no IOMMU before its slot, or the firmware does not tell of one: try another slot, or an update of the "
    "firmware"
)
_CLAIMED = {"intel": "RMRR", "amd": "IVMD", "arm": "RMR"}
"""What the firmware's tables call such memory (DMAR, IVRS, IORT)."""

_THE_BOARD = frozenset({Kind.BRIDGE, Kind.CHIPSET})
"""Kinds that no machine can have."""
_KINDS: Mapping[Kind, Sentence] = {
    Kind.DISPLAY: Sentence("GPU"),
    Kind.ACCELERATOR: Sentence("accelerator"),
    Kind.BRIDGE: Sentence("bridge"),
    Kind.CHIPSET: Sentence("bridge"),
    Kind.AUDIO: Sentence("audio device"),
    Kind.USB: Sentence("USB controller"),
    Kind.UCSI: Sentence("USB-C controller"),
    Kind.NETWORK: Sentence("network card"),
    Kind.STORAGE: Sentence("storage controller"),
}


def describe(function: PciFunction) -> Sentence:
    """`the network card 0000:02:00.0 (Realtek ...)`."""
    name = " ".join(filter(None, (function.maker, function.model)))
    kind = Sentence("NVSwitch") if function.nvswitch else _KINDS.get(function.kind, Sentence("device"))
    what = Sentence("the {kind} {function}", kind=kind, function=function.address)
    return Sentence.joined(" ", [what, f"({name})"]) if name else what
