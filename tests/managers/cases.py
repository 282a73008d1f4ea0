"""What `LinuxSystemd` does with units: asked of the managers in memory, and of real ones in a virtual machine.

Each case works on one manager, the system's or a user's, with the units of `tests/managers/units.py`.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from gpuswitch.errors import KernelError
from gpuswitch.host.linux.systemd import LinuxSystemd
from gpuswitch.model.holders import Unit


class Outside(Protocol):
    """What a person at this machine can do and see."""

    async def mend(self) -> None:
        """Let `tired.service` be able to start."""

    async def stop_under_way(self) -> None:
        """Wait until `hangs.service` is being stopped."""

    async def job(self, name: str) -> str:
        """The type of the unit's job, "" where it has none."""

    async def begin(self, names: Sequence[str]) -> None:
        """Queue the start of these units, without waiting for it."""


@dataclass(frozen=True)
class Bench:
    systemd: LinuxSystemd
    outside: Outside
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


async def stop_and_start(bench: Bench) -> None:
    unit = bench.unit("plain.service")
    assert await bench.active("plain.service", "triggered.path") == {"plain.service"}
    await bench.systemd.stop(unit)
    assert await bench.active("plain.service") == set()
    await bench.systemd.stop(unit)  # what does not run is as good as stopped
    await bench.systemd.start(unit)
    assert await bench.active("plain.service") == {"plain.service"}
    await bench.systemd.start(unit)


async def alias(bench: Bench) -> None:
    """As display-manager.service is one; jobs carry the unit's own name."""
    unit = bench.unit("alias.service")
    assert await bench.active("alias.service") == {"alias.service"}
    await bench.systemd.stop(unit)
    assert await bench.active("alias.service", "plain.service") == set()
    await bench.systemd.start(unit)
    assert await bench.active("plain.service") == {"plain.service"}


async def missing(bench: Bench) -> None:
    unit = bench.unit("missing.service")
    assert await bench.active("missing.service") == set()
    # of users' units nobody asks: only those of the system can be configured
    known = await bench.systemd.missing([bench.unit("plain.service"), unit])
    assert known == ({unit} if bench.user is None else set())
    assert await bench.systemd.sockets(unit) == ()
    stop = await bench.refused(bench.systemd.stop(unit), f"stop {unit}: there is no such unit")
    assert stop.errno == errno.ENOENT
    start = await bench.refused(bench.systemd.start(unit), f"start {unit}: ")
    assert "not found" in str(start)


async def not_a_name(bench: Bench) -> None:
    for name in ("plain", "pl*.service", "no/such.service"):
        await bench.refused(bench.systemd.stop(bench.unit(name)), f"stop {bench.unit(name)}: ")
    assert await bench.active("plain.service") == {"plain.service"}


async def masked(bench: Bench) -> None:
    unit = bench.unit("masked.service")
    assert await bench.active("masked.service") == set()
    error = await bench.refused(bench.systemd.start(unit), f"start {unit}: ")
    assert "masked" in str(error)


async def refuses_to_stop(bench: Bench) -> None:
    unit = bench.unit("refuses.service")
    error = await bench.refused(bench.systemd.stop(unit), f"stop {unit}: Operation refused")
    assert "refuse manual" in str(error)
    assert await bench.active("refuses.service") == {"refuses.service"}


async def fails_to_start(bench: Bench) -> None:
    unit = bench.unit("fails.service")
    error = await bench.refused(bench.systemd.start(unit), f"start {unit}: ")
    assert "failed" in str(error)
    if bench.user is None:
        assert "(exit-code, status 3)" in str(error)
    assert await bench.active("fails.service") == set()


async def starts_after_too_many_failures(bench: Bench) -> None:
    unit = bench.unit("tired.service")
    await bench.refused(bench.systemd.start(unit), f"start {unit}: ")
    await bench.outside.mend()
    await bench.systemd.start(unit)
    assert await bench.active("tired.service") == {"tired.service"}


async def cancelled_stop(bench: Bench) -> None:
    stop = asyncio.ensure_future(bench.systemd.stop(bench.unit("hangs.service")))
    await bench.outside.stop_under_way()
    assert await bench.outside.job("hangs.service") == "stop"
    stop.cancel()
    await asyncio.wait([stop])
    assert stop.cancelled()
    await bench.systemd.close()
    assert await bench.outside.job("hangs.service") == ""


async def queued_is_active(bench: Bench) -> None:
    await bench.outside.begin(["slow.service", "queued.service"])
    assert await bench.active("slow.service", "queued.service", "missing.service") == {"slow.service", "queued.service"}


async def sockets(bench: Bench) -> None:
    unit = bench.unit("triggered.service")
    triggers = await bench.systemd.sockets(unit)
    assert triggers == (bench.unit("triggered.socket"), bench.unit("triggered.timer"))
    for each in (*triggers, unit):
        await bench.systemd.stop(each)
    assert await bench.systemd.sockets(unit) == ()
    assert await bench.active("triggered.service", "triggered.socket") == set()


CASES: dict[str, Callable[[Bench], Awaitable[None]]] = {
    case.__name__: case
    for case in (
        *(stop_and_start, alias, missing, not_a_name, masked, refuses_to_stop, fails_to_start),
        *(starts_after_too_many_failures, cancelled_stop, queued_is_active, sockets),
    )
}
