"""What holds for the plan of any GPU, in any condition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from gpuswitch.host.port import Captured
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import VFIO_DRIVER, HostFacts, Kind
from gpuswitch.model.gpu import Gpu
from gpuswitch.switch.planning.plan import Plan, to_host, to_vfio
from gpuswitch.switch.restore_state import NOTHING_TO_RESTORE, Baseline, RestoreState
from gpuswitch.switch.steps.pci import (
    AimOverrides,
    Bind,
    DisableRuntimePm,
    HoldGroup,
    LoadDriver,
    ReleaseGroup,
    RestorePower,
    Unbind,
)
from tests.harness.facts import AUDIO, UCSI, USB, VGA, driver, facts, function

_HOST_DRIVERS = st.sampled_from([None, "nvidia", "nouveau", "snd_hda_intel", "xhci_hcd"])
_OVERRIDES = st.sampled_from([None, "vfio-pci", "nvidia"])
_POWER = st.sampled_from(["auto", "on"])


@dataclass(frozen=True)
class Case:
    """A GPU in some condition, and what it is to have at home."""

    host: HostFacts
    gpu: Gpu
    now: Baseline
    baseline: Baseline

    def on(self, address: PciAddress) -> str | None:
        return self.host.functions[address].driver_name

    @property
    def displays(self) -> set[PciAddress]:
        return {a for a, f in self.host.functions.items() if f.kind is Kind.DISPLAY}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    numbers = draw(st.lists(st.integers(1, 7), unique=True, max_size=5))
    functions = [
        function(
            f"0000:01:00.{number}",
            VGA if number == 0 else draw(st.sampled_from([VGA, AUDIO, USB, UCSI])),
            draw(st.one_of(_HOST_DRIVERS, st.just("vfio-pci"))),
            group=draw(st.integers(0, 3)),
        )
        for number in sorted([0, *numbers])
    ]
    registered = draw(st.dictionaries(st.sampled_from(["vfio-pci", "nvidia", "nouveau"]), st.none()))
    host = facts(functions, registered=registered)
    now, baseline = {}, {}
    for f in functions:
        now[f.address] = Captured(f.driver, draw(_OVERRIDES), draw(_POWER))
        baseline[f.address] = Captured(driver(draw(_HOST_DRIVERS)), draw(_OVERRIDES), draw(_POWER))
    return Case(host, Gpu(functions[0].address, tuple(host.functions)), now, baseline)


def out(case: Case) -> Plan:
    return to_vfio(case.gpu, case.host, case.now, NOTHING_TO_RESTORE)


def back(case: Case) -> Plan:
    return to_host(case.gpu, case.host, case.now, RestoreState(case.baseline))


def unbinds(plan: Plan) -> list[Unbind]:
    return [step for step in plan.steps if isinstance(step, Unbind)]


def binds(plan: Plan) -> list[Bind]:
    return [step for step in plan.steps if isinstance(step, Bind)]


def places(plan: Plan, kind: type) -> list[int]:
    return [place for place, step in enumerate(plan.steps) if isinstance(step, kind)]


@pytest.mark.parametrize("make", [out, back], ids=["to vfio", "to host"])
@given(case=cases())
def test_all_functions_are_aimed_before_any_is_unbound(make: Callable[[Case], Plan], case: Case) -> None:
    plan = make(case)
    assume(make is back or binds(plan))
    first = places(plan, AimOverrides)[0]
    aim = plan.steps[first]
    assert isinstance(aim, AimOverrides)
    assert set(aim.to) == set(case.gpu.functions)
    assert all(place > first for place in [*places(plan, Unbind), *places(plan, Bind)])
    assert aim.before == {a: captured.override for a, captured in case.now.items()}


@pytest.mark.parametrize("make", [out, back], ids=["to vfio", "to host"])
@given(case=cases())
def test_every_unbind_comes_before_every_bind(make: Callable[[Case], Plan], case: Case) -> None:
    plan = make(case)
    assert max(places(plan, Unbind), default=-1) < min(places(plan, Bind), default=len(plan.steps))


@pytest.mark.parametrize("make", [out, back], ids=["to vfio", "to host"])
@given(case=cases())
def test_a_function_is_unbound_from_the_driver_it_is_on_and_once(make: Callable[[Case], Plan], case: Case) -> None:
    plan = make(case)
    assert len({step.function for step in unbinds(plan)}) == len(unbinds(plan))
    assert len({step.function for step in binds(plan)}) == len(binds(plan))
    assert all(step.driver == case.on(step.function) for step in unbinds(plan))
    free = {a for a in case.gpu.functions if case.on(a) is None} | {step.function for step in unbinds(plan)}
    assert {step.function for step in binds(plan)} <= free


@pytest.mark.parametrize("make", [out, back], ids=["to vfio", "to host"])
@given(case=cases())
def test_it_is_awake_before_anything_is_touched(make: Callable[[Case], Plan], case: Case) -> None:
    plan = make(case)
    assume(make is back or binds(plan))
    (awake,) = places(plan, DisableRuntimePm)
    assert awake < min(places(plan, AimOverrides))


@given(cases())
def test_out_power_management_is_left_to_vfio(case: Case) -> None:
    """The bind itself sets power/control, as vfio-pci wants it."""
    plan = out(case)
    awake = {a for step in plan.steps if isinstance(step, DisableRuntimePm) for a in step.before}
    assert awake == {step.function for step in binds(plan)}
    assert places(plan, RestorePower) == []


@given(cases())
def test_out_nothing_is_written_to_a_gpu_that_is_there(case: Case) -> None:
    """A machine may run with it."""
    plan = out(case)
    writes = (DisableRuntimePm, AimOverrides, Unbind, Bind)
    assert bool(binds(plan)) is any(isinstance(step, writes) for step in plan.steps)


@given(cases())
def test_out_every_function_ends_on_vfio(case: Case) -> None:
    plan = out(case)
    assert {step.function for step in binds(plan)} == {a for a in case.gpu.functions if case.on(a) != VFIO_DRIVER}
    assert {step.driver for step in binds(plan)} <= {VFIO_DRIVER}
    assert VFIO_DRIVER not in {step.driver for step in unbinds(plan)}
    assert set(plan.restore_state.functions) == {step.function for step in binds(plan)}


@given(cases())
def test_out_what_may_fail_without_harm_comes_first(case: Case) -> None:
    assert places(out(case), LoadDriver) in ([], [0])


@given(cases())
def test_out_the_display_leaves_last(case: Case) -> None:
    order = [step.function in case.displays for step in unbinds(out(case))]
    assert order == sorted(order)


@given(cases())
def test_back_the_display_comes_first(case: Case) -> None:
    for steps in (unbinds(back(case)), binds(back(case))):
        order = [step.function in case.displays for step in steps]
        assert order == sorted(order, reverse=True)


@given(cases())
def test_back_nothing_is_unbound_from_a_host_driver(case: Case) -> None:
    assert {step.driver for step in unbinds(back(case))} <= {VFIO_DRIVER}
    assert {step.function for step in unbinds(back(case))} == {
        a for a in case.gpu.functions if case.on(a) == VFIO_DRIVER
    }


@given(cases())
def test_back_every_group_is_held_through_the_unbinds_and_let_go(case: Case) -> None:
    plan = back(case)
    groups = sorted({case.host.functions[step.function].iommu_group or 0 for step in unbinds(plan)})
    assert [step.group for step in plan.steps if isinstance(step, HoldGroup)] == groups
    assert [step.group for step in plan.steps if isinstance(step, ReleaseGroup)] == groups
    if groups:
        held, let_go, unbound = places(plan, HoldGroup), places(plan, ReleaseGroup), places(plan, Unbind)
        assert max(held) < min(unbound) <= max(unbound) < min(let_go) < min([*places(plan, Bind), len(plan.steps)])


@given(cases())
def test_back_everything_is_as_it_was(case: Case) -> None:
    plan = back(case)
    *_, last, rest = plan.steps
    assert isinstance(last, AimOverrides)
    assert isinstance(rest, RestorePower)
    assert last.to == {a: kept.override for a, kept in case.baseline.items()}
    assert rest.before == {a: kept.power_control for a, kept in case.baseline.items()}
    ends = {a: None if case.on(a) == VFIO_DRIVER else case.on(a) for a in case.gpu.functions}
    ends |= {step.function: step.driver for step in binds(plan)}
    assert ends == {a: kept.driver.name if kept.driver else None for a, kept in plan.restore_state.functions.items()}
    stayed = {a for a in case.gpu.functions if case.on(a) not in {None, VFIO_DRIVER}}
    assert all(
        plan.restore_state.functions[a].driver == case.baseline[a].driver for a in case.gpu.functions if a not in stayed
    )
