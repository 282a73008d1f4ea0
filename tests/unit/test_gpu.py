"""Which functions make one GPU, and who its neighbours are."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import BootFramebuffer, HostFacts, Kind, PciFunction
from gpuswitch.model.gpu import Gpu, discover, harmless
from tests.harness.facts import (
    ACCELERATOR,
    AMD,
    AMD_PROCESSOR,
    AUDIO,
    BRIDGE,
    DISPLAY,
    ENCRYPTION,
    ETHERNET,
    HOST_BRIDGE,
    INTEL,
    NVIDIA,
    NVME,
    NVSWITCH,
    UCSI,
    USB,
    VGA,
    at,
    facts,
    function,
    geforce,
)

_HOST_DRIVERS = ("nvidia", "snd_hda_intel", "xhci_hcd", "nvidia-gpu")


def shapes(host: HostFacts, members: dict[str, list[str]] | None = None) -> dict[str, list[str]]:
    """Every GPU with its functions, as text."""
    named = {at(gpu): [at(member) for member in claimed] for gpu, claimed in (members or {}).items()}
    return {str(gpu.address): [str(a) for a in gpu.functions] for gpu in discover(host, named)}


class TestKinds:
    @pytest.mark.parametrize(
        ("class_code", "kind"),
        [
            (0x030000, Kind.DISPLAY),
            (0x030200, Kind.DISPLAY),
            (0x038000, Kind.DISPLAY),
            (0x040300, Kind.AUDIO),
            (0x040100, Kind.AUDIO),
            (0x040000, Kind.OTHER),  # a video capture card
            (0x0C0330, Kind.USB),
            (0x0C8000, Kind.UCSI),
            (0x0C0500, Kind.OTHER),  # SMBus
            (0x060400, Kind.BRIDGE),
            (0x060401, Kind.BRIDGE),
            (0x060940, Kind.BRIDGE),
            (0x060000, Kind.CHIPSET),
            (0x060100, Kind.CHIPSET),
            (0x068000, Kind.OTHER),  # an NVSwitch
            (0x120000, Kind.ACCELERATOR),
            (0x118000, Kind.OTHER),  # the NPU of an AMD processor
            (0x020000, Kind.NETWORK),
            (0x010802, Kind.STORAGE),
            (0x108000, Kind.OTHER),
        ],
    )
    def test_are_told_by_the_class_code(self, class_code: int, kind: Kind) -> None:
        assert Kind.of(class_code) is kind


class TestCompanions:
    def test_sound_usb_and_ucsi_of_the_slot_come_along(self) -> None:
        host = facts(geforce(*_HOST_DRIVERS))
        assert shapes(host) == {"0000:01:00.0": [f"0000:01:00.{n}" for n in range(4)]}

    def test_whatever_their_group(self) -> None:
        host = facts([function("0000:01:00.0", VGA, group=1), function("0000:01:00.1", AUDIO, group=2)])
        assert shapes(host) == {"0000:01:00.0": ["0000:01:00.0", "0000:01:00.1"]}
        assert discover(host)[0].groups(host) == (1, 2)

    def test_without_a_driver_too(self) -> None:
        assert shapes(facts(geforce("nvidia", "snd_hda_intel", "xhci_hcd", None)))["0000:01:00.0"][-1] == "0000:01:00.3"

    def test_other_slots_and_other_domains_keep_theirs(self) -> None:
        host = facts(
            [
                function("0000:01:00.0", VGA),
                function("0000:02:00.1", AUDIO),
                function("10000:01:00.0", VGA),
                function("10000:01:00.1", AUDIO),
            ]
        )
        assert shapes(host) == {
            "0000:01:00.0": ["0000:01:00.0"],
            "10000:01:00.0": ["10000:01:00.0", "10000:01:00.1"],
        }

    def test_two_displays_of_one_slot_are_one_gpu(self) -> None:
        host = facts([function("0000:01:00.0", VGA), function("0000:01:00.1", 0x038000, vendor=AMD)])
        assert shapes(host) == {"0000:01:00.0": ["0000:01:00.0", "0000:01:00.1"]}

    def test_a_slot_without_a_display_is_no_gpu(self) -> None:
        assert shapes(facts([function("0000:03:00.0", USB), function("0000:03:00.1", AUDIO)])) == {}


class TestRootComplex:
    def test_on_a_root_bus_the_users_usb_and_foreign_sound_stay(self) -> None:
        host = facts(
            [
                function("0000:00:02.0", VGA, vendor=INTEL, parent=None),
                function("0000:00:02.1", AUDIO, vendor=INTEL, parent=None),
                function("0000:00:02.2", USB, vendor=INTEL, parent=None),
                function("0000:00:02.3", AUDIO, vendor=AMD, parent=None),
            ]
        )
        assert shapes(host) == {"0000:00:02.0": ["0000:00:02.0", "0000:00:02.1"]}

    def test_of_an_apu_only_the_makers_own_sound_comes_along(self) -> None:
        slot = "0000:04:00"
        host = facts(
            [
                function(f"{slot}.0", VGA, vendor=AMD),
                function(f"{slot}.1", AUDIO, vendor=AMD),
                function(f"{slot}.2", ENCRYPTION, vendor=AMD_PROCESSOR),
                function(f"{slot}.3", USB, vendor=AMD_PROCESSOR),
                function(f"{slot}.6", AUDIO, vendor=AMD_PROCESSOR),
            ]
        )
        assert shapes(host) == {f"{slot}.0": [f"{slot}.0", f"{slot}.1"]}

    @pytest.mark.parametrize(("maker", "comes"), [(AMD_PROCESSOR, False), (AMD, True)])
    def test_usb_of_another_maker_is_the_hosts(self, maker: int, comes: bool) -> None:
        """Also where the firmware hides the security processor of an APU. A card's own is of its maker."""
        slot = "0000:04:00"
        host = facts(
            [
                function(f"{slot}.0", VGA, vendor=AMD),
                function(f"{slot}.1", AUDIO, vendor=AMD),
                function(f"{slot}.3", USB, vendor=maker),
            ]
        )
        assert shapes(host) == {f"{slot}.0": [f"{slot}.0", f"{slot}.1", *([f"{slot}.3"] if comes else [])]}


