"""What the service tests run on: a real message bus of their own, and those that are on it."""

import shutil
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from gpuswitch.api.bus import Bus
from tests.service.peers import Peer
from tests.service.services import Service, running

Start = Callable[..., Awaitable[Service]]
"""`start(scenario, *faults, config=...)`"""


@dataclass(frozen=True)
class PrivateBus:
    """A running dbus-daemon that nobody else knows of."""

    address: str
    process: subprocess.Popen[str]

    def stop(self) -> None:
        """End the daemon, as a crash of the system bus would. Returns when it is gone."""
        self.process.kill()
        self.process.wait()


@pytest.fixture
def private_bus(tmp_path: Path) -> Iterator[PrivateBus]:
    """A dbus-daemon with the rules of a session bus (all may own, send and receive), ready for connections."""
    program = shutil.which("dbus-daemon")
    if program is None:
        pytest.fail("dbus-daemon is missing; install it: apt-get install dbus-daemon")
    options = ["--session", "--nofork", "--nopidfile", "--print-address", f"--address=unix:path={tmp_path}/bus"]
    with subprocess.Popen([program, *options], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        bus = PrivateBus(process.stdout.readline().strip(), process)
        yield bus
        bus.stop()


@pytest.fixture
async def bus(private_bus: PrivateBus) -> AsyncIterator[Bus]:
    """A connection as the daemon has it."""
    bus = await Bus.connect(private_bus.address)
    yield bus
    await bus.close()


@pytest.fixture
async def peer(private_bus: PrivateBus) -> AsyncIterator[Peer]:
    """Somebody else on the bus."""
    async with Peer.on(private_bus.address) as peer:
        yield peer


@pytest.fixture
async def start(private_bus: PrivateBus, tmp_path: Path) -> AsyncIterator[Start]:
    """Start the real service on the private bus: `start(scenario, *faults, config=...)`. It is ready when this returns.

    It ends with the test, or before.
    """
    async with AsyncExitStack() as until_the_end:

        async def start(scenario: str, *faults: str, **more: str) -> Service:
            service = running(private_bus.address, tmp_path / "service", scenario, *faults, **more)
            return await until_the_end.enter_async_context(service)

        yield start
