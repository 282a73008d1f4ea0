"""A machine, the service that lives on it, and what is done to both. Once it is killed, the next one starts."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from gpuswitch.config.settings import Config
from gpuswitch.errors import GpuswitchError
from gpuswitch.fleet.fleet import Fleet
from gpuswitch.gpu.actor import Actor
from gpuswitch.host.simulated.libvirt import LIBVIRTD
from gpuswitch.model.address import PciAddress
from gpuswitch.model.policy import Options
from gpuswitch.model.states import State
from gpuswitch.switch.journal.journal import Journal
from gpuswitch.switch.record import Requester, Switch
from tests.harness.bridge_power import attributes_of_bridges
from tests.harness.simulation.checker import InvariantChecker
from tests.harness.simulation.doubles import SEND, WRITE, WRITTEN, Disk, Senses, ServiceHost, ServiceStore
from tests.harness.simulation.invariants import Ask
from tests.harness.simulation.listener import ServiceListener
from tests.harness.simulation.loop import AWAIT, Fuse, Life, SimulatedLoop
from tests.harness.simulation.machines import MACHINES, functions, settings
from tests.harness.simulation.promises import Promises
from tests.harness.simulation.trouble import Rule, Trouble, Wrong
from tests.harness.simulation.virtual_machines import VirtualMachines

RESTART_SECONDS = 0.1
"""RestartSec= of a unit, where it says nothing else."""
STOP_SECONDS = 240.0
"""Longer than any step on these machines may take: then systemd kills the service."""
POINTS = frozenset({AWAIT, SEND, WRITE, WRITTEN})
OPERATION = "operation"
SOMEBODY = Requester(uid=0, pid=1, command="somebody")


class Mishap(NamedTuple):
    """The so manieth operation from now goes `wrong`, or the service is killed at the so manieth such point."""

    what: str
    nth: int


@dataclass
class Service:
    """One run of it. `said_ready`: it has; `ready`: and can be asked, since it does not stop yet."""

    life: Life
    host: ServiceHost
    fleet: Fleet | None = None
    ready: bool = False
    said_ready: bool = False


class World:
    """Everything that one schedule happens to."""

    def __init__(self, loop: SimulatedLoop, machine_name: str, rules: str, *, trace: bool = False) -> None:
        self.loop = loop
        self.spec = MACHINES[machine_name]
        self.rules = rules
        self.machine = self.spec.machine()
        self.firmware = self.machine.frame_buffers.names("bind_platform")
        """The frame buffers that the firmware left."""
        self.shared = attributes_of_bridges(self.machine, self.spec.gpus)
        """The attributes that GPUs may share, as they are where none of them needs them otherwise."""
        self.trouble = Trouble()
        self.machine.faults = self.trouble
        self.machine.units.add(LIBVIRTD)
        self.disk = Disk.empty()
        self.senses = Senses()
        self.tears = False
        """The next crash leaves a page of the journal torn."""
        self.functions = functions(machine_name)
        self.checker = InvariantChecker(self, trace=trace)
        self.virtual_machines = VirtualMachines(self)
        self.promises = Promises(self)
        self.service: Service | None = None
        self.since: Counter[str] = Counter()
        self._crashed = False
        self._mishaps: deque[Mishap] = deque()
        self._others: set[asyncio.Task[None]] = set()
        loop.ended = self._killed
        loop.timed = self.checker.timed
        loop.set_exception_handler(lambda _, context: self.checker.unhandled(context))

    @property
    def config(self) -> Config:
        return settings(self.spec.name, self.rules)

    # The service ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start it, as systemd does."""
        life = Life()
        self.service = Service(life, ServiceHost(self.machine, life, self.checker, self.senses))
        self.checker.starts()
        self.loop.begin(life, self._serve(self.service))
        if self._crashed:
            self._crashed = False
            self._next_mishap()

    async def _serve(self, service: Service) -> None:
        journal = Journal(ServiceStore(self.disk, service.life))
        try:
            service.fleet = Fleet(service.host, self.config, journal, ServiceListener(service.life, self.checker))
            await service.fleet.start()
            service.ready = service.said_ready = True
            self.checker.ready(service.fleet)
            # Whatever else the machine starts with waits for us no more.
            self.machine.units.booting = False
            await service.fleet.restore_deferred()
        except Exception as fault:  # noqa: BLE001 -- whatever it is, it is what we are looking for
            self.checker.fault(f"the service does not start: {fault!r}")

    def kill(self) -> None:
        """SIGKILL."""
        if self.service is not None:
            self.service.life.alive = False
            self.loop.notice(self.service.life)

    def kill_at(self, point: str, count: int) -> None:
        """SIGKILL, when it reaches such a point for the so manieth time."""
        if self.service is not None:
            self.service.life.fuse = Fuse(point, count)

    def spare(self) -> None:
        """Nobody kills it any more."""
        self.tears = False
        self._mishaps.clear()
        if self.service is not None:
            self.service.life.fuse = None

    def stop(self) -> None:
        """SIGTERM; it takes its time, but not too much of it. Then it is started again."""
        service = self.ready
        if service is not None:
            service.ready = False
            self.loop.begin(service.life, self._stopped(service))
            self.loop.call_later(STOP_SECONDS, self._kill_if_there, service)

    async def _stopped(self, service: Service) -> None:
        assert service.fleet is not None
        await service.fleet.stop("the service is stopping")
        await service.host.close()
        self.checker.stopped(service.fleet)
        self.kill()

    def _kill_if_there(self, service: Service) -> None:
        if self.service is service and service.life.alive:
            self.kill()

    def _killed(self, _: Life) -> None:
        """It is gone. Its idle workers see that; those that the kernel has end when it lets them."""
        for worker in list(self.machine.workers.values()):
            worker.let_go()
        self.checker.killed()
        self._crashed = True
        if self.tears and self.disk.pages:
            name = min(self.disk.pages)
            self.disk.pages[name] = self.disk.pages[name][: len(self.disk.pages[name]) // 2]
            self.checker.tore(name)
        self.tears = False
        for name in sorted(self.disk.stale & self.disk.pages.keys()):
            self.checker.tore(name)
        self.disk.stale.clear()
        self.service = None
        self.loop.call_later(RESTART_SECONDS, self.start)

    @property
    def ready(self) -> Service | None:
        """The service, if it can be asked now."""
        service = self.service
        return service if service is not None and service.ready and service.life.alive else None

    def actor(self, gpu: PciAddress) -> Actor | None:
        """Whose the function is, if anybody answers for it."""
        service = self.ready
        if service is None or service.fleet is None:
            return None
        return next((a for a in service.fleet.actors.values() if gpu in a.gpu.functions), None)

    # What goes wrong ------------------------------------------------------------------------------------------------

    def befalls(self, *mishaps: Mishap) -> None:
        """These go wrong, one after the other: each is counted from the one before."""
        self._mishaps = deque(mishaps)
        self._next_mishap()

    def _next_mishap(self) -> None:
        self.since = self._progress()
        if self._mishaps and self.service is not None:
            mishap = self._mishaps.popleft()
            if mishap.what in POINTS:
                self.service.life.fuse = Fuse(mishap.what, mishap.nth)
            else:
                wrong = cast("Wrong", mishap.what)
                self.trouble.rules.append(Rule(wrong, mishap.nth, then=self._next_mishap))

    def _progress(self) -> Counter[str]:
        counts = Counter(self.service.life.counts if self.service is not None else ())
        counts[OPERATION] = len(self.trouble.log or ())
        return counts

    @property
    def progress(self) -> Counter[str]:
        """How many points were reached, and operations done, since the last of the mishaps."""
        return self._progress() - self.since

    # What it is asked -----------------------------------------------------------------------------------------------

    def request(self, gpu: PciAddress, target: State, options: Options) -> asyncio.Task[None] | None:
        actor = self.actor(gpu)
        if actor is None:
            return None
        return self.ask(Ask(f"to {target}", actor, options, target), lambda: actor.request(target, options, SOMEBODY))

    def try_out(self, gpu: PciAddress, seconds: float) -> None:
        """To vfio, and home by itself after so long."""
        if (actor := self.actor(gpu)) is not None:
            options = Options(trial_seconds=seconds)
            ask = Ask(f"a trial of {seconds:g} s", actor, options, State.VFIO)
            _ = self.ask(ask, lambda: actor.request(State.VFIO, options, SOMEBODY))

    def recover(self, gpu: PciAddress) -> asyncio.Task[None] | None:
        actor = self.actor(gpu)
        if actor is None:
            return None
        return self.ask(Ask("recover", actor), lambda: actor.recover(requester=SOMEBODY))

    def plan(self, gpu: PciAddress, target: State) -> None:
        if (actor := self.actor(gpu)) is not None:
            _ = self.ask(Ask(f"plan {target}", actor), lambda: actor.plan(target))

    def holders(self, gpu: PciAddress) -> None:
        if (actor := self.actor(gpu)) is not None:
            _ = self.ask(Ask("holders", actor), actor.holders)

    def cancel(self, gpu: PciAddress) -> None:
        actor = self.actor(gpu)
        if actor is not None and actor.switch is not None:
            switch = actor.switch

            async def cancel() -> None:
                actor.cancel(switch.id, SOMEBODY)

            _ = self.ask(Ask("cancel", actor), cancel)

    def ask(self, ask: Ask, work: Callable[[], Coroutine[Any, Any, object]]) -> asyncio.Task[None]:
        assert self.service is not None
        return self.loop.run_as(self.service.life, self.loop.create_task, self._asked(ask, work))

    async def _asked(self, ask: Ask, work: Callable[[], Coroutine[Any, Any, object]]) -> None:
        self.checker.asked(ask)
        try:
            answer = await work()
        except GpuswitchError as error:
            self.checker.refused(ask, error)
        except Exception as fault:  # noqa: BLE001 -- whatever it is, it is what we are looking for
            self.checker.fault(f"{ask.what} of {ask.actor.gpu.address}: {fault!r}")
        else:
            self.checker.answered(ask, answer)
            if isinstance(answer, Switch):
                await answer.wait()

    # What others do -------------------------------------------------------------------------------------------------

    def others(self, work: Coroutine[Any, Any, None]) -> None:
        """Somebody else does something that may take a while."""
        task = self.loop.create_task(work)
        self._others.add(task)
        task.add_done_callback(self._others.discard)

    @property
    def others_wait(self) -> bool:
        return bool(self._others)