def switch(maker: int, *ports: str, above: str | None = "0000:00:01.0") -> list[PciFunction]:
    """A PCIe switch: its upstream port 0000:01:00.0, behind a root port, and downstream ports."""
    root = [function(above, BRIDGE, parent=None, vendor=INTEL)] if above else []
    upstream = function("0000:01:00.0", BRIDGE, vendor=maker, parent=at(above) if above else None)
    return [*root, upstream, *(function(p, BRIDGE, vendor=maker, parent=at("0000:01:00.0")) for p in ports)]


class TestCardsWithASwitch:
    """The picture at 0000:03:00.0 below 0000:02:01.0, other functions below 0000:02:04.0."""

    def shapes(
        self,
        *others: PciFunction,
        switch_of: int = INTEL,
        maker: int = INTEL,
        above: str | None = "0000:00:01.0",
    ) -> list[str]:
        picture = function("0000:03:00.0", VGA, vendor=maker, parent=at("0000:02:01.0"))
        ports = switch(switch_of, "0000:02:01.0", "0000:02:04.0", above=above)
        return shapes(facts([*ports, picture, *others]))["0000:03:00.0"]

    def below(self, class_code: int, vendor: int = INTEL, address: str = "0000:04:00.0") -> PciFunction:
        return function(address, class_code, vendor=vendor, parent=at("0000:02:04.0"))

    def test_sound_on_another_bus_comes_along(self) -> None:
        board = function("0000:00:1f.3", AUDIO, vendor=INTEL, parent=None)
        assert self.shapes(self.below(AUDIO), board) == ["0000:03:00.0", "0000:04:00.0"]

    def test_what_no_card_has_does_not(self) -> None:
        assert self.shapes(self.below(ETHERNET)) == ["0000:03:00.0"]

    def test_of_another_maker_is_another_card(self) -> None:
        """A sound card in the next slot of a board whose switch NVIDIA made (nForce 200)."""
        assert self.shapes(self.below(AUDIO, 0x1102), switch_of=NVIDIA, maker=NVIDIA) == ["0000:03:00.0"]

    @pytest.mark.parametrize("maker", [0x10B5, AMD_PROCESSOR])
    def test_a_switch_of_another_maker_is_the_boards(self, maker: int) -> None:
        """PLX; the chipset of an AMD board, which has the board's USB below it."""
        for usb in (self.below(USB, maker), self.below(USB, AMD)):
            assert self.shapes(usb, switch_of=maker, maker=AMD) == ["0000:03:00.0"]

    def test_with_two_cards_below_it_is_the_boards(self) -> None:
        second = function("0000:05:00.0", VGA, vendor=INTEL, parent=at("0000:02:04.0"))
        assert self.shapes(self.below(AUDIO), second) == ["0000:03:00.0"]

    def test_virtual_functions_are_no_second_card(self) -> None:
        virtual = function(
            "0000:03:00.1", VGA, vendor=INTEL, parent=at("0000:02:01.0"), physical_function="0000:03:00.0"
        )
        assert self.shapes(self.below(AUDIO), virtual) == ["0000:03:00.0", "0000:04:00.0"]
        of_it = function("0000:04:00.1", AUDIO, vendor=INTEL, physical_function="0000:04:00.0")
        assert self.shapes(of_it) == ["0000:03:00.0"]

    def test_ports_of_the_board_are_no_switch(self) -> None:
        """The bridge above the downstream port is on the root bus."""
        assert self.shapes(self.below(AUDIO), above=None) == ["0000:03:00.0"]

    def test_a_member_of_another_gpu_is_taken_out(self) -> None:
        ports = switch(INTEL, "0000:02:01.0", "0000:02:04.0")
        picture = function("0000:03:00.0", VGA, vendor=INTEL, parent=at("0000:02:01.0"))
        other = function("0000:09:00.0", VGA)
        host = facts([*ports, picture, other, self.below(AUDIO)])
        assert shapes(host, {"0000:09:00.0": ["0000:04:00.0"]}) == {
            "0000:03:00.0": ["0000:03:00.0"],
            "0000:09:00.0": ["0000:04:00.0", "0000:09:00.0"],
        }


