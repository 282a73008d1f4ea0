"""What a check says, and what a check is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import TYPE_CHECKING

from gpuswitch.sentence import Sentence

if TYPE_CHECKING:
    from gpuswitch.doctor.seen import Patient, Seen


class Severity(IntEnum):
    """How bad it is; the number is the exit status of the command.

    A problem refuses a switch, or breaks it. A warning may do so, or surprises somebody.
    """

    OK = 0
    WARNING = 1
    PROBLEM = 2

    @property
    def word(self) -> str:
        """As programs have it."""
        return self.name.lower()


class Area(StrEnum):
    """What findings are told under."""

    MACHINE = "machine"
    SERVICE = "service"
    GPU = "gpu"
    LIBVIRT = "libvirt"
    OTHER_TOOLS = "other_tools"


@dataclass(frozen=True, slots=True)
class Said:
    """What a check says of one thing. `remedy` is for a person, `commands` are whole, to be copied, and run as root."""

    severity: Severity
    reason: Sentence
    remedy: Sentence | None = None
    commands: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Finding:
    """The same, with what it is about: `kind` in a word, and the GPU (`subject`, "" where it is about none)."""

    kind: str
    area: Area
    subject: str
    severity: Severity
    reason: Sentence
    remedy: Sentence | None = None
    commands: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Unseen:
    """What could not be looked at, and why; `for_root`: root could."""

    what: str
    why: Sentence
    for_root: bool = False


def ok(reason: Sentence) -> Said:
    """It is as it should be."""
    return Said(Severity.OK, reason)


def warning(reason: Sentence, remedy: Sentence | None = None, commands: Iterable[str] = ()) -> Said:
    """It may keep a switch from working, or surprise somebody."""
    return Said(Severity.WARNING, reason, remedy, tuple(commands))


def problem(reason: Sentence, remedy: Sentence | None = None, commands: Iterable[str] = ()) -> Said:
    """A switch is refused for it, or breaks."""
    return Said(Severity.PROBLEM, reason, remedy, tuple(commands))


@dataclass(frozen=True, slots=True)
class Check:
    """One row of the table of checks, about the machine (`run`), or about each GPU (`of_gpu`).

    `kind` names its findings; `meaning`, `remedy` are what docs/doctor.md says of it: why that matters, and what to do.
    `guards`: the kinds of blockers that it tells, which the switch itself is refused for.
    """

    kind: str
    area: Area
    meaning: str
    remedy: str
    run: Callable[[Seen], Iterator[Said]] | None = None
    of_gpu: Callable[[Seen, Patient], Iterator[Said]] | None = None
    guards: frozenset[str] = frozenset()
