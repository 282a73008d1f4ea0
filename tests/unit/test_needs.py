"""What a switch needs of the host around a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from gpuswitch.config.settings import Config
from gpuswitch.model.facts import Consoles, Driver, HostFacts, Module, PciFunction
from gpuswitch.model.gpu import Gpu
from gpuswitch.model.holders import Holder, HolderQuery, Process, Unit
from gpuswitch.model.policy import Busy, ModulePolicy
from gpuswitch.switch.holder_policy import Leaving
from gpuswitch.switch.planning.requirements import (
    BoundDriver,
    DetachRequirements,
    announcements,
    back_at_once,
    bound_drivers,
    cannot_let_go,
    cannot_unload,
    everything,
    moves_in_turns,
    no_way_home,
    query,
    refuse_holders,
    units_to_stop,
)
from gpuswitch.switch.steps.consoles import consoles_to_move, shown_by_other_gpus, unbound_with
from tests.harness.facts import VGA, at, facts, function, geforce

GPU = Gpu(at("0000:01:00.0"), tuple(at(f"0000:01:00.{n}") for n in range(4)))
DISPLAY, SOUND, USB, UCSI = GPU.functions
OTHER = at("0000:02:00.0")
HOME = ("nvidia", "snd_hda_intel", "xhci_hcd", "nvidia-gpu")
CHAIN = {
    "nvidia": Module(4, ("nvidia_modeset", "nvidia_uvm"), "580.95.05"),
    "nvidia_modeset": Module(1, ("nvidia_drm",), "580.95.05"),
    "nvidia_drm": Module(0, (), "580.95.05", modeset=True),
    "nvidia_uvm": Module(0),
    "snd_hda_intel": Module(1),
    "i2c_nvidia_gpu": Module(0),
}
SIBLING = function("0000:02:00.0", VGA, "nvidia", group=2)
AUTO, ALWAYS, NEVER = ModulePolicy.AUTO, ModulePolicy.ALWAYS, ModulePolicy.NEVER
TOO_OLD = (
    "nvidia 580.95.05 cannot let go of 0000:01:00.0 alone while nvidia_drm has modeset on, and it cannot be unloaded, "
    "since {}: install nvidia 580.105 or later"
)
PERSISTENCED, POWERD = Unit("nvidia-persistenced.service"), Unit("nvidia-powerd.service")


def host(*more: PciFunction, on: tuple[str | None, ...] = HOME, modules: Mapping[str, Module] = CHAIN) -> HostFacts:
    return replace(facts([*geforce(*on), *more]), modules=modules)


def with_version(version: str) -> dict[str, Module]:
    return CHAIN | {"nvidia": replace(CHAIN["nvidia"], version=version)}


def found(*more: PciFunction, on: tuple[str | None, ...] = HOME, policy: ModulePolicy = AUTO) -> dict[str, BoundDriver]:
    return {o.profile.driver: o for o in bound_drivers(GPU, host(*more, on=on), policy)}


@pytest.mark.parametrize(("on_disk", "policy", "refused"), [(False, AUTO, 1), (False, NEVER, 0), (True, AUTO, 0)])
def test_what_could_not_be_loaded_again_is_not_unloaded(*, on_disk: bool, policy: ModulePolicy, refused: int) -> None:
    seen = replace(host(), modules_on_disk=on_disk)
    blockers = list(no_way_home(seen, bound_drivers(GPU, seen, policy)))
    assert len(blockers) == refused
    for blocker in blockers:
        assert blocker.kind == "no_modules"
        assert blocker.sentence == (
            "nvidia, nvidia_uvm, nvidia_modeset, nvidia_drm would have to be unloaded and could not be loaded again, "
            "since the modules of the running kernel are not on disk any more, as after an upgrade of it: "
            "restart the machine first"
        )


@pytest.mark.parametrize(
    ("policy", "others", "refused"), [(AUTO, (), True), (NEVER, (), False), (AUTO, (SIBLING,), False)]
)
def test_a_kernel_that_unloads_no_modules_is_not_asked_to(
    *, policy: ModulePolicy, others: tuple[PciFunction, ...], refused: bool
) -> None:
    stays = {name: replace(module, references=None) for name, module in CHAIN.items()}
    seen = host(*others, modules=stays)
    blockers = list(cannot_unload(GPU, seen, Config(), bound_drivers(GPU, seen, policy)))
    assert [blocker.kind for blocker in blockers] == ["no_unload"] * refused
    for blocker in blockers:
        assert blocker.sentence.startswith(
            "nvidia would have to be unloaded, and this kernel unloads no modules (CONFIG_MODULE_UNLOAD is not set)"
        )
        assert '`module_policy = "never"`' in blocker.sentence


def test_a_kernel_that_has_the_driver_built_in_unloads_nothing() -> None:
    built_in = {name: replace(module, references=None, built_in=True) for name, module in CHAIN.items()}
    seen = host(modules=built_in)
    assert list(cannot_unload(GPU, seen, Config(), bound_drivers(GPU, seen, AUTO))) == []


class TestBoundDrivers:
    def test_one_for_each_driver_the_displays_last(self) -> None:
        assert list(found()) == ["snd_hda_intel", "xhci_hcd", "nvidia-gpu", "nvidia"]
        assert [o.functions for o in found().values()] == [(SOUND,), (USB,), (UCSI,), (DISPLAY,)]

    def test_nobody_occupies_what_has_no_driver_or_is_on_vfio(self) -> None:
        assert list(found(on=(None, "vfio-pci", "xhci_hcd", None))) == ["xhci_hcd"]

    def test_two_functions_of_one_driver_are_one(self) -> None:
        gpu = Gpu(DISPLAY, (*GPU.functions, SIBLING.address))
        (nvidia,) = (o for o in bound_drivers(gpu, host(SIBLING), AUTO) if o.profile.driver == "nvidia")
        assert (nvidia.functions, nvidia.last) == ((DISPLAY, SIBLING.address), True)

    def test_the_last_is_who_leaves_none_behind(self) -> None:
        assert found()["nvidia"].last
        assert not found(SIBLING)["nvidia"].last
        assert found(replace(SIBLING, driver=None))["nvidia"].last
        assert found(replace(SIBLING, driver=Driver("nouveau", "nouveau")))["nvidia"].last

    @pytest.mark.parametrize("last", [True, False])
    def test_nor_is_one_the_last_while_another_driver_of_its_module_has_something(self, last: bool) -> None:
        """What is unloaded is the module, and nvidia's brings two drivers: the other one has the NVSwitches."""
        switch = function("0000:02:00.0", 0x068000, group=2)
        switch = replace(switch, driver=Driver("nvidia-nvswitch", "nvidia" if not last else "nvidia_nvswitch"))
        nvidia = found(switch)["nvidia"]
        assert (nvidia.last, nvidia.unload) == (last, last)
        stuck = replace(host(), pci_drivers={"nvidia-nvswitch": str(switch.driver and switch.driver.module)})
        (*_, nvidia) = bound_drivers(GPU, stuck, AUTO, frozenset({"nvidia-nvswitch"}))
        assert (nvidia.last, nvidia.unload) == (last, last)

    def test_nobody_is_the_last_of_a_driver_that_the_kernel_is_stuck_in(self) -> None:
        """A device that is being unbound shows no driver any more."""
        (*_, nvidia) = bound_drivers(GPU, host(replace(SIBLING, driver=None)), AUTO, frozenset({"nvidia"}))
        assert (nvidia.last, nvidia.unload) == (False, False)

    def test_what_is_loaded_of_the_chain_in_the_order_to_unload_it(self) -> None:
        assert found()["nvidia"].loaded == ("nvidia_drm", "nvidia_modeset", "nvidia_uvm", "nvidia")

    def test_what_is_built_in_cannot_be_unloaded(self) -> None:
        built_in = CHAIN | {"nvidia_uvm": Module()}
        (*_, nvidia) = bound_drivers(GPU, host(modules=built_in), AUTO)
        assert nvidia.loaded == ("nvidia_drm", "nvidia_modeset", "nvidia")

    @pytest.mark.parametrize(
        ("policy", "last", "unloaded"),
        [
            (AUTO, True, {"nvidia"}),
            (AUTO, False, set()),
            # of the card's own drivers, those of companions may serve others at any moment
            (ALWAYS, True, {"nvidia"}),
            (ALWAYS, False, set()),
            (NEVER, True, set()),
            (NEVER, False, set()),
        ],
    )
    def test_what_is_unloaded(self, policy: ModulePolicy, last: bool, unloaded: set[str]) -> None:
        occupied = found(*([] if last else [SIBLING]), policy=policy)
        assert {name for name, o in occupied.items() if o.unload} == unloaded

    @pytest.mark.parametrize(("policy", "unload"), [(AUTO, False), (ALWAYS, True), (NEVER, False)])
    def test_other_drivers_are_unloaded_on_request_only(self, policy: ModulePolicy, unload: bool) -> None:
        radeon = facts(geforce("amdgpu"))
        (amdgpu,) = bound_drivers(GPU, replace(radeon, modules={"amdgpu": Module(0)}), policy)
        assert amdgpu.unload is unload

    def test_a_driver_that_is_built_in_is_never_unloaded(self) -> None:
        built_in = replace(geforce("nvidia")[0], driver=Driver("nvidia", None))
        (nvidia,) = bound_drivers(GPU, facts([built_in]), ALWAYS)
        assert (nvidia.unload, nvidia.loaded) == (False, ())