class TestAccelerators:
    def test_are_gpus(self) -> None:
        host = facts([function("0000:05:00.0", ACCELERATOR, vendor=AMD), function("0000:25:00.0", DISPLAY, vendor=AMD)])
        assert shapes(host) == {"0000:05:00.0": ["0000:05:00.0"], "0000:25:00.0": ["0000:25:00.0"]}
        assert [gpu.draws(host) for gpu in discover(host)] == [False, True]

    def test_beside_a_display_of_their_slot_are_part_of_its_gpu(self) -> None:
        host = facts([function("0000:05:00.0", ACCELERATOR), function("0000:05:00.1", VGA)])
        assert shapes(host) == {"0000:05:00.1": ["0000:05:00.0", "0000:05:00.1"]}

    def test_leave_last(self) -> None:
        host = facts([function("0000:05:00.0", ACCELERATOR), function("0000:06:00.0", NVSWITCH)])
        [gpu] = discover(host, {at("0000:05:00.0"): [at("0000:06:00.0")]})
        assert gpu.in_detach_order(host) == (at("0000:06:00.0"), at("0000:05:00.0"))


def test_what_functions_bring_with_them_is_said_in_a_word() -> None:
    shared_out = function("0000:01:00.0", VGA, virtual_functions=8, mediated_devices=1)
    virtual = function("0000:01:00.1", VGA, group=2, physical_function="0000:01:00.0")
    nvswitch = function("0000:02:00.0", NVSWITCH, group=2)
    host = facts([shared_out, virtual, nvswitch, function("0000:00:01.0", BRIDGE)], direct_regions={1: ("0x0-0x1",)})
    host = replace(host, boot_framebuffers=(BootFramebuffer("efi-framebuffer.0", "efifb", shared_out.address),))
    own = ("8 virtual functions", "1 mediated device", "firmware frame buffer", "reserved region")
    assert host.adds(shared_out) == own
    assert host.adds(virtual) == ("virtual function",)
    assert host.adds(nvswitch) == ("NVSwitch",)
    [gpu] = discover(host, {at("0000:01:00.0"): [at("0000:02:00.0")]})
    assert gpu.adds(host) == (*own, "NVSwitch")


