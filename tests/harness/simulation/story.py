"""What happens to a world, one event after the other, all of it from one seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from gpuswitch.host.simulated.devices import Trouble as DeviceTrouble
from tests.harness.simulation.doubles import SEND, WRITE, WRITTEN
from tests.harness.simulation.loop import AWAIT
from tests.harness.simulation.machines import MACHINES, RULES


class Event(NamedTuple):
    """After so many `seconds`, and `turns` of the loop, `what` happens; to this GPU of the machine, where it is to one.

    `word` and `number` say it more closely (`gpuswitch` itself knows nothing of events: see `drive.py`).
    """

    what: str
    gpu: int = 0
    word: str = ""
    number: int = 0
    turns: int = 0
    seconds: float = 0.0


class Story(NamedTuple):
    """A machine, the rules of its configuration, and what happens there."""

    machine_name: str
    rules: str
    events: tuple[Event, ...]


_MACHINES = (
    *("pair", "trio", "mixed") * 3,
    *("twins", "laptop", "plain", "apu", "single", "single", "shared", "crowded"),
    *("plx", "plx", "hgx", "instinct", "arc", "superchip", "driverless", "prebound", "reserved", "rmrr"),
    *("workstation", "workstation", "hybrid"),
)
_RULES = (*("refuse",) * 4, *RULES)
_PAUSES = (0.0, 0.05, 1.0, 6.0, 50.0)
_VM_SHARE, _TRIAL_SHARE = 0.3, 0.3
_TURNS = 150
"""About as many as a switch takes."""
_BEFORE = (
    *("fault",) * 6,
    *("crash",) * 5,
    "disk",
    "disk",
    "unit",
    "torn",
    "deaf",
    "blind",
    "program",
    "going down",
    "spoil",
)
_MEANWHILE = (
    *("ask",) * 3,
    *("cancel", "kill", "vm", "program", "fault", "crash") * 2,
    *("stop", "move", "pull", "storm", "release", "plan", "holders", "rules", "recover", "unit", "plug"),
    *("blind", "unwatched", "worker", "sleepy", "spoil", "spoil", "trial"),
)
_WORDS: Mapping[str, tuple[str, ...]] = {
    "ask": ("vfio", "host"),
    "plan": ("vfio", "host"),
    "fault": ("error", "error", "hang", "delay", "late", "silent"),
    "crash": (AWAIT, AWAIT, AWAIT, SEND, WRITE, WRITTEN),
    "disk": ("full", "read-only", "failing", "healthy"),
    "vm": ("asks", "asks", "asks", "runs", "grabs", "ends", "dies", "is released", "is heard of"),
    "program": ("opens", "opens", "hides", "closes", "ends"),
    "unit": ("stops", "starts", "fails"),
    "spoil": tuple(str(trouble) for trouble in DeviceTrouble),
    "move": ("vfio", "host"),
}
_NUMBERS: Mapping[str, Callable[[random.Random], int]] = {
    "ask": lambda dice: dice.choice((0, 0, 0, 0, 1, 2, 3)),
    "fault": lambda dice: dice.randint(1, 40),
    "crash": lambda dice: int(dice.expovariate(1 / 70)) + 1,
    "trial": lambda dice: dice.randint(0, 2),
    "disk": lambda dice: dice.randint(1, 3),
    "program": lambda dice: dice.randint(0, 3),
    "unit": lambda dice: dice.randint(0, 3),
    "blind": lambda dice: dice.randint(1, 12),
    "unwatched": lambda dice: dice.randint(1, 4),
    "vm": lambda dice: dice.choice((1, 1, 1, 2, 3)),
    "storm": lambda dice: dice.randint(2, 20),
    "move": lambda dice: dice.randint(0, 4),
    "rules": lambda dice: dice.randrange(len(RULES)),
}
_SMALL_NUMBERS = frozenset({SEND, WRITE, WRITTEN})
"""The points that a switch reaches a few dozen times only."""


def told(seed: int) -> Story:
    """The story of this seed: a few scenes, in each of which somebody asks for a switch, and is disturbed."""
    dice = random.Random(seed)  # noqa: S311 -- it is to be the same each time
    machine_name = dice.choice(_MACHINES)
    gpus = len(MACHINES[machine_name].gpus)
    away: set[int] = set()
    events: list[Event] = []
    for _ in range(dice.choice((1, 2, 2, 3))):
        events += _scene(dice, gpus, away)
    return Story(machine_name, dice.choice(_RULES), tuple(events))


def _scene(dice: random.Random, gpus: int, away: set[int]) -> Iterator[Event]:
    """`away` are the GPUs that were last asked to go."""
    for _ in range(dice.choice((0, 1, 1, 2))):
        yield _event(dice, dice.choice(_BEFORE), gpus)
    gpu = dice.randrange(gpus)
    if dice.random() < _VM_SHARE:
        yield _event(dice, "vm", gpus)._replace(gpu=gpu, word=dice.choice(("asks", "asks", "runs")))
        yield _event(dice, "storm", gpus)._replace(seconds=dice.choice(_PAUSES))
        yield _event(dice, "vm", gpus)._replace(gpu=gpu)
    else:
        away ^= {gpu}
        if gpu in away and dice.random() < _TRIAL_SHARE:
            yield _event(dice, "trial", gpus)._replace(gpu=gpu)
        else:
            yield _event(dice, "ask", gpus)._replace(gpu=gpu, word="vfio" if gpu in away else "host")
    for _ in range(dice.choice((0, 0, 1, 2, 3))):
        yield _event(dice, dice.choice(_MEANWHILE), gpus)._replace(turns=dice.randint(0, _TURNS))
    yield _event(dice, dice.choice(("storm", "release", "plan")), gpus)._replace(seconds=dice.choice(_PAUSES))


def _event(dice: random.Random, what: str, gpus: int) -> Event:
    word = dice.choice(_WORDS[what]) if what in _WORDS else ""
    number = _NUMBERS[what](dice) if what in _NUMBERS else 0
    if word in _SMALL_NUMBERS:
        number = 1 + number // 5
    return Event(what, dice.randrange(gpus), word, number)