@pytest.mark.parametrize(
    ("driver", "policy", "turns"),
    [
        ("nvidia", AUTO, True),
        ("amdgpu", AUTO, False),
        ("amdgpu", ALWAYS, True),
        ("amdgpu", NEVER, False),
        # another one of nvidia's may be allowed to unload
        ("nvidia", NEVER, True),
    ],
)
def test_who_moves_one_at_a_time(driver: str, policy: ModulePolicy, turns: bool) -> None:
    assert moves_in_turns(driver, policy) is turns


class TestCannotLetGo:
    @pytest.mark.parametrize(
        ("version", "policy", "last", "sentences"),
        [
            ("580.95.05", AUTO, True, []),
            ("580.105.08", AUTO, False, []),
            ("590.44.01", NEVER, True, []),
            (
                "580.95.05",
                AUTO,
                False,
                [TOO_OLD.format("other GPUs stay on it")],
            ),
            (
                "580.95.05",
                NEVER,
                True,
                [
                    TOO_OLD.format("module_policy is never")
                    + "; or: add to /etc/gpuswitch/config.toml, by gpuswitchctl config edit: "
                    '`[[gpu]]`, `address = "0000:01:00.0"`, `module_policy = "auto"`'
                ],
            ),
        ],
    )
    def test_old_versions_while_modeset_is_on(
        self, version: str, policy: ModulePolicy, last: bool, sentences: list[str]
    ) -> None:
        seen = host(*([] if last else [SIBLING]), modules=with_version(version))
        blocked = list(cannot_let_go(GPU, seen, Config(), bound_drivers(GPU, seen, policy)))
        assert [blocker.sentence for blocker in blocked] == sentences

    @pytest.mark.parametrize("drm", [replace(CHAIN["nvidia_drm"], modeset=False), None])
    def test_old_versions_without_modeset_can(self, drm: Module | None) -> None:
        modules = {name: module for name, module in CHAIN.items() if name != "nvidia_drm"}
        seen = host(SIBLING, modules=modules | ({"nvidia_drm": drm} if drm else {}))
        assert list(cannot_let_go(GPU, seen, Config(), bound_drivers(GPU, seen, AUTO))) == []


