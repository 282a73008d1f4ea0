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
from gpuswitch.model.holders import HolderQuery, Unit
from gpuswitch.model.policy import Busy
from gpuswitch.model.states import State
from gpuswitch.switch.planning.requirements import DetachRequirements
from gpuswitch.switch.restore_state import NOTHING_TO_RESTORE, Baseline, RestoreState
from gpuswitch.switch.steps.access import TakeAccessBack
from gpuswitch.switch.steps.attributes import RestoreAttribute
from gpuswitch.switch.steps.consoles import MoveConsoles, RestoreConsoles
from gpuswitch.switch.steps.holders import AwaitHolders, CheckHolders, EndSession
from gpuswitch.switch.steps.host import (
    InhibitSleep,
    LoadModules,
    Persistence,
    ReleaseBootFramebuffer,
    RestartUnits,
    RestoreBootFramebuffer,
    RestorePersistence,
    StartUnits,
    StopUnits,
    UnloadModules,
)
from gpuswitch.switch.steps.pci import (
    AimOverrides,
    AwaitLibvirt,
    AwaitNodes,
    Bind,
    CheckGroup,
    CheckRegisters,
    DisableRuntimePm,
    HoldGroup,
    LoadDriver,
    ReleaseGroup,
    RestorePower,
    Unbind,
)
from gpuswitch.switch.steps.step import Step
from gpuswitch.switch.steps.uevents import Announce, AnnounceAgain


@dataclass(frozen=True)
class Plan:
    """The ordered steps that take `gpu` to `target` (State.HOST or State.VFIO).

    `restore_state` is what the GPU must get back one day, from the moment the first step begins; `afterwards` is what
    is left of it once all steps are done.
    """

    gpu: Gpu
    target: State
    restore_state: RestoreState
    steps: tuple[Step, ...]
    afterwards: RestoreState = NOTHING_TO_RESTORE


@dataclass(frozen=True, slots=True)
class HomeOptions:
    """What the config says of the way home: a unit to start `after`, and what is not to be put back.

    `wait_seconds`: how long to wait for whoever has it open; None: not at all, since its groups are held already.
    `machine`: the one for whose sake it goes home, by name, which has waited for libvirt; for others that are waited
    for, libvirt is waited for, too.
    `vtconsoles` were unbound for other GPUs' sake, when none was left to show them; now one is.
    `units_later`: systemd jobs cannot be waited for while the service starts; the units stay in the restore state.
    `restarted`: units that look for their GPUs when they start, and run, or are to run again.
    """

    after: Unit | None = None
    leave_consoles: tuple[str, ...] = ()
    boot_framebuffer: bool = False
    wait_seconds: float | None = None
    machine: str = ""
    units_later: bool = False
    restarted: tuple[Unit, ...] = ()
    vtconsoles: tuple[str, ...] = ()


def to_vfio(
    gpu: Gpu,
    facts: HostFacts,
    now: Baseline,
    restore_state: RestoreState,
    requirements: DetachRequirements = DetachRequirements(),  # noqa: B008 -- frozen
) -> Plan:
    """Every function of the GPU to its vfio driver.

    `now` is what the functions have at this moment, and what a revert gives back; `restore_state` is what an earlier
    switch, that never came home, has left to restore.
    """
    driver = {f.address: f.driver_name for f in gpu.present(facts)}
    vfio = vfio_drivers(gpu, facts, requirements.vfio_driver)
    unloaded = {a for o in requirements.unload for a in o.functions}
    patience = {a: o.profile.unbind_seconds for o in requirements.bound_drivers for a in o.functions}
    arriving = [a for a in gpu.in_detach_order(facts) if driver[a] != vfio[a].name]
    leaving = [a for a in arriving if driver[a] is not None]
    overrides = {a: now[a].override for a in gpu.functions}
    to_restore = _restore_state(requirements, {a: now[a] for a in arriving}).and_before(restore_state)
    return Plan(
        gpu,
        State.VFIO,
        to_restore,
        (
            # First what may fail without anything having been touched.
            *_load(facts, vfio),
            *_make_ready(gpu, requirements),
            # A device that sleeps in D3cold may not wake up on another driver. A vfio driver takes power management
            # over with the bind (pm_runtime_allow in vfio_pci_core_register_device), so this needs no end here.
            *([DisableRuntimePm({a: now[a].power_control for a in arriving})] if arriving else []),
            # All functions before any unbind: from here on whatever probes them, be it udev or a rescan, can only
            # bind its vfio driver, and no host driver snatches a function back half-way.
            *([AimOverrides({a: vfio[a].name for a in gpu.functions}, overrides)] if arriving else []),
            # An unbind that meets a holder waits for him, and nothing takes it back; and a vfio driver takes what the
            # firmware's frame buffer is drawn on from whoever draws there: look again, now.
            *(
                [_last_look(requirements.query, requirements)]
                if requirements.query and (leaving or requirements.boot_framebuffers)
                else []
            ),
            # Companions first: the display function powers the card, and it is the one that must not be lost early.
            *(Unbind(a, str(driver[a]), patience.get(a, 0.0)) for a in leaving if a not in unloaded),
            *(UnloadModules(o.functions, o.profile.driver, o.loaded) for o in requirements.unload),
            *(Bind(a, vfio[a].name) for a in arriving),
            # A VM takes whole groups, and finds out late that it cannot.
            *(CheckGroup(number, gpu, requirements.along) for number in gpu.groups(facts)),
            # The other GPUs of this driver want theirs back.
            *([StartUnits(requirements.at_once)] if requirements.at_once else []),
        ),
        replace(to_restore, units=tuple(unit for unit in to_restore.units if unit not in requirements.at_once)),
    )


