"""How the real service starts, reloads and ends, and what it tells systemd meanwhile."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from gpuswitch.host.simulated.scenarios import SCENARIOS
from gpuswitch.service import main
from tests.harness.buses.private import PrivateBus
from tests.harness.service.peers import Peer, PeerError
from tests.harness.service.services import (
    ANY_PORT,
    BIN,
    GPU,
    MANAGER,
    NAME,
    ROOT,
    contents,
    environment,
    notifications,
    run_to_the_end,
    told_properties,
    write_config,
)
from tests.real_bus.conftest import Start

DISCRETE = f"{ROOT}/gpu/0000_01_00_0"
NAMED = f'{ANY_PORT}[[gpu]]\naddress = "01:00.0"\nname = "geforce"\n'
TYPO = f"{ANY_PORT}[deadlines]\nunbnid = 3\n"
NO_SYSTEM_BUS = (
    "gpuswitchd: a simulated gpuswitchd does not go on the system bus, "
    "but in a container that has a systemd of its own: "
    "give it a --bus of its own, a socket of this machine like unix:path=/tmp/bus\n"
)


def a_daemon(bus: str, folder: Path, runtime: str) -> list[str]:
    (folder / "empty").mkdir(exist_ok=True)
    return ["--simulate", "laptop", "--bus", bus, "--config", f"{folder}/empty", "--runtime", f"{folder}/{runtime}"]


# Start


@pytest.mark.parametrize("scenario", sorted(SCENARIOS))
async def test_it_is_ready_once_every_gpu_is_on_the_bus(start: Start, scenario: str) -> None:
    service = await start(scenario)
    objects = await service.call(ROOT, "org.freedesktop.DBus.ObjectManager.GetManagedObjects")
    states = {interfaces[GPU]["State"][1] for interfaces in objects.values()}
    assert states == {"vfio" if scenario == "reserved" else "host"}


async def test_it_does_not_start_with_a_configuration_that_is_wrong(private_bus: PrivateBus, tmp_path: Path) -> None:
    file = write_config(tmp_path / "etc", TYPO)
    status, said = await run_to_the_end(
        "--simulate", "laptop", "--bus", private_bus.address, "--config", f"{tmp_path}/etc"
    )
    assert status == 2
    assert said == f"gpuswitchd: cannot use {file}:4: deadlines.unbnid: no such key; did you mean unbind?\n"


async def test_it_does_not_start_with_a_library_that_nobody_knows() -> None:
    status, said = await run_to_the_end("--simulate", "laptop", "--bus=unix:path=/tmp/bus", DBUS_LIBRARY="libdbus")
    assert (status, said) == (1, "cannot use DBUS_LIBRARY=libdbus: it is one of dbus-next, dbus-fast\n")


async def test_a_second_one_in_the_same_runtime_directory_does_not_start(
    start: Start, private_bus: PrivateBus, tmp_path: Path
) -> None:
    service = await start("laptop")
    status, said = await run_to_the_end(*a_daemon(private_bus.address, tmp_path, "service/run"))
    assert status == 1
    assert said == f"gpuswitchd: another gpuswitchd is running (it has {tmp_path}/service/run/lock)\n"
    assert await service.ask("GetGpu", "s", "01:00.0") == DISCRETE


async def test_a_second_one_on_the_same_bus_does_not_start(
    start: Start, private_bus: PrivateBus, tmp_path: Path
) -> None:
    service = await start("laptop")
    status, said = await run_to_the_end(*a_daemon(private_bus.address, tmp_path, "run"))
    assert status == 1
    assert said.splitlines()[-1] == "gpuswitchd: cannot own org.gpuswitch1: another gpuswitchd owns it"
    assert "Traceback" not in said
    assert await service.ask("GetGpu", "s", "01:00.0") == DISCRETE


async def test_it_does_not_start_where_it_cannot_be(private_bus: PrivateBus, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    bus = f"unix:path={tmp_path}/no"
    for arguments, reason in (
        (a_daemon(private_bus.address, tmp_path, "file"), f"cannot use the runtime directory {tmp_path}/file: "),
        (a_daemon(bus, tmp_path, "run"), f"cannot connect to the bus at {bus}"),
    ):
        status, said = await run_to_the_end(*arguments)
        assert status == 1
        assert said.startswith(f"gpuswitchd: {reason}")
        assert said.count("\n") == 1


@pytest.fixture
def system_socket(private_bus: PrivateBus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The private bus plays the system's. Whether this is a container is for the test to say."""
    socket = private_bus.address.removeprefix("unix:path=").partition(",")[0]
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", f"unix:path={socket}")
    monkeypatch.setattr("gpuswitch.runtime.buses.CONTAINER", tmp_path / "container")
    return socket