class TestHolderQuery:
    def test_shared_nodes_only_where_nobody_else_uses_them(self) -> None:
        last, not_last = (query(GPU, host(), found(*more).values()) for more in ((), (SIBLING,)))
        assert last.functions == not_last.functions == GPU.functions
        assert "nvidiactl" in last.nodes
        assert not_last.nodes == ()

    def test_unexplained_references_of_drivers_that_wait(self) -> None:
        """But where others stay on nvidia, their programs are not looked for, and would be unexplained all."""
        assert set(query(GPU, host(), found().values()).modules) == {
            "snd_hda_intel",
            *("nvidia_drm", "nvidia_modeset", "nvidia_uvm", "nvidia"),
        }
        assert query(GPU, host(), found(SIBLING).values()).modules == ("snd_hda_intel",)

    def test_an_nvswitch_does_not_wait_for_who_uses_other_gpus(self) -> None:
        """Their programs have nodes open that are nvidia's own, and are not looked for."""
        switch = replace(function("0000:03:00.0", 0x068000, group=3), driver=Driver("nvidia-nvswitch", "nvidia"))
        gpu = Gpu(DISPLAY, (*GPU.functions, switch.address))
        seen = host(switch, SIBLING)
        assert query(gpu, seen, bound_drivers(gpu, seen, AUTO)).modules == ("snd_hda_intel",)
        alone = host(switch)
        assert "nvidia-nvswitch*" in query(gpu, alone, bound_drivers(gpu, alone, AUTO)).nodes

    def test_everything_is_for_any_driver(self) -> None:
        assert "nvidiactl" in everything(GPU, host()).nodes
        assert "vfio/1" in everything(GPU, host()).nodes
        away = everything(GPU, host(on=("vfio-pci",) * 4))
        assert away == HolderQuery(GPU.functions, ("vfio/1",))