def _last_look(query: HolderQuery, requirements: DetachRequirements) -> CheckHolders:
    """Should somebody else unbind or pull it meanwhile, sysfs shows its nodes no more: whoever has them open has it.

    Nobody is ended for a number alone, which may be another device's by then.
    """
    return CheckHolders(
        replace(query, numbers=requirements.numbers), requirements.passing_seconds, requirements.announce
    )


def to_quiesced(
    gpu: Gpu,
    facts: HostFacts,
    restore_state: RestoreState,
    requirements: DetachRequirements,
    everything: HolderQuery,
    destructive_steps: Sequence[Step],
) -> Plan:
    """Nobody has it open, or can open it, and then the `destructive_steps`, which would harm whoever had.

    The way to the host gives back the rest.
    """
    to_restore = _restore_state(requirements, {}).and_before(restore_state)
    held = _groups(facts, (f.address for f in gpu.present(facts) if f.on_vfio))
    # Who had one of them open would keep us from holding it.
    ours = {f"vfio/{number}" for number in held}
    others = replace(everything, nodes=tuple(node for node in everything.nodes if node not in ours))
    return Plan(
        gpu,
        State.HOST,
        to_restore,
        (
            *_make_ready(gpu, requirements),
            *(HoldGroup(number) for number in held),
            CheckHolders(others, requirements.passing_seconds, requirements.announce),
            *destructive_steps,
            *(ReleaseGroup(number) for number in held),
        ),
        to_restore,
    )


def _make_ready(gpu: Gpu, requirements: DetachRequirements) -> list[Step]:
    """The host around the GPU, before the GPU itself is touched."""
    return [
        # A machine that falls asleep half-way may wake up with a GPU that no driver knows.
        InhibitSleep(),
        # Then whoever has it open: what the config names, what may be asked, what the policy says of the rest.
        *([StopUnits(requirements.stop, requirements.active, requirements.restarted)] if requirements.stop else []),
        *(EndSession(session) for session in requirements.sessions),
        *(Announce(functions, subsystem) for subsystem, functions in requirements.announce),
        *_await_holders(requirements),
        # What draws the kernel's text on it, and what keeps it in use by itself.
        *_move_consoles(gpu, requirements),
        *(Persistence(a, on=False) for a in requirements.persistent),
    ]


def _restore_state(requirements: DetachRequirements, functions: Baseline) -> RestoreState:
    return RestoreState(
        functions,
        units=requirements.active,
        modules=(*requirements.chain, *requirements.expected),
        # Those of a GPU that is away are shown on this one only until it comes back.
        terminals=tuple(
            terminal for terminal in requirements.terminals if terminal not in requirements.terminals_of_others
        ),
        vtconsoles=requirements.consoles_again,
        shown_by_others=requirements.shown_by_others,
        boot_framebuffers=tuple((b.device, b.driver) for b in requirements.boot_framebuffers),
        persistent=requirements.persistent,
        announced=requirements.announce,
        restarted=requirements.restarted,
    )


def _await_holders(requirements: DetachRequirements) -> list[Step]:
    if not requirements.holding or requirements.query is None:
        return []
    return [
        AwaitHolders(
            requirements.query,
            requirements.busy,
            requirements.wait_seconds,
            requirements.grace_seconds,
            requirements.announce,
        )
    ]


def _move_consoles(gpu: Gpu, requirements: DetachRequirements) -> list[Step]:
    steps: list[Step] = [ReleaseBootFramebuffer(b.device, b.driver) for b in requirements.boot_framebuffers]
    # Also where it shows nothing now: another GPU that leaves at the same time may have moved its terminals here.
    if requirements.shows or (requirements.terminals and requirements.to is not None) or requirements.unbind_consoles:
        steps.append(
            MoveConsoles(
                gpu.functions,
                requirements.terminals,
                requirements.to,
                requirements.unbind_consoles,
                requirements.leave_consoles,
                unload=bool(requirements.unload),
                terminals_of_others=requirements.terminals_of_others,
                shown_by_others=requirements.shown_by_others,
            )
        )
    return steps


