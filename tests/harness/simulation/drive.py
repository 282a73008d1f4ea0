"""Makes a story happen in a world, and lets it calm down in the end."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from gpuswitch.errors import KernelError
from gpuswitch.host.simulated.devices import Trouble as DeviceTrouble
from gpuswitch.host.simulated.faults import Call
from gpuswitch.host.simulated.kernel import IN_FLIGHT
from gpuswitch.host.simulated.scenarios import PERSISTENCED, WIREPLUMBER
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import VFIO_DRIVER, VFIO_MODULE
from gpuswitch.model.holders import Unit
from gpuswitch.model.policy import Busy, Options
from gpuswitch.model.states import State
from tests.harness.simulation import rest_checks
from tests.harness.simulation.machines import OLLAMA, RENDERER, RULES
from tests.harness.simulation.story import Event, Story
from tests.harness.simulation.trouble import Rule
from tests.harness.simulation.world import World

LONGER_THAN_ANYTHING = 3000.0
"""Seconds: after them, whatever waits with a deadline has waited long enough."""
_DEAF_SECONDS = 5.0
_OPTIONS = (Options(), Options(wait_seconds=20.0), Options(busy=Busy.TERMINATE), Options(busy=Busy.KILL))
_UNITS = (PERSISTENCED, WIREPLUMBER, OLLAMA, RENDERER)
TRIALS = (1.0, 20.0, 300.0)
"""Seconds: over at once, in the middle of what else happens, and long after that."""
_TARGETS = {"vfio": State.VFIO, "host": State.HOST}


async def happens(world: World, story: Story) -> None:
    """All of it, and then everything comes home."""
    world.start()
    await _passes(world, 0, 0.01)
    for event in story.events:
        await _passes(world, event.turns, event.seconds)
        world.checker.note(f"event {event}")
        _Drama(world).happens(event)
        rest_checks.meanwhile(world)
    await calms_down(world)


async def _passes(world: World, turns: int, seconds: float) -> None:
    """So many turns, or fewer where nothing would happen in those that are left."""
    if seconds:
        await asyncio.sleep(seconds)
    for _ in range(turns):
        if world.loop.idle:
            return
        await asyncio.sleep(0)


class _Drama:
    """One event."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._machine = world.machine

    def happens(self, event: Event) -> None:
        world, gpu = self._world, self._world.spec.gpus[event.gpu]
        match event.what:
            case "ask":
                world.request(gpu, _TARGETS[event.word], _OPTIONS[event.number])
            case "trial":
                world.try_out(gpu, TRIALS[event.number])
            case "plan" | "recover" | "holders" | "cancel":
                self._asked(event, gpu)
            case "crash":
                world.kill_at(event.word, event.number)
            case "kill":
                world.kill()
            case "stop":
                world.stop()
            case "torn":
                world.tears = True
            case "rules":
                self._reconfigured(list(RULES)[event.number])
            case _:
                self._machine_is_troubled(event, gpu)

    def _asked(self, event: Event, gpu: PciAddress) -> None:
        match event.what:
            case "plan":
                self._world.plan(gpu, _TARGETS[event.word])
            case "recover":
                self._world.recover(gpu)
            case "holders":
                self._world.holders(gpu)
            case "cancel":
                self._world.cancel(gpu)

    def _reconfigured(self, rules: str) -> None:
        self._world.rules = rules
        if (service := self._world.ready) is not None and service.fleet is not None:
            self._world.loop.tell(service.life, service.fleet.reconfigure, self._world.config)

    def _machine_is_troubled(self, event: Event, gpu: PciAddress) -> None:
        trouble = self._world.trouble
        match event.what:
            case "fault":
                trouble.rules.append(Rule(event.word, event.number))  # type: ignore[arg-type]  # the words of a story
            case "release":
                trouble.release()
            case "disk":
                self._disk(event.word, event.number)
            case "storm":
                for _ in range(event.number):
                    self._machine.uevent()
            case "deaf":
                self._deaf()
            case "blind":
                self._world.senses.blind = event.number
                self._machine.uevent()
            case "unwatched":
                self._world.senses.deaf = event.number
            case "going down":
                self._machine.units.stopping = True
                self._world.checker.units_touched.update(self._machine.units.names())
            case _:
                self._others_do(event, gpu)

    def _disk(self, word: str, number: int) -> None:
        disk = self._world.disk
        disk.healthy()
        disk.full, disk.read_only = word == "full", word == "read-only"
        disk.failing = number if word == "failing" else 0

    def _deaf(self) -> None:
        """Too many uevents come for a while; when the service can listen again, it knows that it missed some."""
        if self._world.service is not None:
            host = self._world.service.host
            host.deaf = True

            def hears() -> None:
                host.deaf = False
                self._machine.uevent()

            self._world.loop.call_later(_DEAF_SECONDS, hears)

    def _others_do(self, event: Event, gpu: PciAddress) -> None:
        machine = self._machine
        match event.what:
            case "vm":
                self._vm(event)
            case "program":
                self._program(event, gpu)
            case "worker":
                self._worker_dies(gpu)
            case "sleepy":
                # Somebody ends what keeps the machine awake for it.
                self._world.checker.sleepy[gpu] = self._world.loop.time()
                machine.units.uninhibit(str(gpu))
            case "unit":
                self._unit(event)
            case "move":
                self._moves(event, gpu)
            case "spoil":
                self._spoil(DeviceTrouble(event.word), gpu)
            case "pull":
                self._world.checker.meddled.add(gpu)
                self._world.others(machine.unplug(gpu.slot_name))
            case "plug":
                self._world.checker.meddled.add(gpu)
                machine.replug(gpu.slot_name)

    def _vm(self, event: Event) -> None:
        """One with a GPU, or (even numbers) one with all of them."""
        gpus = self._world.spec.gpus[event.gpu :][:1] if event.number % 2 else self._world.spec.gpus
        name, virtual_machines = f"vm {event.number}", self._world.virtual_machines
        match event.word:
            case "asks":
                virtual_machines.asks(name, gpus)
            case "runs":
                virtual_machines.runs(name, gpus)
            case "grabs":
                virtual_machines.takes(name, gpus)
            case "ends":
                virtual_machines.ends(name)
            case "dies":
                virtual_machines.ends(name, unheard=True)
            case "is released":
                # Its QEMU may still be at it, or it may have nothing at all.
                virtual_machines.released(name, "saved")
            case "is heard of":
                virtual_machines.daemon_comes()

    def _program(self, event: Event, gpu: PciAddress) -> None:
        functions = self._world.functions[gpu]
        function, user = functions[event.number % 2 % len(functions)], f"program {event.number // 2} on {gpu}"
        with suppress(KernelError):
            match event.word:
                case "opens" if self._draws_on_the_firmwares(function, user):
                    pass
                case "opens":
                    self._machine.open(function, user)
                case "hides":
                    self._machine.hide(function)
                case "closes":
                    self._machine.close(function, user)
                    self._machine.close(function, IN_FLIGHT)
                    closed = self._machine.frame_buffers.close_all(user)
                    self._machine.processes.stir(None, [f"/dev/{node}" for node in closed])
                case "ends":
                    self._machine.end(user)

    def _draws_on_the_firmwares(self, function: PciAddress, user: str) -> bool:
        """Where no driver has it: on the frame buffer that the firmware left in it, if it did."""
        machine = self._machine
        left = next((each for each in machine.frame_buffers.boot() if each.function == function), None)
        device = machine.devices.get(function)
        if left is None or device is None or device.binding is not None:
            return False
        if machine.processes.named(user) is None:
            machine.run(user)
        machine.frame_buffers.open(left.device, user)
        return True

    def _worker_dies(self, gpu: PciAddress) -> None:
        """Somebody kills it, or the machine is out of memory."""
        for worker in list(self._machine.workers.values()):
            if worker.user == f"the worker of {gpu}":
                worker.die()

    def _spoil(self, trouble: DeviceTrouble, gpu: PciAddress) -> None:
        """A machine leaves it so that no host driver can take it."""
        device = self._machine.devices.get(gpu)
        if device is not None and device.on_vfio:
            device.trouble = trouble

    def _unit(self, event: Event) -> None:
        unit = _UNITS[event.number % len(_UNITS)]
        units = self._machine.units
        if not units.state(unit):
            return
        match event.word:
            case "fails":
                self._world.trouble.rules.append(Rule("error", 1, "start_unit", str(unit)))
            case "stops":
                self._world.checker.units_touched.add(str(unit))
                units.stop(unit)
            case "starts":
                self._world.checker.units_touched.add(str(unit))
                units.settle(unit, "active")

    def _moves(self, event: Event, gpu: PciAddress) -> None:
        """As virsh and driverctl do: one function, or (4) the whole GPU."""
        functions = self._world.functions[gpu]
        chosen = functions if event.number == 4 else (functions[event.number % len(functions)],)
        self._world.others(_moved(self._world, gpu, chosen, to_vfio=event.word == "vfio"))


