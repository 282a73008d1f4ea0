"""The daemon's side of the workers: one `LinuxKernel` for each GPU, and the process that does its operations.

A worker may be in the kernel for ever, and nothing of ours may then depend on it. So it is a plain process with a
session of its own (a terminal's ^C does not reach it), it is never sent a signal (some kernel waits turn from S into D
or spin after one), and it has no descriptor but its socket: all three standard ones are /dev/null or that socket, since
a pipe or the journal's socket that a stuck process keeps open makes whoever waits for its end wait for ever. What goes
wrong in it comes back in its replies; if it dies, its exit status tells. asyncio's own subprocesses are no help: their
transport kills what it is closed on.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpuswitch.errors import KernelError
from gpuswitch.host.linux.sysfs import Roots
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import Captured, Driver
from gpuswitch.switch.host import Kernel, Pending

log = logging.getLogger(__name__)

_PROGRAM = Path(__file__).with_name("worker_main.py")
_LONGEST_REQUEST = 65536  # as in worker_main.py
_LONGEST_REPLY = 1 << 17
_CLOSE_SECONDS = 5.0
# What is meant for the daemon (LD_PRELOAD, PYTHON...) is not meant for a program that writes to the kernel.
_ENVIRONMENT: dict[str, str] = {}


class Worker:
    """One worker process. `received` gets each of its messages; `ended` is told how, once, when it is dead."""

    def __init__(
        self,
        command: Sequence[str],
        received: Callable[[Worker, bytes], None],
        ended: Callable[[Worker, str], None],
    ) -> None:
        """Start it; returns as soon as the program runs.

        Raises:
            OSError: it cannot be started.
        """
        self._received = received
        self._ended = ended
        self._loop = asyncio.get_running_loop()
        self.gone = asyncio.Event()
        # Each message arrives as a whole, or not at all: neither side can be left with half of one.
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                self._process = subprocess.Popen(
                    command,
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    close_fds=True,
                    cwd="/",
                    env=_ENVIRONMENT,
                    start_new_session=True,
                )
                self._pidfd = os.pidfd_open(self._process.pid)
            except OSError:
                self._socket.close()
                raise
        self._socket.setblocking(False)
        self.pid = self._process.pid
        self._loop.add_reader(self._socket, self._receive)
        self._loop.add_reader(self._pidfd, self._end)

    def send(self, message: bytes) -> None:
        """Give it something to do.

        Raises:
            OSError: it is gone.
        """
        self._socket.send(message)

    def let_go(self) -> None:
        """Close our end: it ends when it is idle, or when the kernel lets it be."""
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket)
            self._socket.close()

    def _receive(self) -> None:
        while self._socket.fileno() >= 0:
            try:
                message = self._socket.recv(_LONGEST_REPLY)
            except OSError:  # EAGAIN: that was all; ECONNRESET: it died with a request unread
                return
            if not message:
                # End-of-file, and readable for ever. It is about to end, which the pidfd tells.
                self._loop.remove_reader(self._socket)
                return
            self._received(self, message)

    def _end(self) -> None:
        """It is dead. What it said before it died still counts."""
        self._receive()
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self.let_go()
        status = self._process.wait()  # returns at once: a pidfd is readable when the process can be reaped
        self.gone.set()
        self._ended(self, f"died of signal {-status}" if status < 0 else f"ended with status {status}")


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

    def __init__(self, gpu: str, roots: Roots) -> None:
        self._command = (sys.executable, "-ISE", str(_PROGRAM), roots.sysfs, roots.dev, roots.tools, gpu)
        self._gpu = gpu
        self._worker: Worker | None = None
        self._numbers = itertools.count(1)
        self._sent: _Sent | None = None
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

    async def candidates(self, function: PciAddress) -> tuple[str, ...]:
        return tuple(await self._call("find the modules for", str(function), "candidates", str(function)))

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

    @property
    def pending(self) -> Pending | None:
        if self._sent is None or self._worker is None:
            return None
        pid = _sitting(self._worker.pid)
        return Pending(self._sent.what, pid, _process_state(pid), _kernel_wait(pid))

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
        if self._sent is not None:
            text = f"the kernel has not returned from this: {self._sent.what}"
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

    def _returned(self, sent: _Sent, result: list[str] | KernelError) -> None:
        self._sent = None
        self._idle.set()
        if sent.answer.done():
            seconds = asyncio.get_running_loop().time() - sent.at
            outcome = result if isinstance(result, KernelError) else "it worked"
            log.info("the kernel returned after %.1f s from this: %s: %s", seconds, sent.what, outcome)
        elif isinstance(result, KernelError):
            sent.answer.set_exception(result)
        else:
            sent.answer.set_result(result)


def _names(functions: Mapping[PciAddress, object] | Sequence[PciAddress]) -> str:
    return ", ".join(str(function) for function in functions)


def _fours(values: Sequence[str]) -> list[tuple[str, str, str, str]]:
    return list(zip(values[::4], values[1::4], values[2::4], values[3::4], strict=True))


def _sitting(pid: int) -> int:
    """The process that sits in the kernel: the worker, or the modprobe that it waits for."""
    children = _proc(pid, f"task/{pid}/children").split()
    return int(children[0]) if children else pid


def _process_state(pid: int) -> str:
    """Field 3 of /proc/PID/stat, the first one after the name in brackets (which may hold brackets itself)."""
    return _proc(pid, "stat").rpartition(")")[2].strip()[:1]


def _kernel_wait(pid: int) -> str:
    """/proc/PID/wchan; it says 0 where the process does not wait, or where we may not know."""
    wait = _proc(pid, "wchan").strip()
    return "" if wait == "0" else wait


def _proc(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text()
    except OSError:
        return ""
