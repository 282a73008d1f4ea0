"""Dataclasses to JSON and back: everything comes back, and nothing else passes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated, Any

import pytest

from gpuswitch.model.address import PciAddress
from gpuswitch.model.hints import OneOf
from gpuswitch.switch.journal.codec import decode, encode
from tests.harness.facts import at


class Colour(Enum):
    RED = "red"
    GREEN = "green"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Inner:
    number: int


@dataclass(frozen=True)
class Outer:
    text: str
    number: int = 0
    seconds: float = 0.0
    told: bool = False
    colour: Colour = Colour.RED
    red: Annotated[Colour, OneOf(Colour.RED)] = Colour.RED
    power: Annotated[str, OneOf("auto", "on")] = "on"
    cold: Annotated[str | None, OneOf("0", "1")] = None
    address: PciAddress | None = None
    inner: Inner | None = None
    many: tuple[Inner, ...] = ()
    pair: tuple[int, str] = (0, "")
    mapping: Mapping[PciAddress, tuple[int, ...]] = field(default_factory=dict)


FULL = Outer(
    "a",
    1,
    1.5,
    told=True,
    colour=Colour.GREEN,
    power="auto",
    cold="1",
    address=at("0000:01:00.0"),
    inner=Inner(2),
    many=(Inner(3), Inner(4)),
    pair=(5, "b"),
    mapping={at("10000:e1:00.0"): (6, 7)},
)


@pytest.mark.parametrize("value", [FULL, Outer("")])
def test_everything_comes_back(value: Outer) -> None:
    assert decode(Outer, json.loads(json.dumps(encode(value)))) == value


def test_a_field_that_is_missing_gets_its_default() -> None:
    assert decode(Outer, {"text": "a"}) == Outer("a")


_REFUSED: list[dict[str, Any]] = [
    {"text": None},
    {"text": 5},
    {"number": True},
    {"number": 1.0},
    {"number": "1"},
    {"seconds": 1},
    {"seconds": float("inf")},
    {"seconds": float("nan")},
    {"told": 1},
    {"told": None},
    {"colour": "blue"},
    {"colour": None},
    {"red": "green"},
    {"power": "off"},
    {"address": ""},
    {"address": "01:00.0"},
    {"address": "pci_0000_01_00_0"},
    {"address": [0, 1, 0, 0]},
    {"inner": 2},
    {"inner": [2]},
    {"inner": {}},
    {"inner": {"number": 2, "more": 3}},
    {"many": None},
    {"many": {"number": 2}},
    {"many": [None]},
    {"many": "abc"},
    {"pair": [5]},
    {"pair": [5, "b", 6]},
    {"pair": ["b", 5]},
    {"mapping": []},
    {"mapping": {"01:00.0": []}},
    {"mapping": {"0000:01:00.0": 6}},
    {"more": None},
]


@pytest.mark.parametrize("change", _REFUSED, ids=str)
def test_what_was_not_written_does_not_pass(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        decode(Outer, encode(Outer("a")) | change)


@pytest.mark.parametrize("content", [None, [], "a", 5, {}])
def test_what_is_no_such_object_does_not_pass(content: object) -> None:
    with pytest.raises(ValueError, match=r"is no dict|Outer without text"):
        decode(Outer, content)


@dataclass(frozen=True)
class Odd:
    what: set[str]


def test_a_type_that_nobody_can_keep_is_named() -> None:
    with pytest.raises(
        TypeError, match=r"cannot keep a value of type set\[str\] as JSON: see gpuswitch.switch.journal.codec"
    ):
        encode(Odd(set()))
