"""Units of the system and of users, as managers in memory have them: tests/real_system asks real ones."""

from __future__ import annotations

import asyncio
import errno
import os
import tempfile
from collections.abc import AsyncIterator, Awaitable, Iterator
from pathlib import Path

import pytest

from gpuswitch.errors import KernelError
from gpuswitch.host.linux.systemd import LinuxSystemd
from gpuswitch.model.holders import Unit
from tests.harness.buses.private import BusProgram, PrivateBus, running
from tests.harness.managers.doubles import FakeSystemd, systemd_on
from tests.harness.managers.memory import Manager, MemoryAdministrator
from tests.harness.managers.systemctl import Systemctl, user_manager
from tests.harness.service.peers import Peer, ScriptedBus, scripted_bus
from tests.systemd_contract.cases import CASES, ManagerHarness

PLAIN = Unit("plain.service")
HANGS = Unit("hangs.service")
ME = os.getuid()
MINE = Unit("plain.service", ME)


@pytest.fixture
def run() -> Iterator[Path]:
    """A /run of a machine that systemd runs; its path is short, as that of a socket must be."""
    with tempfile.TemporaryDirectory(prefix="run-") as folder:
        (Path(folder) / "systemd/system").mkdir(parents=True)
        (Path(folder) / "tools").mkdir()
        yield Path(folder)


@pytest.fixture
def manager() -> Manager:
    return Manager()


