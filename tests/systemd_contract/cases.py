"""What `LinuxSystemd` does with units: asked of the managers in memory, and of real ones in a virtual machine.

Each case works on one manager, the system's or a user's, with the units of `tests/systemd_contract/units.py`.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from gpuswitch.errors import KernelError
from gpuswitch.host.linux.systemd import LinuxSystemd
from gpuswitch.host.port import StartJob
from gpuswitch.model.holders import Unit


class Administrator(Protocol):
    """What a person at this machine can do and see."""

    async def mend(self) -> None:
        """Let `tired.service` be able to start."""

    async def stop_under_way(self) -> None:
        """Wait until `hangs.service`, or `lingers.service`, is being stopped."""

    async def job(self, name: str) -> str:
        """The type of the unit's job, "" where it has none."""

    async def main_pid(self, name: str) -> int:
        """Of the process that the unit runs, 0 where it runs none."""

    async def begin(self, names: Sequence[str]) -> None:
        """Queue the start of these units, without waiting for it."""


@dataclass(frozen=True)
class ManagerHarness:
    systemd: LinuxSystemd
    administrator: Administrator
    user: int | None

    def unit(self, name: str) -> Unit:
        return Unit(name, self.user)

    async def active(self, *names: str) -> set[str]:
        return {unit.name for unit in await self.systemd.active([self.unit(name) for name in names])}

    async def refused(self, call: Awaitable[None], beginning: str) -> KernelError:
        """The error of a call that must fail; it has to be one sentence that says what could not be done."""
        try:
            await call
        except KernelError as error:
            text = str(error)
            assert text.startswith(f"cannot {beginning}"), text
            assert "\n" not in text
            assert not text.endswith("."), text
            return error
        raise AssertionError("it worked")


async def stop_and_start(harness: ManagerHarness) -> None:
    unit = harness.unit("plain.service")
    assert await harness.active("plain.service", "triggered.path") == {"plain.service"}
    await harness.systemd.stop(unit)
    assert await harness.active("plain.service") == set()
    await harness.systemd.stop(unit)  # what does not run is as good as stopped
    await harness.systemd.start(unit)
    assert await harness.active("plain.service") == {"plain.service"}
    await harness.systemd.start(unit)


async def restart(harness: ManagerHarness) -> None:
    """One that does not run stays so, or is started, by the kind of job."""
    unit, pids = harness.unit("plain.service"), [await harness.administrator.main_pid("plain.service")]
    for job in (StartJob.RESTART, StartJob.TRY_RESTART):
        await harness.systemd.start(unit, job)
        pids.append(await harness.administrator.main_pid("plain.service"))
    assert len({0, *pids}) == 4
    await harness.systemd.stop(unit)
    await harness.systemd.start(unit, StartJob.TRY_RESTART)
    assert await harness.active("plain.service") == set()
    await harness.systemd.start(unit, StartJob.RESTART)
    assert await harness.active("plain.service") == {"plain.service"}


async def alias(harness: ManagerHarness) -> None:
    """As display-manager.service is one; jobs carry the unit's own name."""
    unit = harness.unit("alias.service")
    assert await harness.active("alias.service") == {"alias.service"}
    await harness.systemd.stop(unit)
    assert await harness.active("alias.service", "plain.service") == set()
    await harness.systemd.start(unit)
    assert await harness.active("plain.service") == {"plain.service"}


async def missing(harness: ManagerHarness) -> None:
    unit = harness.unit("missing.service")
    assert await harness.active("missing.service") == set()
    # of users' units nobody asks: only those of the system can be configured
    known = await harness.systemd.missing([harness.unit("plain.service"), unit])
    assert known == ({unit} if harness.user is None else set())
    assert await harness.systemd.sockets(unit) == ()
    stop = await harness.refused(harness.systemd.stop(unit), f"stop {unit}: there is no such unit")
    assert stop.errno == errno.ENOENT
    start = await harness.refused(harness.systemd.start(unit), f"start {unit}: ")
    assert "not found" in str(start)


async def not_a_name(harness: ManagerHarness) -> None:
    for name in ("plain", "pl*.service", "no/such.service"):
        await harness.refused(harness.systemd.stop(harness.unit(name)), f"stop {harness.unit(name)}: ")
    assert await harness.active("plain.service") == {"plain.service"}


async def masked(harness: ManagerHarness) -> None:
    unit = harness.unit("masked.service")
    assert await harness.active("masked.service") == set()
    error = await harness.refused(harness.systemd.start(unit), f"start {unit}: ")
    assert "masked" in str(error)


async def refuses_to_stop(harness: ManagerHarness) -> None:
    unit = harness.unit("refuses.service")
    error = await harness.refused(harness.systemd.stop(unit), f"stop {unit}: Operation refused")
    assert "refuse manual" in str(error)
    assert await harness.active("refuses.service") == {"refuses.service"}


async def fails_to_start(harness: ManagerHarness) -> None:
    unit = harness.unit("fails.service")
    error = await harness.refused(harness.systemd.start(unit), f"start {unit}: ")
    assert "failed" in str(error)
    if harness.user is None:
        assert "(exit-code, status 3)" in str(error)
    assert await harness.active("fails.service") == set()


async def starts_after_too_many_failures(harness: ManagerHarness) -> None:
    unit = harness.unit("tired.service")
    await harness.refused(harness.systemd.start(unit), f"start {unit}: ")
    await harness.administrator.mend()
    await harness.systemd.start(unit)
    assert await harness.active("tired.service") == {"tired.service"}


async def cancelled_stop(harness: ManagerHarness) -> None:
    stop = asyncio.ensure_future(harness.systemd.stop(harness.unit("hangs.service")))
    await harness.administrator.stop_under_way()
    assert await harness.administrator.job("hangs.service") == "stop"
    stop.cancel()
    await asyncio.wait([stop])
    assert stop.cancelled()
    await harness.systemd.close()
    assert await harness.administrator.job("hangs.service") == ""


async def cancelled_restart(harness: ManagerHarness) -> None:
    """It goes on: half-way, the unit would stay stopped."""
    restart = asyncio.ensure_future(harness.systemd.start(harness.unit("lingers.service"), StartJob.TRY_RESTART))
    await harness.administrator.stop_under_way()
    restart.cancel()
    await asyncio.wait([restart])
    assert restart.cancelled()
    await harness.systemd.close()
    assert await harness.administrator.job("lingers.service") == "restart"
    assert await harness.active("lingers.service") == {"lingers.service"}


async def queued_is_active(harness: ManagerHarness) -> None:
    await harness.administrator.begin(["slow.service", "queued.service"])
    assert await harness.active("slow.service", "queued.service", "missing.service") == {
        "slow.service",
        "queued.service",
    }


async def sockets(harness: ManagerHarness) -> None:
    unit = harness.unit("triggered.service")
    triggers = await harness.systemd.sockets(unit)
    assert triggers == (harness.unit("triggered.socket"), harness.unit("triggered.timer"))
    for each in (*triggers, unit):
        await harness.systemd.stop(each)
    assert await harness.systemd.sockets(unit) == ()
    assert await harness.active("triggered.service", "triggered.socket") == set()


CASES: dict[str, Callable[[ManagerHarness], Awaitable[None]]] = {
    case.__name__: case
    for case in (
        *(stop_and_start, restart, alias, missing, not_a_name, masked, refuses_to_stop, fails_to_start),
        *(starts_after_too_many_failures, cancelled_stop, cancelled_restart, queued_is_active, sockets),
    )
}
