"""Who has what open, looked at by processes of their own, since such a look may wait for ever; and a word to them."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from asyncinotify import Inotify, Mask

from gpuswitch.errors import KernelError
from gpuswitch.host.linux import procfs
from gpuswitch.host.linux.descriptors import when_readable
from gpuswitch.host.linux.sysfs import Roots
from gpuswitch.host.linux.worker import Worker
from gpuswitch.host.port import Processes
from gpuswitch.model.drivers import from_module, profile_of
from gpuswitch.model.holders import Holder, HolderQuery, Process, Scan, doubt, unit_and_session

log = logging.getLogger(__name__)

_PROGRAM = Path(__file__).with_name("scan_main.py")
_MOST_ABANDONED = 4
_MOST_WATCHED = 16
"""Of many holders, it is enough to be told of some: a GPU is free when all of them have gone."""
_CLOSE_SECONDS = 5.0


@dataclass(slots=True)
class _Look:
    """A request to a scanner: the pieces of its answer so far, and who waits for it."""

    answer: asyncio.Future[bytes]
    pieces: list[bytes] = field(default_factory=list)


class LinuxProcesses(Processes):
    """The processes of this machine. One idle scanner is kept for the next look."""

    def __init__(self, roots: Roots) -> None:
        self.noticed = lambda *_: None
        self._dev = roots.dev
        self._command = (sys.executable, "-ISE", str(_PROGRAM), roots.sysfs, roots.dev, roots.proc)
        self._idle: Worker | None = None
        self._looks: dict[Worker, _Look] = {}
        self._abandoned: set[Worker] = set()
        self._leaving: set[Worker] = set()

    async def scan(self, query: HolderQuery) -> Scan:
        if len(self._abandoned) >= _MOST_ABANDONED:
            text = f"{len(self._abandoned)} earlier looks have not returned"
            raise KernelError("look for", "holders", errno.EBUSY, text)
        worker, look = self._ask(request_of(query))
        try:
            said = json.loads(await look.answer)
        except asyncio.CancelledError:
            self._abandon(worker)
            raise
        if "error" in said:
            number, text = said["error"]
            raise KernelError("look for", "holders", number or errno.EIO, text)
        holders = sorted((holder_of(found) for found in said["holders"]), key=lambda holder: (holder.pid, holder.nodes))
        scan = Scan(tuple(holders), tuple(said["numbers"]))
        self.noticed(query, scan)
        return scan

    async def wait_for_change(self, holders: Sequence[Holder]) -> None:
        changed = asyncio.Event()
        processes = [holder.process for holder in holders if holder.process]
        with ExitStack() as stack:
            try:
                for process in processes[:_MOST_WATCHED]:
                    pidfd = _open(process)
                    if pidfd is None:
                        return
                    stack.callback(os.close, pidfd)
                    when_readable(stack, pidfd, changed.set)
            except OSError as error:
                text = f"cannot wait for their end: {error.strerror}"
                raise KernelError("watch", "the holders", error.errno or errno.EIO, text) from None
            nodes = {
                node.removeprefix("/dev") for holder in holders for node in holder.nodes if node.startswith("/dev/")
            }
            self._watch_nodes(stack, nodes, changed.set)
            await changed.wait()

    def signal(self, process: Process, number: signal.Signals) -> bool:
        try:
            pidfd = _open(process)
            if pidfd is None:
                return False
            try:
                signal.pidfd_send_signal(pidfd, number)
            finally:
                os.close(pidfd)
        except ProcessLookupError:
            return False
        except OSError as error:
            text = os.strerror(error.errno or errno.EIO)
            raise KernelError(
                f"send {number.name} to", f"process {process.pid}", error.errno or errno.EIO, text
            ) from None
        return True

    async def close(self) -> None:
        """Let all scanners go, and see off those that have nothing to do. One that waits ends when that returns."""
        for worker in self._looks:
            worker.let_go()
        if self._idle is not None:
            self._dismiss(self._idle)
            self._idle = None
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                await asyncio.gather(*(worker.gone.wait() for worker in self._leaving))
        except TimeoutError:
            pids = ", ".join(str(worker.pid) for worker in self._leaving)
            log.warning("a scanner (pid %s) does not end, though it has nothing to do", pids)

    def _ask(self, request: bytes) -> tuple[Worker, _Look]:
        """Send it to the idle scanner; to a new one where there is none, or where that turns out to have died."""
        worker, self._idle = self._idle, None
        try:
            if worker is not None:
                try:
                    worker.send(request)
                except (BrokenPipeError, ConnectionResetError):
                    self._dismiss(worker)
                    worker = None
            if worker is None:
                worker = Worker(self._command, self._received, self._ended)
                worker.send(request)
        except OSError as error:
            if worker is not None:
                self._dismiss(worker)
            text = f"the scanner cannot be started or reached: {error.strerror}"
            raise KernelError("look for", "holders", error.errno or errno.EIO, text) from None
        look = _Look(asyncio.get_running_loop().create_future())
        self._looks[worker] = look
        return worker, look

    def _abandon(self, worker: Worker) -> None:
        """Nobody waits for this one any longer. It finds that out when it comes back, and ends."""
        if self._looks.pop(worker, None) is not None:
            self._abandoned.add(worker)
            worker.let_go()

    def _dismiss(self, worker: Worker) -> None:
        """It has nothing to do, and ends."""
        self._leaving.add(worker)
        worker.let_go()

    def _received(self, worker: Worker, message: bytes) -> None:
        look = self._looks.get(worker)
        if look is None:
            return
        look.pieces.append(message[1:])
        if message.startswith(b"."):
            del self._looks[worker]
            if not look.answer.done():  # its caller may have been cancelled in this turn of the loop
                look.answer.set_result(b"".join(look.pieces))
            if self._idle is None:
                self._idle = worker
            else:
                self._dismiss(worker)

    def _ended(self, worker: Worker, how: str) -> None:
        self._abandoned.discard(worker)
        self._leaving.discard(worker)
        if worker is self._idle:
            self._idle = None
        look = self._looks.pop(worker, None)
        if look is not None and not look.answer.done():
            log.warning("the scanner (pid %d) %s", worker.pid, how)
            look.answer.set_exception(KernelError("look for", "holders", errno.EIO, f"the scanner {how}"))

    def _watch_nodes(self, stack: ExitStack, nodes: Iterable[str], changed: Callable[[], None]) -> None:
        """Their own file tells when one is closed. This does not open them."""
        try:
            inotify = stack.enter_context(Inotify())
            when_readable(stack, inotify.fd, changed)
            for node in nodes:
                with suppress(FileNotFoundError):  # it is in another /dev only, or its device left
                    inotify.add_watch(f"{self._dev}{node}", Mask.CLOSE)
        except OSError as error:  # the user has as many watches as the kernel allows; the processes still tell
            log.warning("cannot watch device nodes: %s", error.strerror)


def _open(process: Process) -> int | None:
    """A descriptor of this process; None: it is gone, whoever has its number now.

    Raises:
        OSError: there are no more descriptors.
    """
    try:
        pidfd = os.pidfd_open(process.pid)
    except OSError as error:
        if error.errno in {errno.ESRCH, errno.EINVAL, errno.ENOENT}:  # the last two: a thread has this number now
            return None
        raise
    # Looked at only now, so whoever has the number is the one that the descriptor is of.
    try:
        same = procfs.process(process.pid) == process
    except OSError:
        os.close(pidfd)
        raise
    if same:
        return pidfd
    os.close(pidfd)
    return None


def request_of(query: HolderQuery) -> bytes:
    """As scan_main.py wants it. The nodes that a module's devices share tell who else has a reference to it."""
    return json.dumps(
        {
            "functions": [str(function) for function in query.functions],
            "nodes": query.nodes,
            "numbers": query.numbers,
            "modules": {module: profile_of(from_module(module, {})).nodes for module in query.modules},
        }
    ).encode()


def holder_of(found: dict[str, Any]) -> Holder:
    """A holder as scan_main.py tells it."""
    unit, session = unit_and_session(found["cgroup"])
    return Holder(
        process=Process(found["pid"], found["started"]) if found["pid"] else None,
        command=found["command"],
        uid=found["uid"],
        user=found["user"],
        unit=unit,
        session=session,
        nodes=tuple(found["nodes"]),
        doubt=doubt(found["doubt"]),
        machine=found["machine"],
    )