async def _moved(world: World, gpu: PciAddress, functions: tuple[PciAddress, ...], *, to_vfio: bool) -> None:
    machine, call = world.machine, Call("move", gpu)
    with suppress(KernelError):
        await machine.modules.load(VFIO_MODULE, call)
        for function in functions:
            world.checker.meddled.add(gpu)
            to = VFIO_DRIVER if to_vfio else None
            await machine.write("set_override", "driver_override", {function: to}, call)
            device = machine.devices.get(function)
            if device is not None and device.binding is not None:
                await machine.unbind(function, device.binding.driver.name, call)
            await machine.probe(function, "", call)
    world.checker.meddled.add(gpu)


async def calms_down(world: World) -> None:
    """Nothing goes wrong any more, and everybody lets go: then everything has to come home."""
    await asyncio.sleep(LONGER_THAN_ANYTHING)
    rest_checks.in_trouble(world)
    world.trouble.calm()
    world.disk.healthy()
    world.senses.blind = world.senses.deaf = 0
    world.machine.units.stopping = False
    for gpu in world.spec.gpus:
        _mended(world, gpu)
    for _, card in world.machine.cards():
        # udev has caught up.
        card.ready = True
    world.machine.changed(None, uevent=True)
    world.spare()
    await asyncio.sleep(LONGER_THAN_ANYTHING)
    rest_checks.at_rest(world)
    await _others_undo(world)
    await _all_come_home(world)
    if world.checker.meddled:
        await _restore_host(world)
    if not rest_checks.is_home(world):
        # Whatever was forgone, the next service puts right.
        world.stop()
        await asyncio.sleep(LONGER_THAN_ANYTHING)
    rest_checks.at_home(world)


