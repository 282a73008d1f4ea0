"""What a service does, as it does it: nothing is taken from anybody, nobody is ended who need not be."""

from __future__ import annotations

from collections import Counter
from signal import SIGKILL, Signals
from typing import TYPE_CHECKING, Any

from gpuswitch.config.schema import Defaults
from gpuswitch.host.simulated.faults import Call
from gpuswitch.host.simulated.kernel import IN_FLIGHT
from gpuswitch.model.address import PciAddress
from gpuswitch.model.drivers import PERSISTENCED
from gpuswitch.model.facts import VFIO_DRIVER
from gpuswitch.model.holders import HolderQuery, Process, Scan
from gpuswitch.model.policy import Busy, Options
from gpuswitch.model.states import State
from tests.harness.simulation.doubles import AT
from tests.harness.simulation.invariants import ViolationLog
from tests.harness.simulation.trouble import Struck

if TYPE_CHECKING:
    from tests.harness.simulation.world import World

_UNDONE = frozenset({"hold_group", "release_group", "load"})
"""What changes nothing for the GPU, or is undone by the next.

A module that is loaded so that its drivers' names are known stays loaded, and has none of this GPU.
"""
_NOTHING_BETWEEN = frozenset({"unbind", "probe", "set_override", "unload", "remove", "unbind_platform"})
"""What may come between the look for holders and the unbind: steps that do the same to other functions."""
AGAIN_SECONDS = 1.0
"""For what was ended by somebody else to be done again."""
_JOBS = frozenset({"stop_unit", "start_unit", "end_session"})


