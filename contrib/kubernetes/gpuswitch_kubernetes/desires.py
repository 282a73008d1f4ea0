"""Where a node's annotations want its GPUs, and what the agent has noted of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from gpuswitch_kubernetes.names import DESIRED, HANDLED, address_of, part_of

_DESIRE = re.compile(r"(vfio|host)(?:/[A-Za-z0-9._-]{1,63})?")
_NOTE = re.compile(r"(\S+) (begun|done|failed|given-up)(?: after (\S+))?")


@dataclass(frozen=True)
class Desire:
    """`text` is what was written: `vfio`, or `vfio/TOKEN`, which asks once more for the same."""

    text: str

    @property
    def target(self) -> str:
        return self.text.partition("/")[0]


@dataclass(frozen=True)
class Fault:
    """An annotation that says nothing that can be done. `address` is "" where it names no PCI function."""

    address: str
    text: str


@dataclass(frozen=True)
class Note:
    """What became of a desire, as the annotation `handled` keeps it.

    begun: the service may have been asked; `known` are the switches that there were before. done: the GPU was seen
    there. failed: a switch was begun and did not end there. given-up: it could not be begun in time.
    """

    desire: str
    stage: str
    known: tuple[str, ...] = ()

    def write(self) -> str:
        after = f" after {','.join(self.known)}" if self.known else ""
        return f"{self.desire} {self.stage}{after}"

    @classmethod
    def read(cls, text: str) -> Note | None:
        """None: somebody else has written that."""
        match = _NOTE.fullmatch(text)
        if match is None:
            return None
        desire, stage, known = match.groups()
        return cls(desire, stage, tuple(known.split(",")) if known else ())


def desires(annotations: Mapping[str, str]) -> tuple[dict[str, Desire], list[Fault]]:
    """By address, and what cannot be read."""
    found: dict[str, Desire] = {}
    faults = []
    for key, value in sorted(annotations.items()):
        if not key.startswith(DESIRED):
            continue
        address = address_of(key.removeprefix(DESIRED))
        if address is None:
            faults.append(
                Fault(
                    "", f"cannot use the annotation {key}: it ends in no address of a GPU: write {DESIRED}0000_01_00_0"
                )
            )
        elif not _DESIRE.fullmatch(value):
            faults.append(
                Fault(
                    address,
                    f"cannot use {value!r} of the annotation {key}: write vfio, host, or one of them with /TOKEN",
                )
            )
        else:
            found[address] = Desire(value)
    return found, faults


def note_of(annotations: Mapping[str, str], address: str) -> Note | Fault | None:
    """What was noted of this GPU; None: nothing."""
    key = HANDLED + part_of(address)
    text = annotations.get(key)
    if text is None:
        return None
    return Note.read(text) or Fault(
        address, f"cannot read {text!r} of the annotation {key}: remove the annotation, if {address} may be moved again"
    )
