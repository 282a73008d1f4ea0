"""The processes of a simulated machine: who has what open, who lets go when asked, and who comes back."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from signal import SIGHUP, SIGINT, SIGKILL, SIGQUIT, SIGTERM, Signals

from gpuswitch.errors import KernelError
from gpuswitch.host.port import Processes
from gpuswitch.host.simulated.bus import Bus
from gpuswitch.host.simulated.consoles import FrameBuffers
from gpuswitch.host.simulated.devices import Card
from gpuswitch.host.simulated.faults import Call
from gpuswitch.host.simulated.modules import Modules
from gpuswitch.model.address import PciAddress
from gpuswitch.model.holders import Holder, HolderQuery, Process, Scan, Unit, doubt

MOMENT = 0.1
"""Seconds: how long systemd waits before it starts a unit again (RestartSec=), and others until they notice."""
_FIRST_PID = 1000
_TICKS = 100
_USERS = {0: "root", 1000: "alice"}
_SHARED = "nvidiactl"
"""The node, below /dev, that everybody opens who opens a node of kind `nvidia`."""
_ENDING = frozenset({SIGHUP, SIGINT, SIGQUIT, SIGTERM})

_NOT_STARTED = Process(0, 0)


@dataclass(eq=False)
class Program:
    """What runs under one name, and again under the same when its unit is started anew.

    `opens`: a kind of `Card`; it opens each of them when it starts. `opened`: what else it was seen to open, and opens
    again. `polite`: it follows udev, lets go of a card that is announced as removed, and takes up one that appears.
    `stubborn`: SIGTERM does not end it. `restarts`: it comes back, whatever ended it but a stop of its unit.
    `lives_by`: it ends soon after this unit is stopped, as what is drawn on a display does without its display manager.
    `machine`: it has /dev/kvm open.
    """

    name: str
    command: str
    uid: int
    unit: Unit | None
    session: str
    polite: bool
    stubborn: bool
    restarts: bool
    opens: str
    lives_by: Unit | None
    machine: bool
    process: Process = _NOT_STARTED
    opened: set[tuple[PciAddress, str]] = field(default_factory=set)

    def follows(self, kind: str) -> bool:
        """Whether it takes up a card of this kind that appears."""
        return self.polite and (self.opens == kind or any(known == kind for _, known in self.opened))


@dataclass(frozen=True)
class _Waiter:
    processes: frozenset[Process]
    nodes: frozenset[str]
    changed: asyncio.Future[None]


class ProcessTable:
    """What runs on one machine. `ended` is told of each end that nobody's stop of a unit was the cause of."""

    def __init__(self, bus: Bus, modules: Modules, frame_buffers: FrameBuffers) -> None:
        self._bus = bus
        self._frame_buffers = frame_buffers
        self._modules = modules
        self._running: dict[str, Program] = {}
        self._pids = itertools.count(_FIRST_PID)
        self._waiters: list[_Waiter] = []
        self.ended: Callable[[Program], None] = lambda _: None
        bus.ready.append(lambda device, card: self.announced(device.address, card.kind, "add"))
        bus.leaving.append(lambda device, card: self.announced(device.address, card.kind, "remove"))

    def new_process(self) -> Process:
        pid = next(self._pids)
        return Process(pid, pid * _TICKS)

    def running(self, process: Process | None = None, unit: Unit | None = None) -> Iterator[Program]:
        """All that run, or this process, or those of a unit."""
        for program in list(self._running.values()):
            if process in {None, program.process} and unit in {None, program.unit}:
                yield program

    def named(self, name: str) -> Program | None:
        return self._running.get(name)

    def start(self, program: Program) -> None:
        """Start it, under a new number; it opens what it opens."""
        program.process = self.new_process()
        self._running[program.name] = program
        for function, card in list(self._bus.cards()):
            if card.kind and (card.kind == program.opens or (function, card.kind) in program.opened):
                self._take_up(program, function, card.kind)

    def end(self, program: Program, *, stopped: bool = False) -> None:
        """It ends, and closes everything. `stopped`: because its unit was stopped."""
        if self._running.get(program.name) is not program:
            return
        del self._running[program.name]
        self.close_all(program.name)
        self.stir(program.process, ())
        if not stopped:
            self.ended(program)

    def close_all(self, user: str) -> None:
        """Close all that it has open."""
        for number, group in self._bus.groups():
            if group.dma_owner == user:
                group.dma_owner = None
            if group.opened_by == user:
                group.opened_by = None
                self.stir(None, [f"/dev/vfio/{number}"])
        for function in dict.fromkeys(function for function, _ in self._bus.cards()):
            self.close(function, user)
        self.stir(None, [f"/dev/{node}" for node in self._frame_buffers.close_all(user)])

    def close(self, function: PciAddress, user: str, kind: str = "") -> None:
        for card in self._bus.close_cards(function, user, kind):
            self.stir(None, card.nodes)

    def announced(self, function: PciAddress, kind: str, action: str) -> None:
        """Who follows udev hears of a card that is removed or added, or so it seems."""
        for program in self.running():
            if action == "add" and program.follows(kind):
                self._bus.later(self._comes(program, function, kind))
            elif action == "remove" and program.polite:
                self._bus.later(self._goes(program, function, kind))

    def signal(self, process: Process, number: Signals) -> bool:
        """False: it is gone. Who is ended by it ends a little later."""
        for program in self.running(process):
            strike = self._bus.faults.strike("signal", program.name)
            if strike.errno:
                raise Call("signal", process.pid).error(strike.errno)
            if number is SIGKILL or (number in _ENDING and not program.stubborn and not strike.silent):
                asyncio.get_running_loop().call_soon(self.end, program)
            return True
        return False

    async def wait_for_change(self, holders: Sequence[Holder]) -> None:
        """Wait until one of them ends, or somebody closes a node that one of them has open."""
        processes = frozenset(holder.process for holder in holders if holder.process is not None)
        if not processes <= {program.process for program in self.running()}:
            return
        nodes = frozenset(node for holder in holders for node in holder.nodes)
        waiter = _Waiter(processes, nodes, asyncio.get_running_loop().create_future())
        self._waiters.append(waiter)
        try:
            await waiter.changed
        finally:
            self._waiters.remove(waiter)

    def scan(self, query: HolderQuery) -> Scan:
        """Who has it open."""
        cards = self._cards(query)
        nodes: dict[str, set[str]] = {}
        for card in cards:
            for user in card.users:
                nodes.setdefault(user, set()).add(card.nodes[0])
        for user, node in self._named(query.nodes):
            nodes.setdefault(user, set()).add(node)
        holders = [_holder(program, nodes[program.name]) for program in self.running() if program.name in nodes]
        kernel = [holder for module in query.modules for holder in self._unexplained(module, query.nodes)]
        return Scan((*kernel, *sorted(holders, key=lambda holder: holder.pid)), _numbers(cards))

    def numbers(self, query: HolderQuery) -> tuple[str, ...]:
        """The device numbers that are looked for."""
        return _numbers(self._cards(query))

    def _cards(self, query: HolderQuery) -> list[Card]:
        return [card for function, card in self._bus.cards() if self._matches(query, function, card)]

    def _matches(self, query: HolderQuery, function: PciAddress, card: Card) -> bool:
        """Whether it is below one of the functions in sysfs, or an earlier scan had seen it there."""
        device = self._bus.devices.get(function)
        shown = (
            function in query.functions
            and device is not None
            and device.link is not None
            and device.binding is not None
            and card in device.binding.cards
            and bool(card.nodes)
        )
        return shown or (bool(query.numbers) and not set(card.numbers).isdisjoint(query.numbers))

    def _named(self, patterns: Collection[str]) -> Iterator[tuple[str, str]]:
        """Who has a node open that one of these patterns names, and the node."""
        for number, group in self._bus.groups():
            if group.opened_by is not None and _matches(f"vfio/{number}", patterns):
                yield group.opened_by, f"/dev/vfio/{number}"
        yield from ((user, f"/dev/{node}") for user, node in self._frame_buffers.users() if _matches(node, patterns))
        if _matches(_SHARED, patterns):
            for _, card in self._bus.cards():
                yield from ((user, f"/dev/{_SHARED}") for user in card.users if card.kind == "nvidia")

    def _unexplained(self, module: str, nodes: Collection[str]) -> Iterator[Holder]:
        """What no process explains, and no other module, and no console: nor a node that nobody looked for."""
        if not self._modules.unloads:
            # Nobody counts.
            return
        count = sum(user not in self._running for user in self._modules.opened(module))
        if not _matches(_SHARED, nodes):
            shared = [user for _, card in self._bus.cards() if card.kind == module == "nvidia" for user in card.users]
            count += sum(user in self._running for user in shared)
        if count:
            users = "1 user" if count == 1 else f"{count} users"
            yield Holder(None, module, doubt=doubt(f"module {module} has {users} that no process explains"))

    async def _goes(self, program: Program, function: PciAddress, kind: str) -> None:
        if await self._bus.faults.strike("let_go", program.name).land(Call("let go of", function)):
            self.close(function, program.name, kind)

    async def _comes(self, program: Program, function: PciAddress, kind: str) -> None:
        if self._running.get(program.name) is program:
            self._take_up(program, function, kind)

    def _take_up(self, program: Program, function: PciAddress, kind: str) -> None:
        # A card that goes at the same moment is not missed.
        with suppress(KernelError):
            self._bus.open_card(function, program.name, kind)

    def stir(self, process: Process | None, nodes: Collection[str]) -> None:
        for waiter in self._waiters:
            if (process in waiter.processes or not waiter.nodes.isdisjoint(nodes)) and not waiter.changed.done():
                waiter.changed.set_result(None)


