"""The libvirt hook as libvirt runs it, on a bus of the test's own; and who may stand there in the service's place."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext, suppress
from pathlib import Path

import jeepney
import pytest
from jeepney.bus_messages import MatchRule
from jeepney.io.asyncio import DBusRouter, open_dbus_connection

from tests.harness.buses.private import BusProgram, PrivateBus, running
from tests.harness.buses.starter import starting_services
from tests.harness.domains import DOMAIN
from tests.harness.service.services import NAME

ROOT = Path(__file__).parents[3]
CONFIGURATION = '"/etc/gpuswitch"'
"""As hook.py has it."""


class Hook:
    """The hook in `folder`, as it is installed but for the places of hook.py and of the configuration, `folder`/etc."""

    def __init__(self, folder: Path, bus: str) -> None:
        if not Path("/usr/bin/dbus-send").exists():
            pytest.fail("dbus-send is missing; install it: apt-get install dbus-bin")
        self.folder = folder
        self.bus = bus
        source = (ROOT / "gpuswitch/hook.py").read_text()
        assert source.count(CONFIGURATION) == 1
        folder.mkdir(exist_ok=True)
        (folder / "hook.py").write_text(source.replace(CONFIGURATION, repr(f"{folder}/etc")))
        gate = (ROOT / "contrib/libvirt/qemu.d/50-gpuswitch").read_text()
        self.program = folder / "50-gpuswitch"
        self.program.write_text(gate.replace("@hook@", f"{folder}/hook.py"))
        self.program.chmod(0o755)

    async def start(
        self, operation: str, xml: str = DOMAIN, *, name: str = "win10", reason: str = "-"
    ) -> asyncio.subprocess.Process:
        """Run it as libvirt does. Its XML is read."""
        pipe = asyncio.subprocess.PIPE
        environ = {"LC_ALL": "C", "PATH": os.defpath, "DBUS_SYSTEM_BUS_ADDRESS": self.bus}
        process = await asyncio.create_subprocess_exec(
            self.program, name, *operation.split(), reason, env=environ, stdin=pipe, stdout=pipe, stderr=pipe
        )
        assert process.stdin is not None
        process.stdin.write(xml.encode())
        process.stdin.close()
        return process

    async def run(
        self, operation: str, xml: str = DOMAIN, *, name: str = "win10", reason: str = "-"
    ) -> tuple[int, str]:
        """Its status and what it says, once libvirt would go on."""
        return await ended(await self.start(operation, xml, name=name, reason=reason))


async def ended(process: asyncio.subprocess.Process) -> tuple[int, str]:
    out, said = await process.communicate()
    assert out == b""
    assert process.returncode is not None
    return process.returncode, said.decode()


class StandIn:
    """Somebody who has the service's name, and answers as the test says."""

    def __init__(self, router: DBusRouter, calls: asyncio.Queue[jeepney.Message]) -> None:
        self._router = router
        self._calls = calls

    @classmethod
    @asynccontextmanager
    async def on(cls, address: str) -> AsyncIterator[StandIn]:
        async with await open_dbus_connection(address) as connection:
            router = DBusRouter(connection)
            with router.filter(MatchRule(type="method_call"), bufsize=0) as calls:
                await router.send_and_get_reply(jeepney.message_bus.RequestName(NAME))
                try:
                    yield cls(router, calls)
                finally:
                    with suppress(EOFError):
                        await router.__aexit__(None, None, None)

    async def call(self) -> jeepney.Message:
        """The next call."""
        return await self._calls.get()

    async def answer(self, call: jeepney.Message, signature: str | None = None, *values: object) -> None:
        await self._router.send(jeepney.new_method_return(call, signature, values))

    async def refuse(self, call: jeepney.Message, name: str, text: str) -> None:
        await self._router.send(jeepney.new_error(call, name, "s", (text,)))


@asynccontextmanager
async def system_bus(
    program: BusProgram, folder: Path, *, activates: str = "", rules: str = ""
) -> AsyncIterator[PrivateBus]:
    """A bus that has the service started by this command, with these rules in its policy."""
    if activates:
        (folder / "services").mkdir(parents=True)
        (folder / f"services/{NAME}.service").write_text(f"[D-BUS Service]\nName={NAME}\nExec={activates}\n")
    with running(program, folder, rules=rules) as bus:
        async with starting_services(bus.address) if program.asks_systemd else nullcontext():
            yield bus
