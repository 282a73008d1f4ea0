"""What must be so when nothing is under way: the invariants that only time can break."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import cast

from gpuswitch.gpu.actor import Actor
from gpuswitch.host.simulated.kernel import IN_FLIGHT
from gpuswitch.model.address import PciAddress
from gpuswitch.model.drivers import NVIDIA
from gpuswitch.model.holders import Unit
from gpuswitch.model.states import State
from tests.harness.simulated.harness import Settings, Snapshot, snapshot
from tests.harness.simulation.checker import ANSWER_SECONDS
from tests.harness.simulation.invariants import ViolationLog
from tests.harness.simulation.loop import Life
from tests.harness.simulation.world import World

START_SECONDS = 2000.0
_EXCUSED_BY = {
    "StartUnits": {"units", "opened by units"},
    "RestartUnits": {"units", "opened by units"},
    "StopUnits": {"units"},
    "AwaitHolders": {"units"},
    "RestoreConsoles": {"consoles"},
    "MoveConsoles": {"consoles"},
    # Where the driver's frame buffer comes from.
    "LoadModules": {"modules", "consoles"},
    "UnloadModules": {"modules", "consoles"},
    "RestorePersistence": {"persistent"},
    "Persistence": {"persistent"},
}
"""What a step that is no condition for coming home may leave behind, where it was made to fail."""


def meanwhile(world: World) -> None:
    """At any time: whoever asked is answered, and whoever works gets on."""
    checker = world.checker
    world.virtual_machines.untouched()
    for ask in checker.asks:
        if checker.now - ask.began > ANSWER_SECONDS * (1 + ask.before):
            checker.broken(
                4, f"{ask.what} of {ask.actor.gpu.address} has no answer after {checker.now - ask.began:g} s"
            )
            checker.asks.remove(ask)
            break
    service = world.service
    if service is None or service.fleet is None:
        return
    for actor in world.loop.run_as(service.life, service.fleet.stalled):
        checker.broken(4, f"{actor.gpu.address} stands still: {actor.state} since {actor.record.progress:g} s")
    if not service.ready and service.life.alive and checker.now - checker.started > START_SECONDS:
        checker.broken(4, "the service is not ready")


def in_trouble(world: World) -> None:
    """A long time has passed, and the kernel may still have what it was given."""
    meanwhile(world)
    service = world.ready
    if service is None or service.fleet is None:
        world.checker.broken(4, "the service does not run, or is not ready")
        return
    for actor in service.fleet.actors.values():
        world.checker.explained(actor, "after a long time")


def at_rest(world: World) -> None:
    """The kernel has returned, nothing goes wrong any more, and a long time has passed."""
    checker = world.checker
    meanwhile(world)
    for ask in checker.asks:
        checker.broken(4, f"{ask.what} of {ask.actor.gpu.address} has no answer")
    service = world.ready
    if service is None or service.fleet is None:
        checker.broken(5, "the service does not run, or is not ready")
        return
    actors = list(service.fleet.actors.values())
    for actor in actors:
        checker.explained(actor, "at rest")
        checker.split(actor, 0.0)
        world.virtual_machines.at_rest(actor)
        world.promises.at_rest(actor)
        if actor.state is State.WEDGED and world.machine.workers and not _stuck(world, actor):
            checker.broken(4, f"{actor.gpu.address} is wedged, and the kernel has returned")
        if actor.state is State.UNKNOWN and actor.gpu.address not in checker.meddled and not checker.torn:
            checker.broken(5, f"{actor.gpu.address} is unknown, and nobody else moved it: {actor.reason}")
    # Where somebody else is half-way with a GPU, it is tried again to bring it home.
    untold = any(_untold(world, actor) for actor in actors)
    if (times := world.loop.timers(service.life)) and not world.others_wait and not untold:
        checker.broken(9, f"an idle service waits for {len(times)} timers, the first one at {times[0]:g} s")
    if not world.checker.torn and not world.others_wait:
        world.virtual_machines.nobody_is_left()
    _shared(world)
    _nothing_left(world, service.life)
    _around(world, actors)


def _nothing_left(world: World, life: Life) -> None:
    """Of what ended: no error that nobody heeds, no group that is held for a switch."""
    for task in life.tasks:
        if task.done() and not task.cancelled() and getattr(task, "_log_traceback"):  # noqa: B009 -- typeshed lacks it
            world.checker.fault(f"nobody heeds {task.exception()!r}")
    for number, group in world.machine.groups():
        # Behind it is the number of one that came while another was at its end.
        whose = (group.opened_by or "").partition("the worker of ")[2].partition(" ")[0]
        actor = world.actor(PciAddress.parse(whose)) if whose else None
        if whose and (actor is None or actor.state is not State.WEDGED):
            world.checker.broken(7, f"{group.opened_by} has group {number} open, and no switch runs")


def _shared(world: World) -> None:
    """An attribute that no GPU needs otherwise is as it was."""
    if world.checker.torn or world.others_wait or world.checker.failed_to_restore:
        return
    pages = [json.loads(page)["restore_state"]["attributes"] for page in world.disk.pages.values()]
    for attribute, home in world.shared.items():
        now = world.machine.devices[attribute.function].settings[attribute.path]
        if now != home and not any(str(attribute) in recorded for recorded in pages):
            world.checker.broken(3, f"{attribute} is {now}, was {home}, and no GPU needs it so")


def _untold(world: World, actor: Actor) -> bool:
    """Whether something is in the way of whose end nothing tells.

    A user that is no process; another machine in the books of libvirt, which is not there to clear up after it.
    """
    # Of any GPU: they may share a driver, and what it counts.
    in_flight = any(IN_FLIGHT in world.checker.users(function) for gpu in world.functions.values() for function in gpu)
    books = world.machine.libvirt
    in_the_books = any(not {*functions}.isdisjoint(actor.gpu.functions) for functions in books.machines.values())
    return (bool(actor.record.stays_out) and in_flight) or (in_the_books and not books.running)


def _stuck(world: World, actor: Actor) -> bool:
    return any(w.pending for w in world.machine.workers.values() if str(actor.gpu.address) in w.user)


def _around(world: World, actors: Iterable[Actor]) -> None:
    """Units that are down are owed by somebody; at home, nothing is left of what was around a switch."""
    checker = world.checker
    if world.others_wait or checker.torn:
        return
    excused = _excused(world)
    restore_state = _units_to_start(world)
    now = snapshot(world.machine)
    units = [unit for unit in checker.home if isinstance(unit, Unit) and str(unit) not in checker.units_touched]
    for unit in units if "units" not in excused else ():
        if checker.home[unit] == "active" != now[unit] and unit.name not in restore_state:
            checker.broken(3, f"{unit} is {now[unit]}, and nobody owes it")
    for unit in units:
        # Whatever went wrong, nobody had a reason to start it.
        if checker.home[unit] != "active" == now[unit]:
            checker.broken(3, f"{unit} is active, and was {checker.home[unit]}")
    if not excused and not checker.meddled and all(a.state is State.HOST and not a.bound for a in actors):
        _compare(checker, {k: v for k, v in checker.home.items() if not isinstance(k, Unit)}, now)


def _units_to_start(world: World) -> set[str]:
    """As the journal has it."""
    pages = [json.loads(page) for page in world.disk.pages.values()]
    return {unit["name"] for page in pages for unit in page["restore_state"]["units"]}


def _excused(world: World) -> set[object]:
    """Keys of a snapshot, and "settings" for all functions."""
    hit = {struck.at.step for struck, wrong in world.trouble.hit if wrong != "delay"}
    excused: set[object] = {what for step in hit for what in _EXCUSED_BY.get(step, ())}
    if world.checker.failed_to_restore:
        excused |= {attribute.function for attribute in world.shared}
    if any(struck.operation == "start_unit" for struck, _ in world.trouble.hit):
        excused.add("units")
    # Nobody could tell whether there is one to restart.
    if any(struck.operation == "active" for struck, _ in world.trouble.hit):
        excused.add("opened by units")
    # One that was on its way when the service was killed comes after the next one has looked.
    if any(struck.operation == "inhibit" and wrong != "error" for struck, wrong in world.trouble.hit):
        excused.add("inhibitors")
    if world.machine.frame_buffers.names("bind_platform") != world.firmware:
        # The kernel takes away for good what the firmware left in the memory of a GPU that vfio-pci, or a driver, gets.
        excused |= {"boot frame buffers", "consoles"}
    return excused


def came_home(world: World) -> None:
    """Everybody was asked to come home, and nothing was in the way."""
    for gpu in world.spec.gpus:
        actor = world.actor(gpu)
        if actor is None:
            world.checker.broken(5, f"nobody answers for {gpu}")
        elif actor.state is not State.HOST:
            world.checker.broken(5, f"{gpu} is {actor.state}, and should have come home: {actor.reason}")


def is_home(world: World) -> bool:
    return not world.disk.pages and snapshot(world.machine) == world.checker.home


def at_home(world: World) -> None:
    """The machine is as it was when it was booted, and nobody owes anything."""
    checker = world.checker
    excused = _excused(world) - {"inhibitors", "units"}
    if checker.meddled:
        # A card that is pulled takes the consoles from where they were, and nothing that the firmware left is in it;
        # and who looks for cards only at its start never hears of it again.
        excused |= {"consoles", "boot frame buffers", "opened by units"}
    if checker.torn:
        # What was owed was written on the page that was torn.
        excused |= {"consoles", "modules", "persistent", "boot frame buffers", "opened by units", "settings"}
    started = {k for k, v in checker.home.items() if str(k) in checker.units_touched and v != "active"}
    home = {k: v for k, v in checker.home.items() if k not in excused | started}
    if "settings" in excused:
        home = {k: v for k, v in home.items() if not isinstance(k, PciAddress)}
    _compare(checker, home, snapshot(world.machine))
    if world.disk.pages:
        checker.broken(3, f"the journal still says {world.disk.pages}")
    came_home(world)


def _compare(checker: ViolationLog, home: Snapshot, now: Snapshot) -> None:
    # What somebody else has started may have found less, and what they have stopped has nothing open.
    excused = {"opened by units"} if checker.units_touched.intersection(map(str, NVIDIA.units)) else set()
    for what in (home.keys() | now.keys() if len(home) == len(checker.home) else home.keys()) - excused:
        if home.get(what) != now.get(what):
            checker.broken(3, f"{what} was {home.get(what)}, and is {now.get(what)}")


def settings_at_home(world: World, function: PciAddress) -> Settings:
    return cast("Settings", world.checker.home[function])


def modules_at_home(world: World) -> Iterable[str]:
    return sorted(cast("frozenset[str]", world.checker.home["modules"]))
