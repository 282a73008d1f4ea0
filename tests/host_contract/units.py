"""Cases about units, sessions, and the inhibitor that keeps the machine awake."""

from __future__ import annotations

import asyncio
import errno

from gpuswitch.model.holders import Unit
from tests.host_contract.harness import ContractHarness, case, refused

NOBODY = Unit("no-such-unit-here.service")


@case
async def unit_is_started_and_stopped(harness: ContractHarness) -> None:
    systemd = harness.host.systemd
    unit = await harness.external.add_unit()
    assert await systemd.active([unit, NOBODY]) == frozenset()
    assert await systemd.missing([unit, NOBODY]) == {NOBODY}
    await systemd.start(unit)
    assert await systemd.active([unit, NOBODY]) == {unit}
    assert await systemd.missing([unit, NOBODY]) == {NOBODY}
    await systemd.start(unit)
    await systemd.stop(unit)
    assert await systemd.active([unit]) == frozenset()
    await systemd.stop(unit)


@case
async def unit_is_that_of_its_processes(harness: ContractHarness) -> None:
    systemd = harness.host.systemd
    unit = await harness.external.add_unit(harness.display)
    assert (await harness.scan(harness.display)).holders == ()
    for _ in range(2):
        await systemd.start(unit)
        [holder] = (await harness.scan(harness.display)).holders
        assert (holder.unit, holder.session) == (unit, "")
        await systemd.stop(unit)
        assert (await harness.scan(harness.display)).holders == ()


@case
async def unit_that_is_not_there(harness: ContractHarness) -> None:
    systemd = harness.host.systemd
    await refused(systemd.start(NOBODY), errno.ENOENT)
    await refused(systemd.stop(NOBODY), errno.ENOENT)
    assert await systemd.active([NOBODY]) == frozenset()
    assert await systemd.sockets(NOBODY) == ()
    await refused(systemd.end_session("no-such-session"), errno.ENOENT)


@case
async def unit_that_cannot_start(harness: ContractHarness) -> None:
    unit = await harness.external.add_unit(fails=True)
    await refused(harness.host.systemd.start(unit), errno.EIO)
    assert await harness.host.systemd.active([unit]) == frozenset()
    await harness.host.systemd.stop(unit)


@case
async def socket_would_start_its_unit_again(harness: ContractHarness) -> None:
    systemd = harness.host.systemd
    unit = await harness.external.add_unit()
    assert await systemd.sockets(unit) == ()
    socket = await harness.external.add_socket(unit)
    assert await systemd.sockets(unit) == (socket,)
    assert await systemd.active([unit, socket]) == {socket}
    await systemd.stop(socket)
    assert await systemd.sockets(unit) == ()


@case
async def system_is_not_going_down(harness: ContractHarness) -> None:
    assert not await harness.host.systemd.stopping()
    assert await harness.host.systemd.sessions(4_000_000) == ()


@case
async def inhibitor_is_taken_once_and_outlives_us(harness: ContractHarness) -> None:
    one, other = str(harness.display), str(harness.crowded)
    await harness.host.systemd.inhibit(one)
    await harness.host.systemd.inhibit(one)
    await harness.host.systemd.inhibit(other)
    await harness.host.close()
    systemd = harness.external.next_run().systemd
    await systemd.inhibit(one)
    assert [await harness.external.inhibitors(gpu) for gpu in (one, other)] == [1, 1]
    await systemd.release(one)
    await systemd.release(one)
    assert [await harness.external.inhibitors(gpu) for gpu in (one, other)] == [0, 1]
    await systemd.release(other)
    assert await harness.external.inhibitors(other) == 0


@case
async def inhibitor_may_be_ended_by_anybody(harness: ContractHarness) -> None:
    gpu, systemd = str(harness.display), harness.host.systemd
    await systemd.uninhibited(gpu)
    await systemd.inhibit(gpu)
    waiting = asyncio.create_task(systemd.uninhibited(gpu))
    await harness.external.end_inhibitors(gpu)
    await waiting
    await systemd.inhibit(gpu)
    assert await harness.external.inhibitors(gpu) == 1
    await systemd.release(gpu)
