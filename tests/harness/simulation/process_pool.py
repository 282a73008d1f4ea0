"""Plays many stories and trials on every core."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

from tests.harness.simulation import exhaustive
from tests.harness.simulation.exhaustive import Trial, tried
from tests.harness.simulation.invariants import Violation
from tests.harness.simulation.play import Outcome, many, replayed

_CHUNK = 25


class Found(NamedTuple):
    """What was broken, and by which seed or trial."""

    by: int | Trial
    violation: Violation


@dataclass
class Sum:
    """What came of all that was played so far."""

    outcome: Outcome = field(default_factory=Outcome)
    found: list[Found] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def add(self, outcome: Outcome, found: list[Found]) -> None:
        self.outcome.add(outcome)
        self.found += found

    @property
    def seconds(self) -> float:
        return max(time.monotonic() - self.began, 1e-6)


def play(seeds: Iterable[int]) -> tuple[Outcome, list[Found]]:
    """Play the stories of these seeds."""
    return _together((seed, replayed(seed)) for seed in seeds)


def attempt(trials: Iterable[Trial]) -> tuple[Outcome, list[Found]]:
    return _together((trial, tried(trial).outcome) for trial in trials)


def _together(each: Iterator[tuple[int | Trial, Outcome]]) -> tuple[Outcome, list[Found]]:
    whole, found = Outcome(), list[Found]()
    for by, outcome in each:
        found += [Found(by, violation) for violation in outcome.violations[:1]]
        outcome.trace, outcome.violations = [], []
        whole.add(outcome)
    return whole, found


class _Work(NamedTuple):
    """A part of the whole, as it is sent to another process."""

    seeds: range = range(0)
    singles: tuple[tuple[str, str], ...] = ()
    pairs: tuple[tuple[str, str], ...] = ()
    part: int = 0
    parts: int = 1

    def done(self) -> tuple[Outcome, list[Found]]:
        trials = chain(
            *(
                exhaustive.singles(machine_name, exhaustive.BY_WORD[to], thorough=True)
                for machine_name, to in self.singles
            ),
            *(exhaustive.pairs(machine_name, exhaustive.BY_WORD[to], thorough=True) for machine_name, to in self.pairs),
        )
        if self.seeds:
            return play(self.seeds)
        return attempt(trial for number, trial in enumerate(trials) if number % self.parts == self.part)


def everything(seeds: range, jobs: int, tell: Callable[[Sum, float], None]) -> Sum:
    """The exhaustive part, and these seeds, on so many cores; `tell` hears the sum and how much is done (0..1)."""
    plans = [(machine_name, str(target)) for machine_name, target in exhaustive.PLANS]
    work = [_Work(singles=(plan,), part=part, parts=4) for plan in plans for part in range(4)]
    shortest = [(exhaustive.SHORTEST, str(target)) for target in exhaustive.TARGETS]
    work += [_Work(pairs=(plan,), part=part, parts=16) for plan in shortest for part in range(16)]
    return _shared(work, jobs, tell) if not seeds else _shared(work + _seeds(seeds), jobs, tell)


def stories(seeds: range, jobs: int, tell: Callable[[Sum, float], None]) -> Sum:
    """These seeds alone."""
    return _shared(_seeds(seeds), jobs, tell)


def _seeds(seeds: range) -> list[_Work]:
    return [_Work(seeds=seeds[start : start + _CHUNK]) for start in range(0, len(seeds), _CHUNK)]


def _shared(work: Sequence[_Work], jobs: int, tell: Callable[[Sum, float], None]) -> Sum:
    whole = Sum()
    with multiprocessing.get_context("fork").Pool(jobs, initializer=many) as pool:
        for number, (outcome, found) in enumerate(pool.imap_unordered(_Work.done, work), 1):
            whole.add(outcome, found)
            if 100 * number // len(work) > 100 * (number - 1) // len(work):
                tell(whole, number / len(work))
    whole.found.sort(key=lambda found: (isinstance(found.by, Trial), str(found.by)))
    return whole
