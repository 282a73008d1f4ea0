"""Sessions, and the locks that keep the machine from sleeping, as a logind in memory has them.

What stands in for systemd-inhibit takes its lock over the bus, as the real one does; the lock goes with the process.
tests/real_system/test_managers.py has the real ones.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gpuswitch.host.linux.systemd import LinuxSystemd
from tests.harness.buses.private import PrivateBus
from tests.harness.managers.doubles import FakeLogind, logind_on
from tests.real_bus.test_systemd import error_of

GPU = "0000:01:00.0"
OTHER = "0000:02:00.0"

ITS_OWN = ("socket:", "anon_inode:")
"""What the stand-in opens for itself, to talk to the bus."""

INHIBIT = f"""#!{sys.executable}
import os, signal, sys
from jeepney import DBusAddress, new_method_call
from jeepney.io.blocking import open_dbus_connection
options = dict(each[2:].split("=", 1) for each in sys.argv[1:5])
assert set(options) == {{"what", "who", "why", "mode"}}
assert sys.argv[5].endswith("/sleep") and sys.argv[6:] == ["infinity"]
logind = DBusAddress("/org/freedesktop/login1", "org.freedesktop.login1", "org.freedesktop.login1.Manager")
lock = tuple(options[name] for name in ("what", "who", "why", "mode"))
bus = open_dbus_connection("SYSTEM")
bus.send_and_get_reply(new_method_call(logind, "Inhibit", "ssss", lock))
signal.pause()
"""


@pytest.fixture
async def systemd(
    private_bus: PrivateBus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[LinuxSystemd]:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", private_bus.address)
    write(tmp_path / "systemd-inhibit", INHIBIT)
    write(tmp_path / "sleep", "")
    systemd = LinuxSystemd(str(tmp_path), tmp_path)
    yield systemd
    for gpu in (GPU, OTHER):
        await systemd.release(gpu)


def write(program: Path, text: str) -> None:
    program.write_text(text)
    program.chmod(0o755)


@pytest.fixture
async def logind(private_bus: PrivateBus, systemd: LinuxSystemd) -> AsyncIterator[FakeLogind]:
    async with logind_on(private_bus.address) as logind:
        yield logind
        for gpu in (GPU, OTHER):
            await systemd.release(gpu)


def holders(logind: FakeLogind) -> list[int]:
    return [lock.row[5] for lock in logind.locks]


def descriptors(pid: int) -> dict[int, str]:
    return {int(entry.name): str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir()}


def folder_of(pid: int) -> Path:
    """Where it is: a file system that it is in could not be unmounted."""
    return Path(f"/proc/{pid}/cwd").readlink()


def is_process(pid: int) -> bool:
    """Also a dead one that nobody reaped."""
    return Path(f"/proc/{pid}").exists()


def children() -> set[int]:
    """Our own processes."""
    return set(map(int, Path("/proc/thread-self/children").read_text().split()))


async def ended(pid: int) -> None:
    """Wait until a process has ended."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    over = asyncio.Event()
    asyncio.get_running_loop().add_reader(process, over.set)
    await over.wait()
    asyncio.get_running_loop().remove_reader(process)
    os.close(process)


async def test_one_lock_for_each_gpu(systemd: LinuxSystemd, logind: FakeLogind) -> None:
    for gpu in (GPU, OTHER, GPU):
        await systemd.inhibit(gpu)
    why = [f"GPU {gpu} is being switched" for gpu in (GPU, OTHER)]
    assert [lock.row[:5] for lock in logind.locks] == [
        ("sleep:handle-lid-switch", "gpuswitch", each, "block", os.getuid()) for each in why
    ]
    first, second = holders(logind)
    await systemd.release(GPU)
    assert not is_process(first)
    assert is_process(second)
    await systemd.release(GPU)
    await systemd.release(OTHER)


async def test_it_is_on_its_own(systemd: LinuxSystemd, logind: FakeLogind) -> None:
    """It stays when the service ends: a session of its own, nothing open that is the service's."""
    await systemd.inhibit(GPU)
    (pid,) = holders(logind)
    assert os.getsid(pid) == pid
    opened = descriptors(pid)
    assert [opened[number] for number in (0, 1, 2)] == ["/dev/null"] * 3
    assert [name for number, name in opened.items() if number > 2 and not name.startswith(ITS_OWN)] == []
    assert folder_of(pid) == Path("/")


async def test_a_later_run_of_the_service_finds_it(systemd: LinuxSystemd, logind: FakeLogind, tmp_path: Path) -> None:
    await systemd.inhibit(GPU)
    (pid,) = holders(logind)
    later = LinuxSystemd(str(tmp_path), tmp_path)
    await later.inhibit(GPU)
    assert holders(logind) == [pid]
    await later.release(GPU)
    await ended(pid)


async def test_what_is_not_ours_is_left_alone(systemd: LinuxSystemd, logind: FakeLogind) -> None:
    """Logind lists what has just ended; its number may be another process's by now: here, our own."""
    await systemd.inhibit(GPU)
    (lock,) = logind.locks
    await systemd.release(GPU)
    await logind.no_locks()
    for row in ((*lock.row[:5], os.getpid()), (*lock.row[:4], os.getuid() + 1, lock.row[5])):
        logind.locks = [type(lock)(row, lock.owner)]
        await systemd.release(GPU)
        await systemd.inhibit(GPU)
        assert len(logind.locks) == 2
        await systemd.release(GPU)