def to_host(
    gpu: Gpu, facts: HostFacts, now: Baseline, restore_state: RestoreState, back: HomeOptions = HomeOptions()
) -> Plan:
    """Everything in `restore_state`: each function's driver (or none), override and power setting, and the host around.

    `restore_state` knows every function; `now` is what the functions have, and what a revert gives back.
    """
    driver = {f.address: f.driver_name for f in gpu.present(facts)}
    baseline = _home(gpu, facts, restore_state.functions)
    names = {a: captured.driver.name if captured.driver else None for a, captured in baseline.items()}
    order = gpu.in_attach_order(facts)
    leaving = [a for a in order if facts.functions[a].on_vfio]
    arriving = [a for a in order if names[a] is not None and (driver[a] is None or a in leaving)]
    held = _groups(facts, leaving)
    moved = {*leaving, *arriving}
    restarted = tuple(unit for unit in back.restarted if moved or unit in restore_state.restarted)
    # One that the configuration had stopped is not to run while this GPU is away, should all this be taken back.
    configured = {*restore_state.units}.difference(restore_state.restarted)
    to_restore = replace(
        restore_state, functions=baseline, restarted=tuple(unit for unit in restarted if unit not in configured)
    )
    restore_state = replace(to_restore, restarted=restarted)

    return Plan(
        gpu,
        State.HOST,
        to_restore,
        (
            InhibitSleep(),
            *_await_vm(gpu, leaving, held, back),
            # While nobody can open it: a group that others are in stays, and what was let on it with it.
            *_take_access_back(restore_state),
            DisableRuntimePm({a: now[a].power_control for a in gpu.functions}),
            *([CheckRegisters(tuple(arriving))] if arriving else []),
            # `vfio-pci.ids=` on the kernel command line would win a probe that is not aimed.
            AimOverrides(
                {a: names[a] or baseline[a].override for a in gpu.functions},
                {a: now[a].override for a in gpu.functions},
                returns=True,
            ),
            *_check_vfio_cdev(leaving),
            # Display first: the reverse of the way out.
            *(Unbind(a, str(driver[a])) for a in leaving),
            *(ReleaseGroup(number) for number in held),
            # Not before the device is free: nvidia's module refuses to load where it finds no card of its own.
            *_load(facts, {a: c.driver for a, c in baseline.items() if c.driver is not None}),
            *(Bind(a, str(names[a])) for a in arriving),
            *_load_chain(facts, baseline, restore_state),
            *(AwaitNodes(a) for a in order if facts.functions[a].makes_gpu),
            # The override has done its work; from here the functions probe as they did before us.
            AimOverrides(to={a: baseline[a].override for a in gpu.functions}, before=names),
            # While a failure still takes the way home back: from here on nobody would try again.
            *_restore_attributes(restore_state),
            RestorePower({a: baseline[a].power_control for a in gpu.functions}),
            *_restore_host(gpu, restore_state, back, moved, _never_left(facts, restore_state, moved)),
        ),
        _later(restore_state, back) if back.units_later else NOTHING_TO_RESTORE,
    )


def _groups(facts: HostFacts, functions: Iterable[PciAddress]) -> list[int]:
    return sorted({g for a in functions if (g := facts.functions[a].iommu_group) is not None})


def _check_vfio_cdev(leaving: Sequence[PciAddress]) -> list[Step]:
    """A VM may have a function open by /dev/vfio/devices/ too."""
    return [CheckHolders(HolderQuery(tuple(leaving)))] if leaving else []


def _load_chain(facts: HostFacts, baseline: Baseline, restore_state: RestoreState) -> list[Step]:
    """The modules around the host drivers; their own are loaded by then."""
    drivers = {captured.driver for captured in baseline.values() if captured.driver}
    around = {module for driver in drivers for module in profile_of(driver).chain if module != driver.module}
    there = {*facts.modules, *facts.pci_drivers.values()}
    missing = tuple(module for module in restore_state.modules if kernel_name(module) in around - there)
    return [LoadModules(missing)] if missing else []


def _await_vm(gpu: Gpu, leaving: Sequence[PciAddress], held: Sequence[int], back: HomeOptions) -> list[Step]:
    """Whoever has the group open would lose the device; holding it keeps the next one out, too.

    Who has it open now is a virtual machine, and nobody ends that; one that was waited for, libvirt clears up after.
    """
    held_groups = [HoldGroup(number) for number in held]
    if back.wait_seconds is None or not leaving:
        return [*held_groups]
    query = HolderQuery(tuple(leaving), tuple(f"vfio/{number}" for number in held))
    clearing_up = AwaitLibvirt(gpu.functions, back.wait_seconds, back.machine)
    return [AwaitHolders(query, Busy.WAIT, back.wait_seconds, 0.0), *held_groups, clearing_up]