class TestNeighbours:
    def test_an_nvswitch_is_one_and_a_bridge_is_none(self) -> None:
        others = [
            function("0000:00:01.0", BRIDGE, "pcieport", parent=None),
            function("0000:02:00.0", NVSWITCH, "nvidia-nvswitch"),
            function("0000:00:00.0", HOST_BRIDGE, "ie31200_edac", parent=None),
        ]
        host = facts([function("0000:01:00.0", VGA), *others])
        assert [str(f.address) for f in discover(host)[0].neighbours(host)] == ["0000:00:00.0", "0000:02:00.0"]

    def test_are_the_other_endpoints_of_all_its_groups(self) -> None:
        card = [function("0000:01:00.0", VGA, group=1), function("0000:01:00.1", AUDIO, group=2)]
        others = [
            function("0000:02:00.0", ETHERNET, "r8169", group=1),
            function("0000:03:00.0", NVME, group=2),
            function("0000:00:01.0", BRIDGE, "pcieport", group=1, parent=None),
            function("0000:00:02.0", BRIDGE, group=1, parent=None),
            function("0000:04:00.0", BRIDGE, "shpchp", group=1, parent=None),
            function("0000:05:00.0", ETHERNET, "r8169", group=3),
            function("0000:06:00.0", ETHERNET, "r8169", group=None),
        ]
        host = facts(card + others)
        found = discover(host)[0].neighbours(host)
        assert [str(f.address) for f in found] == ["0000:02:00.0", "0000:04:00.0", "0000:03:00.0"]

    def test_two_gpus_in_one_group_are_neighbours(self) -> None:
        host = facts([function("0000:01:00.0", VGA), function("0000:02:00.0", VGA)])
        first, second = discover(host)
        assert first.neighbours(host) == (host.functions[second.address],)
        assert second.neighbours(host) == (host.functions[first.address],)

    @pytest.mark.parametrize(
        ("on", "ok"), [(None, True), ("vfio-pci", True), ("pci-stub", True), ("r8169", False), ("nvidia", False)]
    )
    def test_without_dma_of_their_own_do_no_harm(self, on: str | None, ok: bool) -> None:
        assert harmless(function("0000:02:00.0", ETHERNET, on)) is ok


class TestVirtualFunctions:
    def test_are_nobodys(self) -> None:
        host = facts(
            [
                function("0000:01:00.0", VGA, virtual_functions=2),
                function("0000:01:00.1", VGA, physical_function="0000:01:00.0"),
                function("0000:02:00.0", VGA, physical_function="0000:01:00.0"),
            ]
        )
        assert shapes(host) == {"0000:01:00.0": ["0000:01:00.0"]}


