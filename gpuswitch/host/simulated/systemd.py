"""The units, sessions and inhibitors of a simulated machine, and the managers that one asks about them."""

from __future__ import annotations

import asyncio
import errno
from collections import defaultdict
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field

from gpuswitch.errors import KernelError
from gpuswitch.host.port import StartJob, Systemd
from gpuswitch.host.simulated.bus import Bus
from gpuswitch.host.simulated.faults import Call, Strike
from gpuswitch.host.simulated.processes import MOMENT, ProcessTable, Program
from gpuswitch.model.holders import Unit
from gpuswitch.runtime.apart import apart


@dataclass
class _Record:
    """A unit: its ActiveState, the units that would start it again, and the programs that it runs, once started."""

    state: str
    triggers: tuple[Unit, ...] = ()
    programs: list[Program] = field(default_factory=list)


class Units:
    """The units of one machine, and its `sessions`, each with the uid whose it is. `inhibitors`: by GPU.

    `booting`: the whole machine is still starting; `stopping`: it is going down. `managed` False: there is no systemd
    on it.
    """

    def __init__(self, bus: Bus, table: ProcessTable) -> None:
        self._bus = bus
        self._table = table
        self._records: dict[Unit, _Record] = {}
        self.jobs: defaultdict[Unit, asyncio.Lock] = defaultdict(asyncio.Lock)
        """A unit has one job at a time: a start waits for the stop before it, whoever asked for that."""
        self.sessions: dict[str, int] = {}
        self.inhibitors: set[str] = set()
        self._uninhibited: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self.aliases: dict[Unit, Unit] = {}
        self.booting = True
        self.stopping = False
        self.managed = True
        self.settled: Callable[[Unit, str], None] = lambda _unit, _state: None
        """Told of each state that a unit gets to."""
        table.ended = self._program_ended

    def inhibit(self, gpu: str) -> None:
        self.inhibitors.add(gpu)
        self._uninhibited[gpu].clear()

    def uninhibit(self, gpu: str) -> None:
        """What kept the machine awake for this GPU ends, whoever has ended it."""
        self.inhibitors.discard(gpu)
        self._uninhibited[gpu].set()

    async def until_uninhibited(self, gpu: str) -> None:
        if gpu in self.inhibitors:
            await self._uninhibited[gpu].wait()

    def names(self) -> frozenset[str]:
        return frozenset(map(str, self._records))

    def state(self, unit: Unit) -> str:
        """`active`, `inactive`, `activating` or `failed`; "" where there is no such unit."""
        return self._records[unit].state if unit in self._records else ""

    def add(self, unit: Unit, *, active: bool = True, triggered_by: Collection[Unit] = ()) -> None:
        """Install a unit. Those in `triggered_by` (sockets, say) start it again while they are active."""
        self._records[unit] = _Record("active" if active else "inactive", tuple(triggered_by))
        for trigger in triggered_by:
            self._records.setdefault(trigger, _Record("active"))

    def run(self, program: Program) -> None:
        """A program is started, as part of its unit and its session."""
        if program.unit is not None:
            record = self._records.setdefault(program.unit, _Record("active"))
            record.state = "active"
            record.programs.append(program)
        if program.session:
            self.sessions[program.session] = program.uid
        self._table.start(program)

    def stop(self, unit: Unit) -> None:
        """All its processes end. What would start it again does so, unless it is stopped too."""
        self._records[unit].state = "inactive"
        self.settled(unit, "inactive")
        for program in self._table.running(unit=unit):
            self._table.end(program, stopped=True)
        for program in self._table.running():
            if program.lives_by == unit:
                self._bus.later(self._outlived(program))
        self._trigger(unit)

    def settle(self, unit: Unit, state: str) -> None:
        """The unit gets to another state; active, its programs run."""
        record = self._records[unit]
        record.state = state
        self.settled(unit, state)
        for program in record.programs if state == "active" else ():
            if self._table.named(program.name) is None:
                self._table.start(program)

    def triggers(self, unit: Unit) -> tuple[Unit, ...]:
        """The active units that would start it again."""
        known = self._records.get(unit)
        return tuple(trigger for trigger in known.triggers if self.state(trigger) == "active") if known else ()

    def end_session(self, session: str) -> None:
        for program in self._table.running():
            if program.session == session:
                self._table.end(program)
        self.sessions.pop(session, None)

    def _program_ended(self, program: Program) -> None:
        """By itself, or by a signal."""
        unit = program.unit
        if program.restarts:
            self._bus.later(self._restart(program))
        elif unit is not None and self.state(unit) == "active" and not any(self._table.running(unit=unit)):
            self._records[unit].state = "inactive"
            self.settled(unit, "inactive")
            self._trigger(unit)

    async def _restart(self, program: Program) -> None:
        await asyncio.sleep(MOMENT)
        stopped = program.unit is not None and self.state(program.unit) != "active"
        if not stopped and self._table.named(program.name) is None:
            self._table.start(program)

    async def _outlived(self, program: Program) -> None:
        await asyncio.sleep(MOMENT)
        self._table.end(program)

    def _trigger(self, unit: Unit) -> None:
        if self.triggers(unit):
            self._bus.later(self._triggered(unit))

    async def _triggered(self, unit: Unit) -> None:
        """A client connects to the socket that is still there."""
        await asyncio.sleep(MOMENT)
        if self.triggers(unit) and self.state(unit) == "inactive":
            self.settle(unit, "active")


