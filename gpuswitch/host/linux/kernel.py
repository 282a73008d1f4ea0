"""The kernel operations on each GPU, done by a worker of its own: one at a time, each of which may never return."""

from __future__ import annotations

import asyncio
import errno
import itertools
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpuswitch.errors import KernelError
from gpuswitch.host.linux import procfs
from gpuswitch.host.linux.adopted import AdoptedWorker
from gpuswitch.host.linux.sysfs import Roots
from gpuswitch.host.linux.wire import CAPTURED, from_wire, on_wire
from gpuswitch.host.linux.worker import Worker
from gpuswitch.host.operation import Request, Words
from gpuswitch.host.port import Kernel, Pending
from gpuswitch.model.address import PciAddress
from gpuswitch.model.holders import Process

log = logging.getLogger(__name__)

_PROGRAM = Path(__file__).with_name("worker_main.py")
_LONGEST_REQUEST = 65536  # as in worker_main.py
_CLOSE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class _Sent:
    """A request that has no reply yet. `answer` may be done before: then nobody waits for it any more."""

    number: str
    words: Words[Any]
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
        self._adopted: AdoptedWorker | None = None
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

    async def perform(self, request: Request) -> Any:
        if request.operation.name == "capture":
            name, arguments = "capture", [CAPTURED, *on_wire(request.arguments)]
        elif request.operation.attribute:
            name, arguments = "write", [request.operation.attribute, *on_wire(request.arguments)]
        else:
            name, arguments = request.operation.name, on_wire(request.arguments)
        return from_wire(request.operation, await self._call(request.words, name, *arguments))

    async def unbind(self, function: PciAddress, driver: str) -> None:
        if self._lost:
            # Somebody else may have opened the group since: then this write would wait for them, and cannot be undone.
            nodes = ", ".join(f"/dev/vfio/{group}" for group in sorted(self._lost))
            text = f"the worker that held {nodes} is gone"
            raise KernelError("unbind", str(function), errno.EIO, text, whole=f"{function} from {driver}")
        await super().unbind(function, driver)

    async def hold_group(self, group: int) -> None:
        if group in self._held:
            return
        await super().hold_group(group)
        self._lost.discard(group)
        self._held.add(group)

    async def release_group(self, group: int) -> None:
        if self._worker is not None:
            await super().release_group(group)
        self._lost.discard(group)
        self._held.discard(group)

    @property
    def worker(self) -> Process | None:
        return self._process if self._worker is not None else None

    def adopt(self, pending: Pending) -> bool:
        if pending.worker is None:
            return False
        try:
            self._adopted = AdoptedWorker(pending.what, pending.worker, self._adopted_ended)
        except ProcessLookupError:
            return False
        except OSError as error:
            number = error.errno or errno.EIO
            raise KernelError("find", f"process {pending.worker.pid}", number, str(error.strerror)) from None
        self._idle.clear()
        return True

    @property
    def _busy_with(self) -> str | None:
        """What the kernel has not returned from."""
        if self._adopted is not None:
            return self._adopted.what
        return None if self._sent is None else self._sent.words.what

    @property
    def pending(self) -> Pending | None:
        if self._adopted is not None:
            return _in_kernel(self._adopted.what, self._adopted.worker.pid, self._adopted.worker)
        if self._sent is None or self._worker is None:
            return None
        return _in_kernel(self._sent.words.what, self._worker.pid, self._process)

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

    async def _call(self, words: Words[Any], request: str, *arguments: str) -> list[str]:
        """Send one request and wait for its reply. A cancelled caller leaves it to the kernel, and to `_returned`."""
        if (busy := self._busy_with) is not None:
            raise _error(words, errno.EBUSY, f"the kernel has not returned from this: {busy}")
        number = str(next(self._numbers))
        message = "\0".join([number, request, *arguments]).encode()
        # A NUL would end an argument early, and of a longer message the worker would read the beginning only.
        if message.count(0) != 1 + len(arguments) or len(message) > _LONGEST_REQUEST:
            raise _error(words, errno.EINVAL, "no driver, module or function is named like that")
        loop = asyncio.get_running_loop()
        try:
            self._send(message)
        except OSError as error:
            text = f"its worker cannot be started or reached: {error.strerror}"
            raise _error(words, error.errno or errno.EIO, text) from None
        answer: asyncio.Future[list[str]] = loop.create_future()
        self._sent = _Sent(number, words, loop.time(), answer)
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
                self._returned(sent, _error(sent.words, int(code), text, subject))
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
            self._returned(self._sent, _error(self._sent.words, errno.EIO, f"its worker {why}"))

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
            log.info("the kernel returned after %.1f s from this: %s: %s", seconds, sent.words.what, outcome)
        elif isinstance(result, KernelError):
            sent.answer.set_exception(result)
        else:
            sent.answer.set_result(result)

    def _settle(self) -> None:
        if self._sent is None and self._adopted is None:
            self._idle.set()


def _error(words: Words[Any], number: int, text: str, subject: str = "") -> KernelError:
    """What an operation failed with; `subject`: with which of several, "" where it is about one."""
    if subject in {"", words.subject}:
        return KernelError(words.verb, words.subject, number, text, whole=words.whole)
    return KernelError(words.verb, subject, number, text)


def _in_kernel(what: str, worker_pid: int, worker: Process | None) -> Pending:
    """What is pending, as the process that sits in it shows now."""
    pid = procfs.sitting(worker_pid)
    return Pending(what, pid, procfs.state(pid), procfs.kernel_wait(pid), procfs.stack(pid), worker)
