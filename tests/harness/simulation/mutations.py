"""Faults put into the heart on purpose: for each invariant at least one that breaks it.

Each puts the fault in through a `pytest.MonkeyPatch`, which takes it out again. A simulation that does not notice them
proves nothing when it finds nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

import pytest

from gpuswitch.errors import KernelError
from gpuswitch.fleet import ownership
from gpuswitch.fleet.fleet import Fleet
from gpuswitch.fleet.owners import Owners
from gpuswitch.fleet.ownership import Ownership
from gpuswitch.gpu import gpu_record, observe
from gpuswitch.gpu.actor import Actor
from gpuswitch.gpu.admission import Admission
from gpuswitch.gpu.machine import START
from gpuswitch.gpu.planner import Planner
from gpuswitch.gpu.runner import Runner
from gpuswitch.host.port import StartJob
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import HostFacts
from gpuswitch.model.gpu import Gpu
from gpuswitch.model.owner import Owner
from gpuswitch.model.policy import Busy, Options
from gpuswitch.model.states import State
from gpuswitch.switch import engine
from gpuswitch.switch.engine import Engine
from gpuswitch.switch.journal.journal import Journal, Page
from gpuswitch.switch.planning import guards
from gpuswitch.switch.planning import preparation as prepare
from gpuswitch.switch.planning.preparation import Preparation
from gpuswitch.switch.planning.survey import DetachSurvey
from gpuswitch.switch.restore_state import NOTHING_TO_RESTORE, RestoreState
from gpuswitch.switch.shared.arbiter import Arbiter
from gpuswitch.switch.shared.awake import Awake, Why
from gpuswitch.switch.shared.clearing_up import ClearingUp
from gpuswitch.switch.steps.holders import CheckHolders
from gpuswitch.switch.steps.host import RestartUnits
from gpuswitch.switch.steps.pci import AimOverrides, AwaitLibvirt, DisableRuntimePm, HoldGroup, RestorePower
from tests.harness.simulation.loop import AWAIT
from tests.harness.simulation.story import Event, Story


class Mutation(NamedTuple):
    """A fault in the heart, and the invariants of which it breaks at least one; `story`: the one that shows it."""

    name: str
    numbers: frozenset[int]
    put_in: Callable[[pytest.MonkeyPatch], None]
    story: Story | None = None


ALL: list[Mutation] = []
_A_MOMENT = Event("storm", 0, "", 2, seconds=6.0)
A_MACHINE_ASKS = Event("vm", 0, "asks", 1)
_WHILE_THE_FIRST_WAITS = Story(
    "plain", "wait", (Event("program", 0, "opens"), Event("ask", 0, "vfio"), Event("ask", 0, "vfio", seconds=1.0))
)


def breaks(
    *numbers: int, story: Story | None = None
) -> Callable[[Callable[[pytest.MonkeyPatch], None]], Callable[[pytest.MonkeyPatch], None]]:
    """It breaks one of these invariants at least."""

    def kept(put_in: Callable[[pytest.MonkeyPatch], None]) -> Callable[[pytest.MonkeyPatch], None]:
        ALL.append(Mutation(put_in.__name__, frozenset(numbers), put_in, story))
        return put_in

    return kept


async def nothing(*_: Any, **__: Any) -> None:
    """In the place of what does something."""


@breaks(1)
def nobody_looks_before_the_unbind(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CheckHolders, "apply", nothing)


@breaks(1)
def units_start_while_others_need_them_stopped(patch: pytest.MonkeyPatch) -> None:
    async def start(self: Arbiter, gpu: object, unit: Any, *, job: Any = StartJob.START, wait: bool = True) -> None:
        await self._systemd.start(unit, job)

    patch.setattr(Arbiter, "start", start)


@breaks(2, story=Story("pair", "refuse", (Event("move", 1, "vfio", 2), Event("ask", 0, "vfio"))))
def half_way_counts_as_there(patch: pytest.MonkeyPatch) -> None:
    seen = observe.observe

    def observed(gpu: Gpu, facts: HostFacts, restore_state: RestoreState) -> State:
        found = seen(gpu, facts, restore_state)
        half = found is State.UNKNOWN and any(f.on_vfio for f in gpu.present(facts))
        return State.VFIO if half else found

    patch.setattr(gpu_record, "observe", observed)


@breaks(3)
def power_is_not_restored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RestorePower, "apply", nothing)


@breaks(3)
def units_of_the_driver_do_not_hear_of_who_comes_home(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RestartUnits, "apply", nothing)


@breaks(3)
def overrides_stay_when_a_switch_is_taken_back(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(AimOverrides, "revert", nothing)


@breaks(3)
def owed_units_are_forgotten(patch: pytest.MonkeyPatch) -> None:
    write = Page.write

    def forgetful(self: Page, entry: Any) -> None:
        write(self, replace(entry, restore_state=replace(entry.restore_state, units=())))

    patch.setattr(Page, "write", forgetful)


@breaks(3)
def the_last_step_is_not_taken_back(patch: pytest.MonkeyPatch) -> None:
    back = engine.Engine.back

    async def skipping(self: Engine) -> None:
        self._begun = self._begun[:-1]
        await back(self)

    patch.setattr(Engine, "back", skipping)


@breaks(3)
def the_machine_never_sleeps_again(patch: pytest.MonkeyPatch) -> None:
    need = Awake.need

    def requirements(self: Awake, gpu: PciAddress, why: Why, *, needed: bool) -> None:
        if needed:
            need(self, gpu, why, needed=True)

    patch.setattr(Awake, "need", requirements)


@breaks(3, story=Story("pair", "refuse", (A_MACHINE_ASKS,)))
def the_machine_may_sleep_under_a_virtual_machine(patch: pytest.MonkeyPatch) -> None:
    need = Awake.need

    def requirements(self: Awake, gpu: PciAddress, why: Why, *, needed: bool) -> None:
        if why is not Why.OWNER:
            need(self, gpu, why, needed=needed)

    patch.setattr(Awake, "need", requirements)


@breaks(3)
def nobody_waits_for_the_lock(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Awake, "settled", nothing)


@breaks(3)
def whatever_is_stopped_was_active(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Arbiter, "is_to_be_started", lambda *_: True)


@breaks(
    3, story=Story("single", "refuse", (Event("ask", 0, "vfio"), Event("blind", 0, "", 1, seconds=50.0), _A_MOMENT))
)
def an_empty_look_is_a_look(patch: pytest.MonkeyPatch) -> None:
    def look(self: Fleet) -> None:
        self._put_off = None
        try:
            facts = self._host.look()
        except KernelError:
            facts = HostFacts({}, iommu=False, vfio_available=False)
        self._take_in(facts)

    patch.setattr(Fleet, "look", look)


@breaks(4)
def the_kernel_is_waited_for(patch: pytest.MonkeyPatch) -> None:
    class Patient:
        def __getattr__(self, name: str) -> object:
            return (lambda _: asyncio.timeout(None)) if name == "timeout" else getattr(asyncio, name)

    patch.setattr(engine, "asyncio", Patient())


@breaks(4)
def a_wedged_gpu_is_written_to(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Engine, "back", _written_to)
    patch.setattr(Runner, "until_returned", _hurried)


async def _written_to(self: Engine) -> None:
    while self._begun:
        _, step = self._begun.pop()
        await step.revert(self._context)


async def _hurried(self: Runner) -> None:
    await self.new_engine((DisableRuntimePm({}),)).forward()


@breaks(4)
def units_are_waited_for_before_the_service_is_ready(patch: pytest.MonkeyPatch) -> None:
    prepared = Planner.preparation

    def patient(self: Planner, state: State, options: Any, *, starting: bool) -> Preparation:
        return replace(prepared(self, state, options, starting=starting), starting=False)

    patch.setattr(Planner, "preparation", patient)


@breaks(3, 5)
def the_journal_is_not_written(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Journal, "save", lambda *_: None)


@breaks(5, story=Story("single", "refuse", (Event("crash", 0, AWAIT, 73), Event("ask", 0, "vfio"), _A_MOMENT)))
def nobody_takes_up_what_a_dead_service_left(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Actor, "adopt", nothing)


@breaks(6, story=_WHILE_THE_FIRST_WAITS)
def two_switches_may_run(patch: pytest.MonkeyPatch) -> None:
    async def request(self: Actor, target: State, *others: Any, **_: Any) -> object:
        preparation = replace(await self._preparation(others[0]), state=State.UNKNOWN)
        return await self._begun(preparation, target, others[1])

    def set_out(self: Runner, switch: Any, trigger: str = "") -> None:
        record = self._record
        record.make_current(switch)
        if not record.state.moving:
            record.fire(trigger or ("recover" if record.state is State.FAILED else START[switch.target]))
        record.tell()

    patch.setattr(Actor, "request", request)
    patch.setattr(Runner, "set_out", set_out)
    patch.setattr(Preparation, "is_still_valid", lambda *_: True)


@breaks(7)
def the_group_is_not_held(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(HoldGroup, "apply", nothing)
    patch.setattr(Preparation, "_hold_groups", nothing)


@breaks(7, story=Story("pair", "refuse", (A_MACHINE_ASKS, Event("vm", 0, "is released", 3, seconds=1.0))))
def any_machine_that_ends_lets_go_of_all(patch: pytest.MonkeyPatch) -> None:
    release = Owners.release

    def released(self: Owners, _: Owner, reason: str) -> None:
        for owner in {actor.owner for actor in self._actors() if actor.owner is not None}:
            release(self, owner, reason)

    patch.setattr(Owners, "release", released)


@breaks(7, story=Story("pair", "refuse", (A_MACHINE_ASKS, Event("ask", 0, "host", seconds=1.0))))
def it_is_taken_from_who_is_about_to_open_it(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Admission, "refuse_owned", lambda *_: None)


@breaks(
    7,
    story=Story(
        "pair", "refuse", (Event("unwatched", 0, "", 2), A_MACHINE_ASKS, Event("vm", 0, "ends", 1, seconds=6.0))
    ),
)
def a_watch_ends_with_its_first_fault(patch: pytest.MonkeyPatch) -> None:
    async def wait_for_change(self: Ownership, holders: Any, _: object) -> None:
        await self._processes.wait_for_change(holders)

    async def once(work: Callable[[], Awaitable[None]], _: object) -> None:
        with suppress(KernelError):
            await work()

    patch.setattr(Ownership, "_wait_for_change", wait_for_change)
    patch.setattr(ownership, "whatever_happens", once)


_LIBVIRT_DIES = (A_MACHINE_ASKS, Event("vm", 0, "dies", 1, seconds=6.0))
_AND_COMES_BACK = Event("vm", 0, "is heard of", 1, seconds=50.0)


@breaks(3, story=Story("pair", "refuse", (*_LIBVIRT_DIES, _AND_COMES_BACK)))
def nobody_waits_until_libvirt_has_cleared_up(patch: pytest.MonkeyPatch) -> None:
    async def wait(*_: object) -> bool:
        return True

    patch.setattr(ClearingUp, "wait", wait)


_A_MACHINE_OF_OTHERS = (Event("ask", 0, "vfio"), Event("vm", 0, "grabs", 1, seconds=6.0))


@breaks(
    3,
    story=Story(
        "pair",
        "refuse",
        (*_A_MACHINE_OF_OTHERS, Event("vm", 0, "dies", 1), Event("ask", 0, "host", seconds=1.0), _AND_COMES_BACK),
    ),
)
def a_way_home_does_not_look_into_the_books(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Preparation, "_refuse_in_the_books", lambda *_: None)


@breaks(
    3,
    story=Story(
        "pair",
        "refuse",
        (*_A_MACHINE_OF_OTHERS, Event("ask", 0, "host", 1, seconds=1.0), Event("vm", 0, "dies", 1), _AND_COMES_BACK),
    ),
)
def whoever_waits_for_a_machine_does_not_wait_for_libvirt(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(AwaitLibvirt, "apply", nothing)


@breaks(4, story=Story("pair", "refuse", (*_LIBVIRT_DIES, Event("kill", seconds=1.0))))
def libvirt_is_started_before_the_service_is_ready(patch: pytest.MonkeyPatch) -> None:
    start = Owners.start

    def started(self: Owners) -> None:
        self.ready()
        start(self)

    async def held_up(*_: object) -> None:
        await asyncio.sleep(300.0)

    patch.setattr(Owners, "start", started)
    patch.setattr(Awake, "settled_if_possible", held_up)


@breaks(3, story=Story("pair", "refuse", (A_MACHINE_ASKS, Event("sleepy", 0, seconds=6.0))))
def a_lock_that_somebody_ends_is_not_missed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Awake, "_watched", nothing)


@breaks(8, story=Story("plain", "refuse", (Event("fault", 0, "hang", 1), Event("plan", 0, "vfio"))))
def a_plan_is_read_by_who_works_on_the_gpu(patch: pytest.MonkeyPatch) -> None:
    async def plan(self: Actor, target: State, *_: object) -> Any:
        return await self._prepared(await self._preparation(Options()), target)

    patch.setattr(Actor, "plan", plan)


@breaks(8)
def refusals_saynothing(patch: pytest.MonkeyPatch) -> None:
    def refusal(blockers: Iterable[guards.Blocker]) -> Exception:
        return next(iter(blockers)).error("")

    patch.setattr(prepare, "refusal", refusal)
    patch.setattr("gpuswitch.switch.planning.survey.refusal", refusal)


@breaks(8)
def only_one_of_all_is_named(patch: pytest.MonkeyPatch) -> None:
    said = guards.refusal

    def refusal(blockers: Iterable[guards.Blocker]) -> Exception:
        return said(list(blockers)[:1])

    patch.setattr(prepare, "refusal", refusal)
    patch.setattr("gpuswitch.switch.planning.survey.refusal", refusal)


@breaks(9)
def a_step_sleeps(patch: pytest.MonkeyPatch) -> None:
    async def verify(*_: object) -> None:
        await asyncio.sleep(0.1)

    patch.setattr(DisableRuntimePm, "verify", verify)


@breaks(9)
def an_idle_service_looks_again_and_again(patch: pytest.MonkeyPatch) -> None:
    look = Fleet.look

    def looks(self: Fleet) -> None:
        look(self)
        asyncio.get_running_loop().call_later(60.0, self.look)

    patch.setattr(Fleet, "look", looks)


@breaks(10)
def programs_are_killed_whatever_the_policy(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(DetachSurvey, "_busy", property(lambda _: Busy.KILL))


@breaks(3, 5)
def what_is_owed_is_forgotten_after_a_failure(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(gpu_record.GpuRecord, "_restore_state_after", lambda *_: NOTHING_TO_RESTORE)
