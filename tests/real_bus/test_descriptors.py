"""We take no file descriptors from the bus, and ask for none: dbus-broker hangs up on whoever does both.

It is so from version 34 on, which answers GetConnectionCredentials with `ProcessFD` (its driver.c). dbus-daemon leaves
that key out for us, so what is asked is looked at on both.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import jeepney

from tests.harness.buses.private import PrivateBus
from tests.harness.domains import table
from tests.harness.service.hook import Hook
from tests.harness.service.peers import Peer, scripted_bus, until, watching
from tests.harness.service.services import ANY_PORT, BIN, GPU, ROOT, environment, run_to_the_end, write_config
from tests.real_bus.conftest import Start

DISCRETE = f"{ROOT}/gpu/0000_01_00_0"
BUS = "org.freedesktop.DBus"
LAST = "ListNames"

NO_DESCRIPTORS = {
    *("Hello", "RequestName", "AddMatch", "RemoveMatch", "NameHasOwner", "GetNameOwner", "StartServiceByName"),
    *("GetConnectionUnixUser", "GetConnectionUnixProcessID", "GetMachineId", "Subscribe", LAST),
}
"""Methods of the bus whose answers never carry one (specification, Message Bus Messages)."""


async def test_nothing_is_asked_whose_answer_may_carry_a_descriptor(
    start: Start, private_bus: PrivateBus, peer: Peer, tmp_path: Path
) -> None:
    """By the service, the command and the hook, with a whole switch and a virtual machine's."""
    async with watching(private_bus.address) as calls:
        service = await start("laptop", config=ANY_PORT + table("0000:01:00.0"))
        await service.wait(DISCRETE, await service.move(DISCRETE, "vfio"))
        command = [str(BIN / "gpuswitchctl"), "to-host", "0000:01:00.0"]
        ctl = await asyncio.create_subprocess_exec(*command, env=environment(GPUSWITCH_BUS=private_bus.address))
        assert await ctl.wait() == 0
        hook = Hook(tmp_path / "hook", private_bus.address)
        for operation in ("prepare begin", "started begin", "release end"):
            assert await hook.run(operation) == (0, "")
        await service.call("/", "org.freedesktop.DBus.Peer.GetMachineId")
        await peer.call(BUS, "/", f"{BUS}.{LAST}")
        asked: list[str] = []
        while LAST not in asked:
            fields = (await calls.get()).header.fields
            if fields.get(jeepney.HeaderFields.destination) == BUS:
                asked.append(fields[jeepney.HeaderFields.member])
    assert set(asked) <= NO_DESCRIPTORS
    assert set(asked) >= {"GetConnectionUnixUser", "GetConnectionUnixProcessID"}


async def test_a_bus_that_hangs_up_when_it_is_asked_who_calls(tmp_path: Path) -> None:
    """Then the service ends as a failure, for systemd to start it anew, and leaves no switch half-way."""
    write_config(tmp_path / "etc", ANY_PORT)
    async with scripted_bus(tmp_path) as (address, connections):
        options = ["--simulate=laptop", f"--bus={address}", f"--config={tmp_path}/etc", f"--runtime={tmp_path}/run"]
        ending = asyncio.create_task(run_to_the_end(*options, f"--state={tmp_path}/state"))
        bus = await connections.get()
        await bus.log_in()
        asked = await connections.get()
        await asked.log_in()
        bus.answer(await until(bus, "RequestName"), "u", 1)
        switch = jeepney.new_method_call(jeepney.DBusAddress(DISCRETE, ":1.1", GPU), "ToVfio", "a{sv}", ({},))
        switch.header.fields[jeepney.HeaderFields.sender] = ":1.7"
        bus.send(switch, first_serial=50)
        await until(asked, "GetConnectionUnixUser")
        await asked.close()
        status, said = await ending
        await bus.close()
    assert (status, said.splitlines()[-1]) == (1, "gpuswitchd: the connection to the bus was lost")
    assert "Traceback" not in said
    assert list((tmp_path / "run").glob("gpus/*")) == []