def _home(gpu: Gpu, facts: HostFacts, kept: Baseline) -> Baseline:
    """What was kept; but a function that somebody gave another host driver meanwhile is home, and may be in use."""
    elsewhere = {f.address: f.driver for f in gpu.present(facts) if f.driver and not f.on_vfio}
    return {a: replace(kept[a], driver=elsewhere.get(a, kept[a].driver)) for a in gpu.functions}


def _later(restore_state: RestoreState, back: HomeOptions) -> RestoreState:
    """The units that are to be started again, and the one that is to be started after them."""
    units = RestoreState(units=restore_state.units, restarted=restore_state.restarted)
    return units.and_unit(back.after) if back.after else units


def _never_left(facts: HostFacts, restore_state: RestoreState, moved: Collection[PciAddress]) -> Iterator[Step]:
    """A card that gets its driver back is new to everybody; one that never lost it is thought to be gone."""
    for subsystem, functions in restore_state.announced:
        if there := tuple(a for a in functions if a not in moved and facts.functions[a].driver is not None):
            yield AnnounceAgain(there, subsystem)


def _restore_host(
    gpu: Gpu,
    restore_state: RestoreState,
    back: HomeOptions,
    moved: Collection[PciAddress],
    announcements: Iterable[Step],
) -> list[Step]:
    """The host around the GPU, which is home by now: should any of it fail, that takes nothing away."""
    # One after the other: what the user wants afterwards may need what was there before.
    own = (back.after,) if back.after and back.after not in restore_state.units and not back.units_later else ()
    # One that was stopped for this GPU is started for it.
    running = tuple(unit for unit in restore_state.restarted if unit not in restore_state.units)
    return [
        *announcements,
        # A daemon that keeps it persistent does so when it starts; nvidia-smi alone would turn on another mode.
        *(
            RestorePersistence(a, on=True)
            for a in restore_state.persistent
            if PERSISTENCED not in (*restore_state.units, *running)
        ),
        *_bring_consoles_back(gpu, restore_state, back, moved),
        *([] if back.units_later else _start_units(restore_state)),
        *([RestartUnits(running)] if running and not back.units_later else []),
        *([StartUnits(own)] if own else []),
    ]


def restore_shared(restore_state: RestoreState) -> list[Step]:
    """Give back what several GPUs share (`Shared`), for a GPU that has left the bus: each has its turn, whatever fails.

    The way home has the same steps, each in its place.
    """
    # That it is home is nothing to find out: what runs goes on.
    units = replace(restore_state, restarted=())
    return [*_take_access_back(restore_state), *_restore_attributes(restore_state), *_start_units(units)]


def _take_access_back(restore_state: RestoreState) -> list[Step]:
    """Most often there is none left: whoever gave it takes it back when the process has ended that has the GPU."""
    return [TakeAccessBack(access) for access in restore_state.access]


def _restore_attributes(restore_state: RestoreState) -> list[Step]:
    return [RestoreAttribute(*attribute, change) for attribute, change in restore_state.attributes.items()]


def _start_units(restore_state: RestoreState) -> list[Step]:
    units = restore_state.units
    return [StartUnits(units, tuple(unit for unit in units if unit in restore_state.restarted))] if units else []


def _bring_consoles_back(
    gpu: Gpu, restore_state: RestoreState, back: HomeOptions, moved: Collection[PciAddress]
) -> list[Step]:
    steps: list[Step] = []
    if (
        restore_state.terminals
        or restore_state.shown_by_others
        or {*restore_state.vtconsoles, *back.vtconsoles}.difference(back.leave_consoles)
    ):
        steps.append(
            RestoreConsoles(gpu.functions, restore_state.terminals, back.leave_consoles, restore_state.shown_by_others)
        )
    # Where the service died before the GPU went, nobody has touched what the firmware had set up.
    if back.boot_framebuffer or gpu.address not in moved:
        steps += [RestoreBootFramebuffer(device, driver) for device, driver in restore_state.boot_framebuffers]
    return steps


def _load(facts: HostFacts, wanted: Mapping[PciAddress, Driver]) -> list[Step]:
    """Load the drivers that are not registered; one without a module is built in, and registered at boot."""
    return [
        LoadDriver(driver.module, driver.name, tuple(a for a, each in wanted.items() if each.name == driver.name))
        for driver in {driver.name: driver for driver in wanted.values()}.values()
        if driver.module and driver.name not in facts.pci_drivers
    ]
