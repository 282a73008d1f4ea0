"""logind (org.freedesktop.login1(5)): its sessions, and the locks that keep the machine from sleeping.

A lock is held by a `systemd-inhibit`, which outlives the service. logind's list of locks is all that is remembered of
it: after a restart it tells which process holds one for which GPU.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from gpuswitch.errors import KernelError
from gpuswitch.host.linux import procfs
from gpuswitch.host.linux.busclient import PROPERTIES, CallError, Remote, connected_to
from gpuswitch.host.linux.children import Child, find
from gpuswitch.host.linux.descriptors import when_readable
from gpuswitch.model.holders import Process

log = logging.getLogger(__name__)

LOGIND = "org.freedesktop.login1"
PATH = "/org/freedesktop/login1"
MANAGER = "org.freedesktop.login1.Manager"

_WHO = "gpuswitch"
_WHAT = "sleep:handle-lid-switch"
_KEEP = "keep the machine awake for GPU"
_LET = "let the machine sleep again for GPU"


class Sessions:
    """The sessions of logind."""

    async def of(self, uid: int) -> tuple[str, ...]:
        """See `gpuswitch.host.port.Systemd.sessions`.

        Since version 256 a user's manager has a session too; it ends by itself, after the last one of the user's own.
        """
        async with connected_to(LOGIND, "list the sessions of", f"user {uid}", start=True) as logind:
            try:
                rows = await logind.call(PATH, MANAGER, "ListSessions")
            except CallError as error:
                if not error.absent:
                    raise
                return ()
            own = {name: path for name, owner, _, _, path in rows if owner == uid}
            return tuple([name for name, path in own.items() if not await _is_managers(logind, path)])

    async def end(self, session: str) -> None:
        """See `gpuswitch.host.port.Systemd.end_session`."""
        async with connected_to(LOGIND, "end session", session, start=True) as logind:
            if not await _has_session(logind, session):
                raise KernelError("end session", session, errno.ENOENT, "there is no such session")
            await logind.listen(MANAGER, "SessionRemoved")
            await logind.call(PATH, MANAGER, "TerminateSession", "s", session)
            # A new run of logind does not tell of what ended before it, so it is asked, whatever it has to tell.
            while await _has_session(logind, session):
                await logind.signal()


class Inhibitors:
    """The locks that we hold, one for each GPU. `tools`: folders of programs, joined by colons."""

    def __init__(self, tools: str) -> None:
        self._tools = tools
        self._warned = False
        self._ending: set[Process] = set()
        """Those that were told to end: they may have a lock still, and will not for long."""
        self._released: set[str] = set()
        """The GPUs of which it is known that nothing holds a lock for them."""

    async def inhibit(self, gpu: str) -> None:
        """See `gpuswitch.host.port.Systemd.inhibit`."""
        # It takes longer to start than all that there is to ask.
        child = self._start(gpu) if gpu in self._released else None
        self._released.discard(gpu)
        try:
            async with connected_to(LOGIND, _KEEP, gpu, start=True) as logind:
                try:
                    if await self._lasting(logind, gpu):
                        return
                except CallError as error:
                    if not error.absent:
                        raise
                    self._warn(error)
                    self._tell_to_end(child)
                    return
                # It tells of each lock that is taken or given back.
                await logind.listen(PROPERTIES, "PropertiesChanged")
                child = child or self._start(gpu)
                while not await self._lasting(logind, gpu):
                    await _signal_or_end(logind, child, gpu)
        except BaseException:
            self._tell_to_end(child)
            raise

    async def uninhibited(self, gpu: str) -> None:
        """See `gpuswitch.host.port.Systemd.uninhibited`."""
        while pids := await self._asked(gpu):
            try:
                with suppress(ProcessLookupError), _pidfd(pids[0]) as process:
                    if _is_ours(pids[0], gpu):
                        await _readable(process)
            except OSError as error:
                text = f"cannot wait for the end of systemd-inhibit: {error.strerror}"
                raise KernelError(_KEEP, gpu, error.errno or errno.EIO, text) from error
        if pids is None:
            await asyncio.Event().wait()

    async def _asked(self, gpu: str) -> list[int] | None:
        """As `_lasting`; None where there is no logind."""
        async with connected_to(LOGIND, _KEEP, gpu, start=True) as logind:
            try:
                return await self._lasting(logind, gpu)
            except CallError as error:
                if not error.absent:
                    raise
                return None

    async def release(self, gpu: str) -> None:
        """See `gpuswitch.host.port.Systemd.release`."""
        async with connected_to(LOGIND, _LET, gpu, start=True) as logind:
            try:
                holders = await _holders(logind, gpu)
            except CallError as error:
                if not error.absent:
                    raise
                return
        for pid in holders:
            await self._end(pid, gpu)
        self._released.add(gpu)

    async def _lasting(self, logind: Remote, gpu: str) -> list[int]:
        """The processes that hold a lock of ours for this GPU, and go on doing so."""
        return [pid for pid in await _holders(logind, gpu) if _process(pid) not in self._ending]

    def _tell_to_end(self, child: Child | None) -> None:
        if child is not None:
            self._remember(child.pid)
            child.send(signal.SIGTERM)

    def _remember(self, pid: int) -> None:
        """It is told to end; those that have ended are forgotten."""
        self._ending = {process for process in self._ending if _process(process.pid) == process}
        if (process := _process(pid)) is not None:
            self._ending.add(process)

    async def _end(self, pid: int, gpu: str) -> None:
        """End this holder of a lock, and see it gone: the lock goes with it."""
        try:
            with _pidfd(pid) as process:
                if _is_ours(pid, gpu):
                    self._remember(pid)
                    signal.pidfd_send_signal(process, signal.SIGTERM)
                    await _readable(process)
        except ProcessLookupError:
            return  # it has ended by itself
        except OSError as error:
            raise KernelError(
                _LET, gpu, error.errno or errno.EIO, f"systemd-inhibit (pid {pid}) cannot be ended"
            ) from error

    def _start(self, gpu: str) -> Child:
        """A `systemd-inhibit` with a program below it that never ends by itself, and does when its parent has ended."""
        bus = os.environ.get("DBUS_SYSTEM_BUS_ADDRESS")
        options = (f"--what={_WHAT}", f"--who={_WHO}", f"--why={_why(gpu)}", "--mode=block")
        try:
            command = (find(self._tools, "systemd-inhibit"), *options, find(self._tools, "sleep"), "infinity")
            return Child(command, {"DBUS_SYSTEM_BUS_ADDRESS": bus} if bus else {})
        except OSError as error:
            text = f"systemd-inhibit cannot be started: {error.strerror}"
            raise KernelError(_KEEP, gpu, error.errno or errno.EIO, text) from error

    def _warn(self, error: CallError) -> None:
        if not self._warned:
            log.warning("nothing is done to keep this machine awake: there is no logind (%s)", error.text)
            self._warned = True


def _why(gpu: str) -> str:
    return f"GPU {gpu} is being switched"


async def _has_session(logind: Remote, session: str) -> bool:
    try:
        await logind.call(PATH, MANAGER, "GetSession", "s", session)
    except CallError as error:
        if error.kind == "NoSuchSession":
            return False
        raise
    return True


async def _is_managers(logind: Remote, path: str) -> bool:
    try:
        kind = await logind.call(path, PROPERTIES, "Get", "ss", "org.freedesktop.login1.Session", "Class")
    except CallError as error:
        if error.kind == "UnknownObject":  # it has ended meanwhile
            return True
        raise
    return str(kind[1]).startswith("manager")


async def _holders(logind: Remote, gpu: str) -> list[int]:
    """The processes that hold a lock of ours for this GPU. Anybody may call a lock as we do, but not with our uid."""
    locks = await logind.call(PATH, MANAGER, "ListInhibitors")
    ours = (_WHAT, _WHO, _why(gpu), "block", os.geteuid())
    return [pid for *lock, pid in locks if tuple(lock) == ours and _is_ours(pid, gpu)]


def _is_ours(pid: int, gpu: str) -> bool:
    """A process may be on the list when it has just ended, and its number may be another's by now."""
    try:
        return f"--why={_why(gpu)}".encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False


async def _signal_or_end(logind: Remote, child: Child, gpu: str) -> None:
    """Wait until logind has something to tell.

    Raises:
        KernelError: the child has ended before.
    """
    told = asyncio.ensure_future(logind.signal())
    ended = asyncio.ensure_future(child.wait())
    try:
        await asyncio.wait({told, ended}, return_when=asyncio.FIRST_COMPLETED)
        if told.done():
            told.result()
        elif ended.done():
            text = f"systemd-inhibit ended with status {ended.result()}"
            raise KernelError(_KEEP, gpu, errno.EIO, text)
    finally:
        told.cancel()
        ended.cancel()


@contextmanager
def _pidfd(pid: int) -> Iterator[int]:
    """A process that stays the same one, whatever becomes of its number."""
    descriptor = os.pidfd_open(pid)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _process(pid: int) -> Process | None:
    try:
        return procfs.process(pid)
    except OSError:  # nobody can tell now, so it is none that we know
        return None


async def _readable(process: int) -> None:
    """Wait until a process has ended."""
    ended = asyncio.Event()
    with ExitStack() as stack:
        when_readable(stack, process, ended.set)
        await ended.wait()
