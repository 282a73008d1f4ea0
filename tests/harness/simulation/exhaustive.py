"""Every plan of every scenario, with everything that can go wrong at each of its steps; and every two of these.

A trial is one switch with one or two mishaps. What there is to go wrong is counted in a trial without.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from gpuswitch.model.policy import Options
from gpuswitch.model.states import State
from tests.harness.simulation import drive, rest_checks
from tests.harness.simulation.doubles import SEND, WRITE, WRITTEN
from tests.harness.simulation.loop import AWAIT
from tests.harness.simulation.machines import SCENARIO_MACHINES
from tests.harness.simulation.play import Outcome, run
from tests.harness.simulation.trouble import Struck
from tests.harness.simulation.world import OPERATION, Mishap, World

TARGETS = (State.VFIO, State.HOST)
BY_WORD = {str(target): target for target in TARGETS}
SHORTEST = "bare"
"""The machine of the shortest plans."""
_MACHINES = (*(spec.name for spec in SCENARIO_MACHINES), "superchip", "arc", "hgx", "driverless", "trio")
PLANS = (*((machine_name, target) for machine_name in _MACHINES for target in TARGETS), ("prebound", State.HOST))
_LAST_STEPS = frozenset({"StartUnits", "RestartUnits", "RestoreConsoles", "LoadModules", "AnnounceAgain"})
"""Those whose failure is no reason to take anything back."""


class Trial(NamedTuple):
    """One switch of the GPU of this machine, on which these mishaps befall."""

    machine_name: str
    target: State
    mishaps: tuple[Mishap, ...] = ()

    def __str__(self) -> str:
        return " ".join(
            (self.machine_name, str(self.target), *(f"{mishap.what} {mishap.nth}" for mishap in self.mishaps))
        )

    @classmethod
    def read(cls, text: str) -> Trial:
        """What `str` wrote.

        Raises:
            ValueError, KeyError: it did not.
        """
        machine_name, target, *mishaps = text.split()
        pairs = zip(mishaps[::2], mishaps[1::2], strict=True)
        return cls(machine_name, BY_WORD[target], tuple(Mishap(what, int(nth)) for what, nth in pairs))


class Tried(NamedTuple):
    """What came of a trial: which operations it sent, and what it reached after its last mishap."""

    outcome: Outcome
    operations: tuple[Struck, ...]
    left: Counter[str]


def tried(trial: Trial, *, trace: bool = False) -> Tried:
    """Try it, alone in a world of its own."""
    left: Counter[str] = Counter()
    operations: list[Struck] = []

    async def happens(world: World) -> None:
        await _happens(world, trial, left, operations)

    outcome = run(trial.machine_name, "refuse", happens, trace=trace)
    return Tried(outcome, tuple(operations), left)


def booted(machine_name: str, mishap: Mishap | None = None) -> Tried:
    """Start a machine whose GPUs are wanted on vfio at boot, with a mishap or without."""
    left: Counter[str] = Counter()
    operations: list[Struck] = []

    async def happens(world: World) -> None:
        world.trouble.log = operations
        world.start()
        world.befalls(*([mishap] if mishap is not None else []))
        await asyncio.sleep(drive.LONGER_THAN_ANYTHING)
        left.update(world.progress)
        world.trouble.log = None
        rest_checks.meanwhile(world)
        await drive.calms_down(world)

    outcome = run(machine_name, "at boot", happens)
    return Tried(outcome, tuple(operations), left)


def boots(machine_name: str) -> Iterator[Mishap]:
    """Whatever can befall such a start: each operation fails or hangs; a crash before and after each step."""
    left = booted(machine_name).left
    for what, point in (("error", OPERATION), ("hang", OPERATION), (SEND, SEND), (WRITE, WRITE), (WRITTEN, WRITTEN)):
        for number in range(1, left[point] + 1):
            yield Mishap(what, number)


async def _happens(world: World, trial: Trial, left: Counter[str], operations: list[Struck]) -> None:
    [gpu] = world.spec.gpus[:1]
    world.start()
    await asyncio.sleep(1.0)
    if trial.target is State.HOST:
        await drive.over(world.request(gpu, State.VFIO, Options()))
    world.trouble.log = operations
    world.befalls(*trial.mishaps)
    await drive.over(world.request(gpu, trial.target, Options()))
    await asyncio.sleep(drive.LONGER_THAN_ANYTHING)
    left.update(world.progress)
    world.trouble.log = None
    rest_checks.meanwhile(world)
    await drive.calms_down(world)


def singles(machine_name: str, target: State, *, thorough: bool) -> Iterator[Trial]:
    """Each step with an errno and a hang, a crash before and after each, and while each is taken back.

    `thorough`: not only each step, but each of its operations; and a crash wherever the service waits.
    """
    plain = tried(Trial(machine_name, target))
    yield Trial(machine_name, target)
    for number, struck in enumerate(plain.operations, 1):
        if thorough or _last_of_its_step(plain.operations, number):
            yield from (
                Trial(machine_name, target, (Mishap(wrong, number),)) for wrong in _wrongs(struck, thorough=thorough)
            )
    # What is intended is written, and nothing is done yet; the step is done, and that is not written yet.
    crashes = (SEND, WRITE, WRITTEN, AWAIT) if thorough else (WRITTEN, WRITE)
    for point in crashes:
        for number in range(1, plain.left[point] + 1):
            yield Trial(machine_name, target, (Mishap(point, number),))
    last = max(n for n, s in enumerate(plain.operations, 1) if s.at.step not in _LAST_STEPS)
    failing = Trial(machine_name, target, (Mishap("error", last),))
    left = tried(failing).left
    for point in (SEND, WRITE, WRITTEN) if thorough else (WRITTEN,):
        for number in range(1, left[point] + 1):
            yield failing._replace(mishaps=(*failing.mishaps, Mishap(point, number)))


def _last_of_its_step(operations: Sequence[Struck], number: int) -> bool:
    """Of the operations, counted from 1. What comes before the first step is no step."""
    at = operations[number - 1].at
    return not at.step or number == len(operations) or operations[number].at != at


def _wrongs(struck: Struck, *, thorough: bool) -> Iterator[str]:
    yield from ("error", "hang")
    if thorough:
        yield from ("late", "delay")
    if struck.operation in {"probe", "unbind"}:
        yield "silent"


def pairs(machine_name: str, target: State, *, thorough: bool) -> Iterator[Trial]:
    """Every two of: an errno, a hang, a crash before an operation is sent.

    `thorough`: and a crash after the journal was written.
    """
    for first in _mishaps(tried(Trial(machine_name, target)).left, thorough=thorough):
        one = Trial(machine_name, target, (first,))
        for second in _mishaps(tried(one).left, thorough=thorough):
            yield one._replace(mishaps=(first, second))


def _mishaps(left: Counter[str], *, thorough: bool) -> Iterator[Mishap]:
    kinds = [("error", OPERATION), ("hang", OPERATION), (SEND, SEND)]
    for what, point in [*kinds, (WRITTEN, WRITTEN)] if thorough else kinds:
        for number in range(1, left[point] + 1):
            yield Mishap(what, number)
