"""What holds for the plan of any GPU, whatever has to be done around it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hypothesis import given
from hypothesis import strategies as st

from gpuswitch.model.drivers import PERSISTENCED
from gpuswitch.model.facts import BootFramebuffer, HostFacts, Module
from gpuswitch.model.gpu import Gpu
from gpuswitch.model.holders import Unit
from gpuswitch.model.policy import Busy, ModulePolicy
from gpuswitch.switch.planning.plan import HomeOptions, Plan, to_host, to_vfio
from gpuswitch.switch.planning.requirements import DetachRequirements, bound_drivers, query
from gpuswitch.switch.restore_state import NOTHING_TO_RESTORE, RestoreState
from gpuswitch.switch.steps.consoles import MoveConsoles, RestoreConsoles
from gpuswitch.switch.steps.holders import AwaitHolders, CheckHolders, EndSession
from gpuswitch.switch.steps.host import (
    InhibitSleep,
    LoadModules,
    Persistence,
    ReleaseBootFramebuffer,
    RestoreBootFramebuffer,
    StartUnits,
    StopUnits,
    UnloadModules,
)
from gpuswitch.switch.steps.pci import (
    AimOverrides,
    Bind,
    CheckGroup,
    DisableRuntimePm,
    LoadDriver,
    RestorePower,
    Unbind,
)
from gpuswitch.switch.steps.step import Step
from gpuswitch.switch.steps.uevents import Announce
from tests.unit.test_plan_rules import Case, cases

_MODULES = ("nvidia", "nvidia_drm", "nvidia_modeset", "nvidia_uvm", "nouveau", "snd_hda_intel", "xhci_pci")
_UNITS = tuple(Unit(f"{name}.service") for name in ("sddm", "nvidia-persistenced", "ollama"))
_TERMINALS = st.sampled_from([(), (1,), (1, 2, 3)])
_COME_BACK = (LoadDriver, StopUnits, EndSession, Announce, AwaitHolders, MoveConsoles, Persistence, DisableRuntimePm)
"""Steps after which somebody may open it again, or who may do so meanwhile."""


@dataclass(frozen=True)
class Around:
    """A GPU in some condition, and what has to be done around it."""

    case: Case
    requirements: DetachRequirements

    @property
    def out(self) -> Plan:
        return to_vfio(self.case.gpu, self.case.host, self.case.now, NOTHING_TO_RESTORE, self.requirements)

    def back(self, back: HomeOptions) -> Plan:
        restore_state = replace(self.out.restore_state, functions=self.case.baseline)
        return to_host(self.case.gpu, self.case.host, self.case.now, restore_state, back)


def _subset(draw: st.DrawFn, units: tuple[Unit, ...]) -> tuple[Unit, ...]:
    return tuple(unit for unit in units if draw(st.booleans()))


@st.composite
def arounds(draw: st.DrawFn) -> Around:
    case = draw(cases())
    modules = {m: Module(draw(st.sampled_from([None, 0, 3]))) for m in _MODULES if draw(st.booleans())}
    host: HostFacts = replace(case.host, modules=modules)
    case = replace(case, host=host)
    gpu: Gpu = case.gpu
    found = bound_drivers(gpu, host, draw(st.sampled_from(ModulePolicy)))
    stop = _subset(draw, _UNITS)
    active = _subset(draw, stop)
    to = draw(st.sampled_from([None, 1]))
    boot = (BootFramebuffer("efi-framebuffer.0", "efi-framebuffer", gpu.address),)
    requirements = DetachRequirements(
        query=query(gpu, host, found) if found else None,
        busy=draw(st.sampled_from(Busy)),
        stop=stop,
        active=active,
        later=_subset(draw, active),
        sessions=draw(st.sampled_from([(), ("2", "c7")])),
        announce=draw(st.sampled_from([(), (("sound", gpu.functions),)])),
        holding=draw(st.booleans()),
        bound_drivers=found,
        terminals=draw(_TERMINALS),
        to=to,
        unbind_consoles=() if to is not None else draw(st.sampled_from([(), ("vtcon1",)])),
        boot_framebuffers=draw(st.sampled_from([(), boot])),
        persistent=draw(st.sampled_from([(), (gpu.address,)])),
    )
    return Around(case, requirements if found else DetachRequirements())


def places(plan: Plan, *kinds: type[Step]) -> list[int]:
    return [place for place, step in enumerate(plan.steps) if isinstance(step, kinds)]


@given(arounds())
def test_out_the_last_look_for_holders_is_right_before_the_first_detach(around: Around) -> None:
    plan = around.out
    detach = places(plan, Unbind, UnloadModules)
    looks = places(plan, CheckHolders)
    if detach:
        assert looks == [min(detach) - 1]
        assert max(places(plan, *_COME_BACK, AimOverrides)) < looks[0]
    else:
        assert looks == []


@given(arounds())
def test_back_the_last_look_for_holders_is_right_before_the_first_detach(around: Around) -> None:
    plan = around.back(HomeOptions())
    unbinds = places(plan, Unbind)
    assert places(plan, CheckHolders) == ([min(unbinds) - 1] if unbinds else [])


@given(arounds())
def test_out_every_function_leaves_once(around: Around) -> None:
    plan = around.out
    left = [step.function for step in plan.steps if isinstance(step, Unbind)]
    left += [function for step in plan.steps if isinstance(step, UnloadModules) for function in step.functions]
    assert sorted(left) == sorted(a for a in around.case.gpu.functions if around.case.on(a) not in {None, "vfio-pci"})


@given(arounds())
def test_out_units_are_stopped_before_holders_are_waited_for(around: Around) -> None:
    plan = around.out
    order = (StopUnits, EndSession, Announce, AwaitHolders, MoveConsoles)
    first = [min(places(plan, kind), default=None) for kind in order]
    there = [place for place in first if place is not None]
    assert there == sorted(there)
    assert max(there, default=-1) < min(places(plan, DisableRuntimePm), default=len(plan.steps))


@given(arounds())
def test_out_what_may_fail_without_harm_comes_first(around: Around) -> None:
    assert places(around.out, LoadDriver) in ([], [0])


@given(arounds())
def test_out_everything_that_it_changes_is_owed(around: Around) -> None:
    restore_state, requirements = around.out.restore_state, around.requirements
    assert set(restore_state.units) == set(requirements.active)
    assert set(restore_state.modules) == {module for o in requirements.bound_drivers for module in o.loaded}
    assert (restore_state.terminals, restore_state.vtconsoles, restore_state.persistent) == (
        requirements.terminals,
        requirements.unbind_consoles,
        requirements.persistent,
    )
    assert restore_state.boot_framebuffers == tuple((b.device, b.driver) for b in requirements.boot_framebuffers)
    for step in around.out.steps:
        match step:
            case StopUnits():
                assert set(step.active) <= set(restore_state.units)
            case MoveConsoles():
                assert set(step.terminals) <= set(restore_state.terminals)
                assert set(step.vtconsoles) <= set(restore_state.vtconsoles)
            case ReleaseBootFramebuffer():
                assert (step.device, step.driver) in restore_state.boot_framebuffers
            case Persistence():
                assert step.function in restore_state.persistent
            case UnloadModules():
                assert set(step.modules) <= set(restore_state.modules)
            case Unbind():
                assert step.function in restore_state.functions


@given(arounds())
def test_out_a_module_is_unloaded_after_those_that_use_it_and_owed_before_them(around: Around) -> None:
    plan = around.out
    for step in plan.steps:
        if isinstance(step, UnloadModules):
            assert tuple(m for m in plan.restore_state.modules if m in step.modules) == tuple(reversed(step.modules))


@given(arounds())
def test_out_units_start_only_once_the_gpu_is_away(around: Around) -> None:
    plan = around.out
    starts = places(plan, StartUnits)
    gone = places(plan, Unbind, UnloadModules, Bind, CheckGroup)
    assert all(start > max(gone, default=-1) for start in starts)
    started = {unit for step in plan.steps if isinstance(step, StartUnits) for unit in step.units}
    assert started == set(around.requirements.active) - set(around.requirements.later)
    assert set(plan.afterwards.units) == set(around.requirements.later)
    assert replace(plan.afterwards, units=()) == replace(plan.restore_state, units=())


@given(arounds(), st.booleans())
def test_the_machine_is_kept_from_sleeping_all_the_while(around: Around, out: bool) -> None:
    plan = around.out if out else around.back(HomeOptions())
    assert places(plan, InhibitSleep) == [1 if isinstance(plan.steps[0], LoadDriver) and out else 0]


@given(arounds())
def test_out_only_what_follows_the_last_proof_may_fail_and_be_forgone(around: Around) -> None:
    plan = around.out
    done = max(places(plan, Bind, CheckGroup, Unbind, AimOverrides))
    forgone = [place for place, step in enumerate(plan.steps) if step.optional and not isinstance(step, InhibitSleep)]
    assert forgone == list(range(done + 1, len(plan.steps)))


@given(arounds())
def test_back_everything_that_is_owed_is_given_back(around: Around) -> None:
    plan = around.back(HomeOptions(boot_framebuffer=True))
    restore_state = around.out.restore_state
    started = [unit for step in plan.steps if isinstance(step, StartUnits) for unit in step.units]
    assert started == list(restore_state.units)
    shown = [step for step in plan.steps if isinstance(step, RestoreConsoles)]
    assert [step.terminals for step in shown] == (
        [restore_state.terminals] if restore_state.terminals or restore_state.vtconsoles else []
    )
    bound = [(step.device, step.driver) for step in plan.steps if isinstance(step, RestoreBootFramebuffer)]
    assert bound == list(restore_state.boot_framebuffers)
    on = [step.function for step in plan.steps if isinstance(step, Persistence) and step.on]
    # A daemon that is started does so itself.
    assert on == (list(restore_state.persistent) if PERSISTENCED not in restore_state.units else [])
    assert plan.afterwards == NOTHING_TO_RESTORE


@given(arounds())
def test_back_no_module_is_loaded_twice_or_without_being_owed(around: Around) -> None:
    plan = around.back(HomeOptions())
    loaded = [module for step in plan.steps if isinstance(step, LoadModules) for module in step.modules]
    assert len(set(loaded)) == len(loaded)
    assert set(loaded) <= set(around.out.restore_state.modules) - set(around.case.host.modules)


@given(arounds())
def test_back_once_the_gpu_is_home_nothing_takes_it_away_again(around: Around) -> None:
    plan = around.back(HomeOptions(Unit("getty@tty1.service"), boot_framebuffer=True))
    (home,) = places(plan, RestorePower)
    assert all(step.optional for step in plan.steps[home + 1 :])


@given(arounds())
def test_back_while_the_service_starts_units_stay_owed(around: Around) -> None:
    plan = around.back(HomeOptions(Unit("getty@tty1.service"), units_later=True))
    assert places(plan, StartUnits) == []
    assert plan.afterwards == RestoreState(units=(*around.out.restore_state.units, Unit("getty@tty1.service")))
