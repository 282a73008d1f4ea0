"""The units of a user's manager, through `systemctl --user`, run as that user.

A user's bus does not let root in. The socket that systemctl itself uses would, but it is systemd's own affair, and lies
in a folder where the user may put another in its place, or a link to the system's; so no root process should talk
there. systemctl knows the way in every version of systemd, and with the user's rights it can do what the user could.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gpuswitch.errors import KernelError
from gpuswitch.host.linux import children
from gpuswitch.host.linux.systemunits import ACTIVE, OVER, STARTS, InBackground
from gpuswitch.host.port import StartJob
from gpuswitch.model.holders import Unit

# systemctl takes patterns and paths too, and would turn them into other names than the one that was asked for.
_NAME = re.compile(r"[A-Za-z0-9:_.\\@-]+\.[a-z]+")
_SHOWN = "Id,LoadState,ActiveState,Job,TriggeredBy"
# systemctl's last word on what went wrong; the lines around it are hints and warnings.
_VERDICTS = ("Failed ", "Job ", "A dependency job ", "Assertion ")


class SystemctlError(Exception):
    """systemctl did not do it; its own words."""


@dataclass(frozen=True, slots=True)
class _Shown:
    load: str
    state: str
    job: str
    triggered_by: tuple[str, ...]


class UserUnits:
    """Calls as in `gpuswitch.host.port.Systemd`, for the units of any user."""

    def __init__(self, tools: str, run: Path, in_background: InBackground) -> None:
        self._tools = tools
        self._run = run
        self._in_background = in_background

    async def active(self, unit: Unit) -> bool:
        if self._manager(unit) is None:
            return False
        try:
            return await self._is_active(unit)
        except SystemctlError as error:
            if self._manager(unit) is None:  # the user has logged out meanwhile, and the unit went too
                return False
            raise KernelError("ask systemd about", str(unit), errno.EIO, str(error)) from error

    async def triggers(self, unit: Unit) -> tuple[str, ...]:
        if self._manager(unit) is None:
            return ()
        try:
            return (await self._show(unit)).triggered_by
        except SystemctlError as error:
            raise KernelError("ask what triggers", str(unit), errno.EIO, str(error)) from error

    async def stop(self, unit: Unit) -> None:
        self._need_manager("stop", unit)
        try:
            before = await self._show(unit)
            if before.load == "not-found" and before.state == "inactive":
                raise KernelError("stop", str(unit), errno.ENOENT, "there is no such unit")
            await self._change("stop", unit, cancelled=True)
            after = await self._show(unit)
        except SystemctlError as error:
            if self._manager(unit) is None:  # as above
                return
            raise KernelError("stop", str(unit), errno.EIO, str(error)) from error
        if after.state not in OVER:
            raise KernelError("stop", str(unit), errno.EBUSY, f"its job is done, and it is {after.state} again")

    async def start(self, unit: Unit, job: StartJob) -> None:
        self._need_manager(job.operation, unit)
        with suppress(SystemctlError):  # not loaded; what the start says of it is more to the point
            await self._systemctl(unit, "reset-failed", "--", unit.name)
        try:
            await self._change(job, unit, cancelled=job.cancelled)
            after = await self._show(unit)
        except SystemctlError as error:
            raise KernelError(job.operation, str(unit), errno.EIO, str(error)) from error
        if after.state == "failed":
            raise KernelError(job.operation, str(unit), errno.EIO, "it failed")

    async def queue_start(self, unit: Unit, job: StartJob) -> None:
        self._need_manager(job.operation, unit)
        try:
            await self._systemctl(unit, job, "--no-block", "--", unit.name)
        except SystemctlError as error:
            raise KernelError(job.operation, str(unit), errno.EIO, str(error)) from error

    def _manager(self, unit: Unit) -> children.Identity | None:
        """Whose manager it is, None where the user has none. The folder is root's to make, and tells the group too.

        The user database tells it as well, but may have to ask the network.
        """
        folder = self._run / f"user/{unit.user}"
        try:
            (folder / "systemd/private").lstat()
            status = folder.stat()
        except OSError:  # not there, or not for us to see
            return None
        return children.Identity(status.st_uid, status.st_gid) if status.st_uid == unit.user else None

    def _need_manager(self, operation: str, unit: Unit) -> None:
        if self._manager(unit) is None:
            raise KernelError(operation, str(unit), errno.ENOENT, f"user {unit.user} has no systemd running")

    async def _is_active(self, unit: Unit) -> bool:
        shown = await self._show(unit)
        if shown.state in ACTIVE or not shown.job:
            return shown.state in ACTIVE
        return await self._job_type(unit, shown.job) in STARTS

    async def _job_type(self, unit: Unit, job: str) -> str:
        """`start`, `stop` and so on; "" where the job is over."""
        jobs = await self._systemctl(unit, "list-jobs", "--plain", "--no-legend", "--full")
        number_unit_type = (line.split() for line in jobs.splitlines())
        return next((fields[2] for fields in number_unit_type if fields[:1] == [job] and len(fields) > 2), "")

    async def _change(self, verb: str, unit: Unit, *, cancelled: bool) -> None:
        """`systemctl VERB UNIT`, which waits for the job; `cancelled`: with its caller."""
        try:
            await self._systemctl(unit, verb, "--", unit.name)
        except asyncio.CancelledError:
            if cancelled:
                self._in_background(self._cancel(unit, verb))
            raise

    async def _cancel(self, unit: Unit, verb: str) -> None:
        """Cancel the unit's job, if it is of the kind that we asked for."""
        with suppress(SystemctlError):
            job = (await self._show(unit)).job
            if job and await self._job_type(unit, job) == verb:
                await self._systemctl(unit, "cancel", job)

    async def _show(self, unit: Unit) -> _Shown:
        text = await self._systemctl(unit, "show", f"--property={_SHOWN}", "--", unit.name)
        values = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
        job = values.get("Job", "")
        triggers = tuple(values.get("TriggeredBy", "").split())
        return _Shown(values.get("LoadState", ""), values.get("ActiveState", ""), "" if job == "0" else job, triggers)

    async def _systemctl(self, unit: Unit, *arguments: str) -> str:
        """What it says on its output.

        Raises:
            SystemctlError: it cannot be run, or did not do it.
        """
        if not _NAME.fullmatch(unit.name):
            raise SystemctlError("that is not the name of a unit")
        identity = self._manager(unit)
        if identity is None:
            raise SystemctlError(f"user {unit.user} has no systemd running")
        environment = {"XDG_RUNTIME_DIR": str(self._run / f"user/{unit.user}"), "LC_ALL": "C.UTF-8"}
        try:
            command = [children.find(self._tools, "systemctl"), "--user", "--no-ask-password", *arguments]
            # Whoever has that uid already needs no right to take it on.
            other = identity if identity.uid != os.geteuid() else None
            status, output, errors = await children.run(command, environment, other)
        except OSError as error:
            raise SystemctlError(f"systemctl cannot be run: {error.strerror}") from error
        if status != 0:
            raise SystemctlError(_verdict(errors, status, unit))
        return output


def _verdict(errors: str, status: int, unit: Unit) -> str:
    """The line that says what went wrong, without what our own sentence says already."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()] or [f"systemctl ended with status {status}"]
    line = next((line for line in lines if line.startswith(_VERDICTS)), lines[0])
    return re.sub(rf"^Failed to \w+ {re.escape(unit.name)}: ", "", line).rstrip(".")
