"""What is known of host drivers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gpuswitch.model.drivers import (
    MODULES,
    NVIDIA,
    Profile,
    from_module,
    from_name,
    lets_go_of_one,
    profile_of,
    waits_for_ever,
)
from gpuswitch.model.facts import Driver
from gpuswitch.model.holders import Unit


@pytest.mark.parametrize(
    ("version", "can"),
    [
        ("470.256.02", False),
        ("580.65.06", False),
        ("580.95.05", False),
        ("580.105.08", True),
        ("580.126.09", True),
        # between the branches: it was there in none of them
        ("585.10", False),
        ("590.44.01", True),
        ("595.10", True),
        ("1000.1", True),
        ("", False),
        ("unknown", False),
    ],
)
def test_from_which_version_on_nvidia_lets_go_of_one_of_several(version: str, can: bool) -> None:
    assert lets_go_of_one(NVIDIA, version) is can


@pytest.mark.parametrize("name", ["amdgpu", "i915", "xe", "nouveau", "snd_hda_intel", "xhci_hcd", "something"])
def test_others_always_do(name: str) -> None:
    assert lets_go_of_one(profile_of(Driver(name, name)), "")


@pytest.mark.parametrize(
    ("until", "version", "for_ever"),
    [
        ((), "590.48.01", False),
        ((), "595.45.04", True),
        ((), "999.1", True),
        ((), "", False),
        # as a mend would be noted that came to one branch late, and was in all new ones from another on
        (((595, 120), (620,)), "595.99.02", True),
        (((595, 120), (620,)), "595.120.01", False),
        (((595, 120), (620,)), "610.57.04", True),
        (((595, 120), (620,)), "620.10", False),
        (((595, 120), (620,)), "630.1", False),
    ],
)
def test_which_nvidia_waits_for_ever(until: tuple[tuple[int, ...], ...], version: str, for_ever: bool) -> None:
    assert waits_for_ever(replace(NVIDIA, forgets_until=until), version) is for_ever


def test_others_wait_for_those_who_have_it_open() -> None:
    assert not waits_for_ever(profile_of(Driver("snd_hda_intel", None)), "600.1")


def test_nvidias_modules_go_in_an_order_in_which_each_comes_before_those_that_it_needs() -> None:
    chain = NVIDIA.chain
    assert chain[-1] == "nvidia"
    assert chain.index("nvidia_drm") < chain.index("nvidia_modeset")
    assert len(set(chain)) == len(chain)


def test_only_nvidias_modules_are_unloaded_without_being_asked() -> None:
    names = ("amdgpu", "i915", "xe", "nouveau", "snd_hda_intel", "xhci_hcd", "nvidia-gpu", "something")
    assert [name for name in names if profile_of(Driver(name, name)).unload_detaches] == []
    assert NVIDIA.unload_detaches


def test_nvidias_comfort() -> None:
    assert NVIDIA.units == (Unit("nvidia-persistenced.service"), Unit("nvidia-powerd.service"))
    assert {"nvidiactl", "nvidia-uvm", "nvidia-modeset"} <= set(NVIDIA.nodes)
    assert (NVIDIA.waits, NVIDIA.persistence, NVIDIA.modeset) == (True, True, "nvidia_drm")


def test_the_usb_c_controller_of_a_card_is_given_minutes() -> None:
    assert profile_of(Driver("nvidia-gpu", "i2c_nvidia_gpu")).unbind_seconds >= 180


@pytest.mark.parametrize(
    ("driver", "profile"),
    [
        (Driver("bochs-drm", "bochs"), Profile("bochs-drm", chain=("bochs",), waits=True)),
        (Driver("simple", None), Profile("simple", waits=True)),
    ],
)
def test_a_driver_that_nobody_knows_is_believed_to_wait_and_nothing_more(driver: Driver, profile: Profile) -> None:
    assert profile_of(driver) == profile


def test_every_module_that_a_profile_names_is_looked_at() -> None:
    assert {*NVIDIA.chain, "snd_hda_intel", "amdgpu", "xhci_pci", "i2c_nvidia_gpu", "ucsi_ccg"} <= MODULES


@pytest.mark.parametrize(
    ("name", "registered", "driver"),
    [
        ("xhci_hcd", {}, Driver("xhci_hcd", "xhci_pci")),
        ("xhci_hcd", {"xhci_hcd": None}, Driver("xhci_hcd", None)),
        ("bochs-drm", {}, Driver("bochs-drm", "bochs")),
        ("my-driver", {}, Driver("my-driver", "my_driver")),
    ],
)
def test_the_driver_of_a_name(name: str, registered: dict[str, str | None], driver: Driver) -> None:
    assert from_name(name, registered) == driver


@pytest.mark.parametrize(
    ("module", "registered", "driver"),
    [
        ("xhci_pci", {}, Driver("xhci_hcd", "xhci_pci")),
        ("bochs", {"bochs-drm": "bochs"}, Driver("bochs-drm", "bochs")),
        ("several", {"second": "several", "first": "several"}, Driver("first", "several")),
        ("amdgpu", {"i915": "i915"}, Driver("amdgpu", "amdgpu")),
    ],
)
def test_the_driver_of_a_module(module: str, registered: dict[str, str | None], driver: Driver) -> None:
    assert from_module(module, registered) == driver
