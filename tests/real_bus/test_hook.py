"""The libvirt hook on a real bus: what it asks, what it makes of the answers, and of there being none."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import jeepney
import pytest

from tests.harness.buses.private import BusProgram, PrivateBus, chosen
from tests.harness.domains import DOMAIN, UUID, domain, table, write
from tests.harness.service.hook import Hook, StandIn, ended, system_bus
from tests.harness.service.peers import Peer
from tests.harness.service.services import MANAGER, NAME, ROOT

ADDRESSES = ["0000:01:00.0", "0000:01:00.1"]
HARMLESS = ["started begin", "reconnect begin", "release end"]

UNKNOWN, FAILED, DENIED = {
    "dbus-daemon": (
        f"The name {NAME} was not provided by any .service files",
        f"Process {NAME} exited with status 1",
        "Rejected send message",
    ),
    # Other words (its driver.c), and other names: NameHasNoOwner for what the daemon calls Spawn.ChildExited.
    "dbus-broker": (
        "The name is not activatable",
        f"Could not activate remote peer '{NAME}': unit failed",
        "Sender is not authorized to send message",
    ),
}[chosen()]
"""How the bus says that nobody could start the service, that it ended at once, and that it may not be called."""


@pytest.fixture
def hook(tmp_path: Path, private_bus: PrivateBus) -> Hook:
    return Hook(tmp_path / "hook", private_bus.address)


def manage(hook: Hook, address: str = "01:00.0") -> None:
    write(hook.folder / "etc", config=table(address))


def fields(call: jeepney.Message) -> tuple[Any, ...]:
    """Path, method, signature and arguments."""
    keys = jeepney.HeaderFields
    path, interface, member, signature = (
        call.header.fields[key] for key in (keys.path, keys.interface, keys.member, keys.signature)
    )
    return path, f"{interface}.{member}", signature, call.body


def sender(call: jeepney.Message) -> str:
    return str(call.header.fields[jeepney.HeaderFields.sender])


@pytest.mark.parametrize(
    ("operation", "method", "signature", "last"),
    [
        ("prepare begin", "AcquireForVm", "ssas", ADDRESSES),
        ("started begin", "AdoptVm", "ssas", ADDRESSES),
        ("reconnect begin", "AdoptVm", "ssas", ADDRESSES),
        ("release end", "ReleaseFromVm", "sss", "shutdown"),
    ],
)
async def test_what_is_asked(hook: Hook, operation: str, method: str, signature: str, last: object) -> None:
    name = 'wine, 漢 & "cheese"'
    async with StandIn.on(hook.bus) as service:
        process = await hook.start(operation, name=name, reason="shutdown")
        call = await service.call()
        assert fields(call) == (ROOT, f"{MANAGER}.{method}", signature, (name, UUID, last))
        await service.answer(call, *(("as", ADDRESSES[:1]) if method == "AcquireForVm" else ()))
        assert await ended(process) == (0, "")


async def test_prepare_waits_for_the_answer(hook: Hook) -> None:
    async with StandIn.on(hook.bus) as service:
        process = await hook.start("prepare begin")
        call = await service.call()
        assert process.returncode is None
        await service.refuse(call, "org.gpuswitch1.Error.Busy", "cannot move it: a has it open\ncannot move it: b too")
        assert await ended(process) == (1, "gpuswitch: cannot move it: a has it open; cannot move it: b too\n")


@pytest.mark.parametrize("operation", HARMLESS)
async def test_the_others_never_fail(hook: Hook, operation: str) -> None:
    async with StandIn.on(hook.bus) as service:
        process = await hook.start(operation)
        await service.refuse(await service.call(), "org.gpuswitch1.Error.Failed", "it broke")
        assert await ended(process) == (0, "gpuswitch: it broke\n")


async def test_who_waits_no_more_is_seen_to_be_gone(hook: Hook, peer: Peer) -> None:
    """A hook that is killed, by whatever signal, must not leave its call behind."""
    async with StandIn.on(hook.bus) as service, peer.hear("org.freedesktop.DBus") as heard:
        process = await hook.start("prepare begin")
        caller = sender(await service.call())
        process.kill()
        while (await heard.get()).body != (caller, caller, ""):
            pass
        assert (await ended(process))[0] == -9


async def test_a_service_that_ends_before_it_answers(hook: Hook) -> None:
    for managed in (False, True):
        async with StandIn.on(hook.bus) as service:
            process = await hook.start("prepare begin")
            await service.call()
        status, said = await ended(process)
        assert status == managed
        assert (
            said.startswith("gpuswitch: cannot give 0000:01:00.0, 0000:01:00.1 to win10: gpuswitchd has not") == managed
        )
        manage(hook)


async def test_without_a_service_a_managed_gpu_is_refused(hook: Hook) -> None:
    manage(hook, "01:00.1")
    status, said = await hook.run("prepare begin")
    assert status == 1
    assert said == (
        "gpuswitch: cannot give 0000:01:00.0, 0000:01:00.1 to win10: gpuswitchd is not running and could not be "
        f"started ({UNKNOWN}); run: systemctl start gpuswitchd\n"
    )
    for operation in HARMLESS:
        status, said = await hook.run(operation)
        assert status == 0
        assert "gpuswitchd is not running" in said


async def test_without_a_service_other_domains_start(hook: Hook) -> None:
    assert await hook.run("prepare begin") == (0, "")  # nothing is configured
    manage(hook, "02:00.0")
    assert await hook.run("prepare begin") == (0, "")
    (hook.folder / "etc/config.toml").write_text("this is no TOML")
    assert await hook.run("prepare begin", domain("")) == (0, "")
    status, said = await hook.run("prepare begin")
    assert status == 1
    assert "cannot tell whether win10 has a managed GPU: gpuswitchd is not running" in said
    assert f"cannot use {hook.folder}/etc/config.toml" in said
    assert said.count("\n") == 1


async def test_a_service_that_cannot_be_started(bus_program: BusProgram, tmp_path: Path) -> None:
    async with system_bus(bus_program, tmp_path / "system", activates="/bin/false") as bus:
        hook = Hook(tmp_path / "hook", bus.address)
        assert await hook.run("prepare begin") == (0, "")
        manage(hook)
        status, said = await hook.run("prepare begin")
        assert status == 1
        assert f"gpuswitchd is not running and could not be started ({FAILED})" in said


async def test_a_service_that_is_started_by_the_call(bus_program: BusProgram, tmp_path: Path) -> None:
    """It gets the call, once it is there."""
    answer = f"""
