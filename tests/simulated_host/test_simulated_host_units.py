"""The units, sessions and inhibitors of a simulated host."""

from __future__ import annotations

import asyncio
import errno
from signal import SIGKILL, SIGTERM

import pytest

from gpuswitch.host.simulated.faults import Errno, Hang, Silent
from gpuswitch.host.simulated.host import SimulatedHost
from gpuswitch.host.simulated.scenarios import DISPLAY_MANAGER, PERSISTENCED, laptop, plain, server, single
from gpuswitch.model.address import PciAddress
from gpuswitch.model.gpu import discover
from gpuswitch.model.holders import Process, Unit
from tests.host_contract.harness import refused

GPU, AUDIO = PciAddress.parse("0000:01:00.0"), PciAddress.parse("0000:01:00.1")
SERVICE, SOCKET = Unit("mpd.service"), Unit("mpd.socket")
A_WHILE = 60.0


def process(host: SimulatedHost, name: str) -> Process:
    program = host.machine.processes.named(name)
    assert program is not None
    return program.process


async def test_processes_of_a_unit_end_with_it_and_start_with_it() -> None:
    host = laptop()
    before = process(host, "nvidia-persistenced")
    assert await host.systemd.active([PERSISTENCED, DISPLAY_MANAGER]) == {PERSISTENCED}
    await host.systemd.stop(PERSISTENCED)
    assert host.machine.users(GPU) == set()
    assert not host.processes.signal(before, SIGTERM)
    assert await host.systemd.active([PERSISTENCED]) == set()
    await host.systemd.start(PERSISTENCED)
    assert host.machine.users(GPU) == {"nvidia-persistenced"}
    assert process(host, "nvidia-persistenced") != before


async def test_daemon_opens_the_gpus_that_are_there_when_it_starts() -> None:
    host = server()
    one, two = (gpu.address for gpu in discover(host.look())[:2])
    await host.systemd.stop(PERSISTENCED)
    await host.kernel(str(one)).unbind(one, "nvidia")
    await host.systemd.start(PERSISTENCED)
    await host.kernel(str(one)).probe(one)
    await asyncio.sleep(A_WHILE)
    assert [host.machine.users(gpu) for gpu in (one, two)] == [set(), {"nvidia-persistenced"}]


async def test_what_is_drawn_ends_with_the_display_manager() -> None:
    host = single()
    assert host.machine.users(GPU) == {"Xorg", "kwin_x11"}
    await host.systemd.stop(DISPLAY_MANAGER)
    assert host.machine.users(GPU) == {"kwin_x11"}
    await asyncio.sleep(1)
    assert host.machine.users(GPU) == set()
    await host.systemd.start(DISPLAY_MANAGER)
    await asyncio.sleep(A_WHILE)
    assert host.machine.users(GPU) == {"Xorg"}


async def test_session_ends_with_its_processes() -> None:
    host = single()
    assert await host.systemd.sessions(1000) == ("2",)
    await host.systemd.end_session("2")
    assert host.machine.users(GPU) == {"Xorg"}
    assert await host.systemd.sessions(1000) == ()
    await refused(host.systemd.end_session("2"), errno.ENOENT)


async def with_socket() -> SimulatedHost:
    host = plain()
    host.machine.units.add(SERVICE, triggered_by=[SOCKET])
    host.machine.run("mpd", unit=SERVICE)
    host.machine.open(AUDIO, "mpd")
    return host


async def test_socket_starts_its_service_again() -> None:
    host = await with_socket()
    assert await host.systemd.sockets(SERVICE) == (SOCKET,)
    for end in (lambda: host.processes.signal(process(host, "mpd"), SIGKILL), lambda: host.machine.end("mpd")):
        end()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert host.machine.users(AUDIO) == set()
        await asyncio.sleep(A_WHILE)
        assert host.machine.users(AUDIO) == {"mpd"}
    await host.systemd.stop(SERVICE)
    await asyncio.sleep(A_WHILE)
    assert await host.systemd.active([SERVICE]) == {SERVICE}


async def test_service_stays_stopped_without_its_socket() -> None:
    host = await with_socket()
    await asyncio.gather(host.systemd.stop(SERVICE), host.systemd.stop(SOCKET))
    await asyncio.sleep(A_WHILE)
    assert host.machine.users(AUDIO) == set()
    assert await host.systemd.active([SERVICE, SOCKET]) == set()


