"""What is known of host drivers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from gpuswitch.model.drivers import (
    MODULES,
    NVIDIA,
    Candidate,
    Profile,
    around,
    from_module,
    from_name,
    host_drivers,
    kernel_name,
    lets_go_of_one,
    named_surely,
    profile_of,
    shown_by,
    waits_for_ever,
)
from gpuswitch.model.facts import Driver, Module
from gpuswitch.model.holders import Unit
from tests.harness.facts import VGA, facts, function


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
        ("nvidia-nvswitch", {}, Driver("nvidia-nvswitch", "nvidia")),
        # by the names of their modules, and of their files
        ("bochs", {}, Driver("bochs-drm", "bochs")),
        ("xhci-pci", {"xhci_hcd": None}, Driver("xhci_hcd", None)),
        ("nvidia-current", {}, Driver("nvidia", "nvidia_current")),
        ("nvidia-current", {"nvidia": "nvidia"}, Driver("nvidia", "nvidia")),
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
        ("bochs", {"bochs-drm": None}, Driver("bochs-drm", None)),
        # built in, where sysfs links no module to it
        ("i2c_designware_pci", {"i2c-designware-pci": None}, Driver("i2c-designware-pci", None)),
        ("some_thing", {"some-thing": None}, Driver("some-thing", None)),
        ("some_thing", {"some-thing": "other"}, Driver("some_thing", "some_thing")),
        ("nova_core", {}, Driver("nova-core", "nova_core")),
        ("nova_core", {"NovaCore": "nova_core"}, Driver("NovaCore", "nova_core")),
        ("nvidia", {"nvidia-nvswitch": "nvidia", "nvidia": "nvidia"}, Driver("nvidia", "nvidia")),
        ("nvidia_tesla_470", {}, Driver("nvidia", "nvidia_tesla_470")),
        ("nvidia_tesla_470", {"nvidia": "nvidia"}, Driver("nvidia", "nvidia")),
    ],
)
def test_the_driver_of_a_module(module: str, registered: dict[str, str | None], driver: Driver) -> None:
    assert from_module(module, registered) == driver


NVSWITCH = 0x068000
CARD = function("0000:01:00.0", VGA, "vfio-pci", group=13)
LOADED: dict[str, str | None] = {"nvidia-nvswitch": "nvidia", "nvidia": "nvidia", "vfio-pci": "vfio_pci"}


def candidates(*modules: str) -> tuple[Candidate, ...]:
    """Each with the modules that it needs behind it."""
    return tuple(Candidate(name, frozenset(needs)) for name, *needs in map(str.split, modules))


NVIDIAS = candidates("nvidia_drm drm nvidia_modeset nvidia", "nvidia")
RENAMED = candidates("nvidia_current_drm drm nvidia_current_modeset nvidia_current", "nvidia_current drm")


def drivers(*found: str, card: int = VGA, registered: Mapping[str, str | None] | None = None, **on: str) -> list[str]:
    """The names of what fits a card on vfio-pci; `on`: the drivers of others like it."""
    own = replace(CARD, class_code=card)
    others = [function(f"0000:0{n}:00.0", card, name) for n, name in enumerate(on.values(), 2)]
    seen = facts([own, *others], registered=registered or {})
    return [driver.name for driver in host_drivers(own, candidates(*found), seen)]


class TestHome:
    """What a card that was on vfio-pci from boot on goes home to."""

    @pytest.mark.parametrize("found", [NVIDIAS, RENAMED, NVIDIAS[::-1], RENAMED[::-1]])
    @pytest.mark.parametrize("registered", [{}, LOADED])
    def test_what_only_carries_its_table_is_no_driver(
        self, found: tuple[Candidate, ...], registered: Mapping[str, str | None]
    ) -> None:
        [driver] = host_drivers(CARD, found, facts([CARD], registered=registered))
        assert driver == Driver("nvidia", "nvidia" if registered else found[0].module.removesuffix("_drm"))

    def test_what_only_carries_its_table_is_none_either_where_its_load_is_a_command(self) -> None:
        """An install command hides what it needs."""
        assert drivers("nvidia_drm", "nvidia") == ["nvidia"]

    def test_one_that_is_registered_wins(self) -> None:
        assert drivers("nouveau drm", "nvidia", registered=LOADED) == ["nvidia"]
        assert drivers("nouveau drm", "nvidia", registered={"nouveau": "nouveau"}) == ["nouveau"]

    def test_where_none_is_registered_there_is_a_doubt(self) -> None:
        assert drivers("nouveau drm", "nvidia") == ["nouveau", "nvidia"]
        assert drivers("nouveau drm", "nvidia", registered={"nouveau": None, **LOADED}) == ["nouveau", "nvidia"]

    def test_the_driver_of_an_equal_card_wins_over_all(self) -> None:
        assert drivers("nouveau drm", "nvidia", registered=LOADED, twin="nouveau") == ["nouveau"]
        assert drivers("something", registered=LOADED, twin="nvidia") == ["nvidia"]

    def test_equal_cards_may_differ(self) -> None:
        assert drivers("nouveau drm", "nvidia", one="nouveau", other="nvidia") == ["nouveau", "nvidia"]

    @pytest.mark.parametrize("nobody", ["vfio-pci", "pci-stub", "xen-pciback"])
    def test_what_serves_no_device_is_no_driver_of_an_equal_card(self, nobody: str) -> None:
        assert drivers("amdgpu drm", twin=nobody) == ["amdgpu"]

    @pytest.mark.parametrize("registered", [{}, {"i915": "i915", "xe": "xe"}, {"xe": "xe"}])
    def test_one_that_leaves_it_to_another_has_it_not(self, registered: dict[str, str | None]) -> None:
        """Both i915 and xe have an Arc A750 in their tables, and udev loads both."""
        assert drivers("i915 drm", "xe drm", registered=registered) == ["i915"]
        assert drivers("xe drm", registered=registered) == ["xe"]

    def test_a_module_may_bring_a_driver_for_each_class(self) -> None:
        assert drivers("nvidia", card=NVSWITCH) == ["nvidia-nvswitch"]
        assert drivers("nvidia", card=NVSWITCH, registered=LOADED) == ["nvidia-nvswitch"]
        assert drivers("nvidia", registered=LOADED) == ["nvidia"]

    def test_several_files_of_one_module_are_no_doubt(self) -> None:
        """Debian's nvidia-current and nvidia-tesla-470 side by side: `install nvidia` says which of them it is."""
        files = (*RENAMED, *candidates("nvidia_tesla_470_drm drm nvidia_tesla_470", "nvidia_tesla_470 drm"))
        assert host_drivers(CARD, files, facts([CARD], registered={})) == (Driver("nvidia", "nvidia"),)

    @pytest.mark.parametrize("barred", ["nouveau", "nvidia"])
    def test_one_that_the_kernel_refuses_is_none(self, barred: str) -> None:
        """`module_blacklist=`, of which kmod knows nothing."""
        found = (*candidates("nouveau drm"), *RENAMED)
        [driver] = host_drivers(CARD, found, replace(facts([CARD], registered={}), barred=frozenset({barred})))
        assert driver.name == ({"nouveau", "nvidia"} - {barred}).pop()

    def test_a_module_that_has_brought_no_driver_is_none(self) -> None:
        """Nouveau does that with modeset=0."""
        found = candidates("nouveau drm", "nvidia")
        idle = replace(facts([CARD], registered={}), modules={"nouveau": Module(references=0)})
        assert host_drivers(CARD, found, idle) == (Driver("nvidia", "nvidia"),)
        built_in = replace(idle, modules={"nouveau": Module()})
        assert len(host_drivers(CARD, found, built_in)) == 2, "what a built-in one brought shows no module"

    def test_none_fits(self) -> None:
        assert drivers() == []


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("amdgpu", "amdgpu"),
        ("nvidia_uvm", "nvidia_uvm"),
        ("nvidia_current", "nvidia"),
        ("nvidia_tesla_470", "nvidia"),
        ("nvidia_tesla_470_drm", "nvidia_drm"),
        ("nvidia_current_modeset", "nvidia_modeset"),
        ("nvidiafb", "nvidiafb"),
    ],
)
def test_what_the_kernel_calls_a_module(file: str, name: str) -> None:
    assert kernel_name(file) == name


