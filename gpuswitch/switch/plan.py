"""The story of a switch: its steps in order, with the reason for each. Computed from facts before anything is touched.

A plan moves whatever is not yet where it should be. So the same two functions serve a GPU at rest, a GPU that somebody
left half-moved, and one that a crash interrupted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import VFIO_DRIVER, VFIO_MODULE, Captured, HostFacts, Kind
from gpuswitch.model.gpu import Gpu
from gpuswitch.model.states import State
from gpuswitch.switch.steps import (
    AimOverrides,
    AwaitNodes,
    Bind,
    CheckGroup,
    HoldGroup,
    KeepAwake,
    LoadDriver,
    ReleaseGroup,
    RestorePower,
    Step,
    Unbind,
)

Baseline = Mapping[PciAddress, Captured]
"""What each function of a GPU had before we touched it."""


@dataclass(frozen=True)
class Plan:
    """The ordered steps that take `gpu` to `target` (State.HOST or State.VFIO).

    `owed` is what the GPU must get back one day, from the moment the first step begins.
    """

    gpu: Gpu
    target: State
    owed: Baseline
    steps: tuple[Step, ...]


def to_vfio(gpu: Gpu, facts: HostFacts, now: Baseline, owed: Baseline) -> Plan:
    """Every function of the GPU to vfio-pci.

    `now` is what the functions have at this moment, and what a revert gives back; `owed` is what an earlier switch
    that never came home still owes them.
    """
    driver = {f.address: f.driver_name for f in gpu.present(facts)}
    leaving = [a for a in gpu.in_detach_order(facts) if driver[a] not in (None, VFIO_DRIVER)]
    arriving = [a for a in gpu.in_detach_order(facts) if driver[a] != VFIO_DRIVER]

    return Plan(
        gpu,
        State.VFIO,
        {**{a: now[a] for a in arriving}, **owed},
        (
            # First what may fail without anything having been touched.
            *_load(facts, {VFIO_DRIVER: VFIO_MODULE}),
            # A device that sleeps in D3cold may not wake up in other hands. vfio-pci takes power management over with
            # the bind (pm_runtime_allow in vfio_pci_core_register_device), so this needs no end here.
            KeepAwake({a: now[a].power_control for a in arriving}),
            # All functions before any unbind: from here on whatever probes them, be it udev or a rescan, can only
            # bind vfio-pci, and no host driver snatches a function back half-way.
            AimOverrides(
                to=dict.fromkeys(gpu.functions, VFIO_DRIVER), before={a: now[a].override for a in gpu.functions}
            ),
            # Companions first: the display function powers the card, and it is the one that must not be lost early.
            *(Unbind(a, str(driver[a])) for a in leaving),
            *(Bind(a, VFIO_DRIVER) for a in arriving),
            # A VM takes whole groups, and finds out late that it cannot.
            *(CheckGroup(number, gpu) for number in gpu.groups(facts)),
        ),
    )


def to_host(gpu: Gpu, facts: HostFacts, now: Baseline, baseline: Baseline) -> Plan:
    """Every function back to its baseline: its driver (or none), its override, its power setting.

    `now` is what the functions have at this moment, and what a revert gives back.
    """
    driver = {f.address: f.driver_name for f in gpu.present(facts)}
    # A function that somebody gave another host driver meanwhile is home already, and may be in use: it is left alone.
    elsewhere = {f.address: f.driver for f in gpu.present(facts) if f.driver and not f.on_vfio}
    baseline = {a: replace(baseline[a], driver=elsewhere.get(a, baseline[a].driver)) for a in gpu.functions}
    wanted = {a: kept.driver for a, kept in baseline.items()}
    names = {a: d.name if d else None for a, d in wanted.items()}
    order = gpu.in_attach_order(facts)
    leaving = [a for a in order if driver[a] == VFIO_DRIVER]
    arriving = [a for a in order if names[a] is not None and driver[a] in (None, VFIO_DRIVER)]
    held = sorted({g for a in leaving if (g := facts.functions[a].iommu_group) is not None})
    modules = {d.name: d.module for d in wanted.values() if d is not None}

    return Plan(
        gpu,
        State.HOST,
        baseline,
        (
            # Whoever has the group open would lose the device under its feet; holding it keeps the next one out, too.
            *(HoldGroup(number) for number in held),
            KeepAwake({a: now[a].power_control for a in gpu.functions}),
            # `vfio-pci.ids=` on the kernel command line would win a probe that is not aimed.
            AimOverrides(
                to={a: names[a] or baseline[a].override for a in gpu.functions},
                before={a: now[a].override for a in gpu.functions},
            ),
            # Display first: the reverse of the way out.
            *(Unbind(a, VFIO_DRIVER) for a in leaving),
            *(ReleaseGroup(number) for number in held),
            # Not before the device is free: nvidia's module refuses to load where it finds no card of its own.
            *_load(facts, modules),
            *(Bind(a, str(names[a])) for a in arriving),
            *(AwaitNodes(a) for a in order if facts.functions[a].kind is Kind.DISPLAY),
            # The override has done its work; from here the functions probe as they did before us.
            AimOverrides(to={a: baseline[a].override for a in gpu.functions}, before=names),
            RestorePower({a: baseline[a].power_control for a in gpu.functions}),
        ),
    )


def _load(facts: HostFacts, modules: Mapping[str, str | None]) -> list[Step]:
    """Load the drivers that are not registered; one without a module is built in, and registered at boot."""
    return [LoadDriver(module, name) for name, module in modules.items() if module and name not in facts.pci_drivers]