@pytest.fixture
async def systemd(run: Path, private_bus: PrivateBus, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[LinuxSystemd]:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", private_bus.address)
    systemd = LinuxSystemd(str(run / "tools"), run)
    yield systemd
    await systemd.close()


@pytest.fixture
async def fake_systemd(private_bus: PrivateBus, manager: Manager) -> AsyncIterator[FakeSystemd]:
    async with systemd_on(private_bus.address, manager) as fake_systemd:
        yield fake_systemd


@pytest.fixture
async def systemctl(run: Path, manager: Manager) -> AsyncIterator[Systemctl]:
    async with user_manager(run, ME, run / "tools", manager) as systemctl:
        yield systemctl


@pytest.mark.parametrize("early", [False, True], ids=["in_order", "job_over_before_the_answer"])
@pytest.mark.parametrize("name", CASES)
async def test_system(name: str, early: bool, systemd: LinuxSystemd, private_bus: PrivateBus, manager: Manager) -> None:
    async with systemd_on(private_bus.address, manager, early=early):
        await CASES[name](ManagerHarness(systemd, MemoryAdministrator(manager), None))


@pytest.mark.parametrize("name", CASES)
async def test_user(name: str, systemd: LinuxSystemd, systemctl: Systemctl, manager: Manager) -> None:
    await CASES[name](ManagerHarness(systemd, MemoryAdministrator(manager), ME))


async def error_of(call: Awaitable[object]) -> KernelError:
    with pytest.raises(KernelError) as caught:
        await call
    return caught.value


ENDS = {
    end: (number, says)
    for end, number, says in (
        ("failed", errno.EIO, "it failed"),
        ("canceled", errno.ECANCELED, "its job was cancelled"),
        ("timeout", errno.ETIMEDOUT, "time-out"),
        ("dependency", errno.EIO, "a unit that it needs"),
        ("skipped", errno.EIO, "not applicable"),
        ("frozen", errno.EIO, "its job ended as frozen"),
    )
}


@pytest.mark.parametrize("end", ENDS)
async def test_how_a_job_ends(end: str, systemd: LinuxSystemd, fake_systemd: FakeSystemd, manager: Manager) -> None:
    number, says = ENDS[end]
    unit = manager.units["hangs.service"]
    unit.result, unit.status, unit.status_text = "timeout", 5, "waiting for the fan"
    stop = asyncio.ensure_future(systemd.stop(HANGS))
    await manager.stop_under_way.wait()
    assert unit.job
    manager.end(unit.job, end)
    error = await error_of(stop)
    assert error.errno == number
    assert str(error).startswith("cannot stop hangs.service: ")
    assert says in str(error)
    assert str(error).endswith('(timeout, status 5, "waiting for the fan")')


async def test_what_is_up_again_at_once_is_not_stopped(
    systemd: LinuxSystemd, fake_systemd: FakeSystemd, manager: Manager
) -> None:
    unit = manager.units["hangs.service"]
    stop = asyncio.ensure_future(systemd.stop(HANGS))
    await manager.stop_under_way.wait()
    assert unit.job
    unit.state = "activating"
    manager.end(unit.job, "done")
    assert str(await error_of(stop)) == "cannot stop hangs.service: its job is done, and it is activating again"


async def test_a_condition_that_is_not_met(systemd: LinuxSystemd, fake_systemd: FakeSystemd, manager: Manager) -> None:
    """Systemd's word for such a job is `done`. A unit that has done its work and is over is inactive as well."""
    slow = manager.units["slow.service"]
    for condition in (False, True):
        start = asyncio.ensure_future(systemd.start(Unit("slow.service")))
        await manager.start_under_way.wait()
        manager.start_under_way.clear()
        assert slow.job
        slow.state, slow.condition = "inactive", condition
        manager.end(slow.job, "done")
        if condition:
            await start
        else:
            assert "a Condition line of its unit file is not true" in str(await error_of(start))


async def test_cancelled_before_the_job_has_a_name(
    systemd: LinuxSystemd, fake_systemd: FakeSystemd, manager: Manager
) -> None:
    fake_systemd.mute = True
    stop = asyncio.ensure_future(systemd.stop(HANGS))
    await manager.stop_under_way.wait()
    stop.cancel()
    await asyncio.wait([stop])
    assert stop.cancelled()
    await systemd.close()
    assert manager.units["hangs.service"].job is None


async def test_somebody_elses_signal_is_not_believed(
    systemd: LinuxSystemd, fake_systemd: FakeSystemd, manager: Manager, peer: Peer
) -> None:
    stop = asyncio.ensure_future(systemd.stop(HANGS))
    await manager.stop_under_way.wait()
    job = manager.units["hangs.service"].job
    assert job
    origin = (FakeSystemd.path, FakeSystemd.interface, "JobRemoved")
    told = (job.number, job.path, "hangs.service", "dependency")
    await peer.signal(await fake_systemd.called("StopUnit"), *origin, "uoss", *told)
    manager.end(job, "timeout")
    assert (await error_of(stop)).errno == errno.ETIMEDOUT


@pytest.mark.parametrize("over", [False, True], ids=["still_there", "over_meanwhile"])
async def test_systemd_executes_itself_anew(
    over: bool, systemd: LinuxSystemd, private_bus: PrivateBus, manager: Manager
) -> None:
    unit = manager.units["hangs.service"]
    async with systemd_on(private_bus.address, manager) as fake_systemd:
        stop = asyncio.ensure_future(systemd.stop(HANGS))
        await fake_systemd.called("StopUnit")
        await manager.stop_under_way.wait()
    assert unit.job
    job = unit.job
    if over:
        unit.state = "inactive"
        manager.end(job, "done")
    async with systemd_on(private_bus.address, manager) as fake_systemd:
        if not over:
            await fake_systemd.called("Get")
            unit.state = "inactive"
            manager.end(job, "done")
        await stop


async def test_the_bus_is_lost_and_comes_back(
    systemd: LinuxSystemd, bus_program: BusProgram, private_bus: PrivateBus, manager: Manager
) -> None:
    async with systemd_on(private_bus.address, manager):
        assert await systemd.active([PLAIN]) == {PLAIN}
        stop = asyncio.ensure_future(systemd.stop(HANGS))
        await manager.stop_under_way.wait()
        private_bus.stop()
        assert str(await error_of(stop)) == "cannot stop hangs.service: the connection to the system bus is lost"
    lost = await error_of(systemd.active([PLAIN]))
    assert str(lost).startswith("cannot ask systemd about plain.service: the system bus cannot be used: ")
    assert not await systemd.stopping()
    with running(bus_program, private_bus.folder):
        async with systemd_on(private_bus.address, manager):
            assert await systemd.active([PLAIN]) == {PLAIN}


async def test_a_bus_that_does_not_let_us_in(systemd: LinuxSystemd, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def turn_away(buses: asyncio.Queue[ScriptedBus]) -> None:
        bus = await buses.get()
        await bus.reader.readuntil(b"\r\n")
        bus.write(b"REJECTED EXTERNAL\r\n")
        assert await bus.reader.read() == b""  # our end is closed
        await bus.close()

    async with scripted_bus(run) as (address, buses):
        monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", address)
        error, _ = await asyncio.gather(error_of(systemd.stop(PLAIN)), turn_away(buses))
        assert str(error) == "cannot stop plain.service: the system bus cannot be used: it does not let us in"


async def test_a_log_in_that_is_cancelled_leaves_nothing_open(
    systemd: LinuxSystemd, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with scripted_bus(run) as (address, buses):
        monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", address)
        stop = asyncio.ensure_future(systemd.stop(PLAIN))
        bus = await buses.get()
        await bus.reader.readuntil(b"\r\n")
        stop.cancel()
        assert await bus.reader.read() == b""
        await bus.close()


async def test_an_address_that_is_none(systemd: LinuxSystemd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", "nonsense")
    assert "DBUS_SYSTEM_BUS_ADDRESS is not the address of a bus" in str(await error_of(systemd.stop(PLAIN)))


async def test_without_systemd(systemd: LinuxSystemd, run: Path) -> None:
    error = await error_of(systemd.stop(PLAIN))
    assert error.errno == errno.ENOENT
    assert str(error).startswith("cannot stop plain.service: there is no org.freedesktop.systemd1 on the system bus")
    assert not await systemd.stopping()
    assert (await error_of(systemd.booting())).errno == errno.ENOENT
    # It runs the machine, as its folder says, and does not answer: then nobody can say what is active.
    assert (await error_of(systemd.active([PLAIN]))).errno == errno.ENOENT
    (run / "systemd/system").rmdir()
    assert await systemd.active([PLAIN]) == set()
    assert await systemd.sockets(PLAIN) == ()


async def test_stopping(systemd: LinuxSystemd, fake_systemd: FakeSystemd) -> None:
    assert not await systemd.stopping()
    fake_systemd.state = "stopping"
    assert await systemd.stopping()


@pytest.mark.parametrize(
    ("state", "booting"),
    [("initializing", True), ("starting", True), ("running", False), ("degraded", False), ("stopping", False)],
)
async def test_booting(systemd: LinuxSystemd, fake_systemd: FakeSystemd, state: str, *, booting: bool) -> None:
    fake_systemd.state = state
    assert await systemd.booting() is booting


async def test_the_units_of_several_managers(
    systemd: LinuxSystemd, fake_systemd: FakeSystemd, systemctl: Systemctl, manager: Manager
) -> None:
    nobody = Unit("plain.service", 4_000_000)
    units = [PLAIN, MINE, nobody, Unit("missing.service"), Unit("missing.service", ME)]
    assert await systemd.active(units) == {PLAIN, MINE}
    assert await systemd.active([]) == set()
    assert await systemd.sockets(nobody) == ()
    for call in (systemd.stop(nobody), systemd.start(nobody)):
        error = await error_of(call)
        assert error.errno == errno.ENOENT
        assert str(error).endswith("plain.service of user 4000000: user 4000000 has no systemd running")


async def test_how_systemctl_is_run(systemd: LinuxSystemd, systemctl: Systemctl, run: Path) -> None:
    await systemd.stop(MINE)
    for arguments, environment, uid in systemctl.calls:
        assert arguments[-2:] == ["--", "plain.service"]
        assert environment.pop("LC_CTYPE", "C.UTF-8") == "C.UTF-8"  # Python itself sets it
        assert environment == {"XDG_RUNTIME_DIR": str(run / f"user/{ME}"), "LC_ALL": "C.UTF-8"}
        assert uid == ME


async def test_a_folder_of_somebody_else_is_no_manager(systemd: LinuxSystemd, systemctl: Systemctl, run: Path) -> None:
    (run / f"user/{ME}").rename(run / "user/77")
    assert await systemd.active([Unit("plain.service", 77)]) == set()
    assert systemctl.calls == []


async def test_without_systemctl(systemd: LinuxSystemd, systemctl: Systemctl, run: Path) -> None:
    (run / "tools/systemctl").unlink()
    words = f"systemctl cannot be run: there is no systemctl in {run}/tools"
    assert str(await error_of(systemd.stop(MINE))) == f"cannot stop {MINE}: {words}"
    assert str(await error_of(systemd.active([MINE]))) == f"cannot ask systemd about {MINE}: {words}"
    assert str(await error_of(systemd.sockets(MINE))) == f"cannot ask what triggers {MINE}: {words}"


async def test_a_cancelled_systemctl_is_gone(systemd: LinuxSystemd, systemctl: Systemctl, manager: Manager) -> None:
    before = children()
    stop = asyncio.ensure_future(systemd.stop(Unit("hangs.service", ME)))
    await manager.stop_under_way.wait()
    stop.cancel()
    await asyncio.wait([stop])
    await systemd.close()
    assert children() == before


def children() -> set[str]:
    """Our own, dead ones that nobody reaped included."""
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


async def test_the_words_of_systemctl(systemd: LinuxSystemd, systemctl: Systemctl, run: Path) -> None:
    """Hints and warnings come before or after the line that counts."""
    program = run / "tools/systemctl"
    warning = "Warning: The unit file of plain.service changed on disk."
    lines = f'{warning}\nA dependency job for plain.service failed.\nSee "journalctl -xe".\n'
    program.write_text(f"#!/bin/sh\necho '{lines}' >&2\nexit 1\n")
    assert str(await error_of(systemd.start(MINE))) == f"cannot start {MINE}: A dependency job for plain.service failed"
    program.write_text("#!/bin/sh\nkill -9 $$\n")
    assert str(await error_of(systemd.start(MINE))) == f"cannot start {MINE}: systemctl ended with status -9"


async def test_a_manager_that_goes_takes_its_units_along(
    systemd: LinuxSystemd, systemctl: Systemctl, run: Path
) -> None:
    """As when its user's last session ends, with the display manager for one."""
    socket = run / f"user/{ME}/systemd/private"
    (run / "tools/systemctl").write_text(f"#!/bin/sh\n/bin/mv {socket} {socket}.gone\nexit 1\n")
    await systemd.stop(MINE)
    socket.with_name("private.gone").rename(socket)
    assert await systemd.active([MINE]) == set()


async def test_a_users_unit_that_fails_when_its_job_is_done(
    systemd: LinuxSystemd, systemctl: Systemctl, run: Path
) -> None:
    (run / "tools/systemctl").write_text("#!/bin/sh\necho ActiveState=failed\n")
    assert str(await error_of(systemd.start(MINE))) == f"cannot start {MINE}: it failed"


async def test_a_manager_whose_list_of_jobs_makes_no_sense(
    systemd: LinuxSystemd, systemctl: Systemctl, run: Path
) -> None:
    """It is the user's, and may be a program of his own."""
    (run / "tools/systemctl").write_text("#!/bin/sh\necho Job=7\necho\necho 7\n")
    assert await systemd.active([MINE]) == set()


async def test_a_job_that_cannot_be_cancelled_is_told_to_the_log(
    systemd: LinuxSystemd, private_bus: PrivateBus, manager: Manager, caplog: pytest.LogCaptureFixture
) -> None:
    async with systemd_on(private_bus.address, manager):
        stop = asyncio.ensure_future(systemd.stop(HANGS))
        await manager.stop_under_way.wait()
    stop.cancel()
    await asyncio.wait([stop])
    await systemd.close()
    assert stop.cancelled()
    assert "cannot cancel the job of hangs.service: there is no org.freedesktop.systemd1" in caplog.text
