"""What is measured, by turns: of one build, or of two beside each other."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from tests.bench.table import Compared, Row, text

Subject = TypeVar("Subject")
"""What is measured: a running service, a machine."""


@dataclass(frozen=True)
class Quantity:
    """Something measured, how a value of it is written, and what it should be."""

    name: str
    write: Callable[[float], str] = text
    target: str = ""

    def median(self, values: Iterable[float]) -> str:
        return self.write(statistics.median(values))


@dataclass(frozen=True)
class Experiment(Generic[Subject]):
    """A way to get one value of each quantity.

    It is done so many `times` for a figure, and with so many `pairs` for a ratio.
    """

    quantities: Sequence[Quantity]
    sample: Callable[[Subject], Iterable[float]]
    times: int
    pairs: int


def figures(experiments: Iterable[Experiment[Subject]], subject: Subject) -> Iterator[Row]:
    """The median of each quantity."""
    for experiment in experiments:
        [taken] = take(experiment.sample, [subject], experiment.times)
        of = f" (median of {experiment.times})" if experiment.times > 1 else ""
        for quantity, values in zip(experiment.quantities, taken, strict=True):
            yield Row(f"{quantity.name}{of}", quantity.median(values), quantity.target)


def ratios(experiments: Iterable[Experiment[Subject]], this: Subject, base: Subject) -> Iterator[Compared]:
    """The medians of both, and the ratio."""
    for experiment in experiments:
        taken = take(experiment.sample, [this, base], experiment.pairs)
        of = f" ({experiment.pairs} pairs)" if experiment.pairs > 1 else ""
        for quantity, ours, theirs in zip(experiment.quantities, *taken, strict=True):
            medians = (quantity.median(ours), quantity.median(theirs))
            yield Compared(f"{quantity.name}{of}", *medians, ratio(ours, theirs))


def take(
    sample: Callable[[Subject], Iterable[float]], subjects: Sequence[Subject], times: int
) -> list[list[tuple[float, ...]]]:
    """So many samples of each subject: for each of them, for each quantity, its values.

    Of A and B in the order A B B A A B: a machine that grows slower or faster meanwhile does so for both alike.
    """
    taken: list[list[tuple[float, ...]]] = [[] for _ in subjects]
    for number in range(times):
        turns = list(zip(subjects, taken, strict=True))
        for subject, samples in turns if number % 2 == 0 else reversed(turns):
            samples.append(tuple(sample(subject)))
    return [list(zip(*samples, strict=True)) for samples in taken]


def ratio(this: Sequence[float], base: Sequence[float]) -> str:
    """The median of the pairs' ratios, and between which two the middle half of them lies."""
    if 0 in base:
        return "-"
    of_pairs = [mine / other for mine, other in zip(this, base, strict=True)]
    if len(of_pairs) == 1:
        return f"{of_pairs[0]:.2f}"
    low, middle, high = statistics.quantiles(of_pairs, n=4, method="inclusive")
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"
