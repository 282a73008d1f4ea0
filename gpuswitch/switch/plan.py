"""The story of a switch: its steps in order, with the reason for each. Computed from facts before anything is touched.

A plan moves whatever is not yet where it should be. So the same two functions serve a GPU at rest, a GPU that somebody
left half-moved, and one that a crash interrupted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from gpuswitch.model.address import PciAddress
from gpuswitch.model.drivers import PERSISTENCED, kernel_name, profile_of, vfio_drivers
from gpuswitch.model.facts import Driver, HostFacts
from gpuswitch.model.gpu import Gpu
from gpuswitch.model.holders import Sought, Unit
from gpuswitch.model.policy import Busy
from gpuswitch.model.states import State
from gpuswitch.switch.announcing import Announce, AnnounceAgain
from gpuswitch.switch.consoles import MoveConsoles, RestoreConsoles
from gpuswitch.switch.letting_go import AwaitHolders, CheckHolders, EndSession
from gpuswitch.switch.needs import Needs
from gpuswitch.switch.owed import NOTHING, Baseline, Owed
from gpuswitch.switch.step import Step
from gpuswitch.switch.steps import (
    AimOverrides,
    AwaitLibvirt,
    AwaitNodes,
    Bind,
    CheckGroup,
    CheckRegisters,
    HoldGroup,
    KeepAwake,
    LoadDriver,
    ReleaseGroup,
    RestorePower,
    Unbind,
)
from gpuswitch.switch.surroundings import (
    KeepUp,
    LetSleep,
    LoadModules,
    Persistence,
    ReleaseBootFramebuffer,
    RestoreBootFramebuffer,
    RestorePersistence,
    StartUnits,
    StopUnits,
    UnloadModules,
)


@dataclass(frozen=True)
class Plan:
    """The ordered steps that take `gpu` to `target` (State.HOST or State.VFIO).

    `owed` is what the GPU must get back one day, from the moment the first step begins; `afterwards` is what is left
    of it once all steps are done.
    """

    gpu: Gpu
    target: State
    owed: Owed
    steps: tuple[Step, ...]
    afterwards: Owed = NOTHING


@dataclass(frozen=True, slots=True)
class Back:
    """What the config says of the way home: a unit to start `after`, and what is not to be put back.

    `wait_seconds`: how long to wait for whoever has it open; None: not at all, since its groups are held already.
    `machine`: the one for whose sake it goes home, by name, which has waited for libvirt; for others that are waited
    for, libvirt is waited for, too.
    `vtconsoles` were unbound for other GPUs' sake, when none was left to show them; now one is.
    `units_later`: systemd jobs cannot be waited for now, while the service starts; the units stay owed.
    """

    after: Unit | None = None
    leave_consoles: tuple[str, ...] = ()
    boot_framebuffer: bool = False
    wait_seconds: float | None = None
    machine: str = ""
    units_later: bool = False
    vtconsoles: tuple[str, ...] = ()


def to_vfio(gpu: Gpu, facts: HostFacts, now: Baseline, owed: Owed, needs: Needs = Needs()) -> Plan:  # noqa: B008 -- frozen
    """Every function of the GPU to its vfio driver.

    `now` is what the functions have at this moment, and what a revert gives back; `owed` is what an earlier switch
    that never came home still owes them.
    """
    driver = {f.address: f.driver_name for f in gpu.present(facts)}
    vfio = vfio_drivers(gpu, facts, needs.vfio_driver)
    unloaded = {a for o in needs.unload for a in o.functions}
    patience = {a: o.profile.unbind_seconds for o in needs.occupations for a in o.functions}
    arriving = [a for a in gpu.in_detach_order(facts) if driver[a] != vfio[a].name]
    leaving = [a for a in arriving if driver[a] is not None]
    overrides = {a: now[a].override for a in gpu.functions}
    debts = _debts(needs, {a: now[a] for a in arriving}).and_before(owed)
    return Plan(
        gpu,
        State.VFIO,
        debts,
        (
            # First what may fail without anything having been touched.
            *_load(facts, vfio),
            *_make_ready(gpu, needs),
            # A device that sleeps in D3cold may not wake up in other hands. A vfio driver takes power management over
            # with the bind (pm_runtime_allow in vfio_pci_core_register_device), so this needs no end here.
            *([KeepAwake({a: now[a].power_control for a in arriving})] if arriving else []),
            # All functions before any unbind: from here on whatever probes them, be it udev or a rescan, can only
            # bind its vfio driver, and no host driver snatches a function back half-way.
            *([AimOverrides({a: vfio[a].name for a in gpu.functions}, overrides)] if arriving else []),
            # An unbind that meets a holder waits for him, and nothing takes it back; and a vfio driver takes what the
            # firmware's frame buffer is drawn on from whoever draws there: look again, now.
            *([_last_look(needs.sought, needs)] if needs.sought and (leaving or needs.boot_framebuffers) else []),
            # Companions first: the display function powers the card, and it is the one that must not be lost early.
            *(Unbind(a, str(driver[a]), patience.get(a, 0.0)) for a in leaving if a not in unloaded),
            *(UnloadModules(o.functions, o.profile.driver, o.loaded) for o in needs.unload),
            *(Bind(a, vfio[a].name) for a in arriving),
            # A VM takes whole groups, and finds out late that it cannot.
            *(CheckGroup(number, gpu, needs.along) for number in gpu.groups(facts)),
            # The other GPUs of this driver want theirs back.
            *([StartUnits(needs.at_once)] if needs.at_once else []),
            # A machine that has it keeps its host from sleeping all the while.
            *([] if needs.owned else [LetSleep()]),
        ),
        replace(debts, units=tuple(unit for unit in debts.units if unit not in needs.at_once)),
    )


def _last_look(sought: Sought, needs: Needs) -> CheckHolders:
    """Should somebody else unbind or pull it meanwhile, sysfs shows its nodes no more: whoever has them open has it.

    Nobody is ended for a number alone, which may be another device's by then.
    """
    return CheckHolders(replace(sought, numbers=needs.numbers), needs.passing_seconds, needs.announce)


def to_clear(
    gpu: Gpu, facts: HostFacts, owed: Owed, needs: Needs, everything: Sought, destructive_steps: Sequence[Step]
) -> Plan:
    """Nobody has it open, or can open it, and then the `destructive_steps`, which would harm whoever had.

    The way to the host gives back the rest.
    """
    debts = _debts(needs, {}).and_before(owed)
    held = _groups(facts, (f.address for f in gpu.present(facts) if f.on_vfio))
    # Who had one of them open would keep us from holding it.
    ours = {f"vfio/{number}" for number in held}
    others = replace(everything, nodes=tuple(node for node in everything.nodes if node not in ours))
    return Plan(
        gpu,
        State.HOST,
        debts,
        (
            *_make_ready(gpu, needs),
            *(HoldGroup(number) for number in held),
            CheckHolders(others, needs.passing_seconds, needs.announce),
            *destructive_steps,
            *(ReleaseGroup(number) for number in held),
        ),
        debts,
    )


def _make_ready(gpu: Gpu, needs: Needs) -> list[Step]:
    """The host around the GPU, before the GPU itself is touched."""
    return [
        # A machine that falls asleep half-way may wake up with a GPU that no driver knows.
        KeepUp(),
        # Then whoever has it open: what the config names, what may be asked, what the policy says of the rest.
        *([StopUnits(needs.stop, needs.active)] if needs.stop else []),
        *(EndSession(session) for session in needs.sessions),
        *(Announce(functions, subsystem) for subsystem, functions in needs.announce),
        *_await_holders(needs),
        # What draws the kernel's text on it, and what keeps it in use by itself.
        *_move_consoles(gpu, needs),
        *(Persistence(a, on=False) for a in needs.persistent),
    ]


def _debts(needs: Needs, functions: Baseline) -> Owed:
    return Owed(
        functions,
        units=needs.active,
        modules=needs.chain,
        # Those of a GPU that is away are shown on this one only until it comes back.
        terminals=tuple(terminal for terminal in needs.terminals if terminal not in needs.borrowed),
        vtconsoles=needs.consoles_again,
        beside=needs.beside,
        boot_framebuffers=tuple((b.device, b.driver) for b in needs.boot_framebuffers),
        persistent=needs.persistent,
        announced=needs.announce,
    )


def _await_holders(needs: Needs) -> list[Step]:
    if not needs.holding or needs.sought is None:
        return []
    return [AwaitHolders(needs.sought, needs.busy, needs.wait_seconds, needs.grace_seconds, needs.announce)]


def _move_consoles(gpu: Gpu, needs: Needs) -> list[Step]:
    steps: list[Step] = [ReleaseBootFramebuffer(b.device, b.driver) for b in needs.boot_framebuffers]
    # Also where it shows nothing now: another GPU that leaves at the same time may have moved its terminals here.
    if needs.shows or (needs.terminals and needs.to is not None) or needs.unbind_consoles:
        steps.append(
            MoveConsoles(
                gpu.functions,
                needs.terminals,
                needs.to,
                needs.unbind_consoles,
                needs.leave_consoles,
                unload=bool(needs.unload),
                borrowed=needs.borrowed,
                beside=needs.beside,
            )
        )
    return steps


def to_host(gpu: Gpu, facts: HostFacts, now: Baseline, owed: Owed, back: Back = Back()) -> Plan:
    """Everything that is `owed`: each function's driver (or none), override and power setting, and the host around it.

    `owed` knows every function; `now` is what the functions have, and what a revert gives back.
    """
    driver = {f.address: f.driver_name for f in gpu.present(facts)}
    baseline = _home(gpu, facts, owed.functions)
    names = {a: captured.driver.name if captured.driver else None for a, captured in baseline.items()}
    order = gpu.in_attach_order(facts)
    leaving = [a for a in order if facts.functions[a].on_vfio]
    arriving = [a for a in order if names[a] is not None and (driver[a] is None or a in leaving)]
    held = _groups(facts, leaving)

    return Plan(
        gpu,
        State.HOST,
        replace(owed, functions=baseline),
        (
            KeepUp(),
            *_await_vm(gpu, leaving, held, back),
            KeepAwake({a: now[a].power_control for a in gpu.functions}),
            *([CheckRegisters(tuple(arriving))] if arriving else []),
            # `vfio-pci.ids=` on the kernel command line would win a probe that is not aimed.
            AimOverrides(
                {a: names[a] or baseline[a].override for a in gpu.functions},
                {a: now[a].override for a in gpu.functions},
            ),
            *_past_the_group(leaving),
            # Display first: the reverse of the way out.
            *(Unbind(a, str(driver[a])) for a in leaving),
            *(ReleaseGroup(number) for number in held),
            # Not before the device is free: nvidia's module refuses to load where it finds no card of its own.
            *_load(facts, {a: c.driver for a, c in baseline.items() if c.driver is not None}),
            *(Bind(a, str(names[a])) for a in arriving),
            *_load_chain(facts, baseline, owed),
            *(AwaitNodes(a) for a in order if facts.functions[a].makes_gpu),
            # The override has done its work; from here the functions probe as they did before us.
            AimOverrides(to={a: baseline[a].override for a in gpu.functions}, before=names),
            RestorePower({a: baseline[a].power_control for a in gpu.functions}),
            *_put_right(gpu, owed, back, {*leaving, *arriving}, _never_left(facts, owed, {*leaving, *arriving})),
        ),
        _later(owed, back) if back.units_later else NOTHING,
    )


def _groups(facts: HostFacts, functions: Iterable[PciAddress]) -> list[int]:
    return sorted({g for a in functions if (g := facts.functions[a].iommu_group) is not None})


def _past_the_group(leaving: Sequence[PciAddress]) -> list[Step]:
    """A VM may have a function open by /dev/vfio/devices/ too."""
    return [CheckHolders(Sought(tuple(leaving)))] if leaving else []


def _load_chain(facts: HostFacts, baseline: Baseline, owed: Owed) -> list[Step]:
    """The modules around the host drivers; their own are loaded by then."""
    drivers = {captured.driver for captured in baseline.values() if captured.driver}
    around = {module for driver in drivers for module in profile_of(driver).chain if module != driver.module}
    there = {*facts.modules, *facts.pci_drivers.values()}
    missing = tuple(module for module in owed.modules if kernel_name(module) in around - there)
    return [LoadModules(missing)] if missing else []


def _await_vm(gpu: Gpu, leaving: Sequence[PciAddress], held: Sequence[int], back: Back) -> list[Step]:
    """Whoever has the group open would lose the device; holding it keeps the next one out, too.

    Who has it open now is a virtual machine, and nobody ends that; one that was waited for, libvirt clears up after.
    """
    holds = [HoldGroup(number) for number in held]
    if back.wait_seconds is None or not leaving:
        return [*holds]
    sought = Sought(tuple(leaving), tuple(f"vfio/{number}" for number in held))
    clearing_up = AwaitLibvirt(gpu.functions, back.wait_seconds, back.machine)
    return [AwaitHolders(sought, Busy.WAIT, back.wait_seconds, 0.0), *holds, clearing_up]


def _home(gpu: Gpu, facts: HostFacts, kept: Baseline) -> Baseline:
    """What was kept; but a function that somebody gave another host driver meanwhile is home, and may be in use."""
    elsewhere = {f.address: f.driver for f in gpu.present(facts) if f.driver and not f.on_vfio}
    return {a: replace(kept[a], driver=elsewhere.get(a, kept[a].driver)) for a in gpu.functions}


def _later(owed: Owed, back: Back) -> Owed:
    """The units that are owed, and the one that is to be started after them."""
    units = Owed(units=owed.units)
    return units.and_unit(back.after) if back.after else units


def _never_left(facts: HostFacts, owed: Owed, moved: Collection[PciAddress]) -> Iterator[Step]:
    """A card that gets its driver back is new to everybody; one that never lost it is thought to be gone."""
    for subsystem, functions in owed.announced:
        if there := tuple(a for a in functions if a not in moved and facts.functions[a].driver is not None):
            yield AnnounceAgain(there, subsystem)


def _put_right(
    gpu: Gpu, owed: Owed, back: Back, moved: Collection[PciAddress], announcements: Iterable[Step]
) -> list[Step]:
    """The host around the GPU, which is home by now: should any of it fail, that takes nothing away."""
    # One after the other: what the user wants afterwards may need what was there before.
    own = (back.after,) if back.after and back.after not in owed.units else ()
    now = [] if back.units_later else [units for units in (owed.units, own) if units]
    return [
        *announcements,
        # A daemon that keeps it persistent does so when it starts; nvidia-smi alone would turn on another mode.
        *(RestorePersistence(a, on=True) for a in owed.persistent if PERSISTENCED not in owed.units),
        *_bring_consoles_back(gpu, owed, back, moved),
        *(StartUnits(units) for units in now),
        LetSleep(),
    ]


def _bring_consoles_back(gpu: Gpu, owed: Owed, back: Back, moved: Collection[PciAddress]) -> list[Step]:
    steps: list[Step] = []
    if owed.terminals or owed.beside or {*owed.vtconsoles, *back.vtconsoles}.difference(back.leave_consoles):
        steps.append(RestoreConsoles(gpu.functions, owed.terminals, back.leave_consoles, owed.beside))
    # Where the service died before the GPU went, nobody has touched what the firmware had set up.
    if back.boot_framebuffer or gpu.address not in moved:
        steps += [RestoreBootFramebuffer(device, driver) for device, driver in owed.boot_framebuffers]
    return steps


def _load(facts: HostFacts, wanted: Mapping[PciAddress, Driver]) -> list[Step]:
    """Load the drivers that are not registered; one without a module is built in, and registered at boot."""
    return [
        LoadDriver(driver.module, driver.name, tuple(a for a, each in wanted.items() if each.name == driver.name))
        for driver in {driver.name: driver for driver in wanted.values()}.values()
        if driver.module and driver.name not in facts.pci_drivers
    ]