def test_a_simulated_one_refuses_every_spelling_of_the_system_bus(
    system_socket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other").symlink_to(system_socket)
    os.link(system_socket, tmp_path / "hard")
    for options in (
        [],
        [f"--bus=unix:path={system_socket}"],
        [f"--bus=unix:guid=00,path={system_socket}"],
        [f"--bus=unix:path={system_socket.replace('bus', '%62us')}"],
        [f"--bus=unix:path=/.{system_socket}"],
        [f"--bus=unix:path={tmp_path}/other"],
        [f"--bus=unix:path={tmp_path}/hard"],
        [f"--bus=unix:path={tmp_path}/none;unix:path={system_socket}"],
        ["--bus=unix:path=/run/dbus/system_bus_socket"],
        ["--bus=unix:path=/var/run/dbus/system_bus_socket"],
    ):
        assert (options, main(["--simulate", "laptop", *options])) == (options, 2)
        assert capsys.readouterr().err == NO_SYSTEM_BUS


def test_a_simulated_one_stays_on_sockets_of_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    for bus in ("tcp:host=localhost,port=1", "unix:", "unix:path=%00", ";", "system"):
        assert (bus, main(["--simulate", "laptop", f"--bus={bus}"])) == (bus, 2)
        assert capsys.readouterr().err == (
            f"gpuswitchd: a simulated gpuswitchd does not go on the bus {bus!r}: "
            "give it one that is a socket of this machine, like unix:path=/tmp/bus\n"
        )


@pytest.mark.parametrize("options", [[], ["--bus=unix:path={}"], ["--bus=unix:path=/none/such;unix:path={}"]])
def test_a_simulated_one_goes_on_the_system_bus_of_a_container(
    system_socket: str, tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """It gets as far as its configuration. tests/real_system has it in a real container."""
    (tmp_path / "container").write_text("systemd-nspawn")
    config = write_config(tmp_path / "etc", TYPO).parent
    simulate = ["--simulate", "laptop", "--config", str(config), *(option.format(system_socket) for option in options)]
    assert main(simulate) == 2
    assert "unbnid" in capsys.readouterr().err


async def test_options_that_make_no_sense_are_refused_in_one_sentence() -> None:
    bus = "--bus=unix:path=/nowhere"
    for options, sentence in (
        (["--json"], "cannot use --instead and --json without --check-config: they say how to check"),
        (["--bus="], "cannot use an empty --bus: leave it out for the usual one"),
        (["--fault=unbind=EIO"], "cannot inject a --fault into this machine, only into one in memory: add --simulate"),
        (
            ["--simulate=laptop", bus, "--fault=x"],
            "cannot use the fault 'x': write it like probe@0000:01:00.1#1=EINVAL or unbind=0.3s",
        ),
    ):
        assert await run_to_the_end(*options) == (2, f"gpuswitchd: {sentence}\n")


# Reload


async def test_a_reload_takes_the_new_configuration_and_tells_what_changed(start: Start) -> None:
    service = await start("laptop")
    write_config(service.config, NAMED)
    await service.ask("Reload")
    told = told_properties([await service.signal()])
    assert told == {"Name": "geforce", "Managed": True}
    assert await service.ask("GetGpu", "s", "geforce") == DISCRETE


async def test_a_reload_that_finds_a_fault_names_it_and_changes_nothing(start: Start) -> None:
    service = await start("laptop", config=NAMED)
    before = await service.ask("Config")
    write_config(service.config, TYPO)
    with pytest.raises(PeerError) as raised:
        await service.ask("Reload")
    sentence = f"cannot use {service.config}/config.toml:4: deadlines.unbnid: no such key; did you mean unbind?"
    assert str(raised.value) == f"org.gpuswitch1.Error.InvalidArgument: {sentence}"
    assert await service.ask("Config") == before
    assert await service.ask("GetGpu", "s", "geforce") == DISCRETE


async def test_systemd_hears_of_a_reload_by_signal_good_or_bad(start: Start) -> None:
    service = await start("laptop")
    for text, name in ((NAMED, "geforce"), (TYPO, "geforce"), (ANY_PORT, "")):
        write_config(service.config, text)
        service.process.send_signal(signal.SIGHUP)
        reloading = await service.notified("RELOADING")
        assert int(reloading["MONOTONIC_USEC"]) > 0
        assert await service.notified("READY") == {"READY": "1"}
        assert (await service.properties(DISCRETE))["Name"] == name
    assert "the configuration stays as it was: cannot use " in service.log


async def test_a_reload_that_is_asked_for_while_it_starts_comes_after_that(
    private_bus: PrivateBus, tmp_path: Path
) -> None:
    """It has read the configuration by then, and connects to the bus: at first nobody answers there."""
    connected: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
    server = await asyncio.start_unix_server(lambda *ends: connected.put_nowait(ends), tmp_path / "slow")
    config = write_config(tmp_path / "etc", ANY_PORT).parent
    options = ["--config", f"{config}", "--runtime", f"{tmp_path}/run", "--state", f"{tmp_path}/state"]
    async with server, notifications(tmp_path) as (address, told):
        process = await asyncio.create_subprocess_exec(
            BIN / "gpuswitchd",
            "--simulate",
            "laptop",
            "--bus",
            f"unix:path={tmp_path}/slow",
            *options,
            env=environment(NOTIFY_SOCKET=address),
        )
        reader, writer = await connected.get()
        write_config(config, NAMED)
        process.send_signal(signal.SIGHUP)
        pumps = []
        for _ in range(2):
            there = await asyncio.open_unix_connection(private_bus.address.partition("unix:path=")[2].partition(",")[0])
            pumps += [asyncio.create_task(_pump(reader, there[1])), asyncio.create_task(_pump(there[0], writer))]
            if len(pumps) == 2:  # the other one, which others are asked over, is made when this one is there
                reader, writer = await connected.get()
        async with Peer.on(private_bus.address) as peer:
            for word in ("READY", "RELOADING", "READY"):
                while word not in await told.get():
                    pass
            assert '"geforce"' in {each["value"][1] for each in await peer.call(NAME, ROOT, f"{MANAGER}.Config")}
        process.terminate()
        assert await process.wait() == 0
        await asyncio.gather(*pumps)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()
    await writer.wait_closed()


# End


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_it_ends_when_told(start: Start, number: int) -> None:
    service = await start("laptop")
    assert await service.end(number) == 0
    assert await service.notified("STOPPING") == {"STOPPING": "1"}


async def test_told_to_end_in_mid_switch_it_ends_the_step_and_reverts(start: Start) -> None:
    service = await start("laptop", "unbind=1s")
    switch = await service.move(DISCRETE, "vfio")
    while not ((step := await service.signal()).member == "StepChanged" and step.body[3] == "unbind"):
        pass
    assert await service.end(signal.SIGTERM) == 0
    assert (await service.signals_until("SwitchFinished"))[-1].body == (switch, "cancelled", "the service is stopping")
    assert f"0000:01:00.0: switch {switch} to vfio: cancelled" in service.log
    assert contents(service.folder / "run" / "gpus") == []


async def test_told_to_end_it_does_not_wait_for_a_kernel_that_does_not_return(start: Start) -> None:
    service = await start("laptop", "unbind=hang", config=f"{ANY_PORT}[deadlines]\nunbind = 0.2\n")
    await service.move(DISCRETE, "vfio")
    await service.until_state(DISCRETE, "wedged")
    assert await service.end(signal.SIGTERM) == 0
    assert "Traceback" not in service.log


async def test_calls_that_wait_are_answered_when_it_ends(start: Start) -> None:
    service = await start("laptop", "unbind=1s")
    waiting = asyncio.create_task(service.wait(DISCRETE, await service.move(DISCRETE, "vfio")))
    await service.properties(DISCRETE)  # a connection keeps the order, so after this the other call is being served
    service.process.send_signal(signal.SIGTERM)
    assert (await waiting)["result"] == "cancelled"
    assert await service.process.wait() == 0


async def test_without_its_bus_it_ends_as_a_failure(start: Start, private_bus: PrivateBus) -> None:
    service = await start("laptop")
    private_bus.stop()
    assert await service.process.wait() == 1
    assert service.log.splitlines()[-1] == "gpuswitchd: the connection to the bus was lost"
    assert "Traceback" not in service.log


async def test_a_simulated_one_leaves_nothing_behind(tmp_path: Path) -> None:
    status, _ = await run_to_the_end("--simulate=laptop", f"--bus=unix:path={tmp_path}/no", TMPDIR=str(tmp_path))
    assert status == 1
    assert contents(tmp_path) == []


# Watchdog


async def test_the_watchdog_is_fed_where_systemd_asks_for_it(start: Start) -> None:
    service = await start("laptop", WATCHDOG_USEC="100000")
    for _ in range(3):
        assert await service.notified("WATCHDOG") == {"WATCHDOG": "1"}


async def test_a_watchdog_that_is_meant_for_another_is_not_fed(start: Start) -> None:
    service = await start("laptop", WATCHDOG_USEC="1000", WATCHDOG_PID="1")
    await service.end(signal.SIGTERM)
    assert await service.told.get() == {"STOPPING": "1"}
