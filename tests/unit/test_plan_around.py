"""The plan of a host that has to be made ready first: what it does around the functions, and gives back."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gpuswitch.host.port import AttributeChange
from gpuswitch.model.attribute import FunctionAttribute
from gpuswitch.model.drivers import profile_of
from gpuswitch.model.facts import BootFramebuffer, Driver, HostFacts, Module
from gpuswitch.model.holders import HolderQuery, Unit
from gpuswitch.model.policy import Busy
from gpuswitch.switch.planning.plan import HomeOptions, Plan, restore_shared, to_host, to_vfio
from gpuswitch.switch.planning.requirements import BoundDriver, DetachRequirements
from gpuswitch.switch.restore_state import NOTHING_TO_RESTORE, RestoreState
from gpuswitch.switch.steps.attributes import RestoreAttribute
from gpuswitch.switch.steps.consoles import MoveConsoles, RestoreConsoles
from gpuswitch.switch.steps.holders import AwaitHolders, CheckHolders
from gpuswitch.switch.steps.host import StartUnits, StopUnits
from gpuswitch.switch.steps.pci import RestorePower, Unbind
from tests.harness.facts import at, captured, facts, geforce
from tests.unit.test_plan import gpu_of, home_of, titles

DISPLAY, SOUND = at("0000:01:00.0"), at("0000:01:00.1")
PERSISTENCED, SDDM = Unit("nvidia-persistenced.service"), Unit("sddm.service")
CHAIN = ("nvidia_drm", "nvidia_modeset", "nvidia")
NVIDIA = BoundDriver(profile_of(Driver("nvidia", "nvidia")), (DISPLAY,), loaded=CHAIN, unload=True)
HDA = BoundDriver(profile_of(Driver("snd_hda_intel", "snd_hda_intel")), (SOUND,), loaded=("snd_hda_intel",))
QUERY = HolderQuery((DISPLAY, SOUND), ("nvidiactl",))
WHOLE = DetachRequirements(
    query=QUERY,
    busy=Busy.TERMINATE,
    wait_seconds=7.0,
    grace_seconds=3.0,
    stop=(SDDM, PERSISTENCED),
    active=(PERSISTENCED,),
    later=(PERSISTENCED,),
    sessions=("c2",),
    announce=(("sound", (SOUND,)), ("drm", (DISPLAY,))),
    holding=True,
    bound_drivers=(HDA, NVIDIA),
    terminals=(1, 2),
    to=1,
    boot_framebuffers=(BootFramebuffer("efi-framebuffer.0", "efi-framebuffer", DISPLAY),),
    persistent=(DISPLAY,),
)
RESTORE_STATE = RestoreState(
    units=(PERSISTENCED,),
    modules=("snd_hda_intel", "nvidia", "nvidia_modeset", "nvidia_drm"),
    terminals=(1, 2),
    boot_framebuffers=(("efi-framebuffer.0", "efi-framebuffer"),),
    persistent=(DISPLAY,),
    announced=WHOLE.announce,
)


def away(requirements: DetachRequirements, restore_state: RestoreState = NOTHING_TO_RESTORE) -> Plan:
    host = facts(geforce("nvidia", "snd_hda_intel"))
    return to_vfio(gpu_of(host), host, captured(host), restore_state, requirements)


def host_away(*registered: str) -> HostFacts:
    host = facts(geforce("vfio-pci", "vfio-pci"), registered=dict.fromkeys(("vfio-pci", "snd_hda_intel", *registered)))
    return replace(host, modules={"snd_hda_intel": Module(1)})


def home(restore_state: RestoreState, back: HomeOptions = HomeOptions()) -> Plan:  # noqa: B008 -- frozen
    host = host_away()
    known = replace(restore_state, functions=home_of(host, ["nvidia", "snd_hda_intel"]))
    return to_host(gpu_of(host), host, captured(host, "vfio-pci"), known, back)


def test_the_whole_way_out() -> None:
    assert titles(away(WHOLE)) == [
        "load vfio-pci",
        "stop sddm.service, nvidia-persistenced.service",
        "end session c2",
        "announce that the sound card of gpu.1 goes",
        "announce that the display of gpu.0 goes",
        "end the programs that have it open",
        "unbind efi-framebuffer.0 from efi-framebuffer",
        "move the console to fb1",
        "turn persistence mode of gpu.0 off",
        "keep both functions awake",
        "aim the override of both functions at vfio-pci",
        "see that nobody has it open",
        "unbind gpu.1 from snd_hda_intel",
        "unload nvidia_drm, nvidia_modeset, nvidia",
        "bind gpu.1 to vfio-pci",
        "bind gpu.0 to vfio-pci",
        "check IOMMU group 1",
    ]


def test_it_owes_all_of_that() -> None:
    plan = away(WHOLE)
    host = facts(geforce("nvidia", "snd_hda_intel"))
    assert plan.restore_state == replace(RESTORE_STATE, functions=captured(host))
    assert plan.afterwards == plan.restore_state


def test_it_owes_no_terminal_that_another_gpu_is_owed() -> None:
    """They are moved on with its own, and come back to where they belong when that GPU does."""
    plan = away(replace(WHOLE, terminals_of_others=frozenset({2, 7})))
    assert plan.restore_state.terminals == (1,)
    assert "move the console to fb1" in titles(plan)


def test_a_console_that_was_unbound_for_another_gpu_comes_back_with_the_first_that_can_show_it() -> None:
    plan = home(replace(RESTORE_STATE, terminals=()), HomeOptions(vtconsoles=("vtcon1",)))
    assert [step.terminals for step in plan.steps if isinstance(step, RestoreConsoles)] == [()]


def test_a_gpu_that_could_show_a_console_looks_once_more_when_it_leaves() -> None:
    """Another one that leaves at the same time may have moved its terminals here."""
    plan = away(replace(WHOLE, terminals=(), shows=True))
    assert "see that no console is on it" in titles(plan)
    assert [step.unload for step in plan.steps if isinstance(step, MoveConsoles)] == [True]


def test_a_card_that_was_announced_as_gone_and_never_went_is_announced_again() -> None:
    """A service died before it had touched the card; whoever had let go of it takes it up again."""
    host = facts(geforce("nvidia", "snd_hda_intel"))
    plan = to_host(gpu_of(host), host, captured(host), replace(RESTORE_STATE, functions=captured(host)))
    assert "announce that the sound card of gpu.1 is there" in titles(plan)
    assert not [title for title in titles(home(RESTORE_STATE)) if title.startswith("announce")]


def test_of_the_units_it_stops_only_those_that_were_active_start_again() -> None:
    (stop,) = [step for step in away(WHOLE).steps if isinstance(step, StopUnits)]
    assert (stop.units, stop.active) == ((SDDM, PERSISTENCED), (PERSISTENCED,))


def test_what_other_gpus_use_starts_again_once_this_one_is_away_and_is_owed_until_then() -> None:
    plan = away(replace(WHOLE, later=()))
    assert titles(plan)[-1] == "start nvidia-persistenced.service"
    assert plan.restore_state.units == (PERSISTENCED,)
    assert plan.afterwards == replace(plan.restore_state, units=())


def test_where_nobody_has_it_open_nobody_is_waited_for_and_a_second_look_is_taken() -> None:
    plan = away(replace(WHOLE, holding=False))
    assert not [step for step in plan.steps if isinstance(step, AwaitHolders)]
    assert [step.query for step in plan.steps if isinstance(step, CheckHolders)] == [QUERY]


def test_how_long_holders_are_waited_for() -> None:
    (waiting,) = [step for step in away(WHOLE).steps if isinstance(step, AwaitHolders)]
    assert waiting == AwaitHolders(QUERY, Busy.TERMINATE, 7.0, 3.0, WHOLE.announce)
    assert waiting.deadline({"release": 5.0, "units": 100.0}) >= 5.0 + 7.0 + 100.0 + 2 * 3.0
    patient = replace(waiting, policy=Busy.WAIT)
    assert patient.deadline({"release": 5.0, "units": 100.0}) == 5.0 + 7.0


def test_where_no_other_screen_is_left_the_console_is_unbound() -> None:
    plan = away(replace(WHOLE, to=None, unbind_consoles=("vtcon1",)))
    assert "unbind vtcon1" in titles(plan)
    assert plan.restore_state.vtconsoles == ("vtcon1",)


def test_where_nothing_keeps_the_console_it_is_left_alone_and_comes_back() -> None:
    """The console leaves a device that is unbound by itself."""
    plan = away(replace(WHOLE, to=None, boot_framebuffers=()))
    assert not [title for title in titles(plan) if "console" in title or "vtcon" in title]
    assert plan.restore_state.terminals == (1, 2)


def test_a_driver_that_may_take_long_is_given_the_time() -> None:
    slow = BoundDriver(profile_of(Driver("nvidia-gpu", "i2c_nvidia_gpu")), (SOUND,))
    unbinds = [s for s in away(replace(WHOLE, bound_drivers=(slow, NVIDIA))).steps if isinstance(s, Unbind)]
    assert [(step.function, step.deadline({"unbind": 20.0})) for step in unbinds] == [(SOUND, 200.0)]
    unbinds = [step for step in away(DetachRequirements()).steps if isinstance(step, Unbind)]
    assert [step.deadline({"unbind": 20.0}) for step in unbinds] == [20.0, 20.0]


def test_an_earlier_switch_that_never_came_home_is_owed_first() -> None:
    earlier = RestoreState(units=(SDDM,), modules=("nouveau",), terminals=(6,), vtconsoles=("vtcon0",))
    restore_state = away(WHOLE, earlier).restore_state
    assert restore_state.units == (SDDM, PERSISTENCED)
    assert (restore_state.modules, restore_state.terminals, restore_state.vtconsoles) == (
        ("nouveau",),
        (6, 1, 2),
        ("vtcon0",),
    )


def test_the_whole_way_home() -> None:
    after = HomeOptions(Unit("getty@tty1.service"), boot_framebuffer=True)
    assert titles(home(RESTORE_STATE, after)) == [
        "hold IOMMU group 1",
        "keep both functions awake",
        "check the registers of both functions",
        "aim the override of both functions at nvidia, snd_hda_intel",
        "see that nobody has it open",
        "unbind gpu.0 from vfio-pci",
        "unbind gpu.1 from vfio-pci",
        "release IOMMU group 1",
        "load nvidia",
        "bind gpu.0 to nvidia",
        "bind gpu.1 to snd_hda_intel",
        "load nvidia_modeset, nvidia_drm",
        "wait for the device nodes of gpu.0",
        "clear the override of both functions",
        "restore the power setting of both functions",
        "bring the console back",
        "bind efi-framebuffer.0 to efi-framebuffer",
        "start nvidia-persistenced.service",
        "start getty@tty1.service",
    ]


def test_what_bridges_share_is_given_back_while_a_failure_still_takes_the_way_home_back() -> None:
    bridge, change = at("0000:00:01.0"), AttributeChange("1", "0")
    restore_state = replace(RESTORE_STATE, attributes={FunctionAttribute(bridge, "d3cold_allowed"): change})
    restored = RestoreAttribute(bridge, "d3cold_allowed", change)
    steps = home(restore_state).steps
    place = steps.index(restored)
    assert isinstance(steps[place + 1], RestorePower)
    assert not restored.optional
    assert restore_shared(restore_state) == [restored, StartUnits(restore_state.units)]
    assert away(WHOLE, restore_state).afterwards.attributes == restore_state.attributes
    assert home(restore_state, HomeOptions(units_later=True)).afterwards.attributes == {}


def test_persistence_mode_is_turned_on_where_no_daemon_does_so_when_it_starts() -> None:
    assert "turn persistence mode of gpu.0 on" in titles(home(replace(RESTORE_STATE, units=())))
    assert "turn persistence mode of gpu.0 on" not in titles(home(RESTORE_STATE))


def test_at_home_nothing_is_owed() -> None:
    assert home(RESTORE_STATE).afterwards == NOTHING_TO_RESTORE


@pytest.mark.parametrize(
    ("back", "without"),
    [
        (HomeOptions(), {"bind efi-framebuffer.0 to efi-framebuffer", "start getty@tty1.service"}),
        (
            HomeOptions(Unit("getty@tty1.service"), boot_framebuffer=True, units_later=True),
            {"start nvidia-persistenced.service", "start getty@tty1.service"},
        ),
    ],
)
def test_what_the_way_home_leaves_out(back: HomeOptions, without: set[str]) -> None:
    whole = titles(home(RESTORE_STATE, HomeOptions(Unit("getty@tty1.service"), boot_framebuffer=True)))
    assert titles(home(RESTORE_STATE, back)) == [title for title in whole if title not in without]


def test_units_that_must_wait_stay_owed() -> None:
    assert home(RESTORE_STATE, HomeOptions(units_later=True)).afterwards == RestoreState(units=(PERSISTENCED,))


def test_a_console_that_is_to_be_left_stays_unbound() -> None:
    restore_state = RestoreState(vtconsoles=("vtcon0", "vtcon1"))
    assert titles(home(restore_state, HomeOptions(leave_consoles=("vtcon1",))))[-1] == "bring the console back"
    assert "bring the console back" not in titles(home(restore_state, HomeOptions(leave_consoles=("vtcon0", "vtcon1"))))


def test_modules_of_a_driver_that_the_gpu_does_not_go_to_stay_out() -> None:
    host = replace(host_away("nouveau"), functions={f.address: f for f in geforce("nouveau", "vfio-pci")})
    known = replace(RESTORE_STATE, functions=home_of(host, ["nvidia", "snd_hda_intel"]))
    plan = to_host(gpu_of(host), host, captured(host, "vfio-pci"), known)
    assert not [title for title in titles(plan) if title.startswith("load ")]


def test_a_start_of_units_may_fail_and_a_stop_may_not() -> None:
    assert StartUnits((SDDM,)).optional
    assert not StopUnits((SDDM,), ()).optional