class SimulatedSystemd(Systemd):
    """The port, on a machine's units."""

    def __init__(self, bus: Bus, units: Units) -> None:
        self._bus = bus
        self._units = units

    async def active(self, units: Collection[Unit]) -> frozenset[Unit]:
        for unit in units:
            await self._bus.faults.strike("active", unit).land(Call("ask for the state of", unit))
        if not self._units.managed:
            return frozenset()
        return frozenset(unit for unit in units if self._units.state(unit) in {"active", "activating"})

    async def missing(self, units: Collection[Unit]) -> frozenset[Unit]:
        return frozenset(unit for unit in units if self._units.managed and not self._units.state(unit))

    async def canonical(self, unit: Unit) -> Unit:
        return self._units.aliases.get(unit, unit)

    async def sockets(self, unit: Unit) -> tuple[Unit, ...]:
        await self._bus.faults.strike("sockets", unit).land(Call("ask for the sockets of", unit))
        return self._units.triggers(unit) if self._units.managed else ()

    async def stop(self, unit: Unit) -> None:
        call = Call("stop", unit)
        strike = self._bus.faults.strike("stop_unit", unit)
        self._known(unit, call)
        async with self._units.jobs[unit]:
            if await strike.land(call):
                self._units.stop(unit)

    async def start(self, unit: Unit, job: StartJob = StartJob.START) -> None:
        call = Call(job.operation, unit)
        strike = self._bus.faults.strike("start_unit", unit)
        self._known(unit, call)
        if job.cancelled:
            await self._started(unit, job, call, strike)
        else:
            await apart(self._bus.begin(self._started(unit, job, call, strike)))

    async def _started(self, unit: Unit, job: StartJob, call: Call, strike: Strike) -> None:
        async with self._units.jobs[unit]:
            runs = self._units.state(unit) == "active"
            if runs if job is StartJob.START else job is StartJob.TRY_RESTART and not runs:
                return
            if runs:
                self._units.stop(unit)
            self._units.settle(unit, "activating")
            state = "failed"
            try:
                state = "active" if await strike.land(call) else "inactive"
            except asyncio.CancelledError:
                state = "inactive"
                raise
            finally:
                self._units.settle(unit, state)

    async def queue_start(self, unit: Unit, job: StartJob = StartJob.START) -> None:
        self._known(unit, Call(job.operation, unit))
        self._bus.later(self._queued(unit, job))

    async def _queued(self, unit: Unit, job: StartJob) -> None:
        """What becomes of it, nobody waits to hear."""
        with suppress(KernelError):
            await self.start(unit, job)

    async def sessions(self, uid: int) -> tuple[str, ...]:
        if not self._units.managed:
            return ()
        return tuple(sorted(session for session, owner in self._units.sessions.items() if owner == uid))

    async def end_session(self, session: str) -> None:
        call = Call("end session", session)
        strike = self._bus.faults.strike("end_session", session)
        if not self._units.managed or session not in self._units.sessions:
            raise call.error(errno.ENOENT)
        if await strike.land(call):
            self._units.end_session(session)

    async def stopping(self) -> bool:
        return self._units.managed and self._units.stopping

    async def booting(self) -> bool:
        call = Call("ask for the state of", "the system")
        await self._bus.faults.strike("booting", "").land(call)
        if not self._units.managed:
            raise call.error(errno.ENOENT)
        return self._units.booting

    async def inhibit(self, gpu: str) -> None:
        call = Call("keep the machine awake for", gpu)
        if await self._bus.faults.strike("inhibit", gpu).land(call) and self._units.managed:
            self._units.inhibit(gpu)

    async def uninhibited(self, gpu: str) -> None:
        if not self._units.managed:
            await asyncio.Event().wait()
        await self._units.until_uninhibited(gpu)

    async def release(self, gpu: str) -> None:
        if await self._bus.faults.strike("release_inhibitor", gpu).land(Call("let the machine sleep after", gpu)):
            self._units.uninhibit(gpu)

    def _known(self, unit: Unit, call: Call) -> None:
        if not self._units.managed or not self._units.state(unit):
            raise call.error(errno.ENOENT)