class TestUnits:
    def test_configured_ones_and_those_of_the_drivers(self) -> None:
        own, comfort = units_to_stop(found().values(), ["sddm.service", "sddm.service"])
        assert own == (Unit("sddm.service"),)
        assert comfort == (PERSISTENCED, POWERD)

    def test_one_that_is_configured_is_no_comfort(self) -> None:
        own, comfort = units_to_stop(found().values(), [PERSISTENCED.name])
        assert (own, comfort) == ((PERSISTENCED,), (POWERD,))
        assert units_to_stop(found(on=("nouveau",)).values(), []) == ((), ())

    def test_what_other_gpus_of_the_driver_use_comes_back_at_once(self) -> None:
        assert back_at_once(found().values()) == frozenset()
        assert back_at_once(found(SIBLING).values()) == {PERSISTENCED, POWERD}

    def test_the_others_come_back_with_the_gpu(self) -> None:
        requirements = DetachRequirements(active=(Unit("sddm.service"), PERSISTENCED), later=(Unit("sddm.service"),))
        assert requirements.at_once == (PERSISTENCED,)


def test_the_chain_is_told_in_the_order_to_load_it() -> None:
    occupied = tuple(found().values())
    chain = DetachRequirements(bound_drivers=occupied).chain
    assert chain.index("nvidia") < chain.index("nvidia_modeset") < chain.index("nvidia_drm")
    assert DetachRequirements(bound_drivers=occupied).unload == (found()["nvidia"],)


def holder(*nodes: str, command: str = "program", unit: Unit | None = None) -> Holder:
    return Holder(Process(1234, 5), command, 1000, "alice", unit, nodes=nodes)


class TestAnnouncements:
    NODES = holder("/dev/snd/controlC1", "/dev/dri/card0")

    @pytest.mark.parametrize(
        ("sound", "display", "cards"),
        [
            (True, False, [("sound", (SOUND,))]),
            (False, True, [("drm", (DISPLAY,))]),
            (True, True, [("sound", (SOUND,)), ("drm", (DISPLAY,))]),
            (False, False, []),
        ],
    )
    def test_of_what_may_be_announced(self, sound: bool, display: bool, cards: list[object]) -> None:
        assert list(announcements(GPU, host(), [self.NODES], sound=sound, display=display, coming=False)) == cards

    def test_only_of_what_somebody_has_open(self) -> None:
        assert list(announcements(GPU, host(), [holder("/dev/nvidia0")], sound=True, display=True, coming=False)) == []
        assert list(announcements(GPU, host(), [], sound=True, display=True, coming=False)) == []
        # A session that comes to the front gets its devices back, and PipeWire opens the card.
        assert [name for name, _ in announcements(GPU, host(), [], sound=True, display=False, coming=True)] == ["sound"]

    @pytest.mark.parametrize("on", [None, "vfio-pci"])
    def test_not_of_a_card_that_is_gone(self, on: str | None) -> None:
        gone = host(on=("nvidia", on, None, None))
        assert list(announcements(GPU, gone, [self.NODES], sound=True, display=False, coming=True)) == []


