"""`at_boot`: where GPUs are when the machine has started, once in each boot, and before anybody can ask."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest

from gpuswitch.config.kinds import checked_table
from gpuswitch.config.schema import Deadlines, Defaults
from gpuswitch.config.settings import Config, GpuConfig
from gpuswitch.fleet import at_boot
from gpuswitch.gpu.actor import Actor
from gpuswitch.host.simulated.catalogue import AMD, MODULES, VGA, Slot
from gpuswitch.host.simulated.faults import Call
from gpuswitch.host.simulated.faultspec import inject
from gpuswitch.host.simulated.host import SimulatedHost
from gpuswitch.host.simulated.scenarios import DISPLAY_MANAGER, PERSISTENCED, SCENARIOS, boot
from gpuswitch.log.fields import fields_of
from gpuswitch.model.address import PciAddress
from gpuswitch.model.policy import AtBoot, Busy
from gpuswitch.model.states import State
from gpuswitch.switch.journal.journal import Journal
from gpuswitch.switch.journal.store import DirectoryStore
from gpuswitch.switch.record import AT_BOOT, Result
from tests.harness.simulated.harness import GENTLE, Harness, Witness, snapshot
from tests.harness.simulation.machines import bare, pair

RADEON, INTEL = PciAddress.parse("0000:03:00.0"), PciAddress.parse("0000:00:02.0")
GEFORCE = PciAddress.parse("0000:01:00.0")


def wanted(gpu: PciAddress, where: AtBoot = AtBoot.VFIO, **rules: object) -> Config:
    """A configuration that wants this GPU there at boot."""
    own = checked_table(Defaults, {"allow_boot_display": True} | rules)
    return Config(gpus=(GpuConfig(gpu, managed=True, name="card", at_boot=where, rules=own),))


def reserved(**rules: object) -> Config:
    """The same for the GPU that vfio-pci has from the start in the scenario of that name."""
    config = wanted(GEFORCE, AtBoot.HOST, **rules)
    return replace(config, gpus=(replace(config.gpus[0], members=(PciAddress.parse("0000:02:00.0"),)),))


def actor_of(harness: Harness, gpu: PciAddress = RADEON) -> Actor:
    return harness.fleet.actors[gpu]


def note(directory: Path) -> dict[str, object]:
    content = json.loads((directory / "at_boot.json").read_text())
    del content["boot"]
    return dict(content)


async def test_it_is_on_vfio_before_anybody_can_ask_and_comes_home_after(tmp_path: Path) -> None:
    host = bare()
    home = snapshot(host.machine)
    harness = await Harness.start(host, tmp_path, wanted(RADEON), restore_deferred=False)
    actor = actor_of(harness)
    assert (actor.state, actor.reason, actor_of(harness, INTEL).state) == (State.VFIO, "", State.HOST)
    assert actor.switch is not None
    assert (actor.switch.requester, actor.switch.result) == (AT_BOOT, Result.DONE)
    assert note(tmp_path) == {"begun": [str(RADEON)], "over": True}
    await harness.fleet.restore_deferred()
    await harness.moved(actor, State.HOST)
    assert (actor.record.host_driver, snapshot(harness.machine)) == ("amdgpu", home)


async def test_a_service_that_starts_again_moves_nothing(tmp_path: Path) -> None:
    """What somebody has done since then stands."""
    harness = await Harness.start(bare(), tmp_path, wanted(RADEON))
    await harness.moved(actor_of(harness), State.HOST)
    harness = await harness.again()
    assert (actor_of(harness).state, actor_of(harness).reason, actor_of(harness).switch) == (State.HOST, "", None)


async def test_at_the_next_boot_it_is_moved_again(tmp_path: Path) -> None:
    (tmp_path / "at_boot.json").write_text(json.dumps({"boot": "another", "begun": [str(RADEON)], "over": True}))
    harness = await Harness.start(bare(), tmp_path, wanted(RADEON))
    assert actor_of(harness).state is State.VFIO


async def test_a_service_that_is_started_by_hand_moves_nothing(tmp_path: Path) -> None:
    host = bare()
    host.machine.units.booting = False
    harness = await Harness.start(host, tmp_path, wanted(RADEON))
    assert actor_of(harness).state is State.HOST
    assert actor_of(harness).reason == (
        "at_boot is vfio, and card (0000:03:00.0) stays on the host: the machine has started already"
    )
    assert actor_of(harness).record.missed_at_boot
    # Nor does the next one: this boot is over.
    harness.machine.units.booting = True
    harness = await harness.again()
    assert (actor_of(harness).state, actor_of(harness).reason) == (State.HOST, "")


async def test_where_nobody_tells_whether_it_is_a_boot_nothing_is_moved(tmp_path: Path) -> None:
    host = bare()
    host.machine.units.managed = False
    harness = await Harness.start(host, tmp_path, wanted(RADEON))
    assert actor_of(harness).state is State.HOST
    assert "nobody can tell whether the machine is starting: cannot ask for the state of" in actor_of(harness).reason


async def test_without_at_boot_nothing_is_asked_and_nothing_is_kept(tmp_path: Path) -> None:
    host = bare()
    inject(host, "booting=hang")
    harness = await Harness.start(host, tmp_path, wanted(RADEON, AtBoot.KEEP))
    assert (actor_of(harness).state, harness.pages) == (State.HOST, [])


async def test_a_gpu_that_vfio_had_from_the_start_is_brought_to_the_host(tmp_path: Path) -> None:
    host = SCENARIOS["reserved"]()
    harness = await Harness.start(host, tmp_path, reserved())
    assert (actor_of(harness, GEFORCE).state, actor_of(harness, GEFORCE).reason) == (State.HOST, "")
    assert actor_of(harness, GEFORCE).record.host_driver == "nvidia"


# Drivers that are still on their way


async def start_without_driver(directory: Path, config: Config) -> tuple[SimulatedHost, asyncio.Task[Harness]]:
    """The service starts before udev has loaded the driver of the card."""
    host = bare()
    await host.machine.unbind(RADEON, "amdgpu", Call("unbind", RADEON))
    return host, asyncio.create_task(Harness.start(host, directory, config))


async def test_its_host_driver_is_waited_for_since_it_is_the_way_home(tmp_path: Path) -> None:
    host, starting = await start_without_driver(tmp_path, wanted(RADEON))
    await asyncio.sleep(3)
    assert not starting.done()
    await host.machine.probe(RADEON, "", Call("probe", RADEON))
    harness = await starting
    assert (actor_of(harness).state, actor_of(harness).record.host_driver) == (State.VFIO, "amdgpu")
    await harness.moved(actor_of(harness), State.HOST)
    assert actor_of(harness).record.facts.functions[RADEON].driver_name == "amdgpu"
    # The witness took where it was at first for home.
    Witness.broken.clear()


async def test_what_udev_had_yet_to_load_on_top_of_it_comes_back_too(tmp_path: Path) -> None:
    """Without nvidia_drm there is no picture."""
    host = SCENARIOS["plain"]()
    await host.machine.modules.unload("nvidia_drm", Call("unload", "nvidia_drm"))
    harness = await Harness.start(host, tmp_path, wanted(GEFORCE))
    actor = actor_of(harness, GEFORCE)
    assert (actor.state, actor.reason) == (State.VFIO, "")
    await harness.moved(actor, State.HOST)
    assert {"nvidia", "nvidia_modeset", "nvidia_drm"} <= harness.machine.look().modules.keys()
    Witness.broken.clear()


async def test_one_that_does_not_come_is_not_waited_for_for_ever(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loop = asyncio.get_running_loop()
    began = loop.time()
    _, starting = await start_without_driver(tmp_path, wanted(RADEON))
    harness = await starting
    assert actor_of(harness).state is State.VFIO
    assert Deadlines().probe <= loop.time() - began < at_boot.LONGEST_SECONDS
    assert "host drivers do not have all of it" in caplog.text
    await harness.moved(actor_of(harness), State.HOST)
    assert actor_of(harness).record.facts.functions[RADEON].driver is None


async def test_where_no_driver_is_for_it_nobody_waits(tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()
    began = loop.time()
    card = Slot("0000:03:00", 13, "0000:00:1c.0").function(0, AMD, 0x73BF, VGA)
    modules = [module for module in MODULES if module.name != "amdgpu"]
    harness = await Harness.start(boot([card], modules=modules), tmp_path, wanted(RADEON))
    assert actor_of(harness).state is State.VFIO
    assert loop.time() - began < Deadlines().probe


# What is in the way


async def test_who_has_it_open_is_named_and_left_alone(tmp_path: Path) -> None:
    """Whatever the configuration allows later: at boot, no unit is stopped and no program ended."""
    host = pair()
    before = snapshot(host.machine)
    config = wanted(GEFORCE, busy="kill", end_sessions=True, stop_units=(str(PERSISTENCED),))
    harness = await Harness.start(host, tmp_path, config)
    actor = actor_of(harness, GEFORCE)
    assert actor.state is State.HOST
    assert "at_boot is vfio, and card (0000:01:00.0) stays on the host: " in actor.reason
    assert "nvidia-persistenced" in actor.reason
    assert snapshot(harness.machine) == before
    assert note(tmp_path)["over"] is True


async def test_a_display_manager_that_is_to_start_is_not_stopped(tmp_path: Path) -> None:
    host = bare()
    host.machine.units.add(DISPLAY_MANAGER)
    config = wanted(RADEON, stop_units=(str(DISPLAY_MANAGER),))
    harness = await Harness.start(host, tmp_path, config, restore_deferred=False)
    assert (actor_of(harness).state, harness.state(DISPLAY_MANAGER)) == (State.VFIO, "active")


async def test_a_switch_that_fails_leaves_it_on_its_host_driver(tmp_path: Path) -> None:
    host = bare()
    inject(host, "probe@0000:03:00.0#1=EINVAL")
    harness = await Harness.start(host, tmp_path, wanted(RADEON))
    actor = actor_of(harness)
    assert (actor.state, actor.record.facts.functions[RADEON].driver_name) == (State.HOST, "amdgpu")
    assert actor.record.missed_at_boot
    assert "cannot bind 0000:03:00.0" in actor.reason
    assert (
        "at_boot is vfio, and card (0000:03:00.0) stays on the host: the switch was not done: reverted" in actor.reason
    )
    await harness.moved(actor, State.VFIO)
    assert (actor.record.missed_at_boot, actor.reason) == (False, "")


async def test_nobody_waits_for_it_longer_than_is_promised(tmp_path: Path) -> None:
    host = bare()
    inject(host, "unbind@0000:03:00.0=300s")
    settings = wanted(RADEON)
    settings = Config(gpus=settings.gpus, deadlines=Deadlines(unbind=600.0))
    loop = asyncio.get_running_loop()
    began = loop.time()
    harness = await Harness.start(host, tmp_path, settings)
    assert loop.time() - began == pytest.approx(at_boot.LONGEST_SECONDS)
    actor = actor_of(harness)
    assert "it was not there within 120 s of the start" in actor.reason
    await actor.runner.rest()
    assert (actor.state, actor.record.facts.functions[RADEON].driver_name) == (State.HOST, "amdgpu")
    assert actor.switch is not None
    assert actor.switch.result is Result.CANCELLED


async def test_a_kernel_that_hangs_does_not_keep_the_service_from_starting(tmp_path: Path) -> None:
    host = bare()
    inject(host, "unbind@0000:03:00.0=hang")
    harness = await Harness.start(host, tmp_path, wanted(RADEON))
    actor = actor_of(harness)
    assert actor.state is State.WEDGED
    assert "the kernel has not returned from 'unbind 0000:03:00.0 from amdgpu'" in actor.reason
    assert actor.record.missed_at_boot


async def test_what_is_still_being_planned_when_time_is_up_is_taken_back(tmp_path: Path) -> None:
    host = bare()
    before = snapshot(host.machine)
    inject(host, "capture@0000:03:00.0=300s")
    settings = Config(gpus=wanted(RADEON).gpus, deadlines=Deadlines(capture=600.0))
    harness = await Harness.start(host, tmp_path, settings)
    actor = actor_of(harness)
    assert (actor.switch, actor.record.missed_at_boot) == (None, True)
    await harness.witness.until(lambda: actor.switch is not None and actor.switch.result is not None)
    assert actor.switch is not None
    assert (actor.switch.result, actor.state) == (Result.CANCELLED, State.HOST)
    await asyncio.sleep(1)
    assert actor.record.missed_at_boot
    assert snapshot(harness.machine) == before


async def test_one_that_is_nowhere_does_not_stay_on_the_host(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    host = bare()
    inject(host, "probe=EINVAL")
    harness = await Harness.start(host, tmp_path, wanted(RADEON, **GENTLE), restore_deferred=False)
    actor = actor_of(harness)
    assert (actor.state, actor.record.missed_at_boot) == (State.FAILED, True)
    why = "at_boot is vfio, and card (0000:03:00.0) is failed (0000:03:00.0 is on no driver): the switch was not done: "
    assert why in actor.reason
    assert [fields_of(line)["GPU"] for line in caplog.records if why in line.getMessage()] == [str(RADEON)]


async def test_one_that_is_gone_or_a_machines_is_not_missed(tmp_path: Path) -> None:
    host = bare()
    harness = await Harness.start(host, tmp_path, wanted(RADEON, AtBoot.KEEP))
    actor = actor_of(harness)
    await host.machine.unplug("0000:03:00")
    harness.fleet.look()
    harness.fleet.reconfigure(wanted(RADEON))
    (tmp_path / "at_boot.json").mkdir()
    notes = Journal(DirectoryStore(tmp_path)).boot
    await at_boot.AtBootSwitches(host, notes).done([actor])
    (tmp_path / "at_boot.json").rmdir()
    host.machine.units.booting = False
    await at_boot.AtBootSwitches(host, notes).done([actor])
    assert (actor.state, actor.reason, actor.record.missed_at_boot) == (State.ABSENT, "", False)


async def test_a_note_that_cannot_be_written_means_that_nothing_is_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gpuswitch.switch.journal.store.DirectoryStore.replace", full)
    harness = await Harness.start(bare(), tmp_path, wanted(RADEON))
    assert actor_of(harness).state is State.HOST
    assert "at_boot.json (No space left on device)" in actor_of(harness).reason


@pytest.mark.parametrize("text", ["", "[]", "{", '{"boot": 5, "begun": 7}'])
async def test_a_note_that_says_nothing_was_begun_at_least(text: str, tmp_path: Path) -> None:
    nonsense = json.dumps({"boot": _boot_id(), "begun": "all", "over": 1})
    (tmp_path / "at_boot.json").write_text(text or nonsense)
    harness = await Harness.start(bare(), tmp_path, wanted(RADEON))
    moved = text == '{"boot": 5, "begun": 7}'  # of another boot, whatever else it says
    assert actor_of(harness).state is (State.VFIO if moved else State.HOST)


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


async def test_what_a_dead_service_had_begun_is_not_tried_again(tmp_path: Path) -> None:
    (tmp_path / "at_boot.json").write_text(json.dumps({"boot": _boot_id(), "begun": [str(RADEON)], "over": False}))
    harness = await Harness.start(bare(), tmp_path, wanted(RADEON))
    assert actor_of(harness).state is State.HOST
    assert "the service ended in the middle of that switch, and it is not tried again" in actor_of(harness).reason
    assert note(tmp_path)["over"] is True


async def test_a_card_that_comes_after_the_boot_is_left_alone(tmp_path: Path) -> None:
    host = bare()
    await host.machine.unplug("0000:03:00")
    harness = await Harness.start(host, tmp_path, wanted(RADEON))
    harness.replug("0000:03:00")
    harness.fleet.look()
    assert actor_of(harness).state is State.HOST


async def test_a_fault_of_ours_with_one_takes_nothing_from_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object, **__: object) -> None:
        raise RuntimeError("nobody expected this")

    monkeypatch.setattr(Actor, "request", broken)
    harness = await Harness.start(bare(), tmp_path, wanted(RADEON))
    assert "a fault of gpuswitch itself: RuntimeError('nobody expected this')" in actor_of(harness).reason
    assert wanted(RADEON).gpus[0].rules.busy is Busy.REFUSE


# What recovers


async def test_a_recovery_starts_nothing_that_waits_for_the_service(tmp_path: Path) -> None:
    """Systemd has that job in its queue behind our own start."""
    host = SCENARIOS["reserved"]()
    host.machine.units.add(DISPLAY_MANAGER, active=False)
    inject(host, "probe#1=EINVAL")
    inject(host, "probe#2=EINVAL")
    harness = await Harness.start(host, tmp_path, reserved(after_host=str(DISPLAY_MANAGER)), restore_deferred=False)
    actor = actor_of(harness, GEFORCE)
    assert actor.switch is not None
    assert (actor.state, actor.switch.recovery, harness.state(DISPLAY_MANAGER)) == (State.HOST, True, "inactive")
    await harness.fleet.restore_deferred()
    assert (actor.state, bool(actor.record.restore_state), harness.state(DISPLAY_MANAGER)) == (
        State.HOST,
        False,
        "active",
    )


async def test_a_recovery_towards_vfio_stops_no_unit_and_ends_no_session(tmp_path: Path) -> None:
    host = SCENARIOS["plain"]()
    host.machine.units.add(DISPLAY_MANAGER)
    inject(host, "unload#1=EIO")
    inject(host, "probe@0000:01:00.1#1=EINVAL")
    config = wanted(GEFORCE, stop_units=(str(DISPLAY_MANAGER),), end_sessions=True)
    harness = await Harness.start(host, tmp_path, config, restore_deferred=False)
    actor = actor_of(harness, GEFORCE)
    assert actor.switch is not None
    assert (actor.state, actor.switch.recovery) == (State.VFIO, True)
    assert {step.kind for step in actor.switch.steps}.isdisjoint({"units", "sessions"})
    assert (harness.state(DISPLAY_MANAGER), actor.record.restore_state.units) == ("active", ())
