"""What the configuration says of a GPU, and that is about none of this host."""

from __future__ import annotations

from dataclasses import dataclass

from gpuswitch.model.address import PciAddress
from gpuswitch.sentence import Sentence


@dataclass(frozen=True, slots=True)
class Misfit:
    """One such thing. `table` is what the [[gpu]] table that says it is known by, `name` that table's name.

    Whoever asks for one of `addresses` is told. `functions` were meant to be managed, and are not.
    """

    table: str
    name: str
    sentence: Sentence
    addresses: frozenset[PciAddress] = frozenset()
    functions: frozenset[PciAddress] = frozenset()
