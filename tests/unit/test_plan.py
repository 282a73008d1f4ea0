"""The plan: which steps, in which order, for which GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gpuswitch.host.port import Captured
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import Driver, HostFacts, PciFunction
from gpuswitch.model.gpu import Gpu
from gpuswitch.model.states import State
from gpuswitch.switch.planning.plan import Plan, to_host, to_vfio
from gpuswitch.switch.restore_state import NOTHING_TO_RESTORE, RestoreState
from tests.harness.facts import AUDIO, MODULES, UCSI, VGA, at, captured, driver, facts, function, geforce

HOME = ("nvidia", "snd_hda_intel", "xhci_hcd", "nvidia-gpu")
AWAY = ("vfio-pci",) * 4


def gpu_of(host: HostFacts) -> Gpu:
    return Gpu(min(host.functions), tuple(sorted(host.functions)))


def home_of(host: HostFacts, drivers: Sequence[str | None], override: str | None = None) -> dict[PciAddress, Captured]:
    """The baseline of every function, in address order."""
    return {a: Captured(driver(name), override, "auto") for a, name in zip(host.functions, drivers, strict=True)}


def titles(plan: Plan) -> list[str]:
    """The steps as people read them, in short."""
    told = [step.title.replace("0000:01:00", "gpu").replace("driver override", "override") for step in plan.steps]
    # The machine is kept from sleeping all the while, whatever the way.
    told.remove("keep the machine from sleeping")
    return told


def away(functions: Sequence[PciFunction], registered: Mapping[str, str | None] = MODULES) -> Plan:
    host = facts(functions, registered=registered)
    return to_vfio(gpu_of(host), host, captured(host), NOTHING_TO_RESTORE)


def back(functions: Sequence[PciFunction], drivers: Sequence[str | None]) -> Plan:
    host = facts(functions, registered=dict.fromkeys(("vfio-pci", "nvidia", "nouveau", "snd_hda_intel")))
    return to_host(gpu_of(host), host, captured(host, "vfio-pci"), RestoreState(home_of(host, drivers)))


class TestToVfio:
    def test_single_function(self) -> None:
        assert titles(away(geforce("nvidia"))) == [
            "load vfio-pci",
            "keep gpu.0 awake",
            "aim the override of gpu.0 at vfio-pci",
            "unbind gpu.0 from nvidia",
            "bind gpu.0 to vfio-pci",
            "check IOMMU group 1",
        ]

    def test_two_functions_companion_first(self) -> None:
        assert titles(away(geforce("nvidia", "snd_hda_intel"))) == [
            "load vfio-pci",
            "keep both functions awake",
            "aim the override of both functions at vfio-pci",
            "unbind gpu.1 from snd_hda_intel",
            "unbind gpu.0 from nvidia",
            "bind gpu.1 to vfio-pci",
            "bind gpu.0 to vfio-pci",
            "check IOMMU group 1",
        ]

    def test_four_functions_in_two_groups(self) -> None:
        card = [*geforce(*HOME[:3]), function("0000:01:00.3", UCSI, HOME[3], group=2)]
        assert titles(away(card))[3:] == [
            "unbind gpu.1 from snd_hda_intel",
            "unbind gpu.2 from xhci_hcd",
            "unbind gpu.3 from nvidia-gpu",
            "unbind gpu.0 from nvidia",
            "bind gpu.1 to vfio-pci",
            "bind gpu.2 to vfio-pci",
            "bind gpu.3 to vfio-pci",
            "bind gpu.0 to vfio-pci",
            "check IOMMU group 1",
            "check IOMMU group 2",
        ]

    def test_a_driverless_companion_is_only_bound(self) -> None:
        assert titles(away(geforce("nvidia", None)))[3:7] == [
            "unbind gpu.0 from nvidia",
            "bind gpu.1 to vfio-pci",
            "bind gpu.0 to vfio-pci",
            "check IOMMU group 1",
        ]

    def test_half_moved_only_the_rest_moves(self) -> None:
        plan = away(geforce("nvidia", "vfio-pci", None))
        assert titles(plan)[3:6] == ["unbind gpu.0 from nvidia", "bind gpu.2 to vfio-pci", "bind gpu.0 to vfio-pci"]
        assert sorted(plan.restore_state.functions) == [at("0000:01:00.0"), at("0000:01:00.2")]

    def test_a_driver_that_is_there_is_not_loaded(self) -> None:
        assert titles(away(geforce("nvidia"), registered={"vfio-pci": None}))[0] == "keep gpu.0 awake"

    def test_owes_what_the_functions_had(self) -> None:
        host = facts(geforce("nvidia", None))
        plan = to_vfio(gpu_of(host), host, captured(host, "mine", "on"), NOTHING_TO_RESTORE)
        assert plan.restore_state.functions == {
            at("0000:01:00.0"): Captured(Driver("nvidia", "nvidia"), "mine", "on"),
            at("0000:01:00.1"): Captured(None, "mine", "on"),
        }

    def test_owes_what_an_earlier_switch_owes_still(self) -> None:
        host = facts(geforce("nvidia", "snd_hda_intel"))
        first = {at("0000:01:00.0"): Captured(Driver("nouveau", "nouveau"), None, "on")}
        plan = to_vfio(gpu_of(host), host, captured(host, "vfio-pci"), RestoreState(first))
        assert plan.restore_state.functions[at("0000:01:00.0")] == first[at("0000:01:00.0")]
        assert plan.restore_state.functions[at("0000:01:00.1")].override == "vfio-pci"


class TestToHost:
    def test_two_functions_display_first(self) -> None:
        assert titles(back(geforce("vfio-pci", "vfio-pci"), ["nvidia", "snd_hda_intel"])) == [
            "hold IOMMU group 1",
            "keep both functions awake",
            "check the registers of both functions",
            "aim the override of both functions at nvidia, snd_hda_intel",
            "see that nobody has it open",
            "unbind gpu.0 from vfio-pci",
            "unbind gpu.1 from vfio-pci",
            "release IOMMU group 1",
            "bind gpu.0 to nvidia",
            "bind gpu.1 to snd_hda_intel",
            "wait for the device nodes of gpu.0",
            "clear the override of both functions",
            "restore the power setting of both functions",
        ]

    def test_four_functions_load_what_is_missing(self) -> None:
        assert titles(back(geforce(*AWAY), [*HOME[:3], "i915"])) == [
            "hold IOMMU group 1",
            "keep all 4 functions awake",
            "check the registers of all 4 functions",
            "aim the override of all 4 functions at i915, nvidia, snd_hda_intel, xhci_hcd",
            "see that nobody has it open",
            "unbind gpu.0 from vfio-pci",
            "unbind gpu.3 from vfio-pci",
            "unbind gpu.2 from vfio-pci",
            "unbind gpu.1 from vfio-pci",
            "release IOMMU group 1",
            # xhci_hcd has no module: it is built in
            "load i915",
            "bind gpu.0 to nvidia",
            "bind gpu.3 to i915",
            "bind gpu.2 to xhci_hcd",
            "bind gpu.1 to snd_hda_intel",
            "wait for the device nodes of gpu.0",
            "clear the override of all 4 functions",
            "restore the power setting of all 4 functions",
        ]

    def test_what_had_no_driver_gets_none(self) -> None:
        assert titles(back(geforce("vfio-pci", "vfio-pci"), ["nvidia", None]))[3:9] == [
            "aim the override of both functions at nvidia",
            "see that nobody has it open",
            "unbind gpu.0 from vfio-pci",
            "unbind gpu.1 from vfio-pci",
            "release IOMMU group 1",
            "bind gpu.0 to nvidia",
        ]

    def test_half_moved_only_the_rest_moves(self) -> None:
        assert titles(back(geforce(None, "snd_hda_intel"), ["nvidia", "snd_hda_intel"])) == [
            "keep both functions awake",
            "check the registers of gpu.0",
            "aim the override of both functions at nvidia, snd_hda_intel",
            "bind gpu.0 to nvidia",
            "wait for the device nodes of gpu.0",
            "clear the override of both functions",
            "restore the power setting of both functions",
        ]

    def test_all_groups_are_held_before_and_released_after_the_unbinds(self) -> None:
        card = [
            function("0000:01:00.0", VGA, "vfio-pci", group=7),
            function("0000:01:00.1", AUDIO, "vfio-pci", group=3),
        ]
        steps = titles(back(card, ["nvidia", "snd_hda_intel"]))
        assert steps[:2] == ["hold IOMMU group 3", "hold IOMMU group 7"]
        assert steps[8:10] == ["release IOMMU group 3", "release IOMMU group 7"]

    def test_an_override_of_the_owner_comes_back(self) -> None:
        host = facts(geforce("vfio-pci"))
        plan = to_host(
            gpu_of(host), host, captured(host, "vfio-pci"), RestoreState(home_of(host, ["nvidia"], "nvidia"))
        )
        assert titles(plan)[-2] == "aim the override of gpu.0 at nvidia"

    def test_a_function_that_has_another_host_driver_by_now_is_home(self) -> None:
        plan = back(geforce("nouveau", "vfio-pci"), ["nvidia", "snd_hda_intel"])
        assert [title for title in titles(plan) if "gpu.0" in title] == ["wait for the device nodes of gpu.0"]
        assert "aim the override of both functions at nouveau, snd_hda_intel" in titles(plan)
        assert plan.restore_state.functions[at("0000:01:00.0")].driver == Driver("nouveau", "nouveau")
        assert plan.restore_state.functions[at("0000:01:00.0")].power_control == "auto"


def test_a_plan_says_whose_it_is() -> None:
    host = facts(geforce("nvidia"))
    assert (away(geforce("nvidia")).gpu, away(geforce("nvidia")).target) == (gpu_of(host), State.VFIO)
    assert back(geforce("vfio-pci"), ["nvidia"]).target is State.HOST
