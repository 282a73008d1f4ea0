"""What a GPU is told by, where its address is no matter."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gpuswitch.model.facts import HostFacts
from gpuswitch.model.gpu import Gpu
from gpuswitch.model.match import Match, traits
from tests.harness.facts import AUDIO, BRIDGE, NVIDIA, VGA, at, facts, function

GPU = Gpu(at("0000:03:00.0"), (at("0000:03:00.0"), at("0000:03:00.1")))
MODALIAS = "pci:v000010DEd00001234sv00001043sd000087C1bc03sc00i00"
PORT, UPSTREAM = "0000:00:01.0", "0000:01:00.0"


def host() -> HostFacts:
    """A card behind a switch of its own, in the slot that the board calls 2."""
    display = replace(
        function("0000:03:00.0", VGA, vendor=NVIDIA, parent=at("0000:02:00.0")),
        modalias=MODALIAS,
        serial="00-80-ee-00-00-00-41-80",
    )
    bridges = [
        function(PORT, BRIDGE),
        function(UPSTREAM, BRIDGE, parent=at(PORT)),
        function("0000:02:00.0", BRIDGE, parent=at(UPSTREAM)),
    ]
    sound = function("0000:03:00.1", AUDIO, vendor=NVIDIA, parent=at("0000:02:00.0"))
    slots = {"2": "0000:01:00", "3": "0000:07:00", "2-1": "0000:02"}
    return replace(facts([*bridges, display, sound]), slots=slots)


def test_all_that_it_may_be_told_by() -> None:
    """The root port comes first: the number of its bus does not move."""
    assert traits(GPU, host()) == {
        "vendor": ("10de",),
        "device": ("1234",),
        "subsystem": ("1043:87c1",),
        "serial": ("00-80-ee-00-00-00-41-80",),
        "slot": ("2", "2-1"),
        "port": (PORT, UPSTREAM, "0000:02:00.0"),
    }


def test_what_nobody_knows_of_it_is_not_there() -> None:
    bare = facts([function("0000:03:00.0", VGA, vendor=NVIDIA)])
    assert traits(GPU, bare) == {"vendor": ("10de",), "device": ("1234",)}
    assert traits(GPU, facts([])) == {}


@pytest.mark.parametrize(
    ("match", "fits"),
    [
        (Match(vendor="10de", device="1234"), True),
        (Match(vendor="10de", device="1235"), False),
        (Match(vendor="1002"), False),
        (Match(subsystem="1043:87c1"), True),
        (Match(serial="00-80-ee-00-00-00-41-81"), False),
        (Match(slot="2"), True),
        (Match(slot="3"), False),
        (Match(port=PORT), True),
        (Match(port=UPSTREAM, vendor="10de"), True),
        (Match(port="0000:00:02.0"), False),
    ],
    ids=str,
)
def test_all_of_it_has_to_be_so(match: Match, *, fits: bool) -> None:
    assert match.fits(GPU, host()) is fits
