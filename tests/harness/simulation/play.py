"""Plays one story to its end, and tells what came of it."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from gpuswitch.gpu.machine import GpuMachine
from gpuswitch.model.states import EDGES, State
from gpuswitch.switch.journal import journal
from tests.harness.bridge_power import bridges_stay_powered
from tests.harness.simulation import drive
from tests.harness.simulation.invariants import Violation
from tests.harness.simulation.loop import SimulatedLoop
from tests.harness.simulation.story import Story, told
from tests.harness.simulation.world import World

_MUCH_GARBAGE = 10_000
_BY_TRIGGER = {(edge.trigger, edge.source): edge.target for edge in EDGES}


@dataclass
class Outcome:
    """What came of one or more stories. `steps` of plans were begun, forward or back."""

    stories: int = 0
    steps: int = 0
    violations: list[Violation] = field(default_factory=list)
    edges: Counter[tuple[str, State]] = field(default_factory=Counter)
    hits: Counter[tuple[str, str]] = field(default_factory=Counter)
    ends: Counter[tuple[str, str]] = field(default_factory=Counter)
    trace: list[str] = field(default_factory=list)

    def add(self, other: Outcome) -> None:
        self.stories += other.stories
        self.steps += other.steps
        self.violations += other.violations
        self.edges.update(other.edges)
        self.hits.update(other.hits)
        self.ends.update(other.ends)

    @property
    def states(self) -> set[State]:
        return {_BY_TRIGGER[edge] for edge in self.edges} | {source for _, source in self.edges}


def played(story: Story, *, trace: bool = False) -> Outcome:
    """Play it, alone in a world of its own."""
    return run(story.machine_name, story.rules, lambda world: drive.happens(world, story), trace=trace)


def run(
    machine_name: str, rules: str, happens: Callable[[World], Coroutine[Any, Any, None]], *, trace: bool = False
) -> Outcome:
    """Have this happen in a new world, to its end."""
    outcome = Outcome(stories=1)
    loop = SimulatedLoop()
    with _quiet(), _watched(outcome), bridges_stay_powered(), asyncio.Runner(loop_factory=lambda: loop):
        world = loop.run_until_complete(_world(loop, machine_name, rules, trace=trace))
        try:
            loop.run_until_complete(happens(world))
        except Exception as fault:  # noqa: BLE001 -- whatever it is, it is told with its seed
            world.checker.fault(repr(fault))
        if world.service is not None:
            loop.end_now(world.service.life)
    checker = world.checker
    outcome.steps, outcome.violations, outcome.ends = checker.steps, checker.violations, checker.ends
    outcome.hits.update({(step, str(wrong)): n for (step, wrong), n in world.trouble.hits.items()})
    outcome.hits.update(checker.crashes)
    outcome.trace = checker.trace or []
    return outcome


def replayed(seed: int, *, trace: bool = False) -> Outcome:
    """Play the story of a seed."""
    return played(told(seed), trace=trace)


async def _world(loop: SimulatedLoop, machine_name: str, rules: str, *, trace: bool) -> World:
    return World(loop, machine_name, rules, trace=trace)


def many() -> None:
    """This process is here to play, and for nothing else: what is there already is never garbage."""
    gc.freeze()
    gc.set_threshold(_MUCH_GARBAGE)


@contextmanager
def _quiet() -> Iterator[None]:
    """The service's own log is for people; what it says is in the trace."""
    before, boot_id, threshold = logging.root.manager.disable, journal.boot_id, gc.get_threshold()
    # One world makes little garbage; to look for it in all that was ever imported costs more than the world does.
    gc.set_threshold(_MUCH_GARBAGE)
    logging.disable(logging.CRITICAL)
    # A machine in memory is booted once.
    journal.boot_id = lambda: "simulated"
    try:
        yield
    finally:
        logging.disable(before)
        journal.boot_id = boot_id
        gc.set_threshold(*threshold)


@contextmanager
def _watched(outcome: Outcome) -> Iterator[None]:
    """Count the edges that are taken."""
    fire = GpuMachine.fire

    def counted(machine: GpuMachine, trigger: str) -> None:
        source = machine.state
        fire(machine, trigger)
        outcome.edges[trigger, source] += 1

    GpuMachine.fire = counted  # type: ignore[assignment, method-assign]  # for as long as this lasts
    try:
        yield
    finally:
        GpuMachine.fire = fire  # type: ignore[method-assign]  # as it was
