"""The kernel operations on each GPU, done by a worker of its own: one at a time, each of which may never return."""

from __future__ import annotations

import asyncio
import errno
import itertools
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpuswitch.errors import KernelError
from gpuswitch.host.linux import procfs
from gpuswitch.host.linux.adopted import Adopted
from gpuswitch.host.linux.sysfs import Roots
from gpuswitch.host.linux.worker import Worker
from gpuswitch.model.address import PciAddress
from gpuswitch.model.drivers import Candidate
from gpuswitch.model.facts import Captured, Consoles, Driver
from gpuswitch.model.holders import Process
from gpuswitch.switch.host import Kernel, Pending

log = logging.getLogger(__name__)

_PROGRAM = Path(__file__).with_name("worker_main.py")
_LONGEST_REQUEST = 65536  # as in worker_main.py
_CLOSE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class _Sent:
    """A request that has no reply yet. `answer` may be done before: then nobody waits for it any more."""

    number: str
    operation: str
    subject: str
    what: str
    at: float
    answer: asyncio.Future[list[str]]


class LinuxKernel(Kernel):
    """The operations on one GPU, done by its worker."""

    def __init__(self, gpu: str, roots: Roots, role: str = "worker") -> None:
        """`role`: what this one is to the GPU, for the person who reads `ps`."""
        places = (roots.sysfs, roots.dev, roots.iomem, roots.tools)
        self._command = (sys.executable, "-ISE", str(_PROGRAM), *places, gpu, role)
        self._gpu = gpu
        self._worker: Worker | None = None
        self._process: Process | None = None
        self._numbers = itertools.count(1)
        self._sent: _Sent | None = None
        self._adopted: Adopted | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._held: set[int] = set()
        self._lost: set[int] = set()

    def prepare(self) -> None:
        """Start the worker, where none runs.

        That it cannot be started is told by the operation that needs it.
        """
        try:
            self._running_worker()
        except OSError as error:
            log.warning("cannot start the worker of %s: %s", self._gpu, error.strerror)

    async def capture(self, functions: Sequence[PciAddress]) -> Mapping[PciAddress, Captured]:
        values = await self._call("read the settings of", _names(functions), "capture", *map(str, functions))
        captured = {}
        for function, (driver, module, override, control) in zip(functions, _fours(values), strict=True):
            captured[function] = Captured(Driver(driver, module or None) if driver else None, override or None, control)
        return captured

    async def candidates(self, function: PciAddress) -> tuple[Candidate, ...]:
        found = await self._call("find the modules for", str(function), "candidates", str(function))
        return tuple(Candidate(module, frozenset(needs)) for module, *needs in map(str.split, found))

    async def loadable(self, modules: Sequence[str], *, by_name: bool = False) -> tuple[str, ...]:
        operation = "installed" if by_name else "loadable"
        return tuple(await self._call("find the modules", ", ".join(modules), operation, *modules))

    async def load(self, module: str) -> None:
        await self._call("load", module, "load", module)

    async def keep_awake(self, functions: Sequence[PciAddress]) -> None:
        await self._call("keep awake", _names(functions), "awake", *map(str, functions))

    async def set_power_control(self, control: Mapping[PciAddress, str]) -> None:
        pairs = [text for function, value in control.items() for text in (str(function), value)]
        await self._call("set power/control of", _names(control), "power", *pairs)

    async def set_override(self, overrides: Mapping[PciAddress, str | None]) -> None:
        pairs = [text for function, driver in overrides.items() for text in (str(function), driver or "")]
        await self._call("set driver_override of", _names(overrides), "override", *pairs)

    async def unbind(self, function: PciAddress, driver: str) -> None:
        if self._lost:
            # Somebody else may have opened the group since: then this write would wait for them, and cannot be undone.
            nodes = ", ".join(f"/dev/vfio/{group}" for group in sorted(self._lost))
            raise KernelError("unbind", str(function), errno.EIO, f"the worker that held {nodes} is gone")
        await self._call("unbind", str(function), "unbind", str(function), driver, what=f"{function} from {driver}")

    async def probe(self, function: PciAddress) -> None:
        await self._call("probe", str(function), "probe", str(function))

    async def hold_group(self, group: int) -> None:
        if group in self._held:
            return
        await self._call("open", f"/dev/vfio/{group}", "hold", str(group))
        self._lost.discard(group)
        self._held.add(group)

    async def release_group(self, group: int) -> None:
        if self._worker is not None:
            await self._call("close", f"/dev/vfio/{group}", "release", str(group))
        self._lost.discard(group)
        self._held.discard(group)

    async def unload(self, module: str) -> None:
        await self._call("unload", module, "unload", module)

    async def announce(self, functions: Sequence[PciAddress], subsystem: str, action: str) -> None:
        arguments = (subsystem, action, *map(str, functions))
        await self._call(f"send {action!r} for the {subsystem} cards of", _names(functions), "announce", *arguments)

    async def consoles(self) -> Consoles:
        values = await self._call("read the console map from", "the frame buffers", "consoles")
        seen = list(zip(values[::3], values[1::3], values[2::3], strict=True))
        return Consoles(
            frame_buffers={int(n): PciAddress.parse(at) if at else None for kind, n, at in seen if kind == "fb"},
            mapped={int(terminal): int(n) for kind, terminal, n in seen if kind == "vt"},
            bound={name: bound == "1" for kind, name, bound in seen if kind == "vtcon"},
        )

    async def map_consoles(self, terminals: Sequence[int], frame_buffer: int) -> None:
        numbers = tuple(map(str, terminals))
        node = f"/dev/fb{frame_buffer}"
        await self._call("show text consoles on", node, "map_consoles", str(frame_buffer), *numbers)

    async def bind_console(self, vtconsole: str, *, bound: bool) -> None:
        await self._call("bind" if bound else "unbind", vtconsole, "bind_console", vtconsole, str(int(bound)))

    async def unbind_platform(self, device: str, driver: str) -> None:
        await self._call("unbind", device, "unbind_platform", device, driver, what=f"{device} from {driver}")

    async def bind_platform(self, device: str, driver: str) -> None:
        await self._call("bind", device, "bind_platform", device, driver, what=f"{device} to {driver}")

    async def persistence(self, function: PciAddress) -> bool | None:
        subject = str(function)
        modes = await self._call("read the persistence mode of", subject, "persistence", subject)
        return modes == ["on"] if modes else None

    async def set_persistence(self, function: PciAddress, *, on: bool) -> None:
        mode = "on" if on else "off"
        await self._call(f"turn {mode} the persistence mode of", str(function), "set_persistence", str(function), mode)

    async def reset(self, function: PciAddress) -> None:
        await self._call("reset", str(function), "reset", str(function))

    async def remove(self, functions: Sequence[PciAddress]) -> None:
        await self._call("remove from the PCI bus", _names(functions), "remove", *map(str, functions))

    async def rescan(self, functions: Sequence[PciAddress]) -> None:
        await self._call("rescan the bus of", _names(functions), "rescan", *map(str, functions))

    async def lost(self, functions: Sequence[PciAddress]) -> tuple[PciAddress, ...]:
        found = await self._call("read the configuration space of", _names(functions), "lost", *map(str, functions))
        return tuple(map(PciAddress.parse, found))

    @property
    def worker(self) -> Process | None:
        return self._process if self._worker is not None else None

    def adopt(self, pending: Pending) -> bool:
        if pending.worker is None:
            return False
        try:
            self._adopted = Adopted(pending.what, pending.worker, self._adopted_ended)
        except ProcessLookupError:
            return False
        except OSError as error:
            number = error.errno or errno.EIO
            raise KernelError("find", f"process {pending.worker.pid}", number, str(error.strerror)) from None
        self._idle.clear()
        return True

    @property
    def pending(self) -> Pending | None:
        if self._adopted is not None:
            return _in_kernel(self._adopted.what, self._adopted.worker.pid, self._adopted.worker)
        if self._sent is None or self._worker is None:
            return None
        return _in_kernel(self._sent.what, self._worker.pid, self._process)

    async def returned(self) -> None:
        await self._idle.wait()

    async def close(self) -> None:
        """Let the worker go, and see it off if it is idle. One that the kernel has ends when that returns."""
        if self._worker is None:
            return
        worker = self._worker
        worker.let_go()
        if self._sent is not None:
            return
        self._discard_worker()
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                await worker.gone.wait()
        except TimeoutError:
            log.warning("the worker of %s (pid %d) does not end, though it has nothing to do", self._gpu, worker.pid)

    async def _call(self, operation: str, subject: str, request: str, *arguments: str, what: str = "") -> list[str]:
        """Send one request and wait for its reply. A cancelled caller leaves it to the kernel, and to `_returned`."""
        if busy := self._adopted or self._sent:
            text = f"the kernel has not returned from this: {busy.what}"
            raise KernelError(operation, subject, errno.EBUSY, text)
        number = str(next(self._numbers))
        message = "\0".join([number, request, *arguments]).encode()
        # A NUL would end an argument early, and of a longer message the worker would read the beginning only.
        if message.count(0) != 1 + len(arguments) or len(message) > _LONGEST_REQUEST:
            raise KernelError(operation, subject, errno.EINVAL, "no driver, module or function is named like that")
        loop = asyncio.get_running_loop()
        try:
            self._send(message)
        except OSError as error:
            text = f"its worker cannot be started or reached: {error.strerror}"
            raise KernelError(operation, subject, error.errno or errno.EIO, text) from None
        answer: asyncio.Future[list[str]] = loop.create_future()
        self._sent = _Sent(number, operation, subject, f"{operation} {what or subject}", loop.time(), answer)
        self._idle.clear()
        return await answer

    def _running_worker(self) -> Worker:
        if self._worker is None:
            self._worker = Worker(self._command, self._received, self._worker_ended)
            # For whoever may have to find it again, by when nobody could tell any more.
            self._process = procfs.process(self._worker.pid)
        return self._worker

    def _send(self, message: bytes) -> None:
        """To the worker that runs; to a new one, where it turns out to have died: then it has not read this."""
        try:
            self._running_worker().send(message)
        except (BrokenPipeError, ConnectionResetError):
            self._discard_worker()
            if self._lost:  # this may be an unbind that relies on the group being held
                raise
            self._running_worker().send(message)

    def _discard_worker(self) -> None:
        """Have no worker. What it held is not held any more."""
        if self._worker is not None:
            self._worker.let_go()
        self._worker = None
        self._lost |= self._held
        self._held.clear()

    def _received(self, worker: Worker, message: bytes) -> None:
        sent = self._sent
        if worker is not self._worker:
            return
        match message.decode(errors="replace").split("\0"):
            case [number, "ok", *values] if sent is not None and number == sent.number:
                self._returned(sent, values)
            case [number, "error", code, subject, text] if sent is not None and number == sent.number:
                self._returned(sent, KernelError(sent.operation, subject, int(code), text))
            case _:
                # Not the program that we know. Whatever it does, it does not do it for us any longer.
                self._give_up(worker, "said something that is no answer")

    def _worker_ended(self, worker: Worker, how: str) -> None:
        if worker is self._worker:
            self._give_up(worker, how)

    def _give_up(self, worker: Worker, why: str) -> None:
        log.warning("the worker of %s (pid %d) %s", self._gpu, worker.pid, why)
        self._discard_worker()
        if self._sent is not None:
            error = KernelError(self._sent.operation, self._sent.subject, errno.EIO, f"its worker {why}")
            self._returned(self._sent, error)

    def _adopted_ended(self) -> None:
        if self._adopted is not None:
            log.info("the kernel returned from what an earlier run of the service had begun: %s", self._adopted.what)
        self._adopted = None
        self._settle()

    def _returned(self, sent: _Sent, result: list[str] | KernelError) -> None:
        self._sent = None
        self._settle()
        if sent.answer.done():
            seconds = asyncio.get_running_loop().time() - sent.at
            outcome = result if isinstance(result, KernelError) else "it worked"
            log.info("the kernel returned after %.1f s from this: %s: %s", seconds, sent.what, outcome)
        elif isinstance(result, KernelError):
            sent.answer.set_exception(result)
        else:
            sent.answer.set_result(result)

    def _settle(self) -> None:
        if self._sent is None and self._adopted is None:
            self._idle.set()


def _names(functions: Mapping[PciAddress, object] | Sequence[PciAddress]) -> str:
    return ", ".join(str(function) for function in functions)


def _fours(values: Sequence[str]) -> list[tuple[str, str, str, str]]:
    return list(zip(values[::4], values[1::4], values[2::4], values[3::4], strict=True))


def _in_kernel(what: str, worker_pid: int, worker: Process | None) -> Pending:
    """What is pending, as the process that sits in it shows now."""
    pid = procfs.sitting(worker_pid)
    return Pending(what, pid, procfs.state(pid), procfs.kernel_wait(pid), procfs.stack(pid), worker)
