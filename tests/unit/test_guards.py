"""The guards: every reason at once, each naming the thing in the way."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gpuswitch.config.kinds import checked_table
from gpuswitch.config.schema import Defaults
from gpuswitch.config.settings import Config, GpuConfig
from gpuswitch.errors import Busy, GpuswitchError, InProgress, NotViable, Owned, Wedged
from gpuswitch.model.facts import HostFacts
from gpuswitch.model.gpu import Gpu
from gpuswitch.model.states import State
from gpuswitch.sentence import Sentence
from gpuswitch.switch.planning.guards import Blocker, blockers, refusal
from tests.harness.facts import AUDIO, BRIDGE, ETHERNET, HOST_BRIDGE, NVME, NVSWITCH, PORT, VGA, at, facts, function

GPU = Gpu(at("0000:01:00.0"), (at("0000:01:00.0"), at("0000:01:00.1")))


def card(*, boot_display: bool = False, virtual_functions: int = 0, group: int | None = 1) -> HostFacts:
    return facts(
        [
            function(
                "0000:01:00.0",
                VGA,
                "nvidia",
                boot_display=boot_display,
                virtual_functions=virtual_functions,
                group=group,
            ),
            function("0000:01:00.1", AUDIO, "snd_hda_intel", group=group),
        ]
    )


def configured(*members: str, **rules: object) -> Config:
    """A configuration with a table for the card."""
    own = GpuConfig(GPU.address, managed=True, members=tuple(map(at, members)), rules=checked_table(Defaults, rules))
    return Config(gpus=(own,))


def reasons(host: HostFacts, target: State = State.VFIO, state: State = State.HOST, gpu: Gpu = GPU) -> dict[str, str]:
    return {blocker.kind: blocker.sentence for blocker in blockers(gpu, target, state, host, Config())}


@pytest.mark.parametrize("target", [State.VFIO, State.HOST], ids=str)
@pytest.mark.parametrize("state", [State.HOST, State.VFIO, State.UNKNOWN, State.FAILED, State.ABSENT], ids=str)
def test_nothing_is_in_the_way_of_a_sound_gpu(state: State, target: State) -> None:
    assert blockers(GPU, target, state, card(), Config()) == ()


@pytest.mark.parametrize("target", [State.VFIO, State.HOST], ids=str)
def test_a_wedged_gpu_is_left_alone(target: State) -> None:
    (blocker,) = blockers(GPU, target, State.WEDGED, card(), Config())
    assert (blocker.kind, blocker.error) == ("wedged", Wedged)
    assert "0000:01:00.0" in blocker.sentence


@pytest.mark.parametrize("target", [State.VFIO, State.HOST], ids=str)
@pytest.mark.parametrize("state", [State.DETACHING, State.REATTACHING, State.RECOVERING], ids=str)
def test_one_switch_at_a_time(state: State, target: State) -> None:
    (blocker,) = blockers(GPU, target, state, card(), Config())
    assert (blocker.kind, blocker.error) == ("in_progress", InProgress)
    assert blocker.sentence == (f"0000:01:00.0 is {state}: wait until it is at rest: gpuswitchctl wait 0000:01:00.0")


@pytest.mark.parametrize("target", [State.VFIO, State.HOST], ids=str)
def test_all_functions_must_be_there(target: State) -> None:
    assert reasons(facts([function("0000:01:00.0", VGA)]), target) == {
        "missing_function": "function 0000:01:00.1 is not on the PCI bus: have it looked for: "
        "echo 1 > /sys/bus/pci/rescan"
    }


class TestToVfio:
    def test_needs_an_iommu(self) -> None:
        off = facts(
            [function("0000:01:00.0", VGA, group=None), function("0000:01:00.1", AUDIO, group=None)], iommu=False
        )
        assert list(reasons(off)) == ["no_iommu"]
        assert "intel_iommu=on" in reasons(off)["no_iommu"]

    @pytest.mark.parametrize(
        ("processor", "named", "not_named"),
        [
            ("intel", ("VT-d", "intel_iommu=on"), ("AMD-Vi", "SMMU")),
            ("amd", ("AMD-Vi",), ("VT-d", "intel_iommu", "SMMU")),
            ("arm", ("SMMU",), ("VT-d", "AMD-Vi", "intel_iommu")),
            ("", ("VT-d", "AMD-Vi", "SMMU", "intel_iommu=on"), ()),
            ("intel on xen", ("Xen",), ("VT-d", "firmware")),
            ("intel on machine", ("virtual IOMMU",), ("VT-d", "firmware")),
        ],
    )
    def test_the_remedy_for_an_iommu_that_is_off_fits_the_machine(
        self, processor: str, named: tuple[str, ...], not_named: tuple[str, ...]
    ) -> None:
        processor, _, hypervisor = processor.partition(" on ")
        host = facts(card().functions.values(), iommu=False, processor=processor, hypervisor=hypervisor)
        sentence = reasons(host)["no_iommu"]
        assert all(word in sentence for word in named)
        assert not any(word in sentence for word in not_named)

    def test_needs_a_group_for_each_function(self) -> None:
        found = blockers(GPU, State.VFIO, State.HOST, card(group=None), Config())
        assert [blocker.sentence.partition(": ")[0] for blocker in found] == [
            "0000:01:00.0 has no IOMMU group",
            "0000:01:00.1 has no IOMMU group",
        ]

    @pytest.mark.parametrize(("processor", "named"), [("intel", "igfx_off"), ("arm", "SMMU"), ("amd", "no IOMMU")])
    def test_says_why_a_function_has_none(self, processor: str, named: str) -> None:
        host = facts(card(group=None).functions.values(), processor=processor)
        assert named in reasons(host)["no_iommu"].partition("has no IOMMU group: ")[2]

    @pytest.mark.parametrize("state", [State.HOST, State.VFIO], ids=str)
    def test_a_group_that_vfio_made_without_an_iommu_is_none(self, state: State) -> None:
        host = facts(card().functions.values(), groups_without_iommu=frozenset({1}), processor="arm")
        for named in ("IOMMU group 1 ", "enable_unsafe_noiommu_mode", "SMMU"):
            assert named in reasons(host, state=state)["no_iommu"]
        assert reasons(host, State.HOST, State.VFIO) == {}

    def test_needs_the_driver(self) -> None:
        host = facts(card().functions.values(), vfio_available=False)
        assert reasons(host) == {
            "no_vfio": "the driver vfio-pci is not available, its kernel module is not installed: install what has it "
            "for the running kernel, so that this works: modprobe vfio_pci"
        }

    def test_says_why_no_module_can_be_loaded(self) -> None:
        host = replace(facts(card().functions.values(), vfio_available=False), modules_on_disk=False)
        assert reasons(host)["no_vfio"].endswith("not on disk any more, as after an upgrade of it: restart the machine")

    def test_names_the_neighbour_its_driver_its_group_and_the_remedy(self) -> None:
        host = facts([*card().functions.values(), function("0000:02:00.0", ETHERNET, "r8169")])
        sentence = reasons(host)["neighbour"]
        for named in ("network card 0000:02:00.0", "IOMMU group 1", "r8169", "members"):
            assert named in sentence

    def test_does_not_mind_what_the_same_machine_gets(self) -> None:
        nic, disk = function("0000:02:00.0", ETHERNET, "r8169"), function("0000:03:00.0", NVME, "nvme")
        host = facts([*card().functions.values(), nic, disk])
        found = blockers(GPU, State.VFIO, State.HOST, host, Config(), along={nic.address})
        assert [blocker.kind for blocker in found] == ["neighbour"]
        assert "0000:03:00.0" in found[0].sentence
        assert blockers(GPU, State.VFIO, State.HOST, host, Config(), along={nic.address, disk.address}) == ()

    @pytest.mark.parametrize("on", [None, "vfio-pci", "mlx5_vfio_pci", "pci-stub"])
    def test_does_not_mind_a_harmless_neighbour(self, on: str | None) -> None:
        assert reasons(facts([*card().functions.values(), function("0000:02:00.0", ETHERNET, on)])) == {}

    def test_does_not_mind_a_bridge(self) -> None:
        bridge = function(str(PORT), BRIDGE, "pcieport", parent=None)
        assert reasons(facts([*card().functions.values(), bridge])) == {}

    def test_a_bridge_whose_driver_does_dma_is_in_the_way(self) -> None:
        """For the kernel, that is; of the drivers of bridges, pcieport alone has `driver_managed_dma`."""
        bridge = function(str(PORT), BRIDGE, "shpchp", parent=None)
        assert reasons(facts([*card().functions.values(), bridge])) == {
            "neighbour": f"the bridge {PORT} is in IOMMU group 1 too and stays on shpchp: unbind it: "
            f"echo {PORT} > /sys/bus/pci/drivers/shpchp/unbind"
        }

    def test_an_nvswitch_is_named_and_may_move_along(self) -> None:
        host = facts([*card().functions.values(), function("0000:02:00.0", NVSWITCH, "nvidia-nvswitch")])
        assert reasons(host) == {
            "neighbour": "the NVSwitch 0000:02:00.0 is in IOMMU group 1 too and stays on nvidia-nvswitch: unbind it: "
            "echo 0000:02:00.0 > /sys/bus/pci/drivers/nvidia-nvswitch/unbind; or move both: add to "
            "/etc/gpuswitch/config.toml, by gpuswitchctl config edit: "
            '`[[gpu]]`, `address = "0000:01:00.0"`, `members = ["0000:02:00.0"]`'
        }
        both = Gpu(GPU.address, (*GPU.functions, at("0000:02:00.0")))
        assert reasons(host, gpu=both) == {}

    def test_a_host_bridge_is_in_the_way_with_a_driver_alone_and_never_moves(self) -> None:
        idle, busy = (function("0000:00:00.0", HOST_BRIDGE, on, parent=None) for on in (None, "ie31200_edac"))
        assert reasons(facts([*card().functions.values(), idle])) == {}
        assert reasons(facts([*card().functions.values(), busy])) == {
            "neighbour": "the bridge 0000:00:00.0 is in IOMMU group 1 too and stays on ie31200_edac: unbind it: "
            "echo 0000:00:00.0 > /sys/bus/pci/drivers/ie31200_edac/unbind"
        }
        both = Gpu(GPU.address, (*GPU.functions, at("0000:00:00.0")))
        assert "is a bridge" in reasons(facts([*card().functions.values(), busy]), gpu=both)["member"]

    def test_a_neighbour_that_cannot_move_along_is_not_said_to(self) -> None:
        virtual = function("0000:02:00.1", ETHERNET, "iavf", physical_function="0000:02:00.0")
        assert "members" not in reasons(facts([*card().functions.values(), virtual]))["neighbour"]

    def test_refuses_a_group_with_memory_that_the_firmware_claims(self) -> None:
        host = facts(card().functions.values(), direct_regions={1: ("0xbdf6e000-0xbdf6efff",)})
        sentence = reasons(host)["reserved_region"]
        for named in ("IOMMU group 1 ", "0xbdf6e000-0xbdf6efff", "RMRR", "another slot"):
            assert named in sentence
        assert reasons(facts(card().functions.values(), direct_regions={2: ("0x1000-0x1fff",)})) == {}
        assert reasons(host, State.HOST, State.VFIO) == {}

    @pytest.mark.parametrize(
        ("processor", "called"), [("intel", "RMRR"), ("amd", "IVMD"), ("arm", "RMR"), ("", "RMRR")]
    )
    def test_such_memory_is_called_as_the_machine_calls_it(self, processor: str, called: str) -> None:
        host = facts(card().functions.values(), direct_regions={1: ("0x1000-0x1fff",)}, processor=processor)
        assert f"0x1fff, {called})" in reasons(host)["reserved_region"]

    def test_leaves_the_screen_on_unless_told(self) -> None:
        host = card(boot_display=True)
        assert "allow_boot_display" in reasons(host)["boot_display"]
        assert blockers(GPU, State.VFIO, State.HOST, host, configured(allow_boot_display=True)) == ()

    def test_does_not_take_what_is_shared_out(self) -> None:
        host = facts(
            [
                function("0000:01:00.0", VGA, virtual_functions=3),
                function("0000:01:00.1", AUDIO, mediated_devices=2),
            ]
        )
        assert reasons(host)["virtual_functions"].startswith("0000:01:00.0 has 3 virtual functions")
        assert reasons(host)["mediated_devices"].startswith("0000:01:00.1 has 2 mediated devices")
        host = facts([function("0000:01:00.0", VGA, virtual_functions=1), function("0000:01:00.1", AUDIO)])
        assert "has 1 virtual function:" in reasons(host)["virtual_functions"]

    def test_a_look_at_some_functions_does_not_count_mediated_devices(self) -> None:
        """What was counted before is so still."""
        whole = facts([function("0000:01:00.0", VGA, "nvidia"), function("0000:01:00.1", AUDIO, mediated_devices=2)])
        partial = facts([function("0000:01:00.1", AUDIO, "vfio-pci")])
        again = whole.renewed(partial, [at("0000:01:00.1")]).functions[at("0000:01:00.1")]
        assert (again.mediated_devices, again.driver_name) == (2, "vfio-pci")

    def test_never_moves_a_virtual_function_or_a_bridge(self) -> None:
        gpu = Gpu(GPU.address, (*GPU.functions, at("0000:01:00.4"), PORT))
        host = facts(
            [
                *card().functions.values(),
                function("0000:01:00.4", VGA, physical_function="0000:01:00.0"),
                function(str(PORT), BRIDGE, "pcieport", parent=None),
            ]
        )
        config = configured("0000:01:00.4", str(PORT))
        sentences = [blocker.sentence for blocker in blockers(gpu, State.VFIO, State.HOST, host, config)]
        where = (
            "in the [[gpu]] table of 0000:01:00.0 in /etc/gpuswitch/config.toml, then run: systemctl reload gpuswitchd"
        )
        assert sentences == [
            (
                "0000:01:00.4 is a virtual function of 0000:01:00.0, and cannot be a member of a GPU: "
                f'set `members = ["{PORT}"]` {where}'
            ),
            f'{PORT} is a bridge, and cannot be a member of a GPU: set `members = ["0000:01:00.4"]` {where}',
        ]

    def test_names_all_blockers_at_once(self) -> None:
        gpu = Gpu(GPU.address, (*GPU.functions, at("0000:01:00.2")))
        host = facts(
            [
                function("0000:01:00.0", VGA, "nvidia", boot_display=True, virtual_functions=1),
                function("0000:01:00.1", AUDIO, group=None, mediated_devices=1),
                function("0000:02:00.0", ETHERNET, "r8169"),
                function("0000:03:00.0", NVME, "nvme"),
            ],
            vfio_available=False,
        )
        found = blockers(gpu, State.VFIO, State.WEDGED, host, Config())
        assert [blocker.kind for blocker in found] == [
            "wedged",
            "missing_function",
            "no_iommu",
            "no_vfio",
            "neighbour",
            "neighbour",
            "virtual_functions",
            "mediated_devices",
            "boot_display",
        ]
        error = refusal(found)
        assert isinstance(error, Wedged)
        assert str(error).split("\n") == [blocker.sentence for blocker in found]


class TestOnVfioAlready:
    """It stays where it is; what is asked is whether a machine can have it."""

    def test_its_groups_must_be_viable(self) -> None:
        on_vfio = [function("0000:01:00.0", VGA, "vfio-pci"), function("0000:01:00.1", AUDIO, "vfio-pci")]
        nic = function("0000:02:00.0", ETHERNET, "r8169")
        assert reasons(facts(on_vfio), state=State.VFIO) == {}
        assert list(reasons(facts([*on_vfio, nic]), state=State.VFIO)) == ["neighbour"]

    def test_nothing_else_is_asked_of_what_works(self) -> None:
        booted = function("0000:01:00.0", VGA, "vfio-pci", boot_display=True, virtual_functions=1)
        host = facts([booted, function("0000:01:00.1", AUDIO, "vfio-pci")], vfio_available=False)
        assert reasons(replace(host, vfio_nodes=frozenset()), state=State.VFIO) == {}


class TestToHost:
    def test_asks_for_nothing_that_only_vfio_needs(self) -> None:
        host = facts(
            [
                function("0000:01:00.0", VGA, "vfio-pci", boot_display=True, virtual_functions=1, group=None),
                function("0000:01:00.1", AUDIO, "vfio-pci", group=None),
                function("0000:02:00.0", ETHERNET, "r8169"),
            ],
            iommu=False,
            vfio_available=False,
        )
        assert reasons(host, State.HOST, State.VFIO) == {}


@pytest.mark.parametrize(
    ("kinds", "named"),
    [
        ((NotViable, Wedged), Wedged),
        ((NotViable, InProgress), InProgress),
        ((Busy, Owned, NotViable), Owned),
        ((NotViable, Busy), Busy),
        ((NotViable,), NotViable),
        ((Busy, Owned, InProgress, Wedged), Wedged),
    ],
)
def test_the_gravest_blocker_names_the_error(
    kinds: tuple[type[GpuswitchError], ...], named: type[GpuswitchError]
) -> None:
    error = refusal([Blocker("a_reason", Sentence("sentence {n}", n=n), kind) for n, kind in enumerate(kinds)])
    assert type(error) is named
    assert str(error) == "\n".join(f"sentence {n}" for n in range(len(kinds)))
