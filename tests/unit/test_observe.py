"""What a look says about a GPU."""

from __future__ import annotations

import pytest

from gpuswitch.gpu.observe import explain, observe
from gpuswitch.host.port import Captured
from gpuswitch.model.facts import Driver
from gpuswitch.model.gpu import Gpu
from gpuswitch.model.states import State
from gpuswitch.switch.restore_state import NOTHING_TO_RESTORE, RestoreState
from tests.harness.facts import AUDIO, at, captured, facts, function, geforce

GPU = Gpu(at("0000:01:00.0"), (at("0000:01:00.0"), at("0000:01:00.1")))


@pytest.mark.parametrize(
    ("display", "audio", "state"),
    [
        ("nvidia", "snd_hda_intel", State.HOST),
        (None, None, State.HOST),
        ("nvidia", None, State.HOST),
        ("vfio-pci", "vfio-pci", State.VFIO),
        ("vfio-pci", "snd_hda_intel", State.UNKNOWN),
        ("vfio-pci", None, State.UNKNOWN),
        ("nvidia", "vfio-pci", State.UNKNOWN),
    ],
)
def test_where_nothing_is_owed(display: str | None, audio: str | None, state: State) -> None:
    assert observe(GPU, facts(geforce(display, audio)), NOTHING_TO_RESTORE) is state


@pytest.mark.parametrize(
    ("display", "audio", "state"),
    [
        ("nvidia", "snd_hda_intel", State.HOST),
        ("nouveau", "snd_hda_intel", State.UNKNOWN),
        ("nvidia", None, State.UNKNOWN),
        (None, None, State.UNKNOWN),
        ("vfio-pci", "vfio-pci", State.VFIO),
    ],
)
def test_what_is_owed_must_be_there(display: str | None, audio: str | None, state: State) -> None:
    restore_state = RestoreState(captured(facts(geforce("nvidia", "snd_hda_intel"))))
    assert observe(GPU, facts(geforce(display, audio)), restore_state) is state


def test_only_what_is_owed_must_be_there() -> None:
    restore_state = RestoreState({GPU.address: Captured(Driver("nvidia", "nvidia"), None, "auto")})
    assert observe(GPU, facts(geforce("nvidia", None)), restore_state) is State.HOST


def test_a_driver_is_the_same_whatever_was_guessed_of_its_module() -> None:
    """Where a driver is built in, the module that a modalias names never shows up in its link."""
    restore_state = RestoreState({GPU.address: Captured(Driver("nvidia", "nvidia_current"), None, "auto")})
    assert observe(GPU, facts(geforce("nvidia", None)), restore_state) is State.HOST


def test_a_gpu_is_gone_with_its_display_and_incomplete_without_a_companion() -> None:
    assert observe(GPU, facts([]), NOTHING_TO_RESTORE) is State.ABSENT
    assert observe(GPU, facts([function("0000:01:00.1", AUDIO, "vfio-pci")]), NOTHING_TO_RESTORE) is State.ABSENT
    assert observe(GPU, facts(geforce("vfio-pci")), NOTHING_TO_RESTORE) is State.UNKNOWN


def test_explains_every_function() -> None:
    assert explain(GPU, facts(geforce("vfio-pci", None))) == (
        "neither host nor vfio: 0000:01:00.0 is on vfio-pci, 0000:01:00.1 is on no driver"
    )
    assert explain(GPU, facts(geforce(None))) == (
        "neither host nor vfio: 0000:01:00.0 is on no driver, 0000:01:00.1 is not on the PCI bus"
    )
