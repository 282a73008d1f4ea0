"""What goes wrong with the simulated machine, and when: told by how many operations are done until then."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from gpuswitch.host.simulated.faults import Delay, Errno, Fault, Faults, Hang, Operation, Silent, Strike
from tests.harness.simulation.doubles import AT, FROM, At

Wrong = Literal["error", "hang", "delay", "late", "silent"]
"""An errno; it does not return; it takes a second; it takes longer than any deadline; it says that it worked."""
_SECONDS: Mapping[Wrong, float] = {"delay": 1.0, "late": 250.0}
_ERRNOS: Mapping[Operation, int] = {
    "hold_group": errno.EBUSY,
    "unload": errno.EAGAIN,
    "probe": errno.EINVAL,
    "unbind": errno.ENODEV,
    "load": errno.ENOENT,
    "signal": errno.EPERM,
    "adopt": errno.EMFILE,
}
_LYING: frozenset[Operation] = frozenset({"probe", "unbind"})
"""No other operation says that it worked when it did not."""
_BY_ITSELF: frozenset[Operation] = frozenset({"adopt", "access"})
"""Nothing is sent: the service itself looks for a process, and says who may open a node."""
_UNHEARD: frozenset[Operation] = frozenset({"nodes", "let_go"})
NO_STRIKE = Strike([])


class Struck(NamedTuple):
    """One operation that the service has sent, in order: `at` which step, what, about what."""

    at: At
    operation: Operation
    subject: str


@dataclass
class Rule:
    """Strikes the `left`-th operation from now; only of this kind, or about this, where these are given.

    `then` is called when it has.
    """

    wrong: Wrong
    left: int
    operation: str = ""
    subject: str = ""
    then: Callable[[], None] = lambda: None


class Trouble(Faults):
    """Takes the place of a machine's faults.

    `struck` is called with each operation, before anything comes of it; `service` says whether the service sent it.
    `hits` counts what went wrong at which step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rules: list[Rule] = []
        self.hangs: list[Hang] = []
        self.hits: Counter[tuple[str, Wrong]] = Counter()
        self.hit: list[tuple[Struck, Wrong]] = []
        self.log: list[Struck] | None = None
        self.struck: Callable[[Struck, bool], None] = lambda _, __: None

    def strike(self, operation: Operation, subject: object) -> Strike:
        struck = Struck(AT.get(), operation, str(subject))
        service = (bool(FROM.get()) and operation not in _UNHEARD) or operation in _BY_ITSELF
        self.struck(struck, service)
        if service and self.log is not None:
            self.log.append(struck)
        if not self.rules or not (service or operation in _UNHEARD):
            return NO_STRIKE
        return self._strike(struck)

    def _strike(self, struck: Struck) -> Strike:
        faults: list[Fault] = []
        for rule in self.rules[:]:
            if rule.operation not in {"", struck.operation} or rule.subject not in {"", struck.subject}:
                continue
            rule.left -= 1
            if rule.left == 0:
                self.rules.remove(rule)
                wrong = fitting(rule.wrong, struck.operation)
                faults.append(self._fault(wrong, struck.operation))
                self.hit.append((struck, wrong))
                self.hits[struck.at.step or "before the first step", wrong] += 1
                rule.then()
        return Strike(faults) if faults else NO_STRIKE

    def _fault(self, wrong: Wrong, operation: Operation) -> Fault:
        match wrong:
            case "error":
                return Errno(_ERRNOS.get(operation, errno.EIO))
            case "silent":
                return Silent()
            case "hang":
                self.hangs.append(Hang())
                return self.hangs[-1]
        return Delay(_SECONDS[wrong])

    def release(self) -> None:
        """The kernel returns."""
        for hang in self.hangs:
            hang.release()
        self.hangs.clear()

    def calm(self) -> None:
        """Nothing goes wrong any more."""
        self.rules.clear()
        self.release()


def fitting(wrong: Wrong, operation: Operation) -> Wrong:
    """What can go wrong so with this operation, or the next best."""
    if operation in {"signal", *_BY_ITSELF}:
        return "error"
    if operation == "release_group" and wrong in {"error", "silent"}:
        # Whatever close(2) says, it is closed (Linux).
        return "delay"
    if operation in _UNHEARD:
        return wrong if wrong != "error" else "silent"
    return "error" if wrong == "silent" and operation not in _LYING else wrong