class TestMembers:
    def host(self) -> HostFacts:
        return facts(
            [
                *geforce(*_HOST_DRIVERS),
                function("0000:02:00.0", VGA),
                function("0000:02:00.1", AUDIO),
                function("0000:03:00.0", ETHERNET),
            ]
        )

    def test_come_along(self) -> None:
        assert shapes(self.host(), {"0000:02:00.0": ["0000:03:00.0"]})["0000:02:00.0"] == [
            "0000:02:00.0",
            "0000:02:00.1",
            "0000:03:00.0",
        ]

    def test_another_gpus_display_brings_that_whole_gpu(self) -> None:
        merged = shapes(self.host(), {"0000:01:00.0": ["0000:02:00.0"]})
        assert list(merged) == ["0000:01:00.0"]
        assert merged["0000:01:00.0"] == [f"0000:01:00.{n}" for n in range(4)] + ["0000:02:00.0", "0000:02:00.1"]

    def test_the_gpu_keeps_the_address_that_the_config_gives_it(self) -> None:
        merged = shapes(self.host(), {"0000:02:00.0": ["0000:01:00.0"]})
        assert list(merged) == ["0000:02:00.0"]
        assert len(merged["0000:02:00.0"]) == 6

    def test_beat_companions(self) -> None:
        taken = shapes(self.host(), {"0000:02:00.0": ["0000:01:00.2"]})
        assert "0000:01:00.2" in taken["0000:02:00.0"]
        assert "0000:01:00.2" not in taken["0000:01:00.0"]

    def test_claims_in_a_circle_make_one_gpu(self) -> None:
        circle = shapes(self.host(), {"0000:01:00.0": ["0000:02:00.0"], "0000:02:00.0": ["0000:01:00.0"]})
        assert list(circle) == ["0000:01:00.0"]
        assert len(circle["0000:01:00.0"]) == 6

    def test_of_itself_changes_nothing(self) -> None:
        assert shapes(self.host(), {"0000:01:00.0": ["0000:01:00.0", "0000:01:00.1"]}) == shapes(self.host())

    def test_of_a_gpu_that_is_not_there_are_not_taken_from_others(self) -> None:
        assert shapes(self.host(), {"0000:09:00.0": ["0000:02:00.0", "0000:03:00.0"]}) == shapes(self.host())

    def test_that_are_not_there_are_missed(self) -> None:
        host = self.host()
        gpu = next(g for g in discover(host, {at("0000:02:00.0"): [at("0000:09:00.0")]}) if g.address.bus == 2)
        assert gpu.missing(host) == (at("0000:09:00.0"),)
        assert [f.address for f in gpu.present(host)] == [at("0000:02:00.0"), at("0000:02:00.1")]


def test_display_leaves_last_and_comes_first() -> None:
    host = facts([*geforce(*_HOST_DRIVERS), function("0000:02:00.0", VGA), function("0000:02:00.1", UCSI)])
    gpu = Gpu(at("0000:01:00.0"), tuple(host.functions))
    out = [str(a)[5:] for a in gpu.in_detach_order(host)]
    assert out == ["01:00.1", "01:00.2", "01:00.3", "02:00.1", "01:00.0", "02:00.0"]
    assert gpu.in_attach_order(host) == tuple(reversed(gpu.in_detach_order(host)))


_addresses = st.builds(
    PciAddress, st.sampled_from([0, 0x10000]), st.integers(0, 3), st.integers(0, 1), st.integers(0, 7)
)


@st.composite
def _hosts(draw: st.DrawFn) -> tuple[HostFacts, dict[PciAddress, list[PciAddress]]]:
    classes = st.sampled_from([VGA, ACCELERATOR, AUDIO, USB, UCSI, ETHERNET, BRIDGE, ENCRYPTION])
    addresses = draw(st.lists(_addresses, min_size=1, max_size=16, unique=True))
    functions: list[PciFunction] = [
        function(str(a), draw(classes), group=draw(st.integers(0, 4)), vendor=draw(st.sampled_from([AMD, INTEL])))
        for a in addresses
    ]
    anyone = st.one_of(st.sampled_from(addresses), _addresses)
    return facts(functions), draw(st.dictionaries(anyone, st.lists(anyone, max_size=3), max_size=3))


@given(_hosts())
def test_a_function_belongs_to_one_gpu_at_most(drawn: tuple[HostFacts, dict[PciAddress, list[PciAddress]]]) -> None:
    host, members = drawn
    gpus = discover(host, members)
    everything = [a for gpu in gpus for a in gpu.functions]
    assert len(everything) == len(set(everything))
    assert [gpu.address for gpu in gpus] == sorted({gpu.address for gpu in gpus})
    for gpu in gpus:
        assert gpu.address in gpu.functions
        assert host.functions[gpu.address].makes_gpu
        assert gpu.functions == tuple(sorted(gpu.functions))
    displays = {a for a, f in host.functions.items() if f.makes_gpu}
    assert displays <= set(everything)