class SimulatedProcesses(Processes):
    """The port, on a machine's processes."""

    def __init__(self, bus: Bus, table: ProcessTable) -> None:
        self.elsewhere: Callable[[Sequence[Holder]], Awaitable[None]] | None = None
        """Waits for a change of processes that are none of this machine's, where there are such."""
        self.noticed = lambda *_: None
        self._bus = bus
        self._table = table

    async def scan(self, query: HolderQuery) -> Scan:
        call = Call("look for the holders of", ", ".join(map(str, query.functions)))
        # Others get their turn meanwhile, as they do while a real look goes on.
        await asyncio.sleep(0)
        # First the device numbers, then the processes: what is pulled in between is found all the same.
        query = replace(query, numbers=(*query.numbers, *self._table.numbers(query)))
        sees = [await self._bus.faults.strike("scan", function).land(call) for function in query.functions]
        scan = self._table.scan(query) if all(sees) else Scan()
        self.noticed(query, scan)
        return scan

    async def wait_for_change(self, holders: Sequence[Holder]) -> None:
        ours = any(holder.process == program.process for holder in holders for program in self._table.running())
        if self.elsewhere is None or ours:
            await self._table.wait_for_change(holders)
        else:
            await self.elsewhere(holders)

    def signal(self, process: Process, number: Signals) -> bool:
        return self._table.signal(process, number)


def _numbers(cards: Iterable[Card]) -> tuple[str, ...]:
    return tuple(sorted({number for card in cards for number in card.numbers}))


def _holder(program: Program, nodes: Collection[str]) -> Holder:
    user = _USERS.get(program.uid, str(program.uid))
    return Holder(
        program.process,
        program.command,
        program.uid,
        user,
        program.unit,
        program.session,
        tuple(sorted(nodes)),
        machine=program.machine or any(node.startswith("/dev/vfio/") for node in nodes),
    )


def _matches(node: str, patterns: Collection[str]) -> bool:
    return any(fnmatchcase(node, pattern) for pattern in patterns)