async def test_one_that_does_not_come_up(systemd: LinuxSystemd, logind: FakeLogind, tmp_path: Path) -> None:
    write(tmp_path / "systemd-inhibit", "#!/bin/sh\nexit 4\n")
    error = await error_of(systemd.inhibit(GPU))
    assert str(error) == f"cannot keep the machine awake for GPU {GPU}: systemd-inhibit ended with status 4"
    (tmp_path / "systemd-inhibit").unlink()
    error = await error_of(systemd.inhibit(GPU))
    assert error.errno == errno.ENOENT
    assert "systemd-inhibit cannot be started: there is no systemd-inhibit in" in str(error)


async def test_cancelled_before_the_lock_is_there(systemd: LinuxSystemd, logind: FakeLogind, tmp_path: Path) -> None:
    fifo = tmp_path / "pid"
    os.mkfifo(fifo)
    write(tmp_path / "systemd-inhibit", f"#!/bin/sh\necho $$ >{fifo}\nexec sleep 1000\n")
    call = asyncio.ensure_future(systemd.inhibit(GPU))
    pid = int(await asyncio.to_thread(fifo.read_text))
    call.cancel()
    await asyncio.wait([call])
    assert call.cancelled()
    await ended(pid)


async def test_a_lock_that_is_about_to_go_is_none(systemd: LinuxSystemd, logind: FakeLogind, tmp_path: Path) -> None:
    """Whoever was told to end may take its time, and whoever asked for that may not have waited."""
    told = tmp_path / "told"
    os.mkfifo(told)
    heard = f"signal.signal(signal.SIGTERM, lambda *_: open({str(told)!r}, 'w').close())\n"
    slow = INHIBIT.replace("signal.pause()", "while True: signal.pause()").replace("options =", f"{heard}options =")
    write(tmp_path / "systemd-inhibit", slow)
    await systemd.inhibit(GPU)
    (dying,) = holders(logind)
    try:
        releasing = asyncio.ensure_future(systemd.release(GPU))
        await asyncio.to_thread(told.read_text)
        releasing.cancel()
        await asyncio.wait([releasing])
        write(tmp_path / "systemd-inhibit", INHIBIT)
        await systemd.inhibit(GPU)
        assert len(holders(logind)) == 2
    finally:
        os.kill(dying, signal.SIGKILL)
        await ended(dying)


async def test_no_logind(systemd: LinuxSystemd, caplog: pytest.LogCaptureFixture) -> None:
    """Then nothing puts the machine to sleep by it. It is worth a word, and one is enough."""
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            await systemd.inhibit(GPU)
    assert [record.getMessage().partition(" (")[0] for record in caplog.records] == [
        "nothing is done to keep this machine awake: there is no logind"
    ]
    await systemd.release(GPU)
    assert await systemd.sessions(1000) == ()
    error = await error_of(systemd.end_session("4"))
    assert error.errno == errno.ENOENT
    assert str(error).startswith("cannot end session 4: there is no org.freedesktop.login1 on the system bus (")


async def test_logind_leaves_between_two_locks(
    systemd: LinuxSystemd, private_bus: PrivateBus, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The second is begun before it is asked, since nothing can hold one: what was begun ends."""
    async with logind_on(private_bus.address):
        await systemd.inhibit(GPU)
        await systemd.release(GPU)
    write(tmp_path / "systemd-inhibit", "#!/bin/sh\nexec sleep 1000\n")
    before = children()
    await systemd.inhibit(GPU)
    for pid in children() - before:
        await ended(pid)
    assert "there is no logind" in caplog.text


async def test_the_sessions_of_a_user(systemd: LinuxSystemd, logind: FakeLogind) -> None:
    logind.sessions.update({"2": (1000, "user"), "c1": (113, "greeter"), "3": (1000, "manager"), "5": (1000, "user")})
    assert await systemd.sessions(1000) == ("2", "5")
    assert await systemd.sessions(7) == ()


async def test_a_session_ends(systemd: LinuxSystemd, logind: FakeLogind) -> None:
    logind.sessions.update({"2": (1000, "user"), "3": (1000, "user")})
    end = asyncio.ensure_future(systemd.end_session("2"))
    await logind.called("TerminateSession")
    await logind.forget("3")
    assert not end.done()
    await logind.forget("2")
    await end
    error = await error_of(systemd.end_session("2"))
    assert error.errno == errno.ENOENT
    assert str(error) == "cannot end session 2: there is no such session"


async def test_a_session_ends_while_logind_is_started_anew(systemd: LinuxSystemd, private_bus: PrivateBus) -> None:
    async with logind_on(private_bus.address) as logind:
        logind.sessions["2"] = (1000, "user")
        end = asyncio.ensure_future(systemd.end_session("2"))
        await logind.called("TerminateSession")
        await logind.called("GetSession", times=2)
    async with logind_on(private_bus.address):
        await end


async def test_a_holder_that_is_killed_from_outside_is_no_zombie(systemd: LinuxSystemd, logind: FakeLogind) -> None:
    await systemd.inhibit(GPU)
    (pid,) = holders(logind)
    os.kill(pid, signal.SIGKILL)
    await ended(pid)
    await systemd.inhibit(GPU)
    assert len([each for each in holders(logind) if each != pid]) == 1
    assert not is_process(pid)
