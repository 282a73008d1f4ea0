"""What the service tests run on: a real message bus of their own, and those that are on it."""

import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from gpuswitch.api.bus import Bus
from tests.harness.buses.private import PROGRAMS, BusProgram, PrivateBus, chosen
from tests.harness.buses.private import running as running_bus
from tests.harness.debian.errors import HarnessError
from tests.harness.debian.progress import progress
from tests.harness.service.peers import Peer
from tests.harness.service.services import BIN, Service, environment, running

Start = Callable[..., Awaitable[Service]]
"""`start(scenario, *faults, config=...)`"""
CTL = str(BIN / "gpuswitchctl")
Ctl = Callable[..., "subprocess.CompletedProcess[str]"]
"""`ctl(*arguments)`"""


def pytest_configure() -> None:
    try:
        chosen()
    except HarnessError as error:
        raise pytest.UsageError(str(error)) from None


@pytest.fixture(scope="session")
def bus_program(request: pytest.FixtureRequest) -> BusProgram:
    """What all buses of this run are (`BUS`). The first dbus-broker is unpacked, which takes a minute, and says so."""
    try:
        return PROGRAMS[chosen()](progress(request.config))
    except HarnessError as error:
        pytest.exit(str(error), returncode=pytest.ExitCode.USAGE_ERROR)


@pytest.fixture(autouse=True)
def settings_of_the_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """The service takes every GPUSWITCH_... variable for a setting of its own, and refuses to start with this one."""
    monkeypatch.delenv("GPUSWITCH_TEST_CACHE", raising=False)


@pytest.fixture
def private_bus(bus_program: BusProgram, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateBus]:
    """A bus with the rules of a session bus: all may own, send and receive."""
    with running_bus(bus_program, tmp_path_factory.mktemp("bus")) as bus:
        yield bus


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


@pytest.fixture
def environ(private_bus: PrivateBus) -> dict[str, str]:
    return environment(GPUSWITCH_BUS=private_bus.address, TERM="xterm", COLUMNS="200")


@pytest.fixture
def ctl(environ: dict[str, str]) -> Ctl:
    """Run gpuswitchctl to its end."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([CTL, *arguments], env=environ, capture_output=True, text=True, check=False)

    return run