class TestConsoles:
    OWN = Consoles({0: None, 1: DISPLAY}, {1: 1, 2: 1, 3: 0}, {"vtcon1": True})

    @pytest.mark.parametrize(
        ("consoles", "unload", "moved"),
        [
            # shown on it, and another frame buffer is there
            (OWN, True, ((1, 2), 0, ())),
            (OWN, False, ((1, 2), 0, ())),
            # the lowest of several others
            (replace(OWN, frame_buffers={1: DISPLAY, 2: None, 3: None}), True, ((1, 2), 2, ())),
            # none is left: only an unload needs fbcon to let go
            (replace(OWN, frame_buffers={1: DISPLAY}), True, ((1, 2), None, ("vtcon1",))),
            (replace(OWN, frame_buffers={1: DISPLAY}), False, ((1, 2), None, ())),
            (replace(OWN, frame_buffers={1: DISPLAY}, bound={"vtcon1": False}), True, ((1, 2), None, ())),
            # it has a frame buffer that shows nothing
            (replace(OWN, mapped={1: 0}), True, ((), 0, ())),
            # it has none
            (replace(OWN, frame_buffers={0: None}), True, ((), None, ())),
            (Consoles(), True, ((), None, ())),
        ],
    )
    def test_where_they_go(self, consoles: Consoles, unload: bool, moved: object) -> None:
        assert consoles_to_move(GPU.functions, consoles, unload=unload) == moved

    @pytest.mark.parametrize(
        ("numbers", "boot_display", "terminals_of_others", "shown_by_others"),
        [
            # all are drawn on what comes as frame buffer 0, or on the booted display; not on any other
            ((0, 1), False, (), ((2, OTHER), (3, OTHER))),
            ((1, 0), True, (), ((2, OTHER), (3, OTHER))),
            ((1, 0), False, (), ()),
            # what is there on loan, its own GPU takes back by itself
            ((0, 1), False, (3,), ((2, OTHER),)),
            # it has no frame buffer that could come back
            ((9, 0), True, (), ()),
        ],
    )
    def test_what_others_show_beside_it(
        self,
        numbers: tuple[int, int],
        boot_display: bool,
        terminals_of_others: tuple[int, ...],
        shown_by_others: object,
    ) -> None:
        own, other = numbers
        buffers = {own: DISPLAY, other: OTHER, 5: None} if own != 9 else {other: OTHER, 5: None}
        consoles = Consoles(buffers, {1: own, 2: other, 3: other, 4: 5}, {"vtcon1": True})
        assert (
            shown_by_other_gpus(GPU.functions, consoles, terminals_of_others, boot_display=boot_display)
            == shown_by_others
        )

    @pytest.mark.parametrize(
        ("own", "boot_display", "console_map", "shown_by_others"),
        [
            (1, False, {1}, ((2, OTHER),)),
            (1, False, {0, 1}, ((2, OTHER),)),
            # nothing is drawn on frame buffer 0 then, nor on the booted display
            (0, False, {1}, ()),
            (1, True, {2}, ()),
        ],
    )
    def test_what_others_show_beside_it_with_a_map(
        self, own: int, boot_display: bool, console_map: set[int], shown_by_others: object
    ) -> None:
        consoles = Consoles({own: DISPLAY, 7: OTHER}, {1: own, 2: 7}, {"vtcon1": True})
        shown = shown_by_other_gpus(GPU.functions, consoles, (), boot_display=boot_display, console_map=console_map)
        assert shown == shown_by_others

    @pytest.mark.parametrize(
        ("consoles", "lost"),
        [
            # another frame buffer shows one of them, and takes over the others
            (OWN, ()),
            # the others show none
            (replace(OWN, mapped={1: 1, 2: 1, 3: 1}), ("vtcon1",)),
            # there is none, and the kernel brings the console back with the next
            (replace(OWN, frame_buffers={1: DISPLAY}, mapped={1: 1}), ()),
            # it shows none
            (replace(OWN, mapped={1: 0}), ()),
            (Consoles(), ()),
        ],
    )
    def test_which_go_along(self, consoles: Consoles, lost: object) -> None:
        assert unbound_with(GPU.functions, consoles) == lost


class TestRefuse:
    KERNEL = Holder(None, "nvidia", doubt="module nvidia has 2 users that no process explains")
    QEMU = holder("/dev/vfio/1", command="qemu-system-x86")
    LOGIND = holder("/dev/dri/card0", command="systemd-logind", unit=Unit("systemd-logind.service"))
    INIT = replace(holder("/dev/dri/card0", command="systemd"), process=Process(1, 0))
    GAME = holder("/dev/dri/renderD128", command="game")
    BUS = holder("/dev/dri/card0", command="dbus-daemon", unit=Unit("dbus.service"))
    ALL = (KERNEL, QEMU, LOGIND, INIT, BUS, GAME)

    @pytest.mark.parametrize(
        ("busy", "named"),
        [
            (
                Busy.REFUSE,
                ["by the kernel", "qemu-system-x86", "systemd-logind", "systemd (pid 1", "dbus-daemon", "game"],
            ),
            (Busy.WAIT, []),
            # logind, and init for it, let go when the session ends that they have it open for
            (Busy.TERMINATE, ["by the kernel", "qemu-system-x86", "dbus-daemon"]),
            (Busy.KILL, ["by the kernel", "qemu-system-x86", "dbus-daemon"]),
        ],
    )
    def test_by_policy_all_at_once(self, busy: Busy, named: list[str]) -> None:
        told = [blocker.sentence for blocker in refuse_holders(GPU, self.ALL, Leaving(), busy)]
        assert len(told) == len(named)
        assert all(word in sentence for word, sentence in zip(named, told, strict=True))

    @pytest.mark.parametrize("busy", Busy)
    def test_not_those_that_go_by_themselves(self, busy: Busy) -> None:
        ollama = holder("/dev/nvidia0", unit=Unit("ollama.service"))
        assert list(refuse_holders(GPU, [ollama], Leaving((Unit("ollama.service"),)), busy)) == []