@pytest.mark.parametrize(
    ("driver", "modules"),
    [
        (Driver("nvidia", "nvidia"), ["nvidia_drm"]),
        (Driver("nvidia", "nvidia_current"), ["nvidia_drm", "nvidia_current_drm"]),
        (Driver("NovaCore", "nova_core"), ["nova_drm"]),
        (Driver("amdgpu", "amdgpu"), []),
        (Driver("nvidia", None), ["nvidia_drm"]),
    ],
)
def test_what_shows_the_picture(driver: Driver, modules: list[str]) -> None:
    assert list(shown_by(driver)) == modules


@pytest.mark.parametrize(
    ("driver", "registered", "sure"),
    [
        (Driver("nvidia", "nvidia_current"), (), True),
        (Driver("amdgpu", "amdgpu"), (), True),
        (Driver("ast", "ast"), (), False),
        (Driver("ast", "ast"), ("ast",), True),
        # called otherwise by some kernels
        (Driver("nova-core", "nova_core"), (), False),
        (Driver("NovaCore", "nova_core"), ("NovaCore",), True),
    ],
)
def test_whose_name_is_known_before_the_module_is_loaded(
    driver: Driver, registered: tuple[str, ...], sure: bool
) -> None:
    assert named_surely(driver, registered) is sure


@pytest.mark.parametrize(
    ("name", "registered", "driver"),
    [
        ("nvidia_drm", LOADED, "nvidia"),
        ("nvidia-drm", {}, "nvidia"),
        ("nova_drm", {}, "nova-core"),
        ("nvidia", {}, ""),
        ("ast", {}, ""),
        # should it ever be one
        ("nvidia_drm", {"nvidia_drm": None}, ""),
    ],
)
def test_modules_around_a_driver_are_none(name: str, registered: dict[str, str | None], driver: str) -> None:
    assert around(name, registered) == driver
