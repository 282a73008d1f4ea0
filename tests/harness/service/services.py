"""The real gpuswitchd as a process on a bus of its own, and what its callers and systemd see of it."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jeepney
import pytest

from tests.harness.service.peers import Peer

NAME = "org.gpuswitch1"
ROOT = "/org/gpuswitch1"
MANAGER = "org.gpuswitch1.Manager"
GPU = "org.gpuswitch1.Gpu"
PROPERTIES = "org.freedesktop.DBus.Properties"

BIN = Path(sys.executable).parent
"""Where the commands of the project are installed that the tests run under."""
LANGUAGE = frozenset({"LANGUAGE", "LC_ALL", "LC_MESSAGES", "LANG"})
ANY_PORT = "[metrics]\nport = 0\n"


def environment(**more: str) -> dict[str, str]:
    """Our own, without what would set up the service, or have the command speak another language."""
    own = {key: value for key, value in os.environ.items() if not key.startswith("GPUSWITCH_") and key not in LANGUAGE}
    return own | {"LC_ALL": "C.UTF-8"} | more


def write_config(directory: Path, text: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / "config.toml"
    file.write_text(text)
    # Whoever's umask this is: root takes no orders from files that others may write.
    directory.chmod(0o755)
    file.chmod(0o644)
    return file


def contents(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


async def run_to_the_end(*arguments: str, **variables: str) -> tuple[int, str]:
    """Run gpuswitchd; its exit status, and what it said."""
    process = await asyncio.create_subprocess_exec(
        BIN / "gpuswitchd", *arguments, env=environment(**variables), stderr=asyncio.subprocess.PIPE
    )
    _, said = await process.communicate()
    assert process.returncode is not None
    return process.returncode, said.decode()


@dataclass(frozen=True)
class Signal:
    """A signal of the service: from which object, which one, with what."""

    path: str
    member: str
    body: tuple[Any, ...]


@dataclass
class Service:
    """A gpuswitchd that runs. `told` are its datagrams to systemd, a dict of assignments each."""

    process: asyncio.subprocess.Process
    peer: Peer
    folder: Path
    told: asyncio.Queue[dict[str, str]]
    owner: str = ""
    signals: asyncio.Queue[jeepney.Message] = field(default_factory=asyncio.Queue)

    @property
    def config(self) -> Path:
        return self.folder / "etc"

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    async def call(self, path: str, method: str, signature: str = "", *arguments: object) -> Any:
        return await self.peer.call(NAME, path, method, signature, *arguments)

    async def ask(self, method: str, signature: str = "", *arguments: object) -> Any:
        """Call the Manager."""
        return await self.call(ROOT, f"{MANAGER}.{method}", signature, *arguments)

    async def properties(self, path: str) -> dict[str, Any]:
        """Of a GPU; without their signatures."""
        return plain(await self.call(path, f"{PROPERTIES}.GetAll", "s", GPU))

    async def move(self, path: str, target: str) -> str:
        """Begin a switch; its id."""
        switch = await self.call(path, f"{GPU}.{'ToVfio' if target == 'vfio' else 'ToHost'}", "a{sv}", {})
        return str(switch)

    async def wait(self, path: str, switch: str) -> dict[str, Any]:
        return plain(await self.call(path, f"{GPU}.Wait", "s", switch))

    async def signal(self) -> Signal:
        """The next signal."""
        message = await self.signals.get()
        fields = message.header.fields
        return Signal(
            fields[jeepney.HeaderFields.path],
            fields[jeepney.HeaderFields.member],
            tuple(map(_signal_value, message.body)),
        )

    async def signals_until(self, member: str) -> list[Signal]:
        """The next signals, up to the first of this name."""
        signals = [await self.signal()]
        while signals[-1].member != member:
            signals.append(await self.signal())
        return signals

    async def until_state(self, path: str, state: str) -> list[Signal]:
        """The next signals, up to the one that tells of this state."""
        signals = [await self.signal()]
        while not (signals[-1].path == path and told_properties(signals[-1:]).get("State") == state):
            signals.append(await self.signal())
        return signals

    async def notified(self, key: str) -> dict[str, str]:
        """The next datagram to systemd that has this key."""
        while key not in (assignments := await self.told.get()):
            pass
        return assignments

    async def end(self, number: int) -> int:
        """Send it a signal, and wait for its exit status."""
        self.process.send_signal(number)
        return await self.process.wait()


def told_properties(signals: list[Signal]) -> dict[str, Any]:
    """What PropertiesChanged told in these signals, the last word on each."""
    told: dict[str, Any] = {}
    for signal in signals:
        if signal.member == "PropertiesChanged":
            told |= signal.body[1]
    return told


def plain(values: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
    """An a{sv} without its signatures, nested ones too."""
    return {key: plain(value) if signature == "a{sv}" else value for key, (signature, value) in values.items()}


def _signal_value(value: Any) -> Any:
    return plain(value) if isinstance(value, dict) else value


class _Datagrams(asyncio.DatagramProtocol):
    def __init__(self, queue: asyncio.Queue[dict[str, str]]) -> None:
        self._queue = queue

    def datagram_received(self, data: bytes, addr: object) -> None:  # noqa: ARG002 -- the protocol's signature
        self._queue.put_nowait(dict(line.split("=", 1) for line in data.decode().splitlines()))


@asynccontextmanager
async def notifications(folder: Path) -> AsyncIterator[tuple[str, asyncio.Queue[dict[str, str]]]]:
    """Where a program tells how it is, as systemd's NOTIFY_SOCKET, and what has come there: each message's fields."""
    told: asyncio.Queue[dict[str, str]] = asyncio.Queue()
    address = str(folder / "notify")
    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
        lambda: _Datagrams(told), local_addr=address, family=socket.AF_UNIX
    )
    try:
        yield address, told
    finally:
        transport.close()


@asynccontextmanager
async def running(
    bus: str, folder: Path, scenario: str, *faults: str, config: str = ANY_PORT, **variables: str
) -> AsyncIterator[Service]:
    """A simulated gpuswitchd on the bus at this address, from READY=1 on. `folder` is for its files."""
    write_config(folder / "etc", config)
    async with notifications(folder) as (address, told):
        options = ["--simulate", scenario, "--bus", bus, "--config", f"{folder}/etc", "--runtime", f"{folder}/run"]
        options += ["--state", f"{folder}/state"]
        with (folder / "log").open("w") as log:
            process = await asyncio.create_subprocess_exec(
                BIN / "gpuswitchd", *options, *(f"--fault={fault}" for fault in faults),
                stderr=log, env=environment(NOTIFY_SOCKET=address, **variables),
            )  # fmt: skip  # the command, then how it runs
        try:
            async with Peer.on(bus) as peer:
                service = Service(process, peer, folder, told)
                await _until_ready(service)
                service.owner = await peer.call(
                    "org.freedesktop.DBus", "/", "org.freedesktop.DBus.GetNameOwner", "s", NAME
                )
                async with peer.hear(service.owner) as service.signals:
                    yield service
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


async def _until_ready(service: Service) -> None:
    ready = asyncio.create_task(service.notified("READY"))
    ended = asyncio.create_task(service.process.wait())
    await asyncio.wait({ready, ended}, return_when=asyncio.FIRST_COMPLETED)
    if not ready.done():
        ready.cancel()
        pytest.fail(f"gpuswitchd ended with status {ended.result()} before it was ready:\n{service.log}")
    ended.cancel()