async def test_process_that_restarts_does_so_unless_its_unit_is_stopped() -> None:
    host = plain()
    host.machine.run("gamescope", unit=SERVICE, restarts=True)
    host.machine.open(GPU, "gamescope")
    host.machine.end("gamescope")
    assert await host.systemd.active([SERVICE]) == {SERVICE}
    await asyncio.sleep(A_WHILE)
    assert host.machine.users(GPU) == {"gamescope"}
    host.machine.end("gamescope")
    await host.systemd.stop(SERVICE)
    await asyncio.sleep(A_WHILE)
    assert host.machine.users(GPU) == set()


async def test_unit_whose_last_process_ends_is_inactive() -> None:
    host = laptop()
    host.machine.end("nvidia-persistenced")
    await asyncio.sleep(A_WHILE)
    assert await host.systemd.active([PERSISTENCED]) == set()


async def test_unit_that_refuses_to_stop() -> None:
    host = laptop()
    host.faults.add(Errno(errno.EIO), operation="stop_unit", subject=PERSISTENCED)
    await refused(host.systemd.stop(PERSISTENCED), errno.EIO)
    host.faults.add(Silent(), operation="stop_unit", subject=PERSISTENCED)
    await host.systemd.stop(PERSISTENCED)
    assert await host.systemd.active([PERSISTENCED]) == {PERSISTENCED}
    assert host.machine.users(GPU) == {"nvidia-persistenced"}


async def test_unit_that_hangs_in_stopping_is_given_up() -> None:
    host = laptop()
    hang = host.faults.add(Hang(), operation="stop_unit")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(host.systemd.stop(PERSISTENCED), 100)
    hang.release()
    await asyncio.sleep(A_WHILE)
    assert await host.systemd.active([PERSISTENCED]) == {PERSISTENCED}


async def test_unit_that_fails_to_start() -> None:
    host = laptop()
    await host.systemd.stop(PERSISTENCED)
    host.faults.add(Errno(errno.EIO), operation="start_unit")
    await refused(host.systemd.start(PERSISTENCED), errno.EIO)
    assert host.machine.units.state(PERSISTENCED) == "failed"
    assert host.machine.users(GPU) == set()
    await host.systemd.start(PERSISTENCED)
    assert host.machine.units.state(PERSISTENCED) == "active"


async def test_unit_that_is_being_started_counts_as_active() -> None:
    host = laptop()
    await host.systemd.stop(PERSISTENCED)
    hang = host.faults.add(Hang(), operation="start_unit")
    starting = asyncio.create_task(host.systemd.start(PERSISTENCED))
    await hang.reached.wait()
    assert await host.systemd.active([PERSISTENCED]) == {PERSISTENCED}
    starting.cancel()
    await asyncio.wait([starting])
    assert await host.systemd.active([PERSISTENCED]) == set()


async def test_faults_hit_sessions_and_inhibitors() -> None:
    host = single()
    host.faults.add(Errno(errno.EIO), operation="end_session", subject="2")
    await refused(host.systemd.end_session("2"), errno.EIO)
    host.faults.add(Errno(errno.EIO), operation="inhibit", subject=GPU)
    await refused(host.systemd.inhibit(str(GPU)), errno.EIO)
    await host.systemd.inhibit(str(GPU))
    host.faults.add(Errno(errno.EIO), operation="release_inhibitor", subject=GPU)
    await refused(host.systemd.release(str(GPU)), errno.EIO)
    assert host.machine.units.inhibitors == {str(GPU)}
    host.faults.add(Errno(errno.EIO), operation="active", subject=PERSISTENCED)
    await refused(host.systemd.active([PERSISTENCED]), errno.EIO)
    host.faults.add(Errno(errno.EIO), operation="sockets")
    await refused(host.systemd.sockets(DISPLAY_MANAGER), errno.EIO)


async def test_machine_that_goes_down() -> None:
    host = plain()
    assert not await host.systemd.stopping()
    host.machine.units.stopping = True
    assert await host.systemd.stopping()


async def test_machine_without_systemd() -> None:
    host = laptop()
    host.machine.units.managed = False
    await refused(host.systemd.stop(PERSISTENCED), errno.ENOENT)
    await refused(host.systemd.start(PERSISTENCED), errno.ENOENT)
    await refused(host.systemd.end_session("2"), errno.ENOENT)
    assert await host.systemd.active([PERSISTENCED]) == set()
    assert await host.systemd.sockets(PERSISTENCED) == ()
    assert await host.systemd.sessions(1000) == ()
    await host.systemd.inhibit(str(GPU))
    assert host.machine.units.inhibitors == set()
    await host.systemd.release(str(GPU))
    assert not await host.systemd.stopping()