def _mended(world: World, gpu: PciAddress) -> None:
    """Whatever is wrong with its functions, but for what the service is to mend by itself."""
    devices = [world.machine.devices[f] for f in world.functions[gpu] if f in world.machine.devices]
    on_host = any(device.binding is not None and not device.on_vfio for device in devices)
    for device in devices:
        if device.trouble is DeviceTrouble.UNKNOWN or world.rules == "gentle" or on_host:
            device.trouble = None


async def _others_undo(world: World) -> None:
    machine = world.machine
    for name in world.virtual_machines.names:
        world.virtual_machines.ends(name)
    world.virtual_machines.daemon_comes()
    for gpu in world.spec.gpus:
        names = (f"program {number} on {gpu}" for number in range(2))
        for program in filter(None, map(machine.processes.named, names)):
            machine.end(program.name)
        for function in world.functions[gpu]:
            machine.close(function, IN_FLIGHT)
    stuck = world.others_wait or any(worker.pending for worker in machine.workers.values())
    for program in list(machine.processes.running()) if stuck else ():
        # Whoever does not let go of a card that is to go is ended, and started again.
        if program.unit is not None and machine.units.state(program.unit) == "active":
            machine.units.stop(program.unit)
        else:
            machine.end(program.name)
    await asyncio.sleep(LONGER_THAN_ANYTHING)
    for slot in world.spec.slots():
        machine.replug(slot)
    for unit, state in world.checker.home.items():
        if isinstance(unit, Unit) and state == "active":
            machine.units.settle(unit, "active")
    await asyncio.sleep(LONGER_THAN_ANYTHING)


async def _all_come_home(world: World) -> None:
    for gpu in world.spec.gpus:
        if gpu in world.checker.meddled and rest_checks.settings_at_home(world, gpu).bound is None:
            await _taken_from_vfio(world, gpu)
        _mended(world, gpu)
        actor = world.actor(gpu)
        if actor is not None and actor.state in {State.FAILED, State.UNKNOWN}:
            await over(world.recover(gpu))
        await over(world.request(gpu, State.HOST, Options(wait_seconds=20.0)))
    actors = filter(None, map(world.actor, world.spec.gpus))
    if any(actor.state.moving for actor in actors):
        # The way home of one has brought another one home, by the module that they share: it goes by itself.
        await asyncio.sleep(LONGER_THAN_ANYTHING)
    rest_checks.came_home(world)


async def _taken_from_vfio(world: World, gpu: PciAddress) -> None:
    """No driver fits it, so nobody but who moved it, or knows what was written on a page that is lost, can do that."""
    for function in world.functions[gpu]:
        device = world.machine.devices[function]
        if device.on_vfio and device.binding is not None:
            with suppress(KernelError):
                await world.machine.unbind(function, device.binding.driver.name, Call("unbind", function))
        device.override = rest_checks.settings_at_home(world, function).bound
        with suppress(KernelError):
            await world.machine.probe(function, "", Call("probe", function))
        device.override = None
    await asyncio.sleep(LONGER_THAN_ANYTHING)


async def over(asked: asyncio.Task[None] | None) -> None:
    if asked is not None:
        await asyncio.wait([asked])


async def _restore_host(world: World) -> None:
    """Those who moved a GPU put right what they did to its settings."""
    machine = world.machine
    moved = [function for gpu in world.checker.meddled for function in world.functions[gpu]]
    for function in moved:
        if (device := machine.devices[function]).binding is None:
            # Where vfio-pci is for such devices, it is to have another driver nevertheless.
            device.override = rest_checks.settings_at_home(world, function).bound
    for name in rest_checks.modules_at_home(world):
        machine.modules.at_boot(name)
    for function in moved:
        home, device = rest_checks.settings_at_home(world, function), machine.devices[function]
        if device.binding is None:
            with suppress(KernelError):
                await machine.probe(function, "", Call("probe", function))
        device.override, device.power_control = home.override, home.power_control
        machine.changed(device)
    machine.changed(None, uevent=True)
    await asyncio.sleep(LONGER_THAN_ANYTHING)