class ActionChecker(ViolationLog):
    """A `Watcher` (`gpuswitch` sends its operations past it), and told of each operation by the machine.

    `sent` counts what was sent for each GPU that changes anything.
    """

    def __init__(self, world: World, *, trace: bool) -> None:
        super().__init__(world, trace=trace)
        self.sent: Counter[str] = Counter()
        self.rules_of: dict[str, tuple[Defaults, ...]] = {}
        """As the configuration was when the switch of a GPU was asked for, and when it began."""
        self.options_of: dict[str, Options] = {}
        """What was asked for with it."""
        self._clean: dict[PciAddress, frozenset[str]] = {}
        """Of each function for which a look found no holder, and nothing came after: who has it open nevertheless."""
        self._from: dict[PciAddress, str] = {}
        """The drivers that functions are to be unbound from."""
        self._down: dict[str, set[str]] = {}
        """The GPUs for whose sake a unit was stopped."""
        self.sleepy: dict[PciAddress, float] = {}
        """When somebody ended what keeps the machine awake for a GPU."""
        world.trouble.struck = self._struck

    def sends(self, gpu: str, call: Call) -> None:
        assert call.request is not None
        operation, arguments = call.request.operation, call.request.arguments
        if operation.name == "unbind":
            self._from[arguments["function"]] = arguments["driver"]
        if not operation.reads and operation.name not in _UNDONE:
            self.sent[gpu] += 1
        address = PciAddress.parse(gpu)
        if self._clean and operation.name not in _NOTHING_BETWEEN:
            for function in self.world.functions.get(address, ()):
                self._clean.pop(function, None)
        actor = self.world.actor(address)
        if actor is not None and actor.state is State.WEDGED and str(actor.gpu.address) == gpu:
            self.broken(4, f"'{call.what}' is sent to {gpu}, which is wedged")

    def scans(self, query: HolderQuery, scan: Scan) -> None:
        devices = self.world.machine.devices
        for function in query.functions:
            self._clean.pop(function, None)
            if not scan.holders and function in devices:
                self._clean[function] = self.users(function) - self._hidden(function, query)

    def _hidden(self, function: PciAddress, query: HolderQuery) -> set[str]:
        """Who can be told by the references of a module alone, and that was not asked for."""
        device = self.world.machine.devices[function]
        cards = device.binding.cards if device.link is not None and device.binding is not None else ()
        told = all(card.module in query.modules for card in cards if IN_FLIGHT in card.users)
        return set() if told and cards else {IN_FLIGHT}

    def signals(self, process: Process, number: Signals) -> None:
        self.note(f"signal {number.name} to {process.pid}")
        if process.pid == 1 or any(p.command.startswith("qemu") for p in self._programs(process)):
            self.broken(10, f"{number.name} is sent to a virtual machine, or to init")
        if not self._policies() & ({Busy.KILL} if number is SIGKILL else {Busy.KILL, Busy.TERMINATE}):
            self.broken(10, f"{number.name} is sent to {process.pid}, and no policy says so")

    def ends_session(self, session: str) -> None:
        if not any(rules.end_sessions for rules in self._rules_now()):
            self.broken(10, f"session {session} is ended, and nobody said that it may be")

    def _struck(self, struck: Struck, service: bool) -> None:
        if self.trace is not None:
            self.note(f"{'' if service else 'others: '}{struck.operation} {struck.subject}")
        if not service:
            return
        living = self.world.service
        if struck.operation in _JOBS and living is not None and living.life.alive and not living.said_ready:
            # systemd may be waiting for us with that very job: the boot would stand still.
            self.broken(4, f"{struck.operation} {struck.subject} before the service is ready")
        if struck.operation in {"unbind", "remove"}:
            self._lets_go(PciAddress.parse(struck.subject), struck)
        if struck.operation in {"unbind_platform", "probe"}:
            self._evicts(struck)
        if struck.operation == "stop_unit":
            self._stops(struck.subject)
            self._down.setdefault(struck.subject, set()).add(AT.get().gpu)
        if struck.operation == "start_unit":
            self._starts(struck.subject)

    def awake(self, gpu: PciAddress) -> bool:
        """Whether the machine is kept awake for this GPU, unless logind would not do that, or somebody ended it now."""
        if self.world.loop.time() - self.sleepy.get(gpu, -AGAIN_SECONDS) < AGAIN_SECONDS:
            return True
        hit = {struck.subject for struck, _ in self.world.trouble.hit if "inhibit" in struck.operation}
        return str(gpu) in self.world.machine.units.inhibitors or str(gpu) in hit

    def _lets_go(self, function: PciAddress, struck: Struck) -> None:
        """What must be so before a driver is made to let go, for which there is no undo."""
        gpu = struck.at.gpu
        if gpu and not self.awake(PciAddress.parse(gpu)):
            self.broken(3, f"{struck.operation} of {function} at {struck.at}, and the machine may sleep")
        device = self.world.machine.devices.get(function)
        if device is None or device.binding is None:
            return
        if struck.operation == "unbind" and device.binding.driver.name != self._from.get(function):
            # Somebody else was quicker: the kernel says ENODEV, and nothing happens.
            return
        if device.on_vfio:
            has = self.world.machine.group(device.shape.iommu_group or 0).opened_by
            self.world.virtual_machines.leaves_vfio(function)
            if has is None or not has.startswith("the worker of"):
                self.broken(7, f"{struck.operation} of {function}, on vfio, at {struck.at}; its group is open by {has}")
            return
        self._unused(function, struck)

    def _unused(self, function: PciAddress, struck: Struck) -> None:
        """Somebody has looked who has it open, and found nobody."""
        clean = self._clean.get(function)
        if clean is None:
            self.broken(1, f"{struck.operation} of {struck.subject} at {struck.at}, and nobody had looked for holders")
        elif stayed := clean & self.users(function):
            self.broken(1, f"{struck.operation} of {struck.subject} at {struck.at} while {sorted(stayed)} has it open")

    def _evicts(self, struck: Struck) -> None:
        """The firmware's frame buffer goes: it is told to, or vfio-pci has the kernel take it away."""
        for each in self.world.machine.frame_buffers.boot():
            if struck.subject == each.device or (
                struck.subject == str(each.function)
                and self.world.machine.devices[each.function].override == VFIO_DRIVER
            ):
                self._unused(each.function, struck)

    def _stops(self, unit: str) -> None:
        allowed = {str(PERSISTENCED), "nvidia-powerd.service"}.union(*(rules.stop_units for rules in self._rules_now()))
        if unit not in allowed and not self._policies() & {Busy.TERMINATE, Busy.KILL}:
            self.broken(10, f"{unit} is stopped, and nobody said that it may be")

    def needs_none(self, gpu: str) -> None:
        for gpus in self._down.values():
            gpus.discard(gpu)

    def _starts(self, unit: str) -> None:
        """It may open what it was stopped for."""
        self._down.setdefault(unit, set()).discard(AT.get().gpu)
        if unit in self.units_touched:
            # Others may have started it, too, and it ran beside those that it was stopped for before.
            return
        for gpu in sorted(self._down[unit]):
            actor = self.world.actor(PciAddress.parse(gpu)) if gpu else None
            if actor is not None and actor.state is State.DETACHING:
                self.broken(1, f"{unit} is started while {gpu} is detached, for which it was stopped")

    def _policies(self) -> set[Busy]:
        """What the switch whose step runs now may do to holders: it may have died since it began to."""
        options = self.options_of.get(AT.get().gpu, Options())
        return {options.policy(rules.busy) for rules in self._rules_now()}

    def _rules_now(self) -> tuple[Defaults, ...]:
        """What the configuration said when that switch was asked for, and when it began: it is planned in between."""
        return self.rules_of.get(AT.get().gpu, (self.world.config.defaults,))

    def _programs(self, process: Process) -> list[Any]:
        return list(self.world.machine.processes.running(process))

    def users(self, function: PciAddress) -> frozenset[str]:
        """Who has it open, as long as it is there, or draws on the firmware's frame buffer in it."""
        machine = self.world.machine
        if function not in machine.devices:
            return frozenset()
        nodes = {node for each in machine.frame_buffers.boot() if each.function == function for node in each.nodes}
        return machine.users(function) | {user for user, node in machine.frame_buffers.users() if node in nodes}