import asyncio
from tests.harness.service.hook import StandIn
async def main():
    async with StandIn.on("unix:path={tmp_path}/system/bus") as service:
        await service.refuse(await service.call(), "org.gpuswitch1.Error.Owned", "it is somebody's")
asyncio.run(main())
"""
    (tmp_path / "service.py").write_text(answer)
    command = shlex.join(["/usr/bin/env", "-C", str(Path(__file__).parents[2]), "PYTHONPATH=.", sys.executable])
    async with system_bus(bus_program, tmp_path / "system", activates=f"{command} {tmp_path}/service.py") as bus:
        hook = Hook(tmp_path / "hook", bus.address)
        assert await hook.run("prepare begin") == (1, "gpuswitch: it is somebody's\n")


async def test_a_service_that_may_not_be_called(bus_program: BusProgram, tmp_path: Path) -> None:
    async with system_bus(bus_program, tmp_path / "system", rules=f'<deny send_destination="{NAME}"/>') as bus:
        hook = Hook(tmp_path / "hook", bus.address)
        manage(hook)
        async with StandIn.on(bus.address):
            status, said = await hook.run("prepare begin")
        assert status == 1
        assert f"gpuswitchd has not answered ({DENIED}" in said


async def test_a_service_that_does_not_know_the_question(hook: Hook) -> None:
    manage(hook)
    async with StandIn.on(hook.bus) as service:
        process = await hook.start("prepare begin")
        await service.refuse(await service.call(), "org.freedesktop.DBus.Error.UnknownMethod", "what?")
        status, said = await ended(process)
    assert status == 1
    assert "gpuswitchd has not answered (what?); run: systemctl status gpuswitchd" in said


async def test_a_bus_that_is_not_there(hook: Hook, private_bus: PrivateBus) -> None:
    private_bus.stop()
    assert await hook.run("prepare begin") == (0, "")
    manage(hook)
    status, said = await hook.run("prepare begin")
    assert status == 1
    assert "Failed to open connection" in said
    assert said.count("\n") == 1
    for operation in HARMLESS:
        assert (await hook.run(operation))[0] == 0


async def test_nobody_is_asked_about_other_domains(hook: Hook) -> None:
    manage(hook)
    usb = "<hostdev mode='subsystem' type='usb'><source><address bus='1' device='2'/></source></hostdev>"
    for operation in ("prepare begin", *HARMLESS):
        for xml in (domain(""), domain(usb)):
            assert await hook.run(operation, xml) == (0, "")
    for operation in ("start begin", "stopped end", "migrate begin", "restore begin"):
        assert await hook.run(operation, DOMAIN) == (0, "")
