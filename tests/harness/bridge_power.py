"""A step that is not in the product, as the worked example of one that changes what several GPUs share.

`d3cold_allowed` of the bridge above several GPUs is 0 while one of them is away, so that nobody takes the power from
all of them. To have it in the product, its line goes into `to_vfio` in `gpuswitch/switch/planning/plan.py`:

    *([ChangeAttribute(bridge, "d3cold_allowed", "0")] if arriving and bridge else []),

All else follows, and is tested with this example: `tests/simulated_host/test_shared_attributes.py`, and the simulation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from gpuswitch.host.simulated.kernel import Machine
from gpuswitch.model.address import PciAddress
from gpuswitch.model.attribute import FunctionAttribute
from gpuswitch.model.facts import HostFacts, Kind
from gpuswitch.model.gpu import Gpu
from gpuswitch.switch.planning import preparation
from gpuswitch.switch.planning.plan import Plan, to_vfio
from gpuswitch.switch.steps.attributes import ChangeAttribute
from gpuswitch.switch.steps.pci import DisableRuntimePm

D3COLD = "d3cold_allowed"
AT_HOME, WHILE_AWAY = "1", "0"


def bridge_above_several(gpu: Gpu, facts: HostFacts) -> PciAddress | None:
    """The nearest bridge that has another GPU below it, too; None: there is none."""
    displays = [
        f.address for f in facts.functions.values() if f.kind is Kind.DISPLAY and f.address not in gpu.functions
    ]
    others = {bridge for display in displays for bridge in _above(display, facts)}
    return next((bridge for bridge in _above(gpu.address, facts) if bridge in others), None)


def _above(function: PciAddress, facts: HostFacts) -> Iterator[PciAddress]:
    while (above := facts.functions.get(function)) is not None and above.parent is not None:
        function = above.parent
        yield function


def with_bridge_powered(plan: Plan, facts: HostFacts) -> Plan:
    """The way to vfio with the step, once the GPU is awake."""
    bridge = bridge_above_several(plan.gpu, facts)
    place = next((n for n, step in enumerate(plan.steps, 1) if isinstance(step, DisableRuntimePm)), None)
    if bridge is None or place is None:
        return plan
    step = ChangeAttribute(bridge, D3COLD, WHILE_AWAY)
    return replace(plan, steps=(*plan.steps[:place], step, *plan.steps[place:]))


@contextmanager
def bridges_stay_powered() -> Iterator[None]:
    """Meanwhile, all plans have it: no module of the product does, so its function is replaced."""

    def planned(gpu: Gpu, facts: HostFacts, *rest: Any) -> Plan:
        return with_bridge_powered(to_vfio(gpu, facts, *rest), facts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "to_vfio", planned)
        yield


def attributes_of_bridges(machine: Machine, gpus: Iterable[PciAddress]) -> dict[FunctionAttribute, str]:
    """What a step may change of the bridges above these GPUs, shared or not, with what it says now."""
    facts = machine.look()
    bridges = {bridge for gpu in gpus for bridge in _above(gpu, facts)}
    return {
        FunctionAttribute(bridge, D3COLD): machine.devices[bridge].settings[D3COLD]
        for bridge in sorted(bridges & machine.devices.keys())  # some machines are made without their root ports
    }
