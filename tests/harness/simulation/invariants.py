"""What must always be so, by its number, and the log in which it is written down when it is not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from gpuswitch.config.schema import Defaults
from gpuswitch.gpu.actor import Actor
from gpuswitch.model.address import PciAddress
from gpuswitch.model.policy import Options
from gpuswitch.model.states import State
from tests.harness.simulated.harness import Settings, settings_of

if TYPE_CHECKING:
    from tests.harness.simulation.world import World

INVARIANTS: Mapping[int, str] = {
    0: "No fault of its own",
    1: "No unbind while busy",
    2: "All or nothing",
    3: "Everything comes back",
    4: "Always answers",
    5: "Survives itself",
    6: "One switch per GPU at a time",
    7: "Only the owner lets go",
    8: "Refuse with a reason",
    9: "No luck",
    10: "Nobody is killed by surprise",
}
_KIND = 40


class Violation(NamedTuple):
    """Which invariant, how, and after how many seconds of the simulated clock."""

    number: int
    text: str
    at: float

    @property
    def kind(self) -> str:
        """The same for all that are broken in the same way."""
        words = (word for word in self.text.split() if not any(sign.isdigit() for sign in word))
        return f"{self.number} {' '.join(words)}"[:_KIND]

    def __str__(self) -> str:
        return f"invariant {self.number} ({INVARIANTS[self.number]}), at {self.at:g} s: {self.text}"


@dataclass(eq=False)
class Ask:
    """A request that waits for its answer.

    `rules` are what the configuration said then; `before` requests of this GPU waited already; `quiet`: no switch of it
    ran all the while. `others` are the GPUs that a machine asks for besides; `along`: functions that went to the same
    machine when it was asked. `seen`: who had it open at the last look.
    """

    what: str
    actor: Actor
    options: Options = field(default_factory=Options)
    target: State | None = None
    others: tuple[Actor, ...] = ()
    rules: Defaults | None = None
    began: float = 0.0
    before: int = 0
    sent: int = 0
    quiet: bool = True
    along: frozenset[PciAddress] = frozenset()
    seen: frozenset[str] | None = None


class ViolationLog:
    """`violations` is what must never be; `trace`, where wanted, all that happened, in order.

    `home` is the machine with its GPUs at home, as it was booted for the most part. What others did to it excuses the
    service: `meddled` are the GPUs that they moved or pulled, `units_touched` what they stopped and started, `torn` the
    pages of the journal that they destroyed.
    """

    def __init__(self, world: World, *, trace: bool) -> None:
        self.world = world
        self.violations: list[Violation] = []
        self.trace: list[str] | None = [] if trace else None
        self.home = world.spec.home(world.machine)
        self.meddled: set[PciAddress] = set()
        self.units_touched: set[str] = set()
        self.torn: set[str] = set()

    @property
    def now(self) -> float:
        return self.world.loop.time()

    def broken(self, number: int, text: str) -> None:
        self.violations.append(Violation(number, text, self.now))
        self.note(f"broken: {self.violations[-1]}")

    def fault(self, text: str) -> None:
        self.broken(0, text)

    def note(self, word: str) -> None:
        if self.trace is not None:
            self.trace.append(f"{self.now:.3f} {word}")

    def lately(self, gpu: PciAddress) -> bool:
        """Whether somebody else may have had a hand in where it is now."""
        return gpu in self.meddled or self.world.others_wait

    def settings(self, functions: tuple[PciAddress, ...]) -> dict[PciAddress, Settings]:
        """What those of them have that are there."""
        devices = self.world.machine.devices
        return {a: settings_of(devices[a]) for a in functions if a in devices}


def difference(before: Mapping[PciAddress, object], now: Mapping[PciAddress, object]) -> str:
    """What was so before and is not now, in words."""
    changed = [f"{a} was {before.get(a)} and is {now.get(a)}" for a in {**before, **now} if before.get(a) != now.get(a)]
    return ", ".join(changed)
