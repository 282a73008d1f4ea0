"""The units of the system's own manager, over D-Bus (org.freedesktop.systemd1(5))."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Collection, Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpuswitch.errors import KernelError
from gpuswitch.host.linux.busclient import PROPERTIES, CallError, Remote, connected_to, plain
from gpuswitch.host.port import StartJob

SYSTEMD = "org.freedesktop.systemd1"
PATH = "/org/freedesktop/systemd1"
MANAGER = "org.freedesktop.systemd1.Manager"
UNIT = "org.freedesktop.systemd1.Unit"
JOB = "org.freedesktop.systemd1.Job"

ACTIVE = frozenset({"active", "activating", "reloading", "refreshing"})
"""The values of ActiveState that mean: it runs, or is about to."""
STARTS = frozenset({"start", "restart", "reload-or-start"})
"""The types of jobs that make a unit run."""
OVER = frozenset({"inactive", "failed"})

_METHODS: Mapping[StartJob, str] = {
    StartJob.START: "StartUnit",
    StartJob.RESTART: "RestartUnit",
    StartJob.TRY_RESTART: "TryRestartUnit",
}

InBackground = Callable[[Coroutine[Any, Any, None]], None]
"""Has something done that nobody waits for: what a cancelled caller leaves behind is put away so."""

# How a job may end, beside `done` (job_result_table in src/core/job.c).
_ENDS: Mapping[str, tuple[int, str]] = {
    "failed": (errno.EIO, "it failed"),
    "canceled": (errno.ECANCELED, "its job was cancelled"),
    "timeout": (errno.ETIMEDOUT, "its job ran into its own time-out"),
    "dependency": (errno.EIO, "a unit that it needs could not be started"),
    "skipped": (errno.EIO, "its job was not applicable"),
    "assert": (errno.EIO, "an Assert line of its unit file is not true"),
    "unsupported": (errno.EOPNOTSUPP, "this machine cannot have units of its kind"),
    "once": (errno.EIO, "it can be started once in a boot only, and was"),
}


@dataclass(frozen=True, slots=True)
class _Row:
    """What ListUnitsByNames says of a unit; `name` is its canonical one, `job_type` is "" where no job is queued."""

    name: str
    load: str
    state: str
    path: str
    job_type: str
    job: str

    @property
    def active(self) -> bool:
        return self.state in ACTIVE or self.job_type in STARTS

    @property
    def missing(self) -> bool:
        return self.load == "not-found" and self.state == "inactive"


class SystemUnits:
    """Calls as in `gpuswitch.host.port.Systemd`, by the names of units. `run` is /run, or what a test has for it."""

    def __init__(self, run: Path, in_background: InBackground) -> None:
        # What sd_booted(3) looks at: without systemd nothing is one of its units.
        self._booted = run / "systemd/system"
        self._in_background = in_background

    async def active(self, names: Collection[str]) -> frozenset[str]:
        if not names or not self._booted.is_dir():
            return frozenset()
        async with connected_to(SYSTEMD, "ask systemd about", ", ".join(sorted(names))) as systemd:
            return frozenset([name for name in names if (await _row(systemd, name)).active])

    async def missing(self, names: Collection[str]) -> frozenset[str]:
        if not names or not self._booted.is_dir():
            return frozenset()
        async with connected_to(SYSTEMD, "ask systemd about", ", ".join(sorted(names))) as systemd:
            return frozenset([name for name in names if (await _row(systemd, name)).missing])

    async def canonical(self, name: str) -> str:
        if not self._booted.is_dir():
            return name
        async with connected_to(SYSTEMD, "ask systemd about", name) as systemd:
            return (await _row(systemd, name)).name

    async def triggers(self, name: str) -> tuple[str, ...]:
        if not self._booted.is_dir():
            return ()
        async with connected_to(SYSTEMD, "ask what triggers", name) as systemd:
            row = await _row(systemd, name)
            return tuple((await systemd.call(row.path, PROPERTIES, "Get", "ss", UNIT, "TriggeredBy"))[1])

    async def stop(self, name: str) -> None:
        async with connected_to(SYSTEMD, "stop", name) as systemd:
            if (await _row(systemd, name)).missing:
                raise KernelError("stop", name, errno.ENOENT, "there is no such unit")
            end = await self._job(systemd, "StopUnit", name, "stop")
            after = await _row(systemd, name)
            if after.state in OVER and end in {"done", ""}:
                return
            if end in {"done", ""}:
                raise KernelError("stop", name, errno.EBUSY, f"its job is done, and it is {after.state} again")
            raise await _failure(systemd, "stop", name, after.path, end)

    async def start(self, name: str, job: StartJob) -> None:
        async with connected_to(SYSTEMD, job.operation, name) as systemd:
            await self._forget_failures(systemd, name)
            end = await self._job(systemd, _METHODS[job], name, job if job.cancelled else "")
            after = await _row(systemd, name)
            if end in {"done", ""} and after.state != "failed":
                # A unit whose work is one command may be over by now: inactive, with its condition met.
                idle = job is StartJob.TRY_RESTART or after.active
                if idle or (await _properties(systemd, after.path)).get("ConditionResult", True):
                    return
                raise KernelError(job.operation, name, errno.EIO, "a Condition line of its unit file is not true")
            raise await _failure(systemd, job.operation, name, after.path, "failed" if end in {"done", ""} else end)

    async def queue_start(self, name: str, job: StartJob) -> None:
        async with connected_to(SYSTEMD, job.operation, name) as systemd:
            await self._forget_failures(systemd, name)
            await systemd.call(PATH, MANAGER, _METHODS[job], "ss", name, "replace")

    async def stopping(self) -> bool:
        """Whether the system goes down; False where no systemd tells."""
        try:
            return await self._state() == "stopping"
        except KernelError:
            return False

    async def booting(self) -> bool:
        """Whether the system has yet to finish its start (manager_state in systemd's src/core/manager.c).

        Raises:
            KernelError: no systemd tells.
        """
        return await self._state() in {"initializing", "starting"}

    async def _state(self) -> str:
        async with connected_to(SYSTEMD, "ask for the state of", "the system") as systemd:
            state = await systemd.call(PATH, PROPERTIES, "Get", "ss", MANAGER, "SystemState")
            return str(state[1])

    async def _forget_failures(self, systemd: Remote, name: str) -> None:
        """Else a unit that has failed too often is not started."""
        try:
            await systemd.call(PATH, MANAGER, "ResetFailedUnit", "s", name)
        except CallError as error:
            if error.kind != "NoSuchUnit":  # not loaded; what the start says of it is more to the point
                raise

    async def _job(self, systemd: Remote, method: str, name: str, cancelled: str) -> str:
        """Have a job done, and wait for its end; returns its result, "" where nobody has told.

        With its caller, it is cancelled if it is of the kind `cancelled`, which is "" where it is to go on.

        A job may be over before the answer that names it, so the signals are listened to before the call.
        """
        await systemd.listen(MANAGER, "JobRemoved")
        await systemd.call(PATH, MANAGER, "Subscribe")
        job = ""
        try:
            job = await systemd.call(PATH, MANAGER, method, "ss", name, "replace")
            while True:
                signal = await systemd.signal()
                if signal is None:
                    # systemd executed itself anew, as each update of it does: jobs stay, signals may be lost.
                    if not await _exists(systemd, job):
                        return ""
                elif signal.arguments[1] == job:
                    return str(signal.arguments[3])
        except asyncio.CancelledError:
            if cancelled:
                self._in_background(_cancel(name, cancelled, job))
            raise


async def _row(systemd: Remote, name: str) -> _Row:
    """The unit by any of its names; loaded for it, where need be, so one that does not exist has a row as well."""
    rows = await systemd.call(PATH, MANAGER, "ListUnitsByNames", "as", [name])
    if not rows:  # it leaves out what is no name of a unit, where this says so
        await systemd.call(PATH, MANAGER, "LoadUnit", "s", name)
        raise CallError(f"{SYSTEMD}.NoSuchUnit", "there is no such unit")
    unit, _, load, state, _, _, path, _, job_type, job = rows[0]
    return _Row(unit, load, state, path, job_type, job)


async def _exists(systemd: Remote, job: str) -> bool:
    try:
        await systemd.call(job, PROPERTIES, "Get", "ss", JOB, "State")
    except CallError as error:
        if error.kind == "UnknownObject":
            return False
        raise
    return True


async def _cancel(name: str, kind: str, job: str) -> None:
    """Cancel the job, by a connection of its own; `job` is "" where the caller was cancelled before it was named."""
    async with connected_to(SYSTEMD, "cancel the job of", name) as systemd:
        row = await _row(systemd, name)
        if row.job_type == kind and job in {row.job, ""}:
            await systemd.call(row.job, JOB, "Cancel")


async def _properties(systemd: Remote, path: str) -> dict[str, Any]:
    """All of a unit, whatever kind it is of."""
    return plain(await systemd.call(path, PROPERTIES, "GetAll", "s", ""))


async def _failure(systemd: Remote, operation: str, name: str, path: str, end: str) -> KernelError:
    """How the job ended, and what the unit says of itself."""
    number, text = _ENDS.get(end, (errno.EIO, f"its job ended as {end}"))
    unit = await _properties(systemd, path)
    details = []
    if unit.get("Result", "success") != "success":
        details.append(str(unit["Result"]))
    if status := unit.get("ExecMainStatus"):
        details.append(f"status {status}")
    if unit.get("StatusText"):
        details.append(f'"{unit["StatusText"]}"')
    return KernelError(operation, name, number, f"{text} ({', '.join(details)})" if details else text)
