"""Every test that asks for `machine` gets a pristine container with the project in it, in about a second."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from tests.harness.containers.container import Container
from tests.harness.containers.system import System, find_bus, find_system
from tests.harness.debian.cache import Cache, default_folder
from tests.harness.debian.errors import HarnessError
from tests.harness.debian.progress import progress
from tests.harness.debian.releases import find_release
from tests.harness.debian.tools import require_tools
from tests.harness.machines.reports import MACHINES, show_machines

RELEASE = os.environ.get("RELEASE", "bookworm")
BUS = os.environ.get("BUS", "dbus-daemon")

SLURM = {"trixie": "dbus-daemon", "forky": "dbus-broker"}
"""Where its tests are run, half an hour each time. Bookworm has 22.05, which needs a reboot; no bus but
the release's own would make a difference to it.
"""
collect_ignore = [] if SLURM.get(RELEASE) == BUS else ["test_slurm.py"]

Boot = Callable[..., Container]
"""`boot(layers, files)`: a pristine machine of these layers, with these files on top, once it is up."""


def pytest_configure(config: pytest.Config) -> None:
    """A wrong choice is one sentence, before anything is built."""
    try:
        find_release(RELEASE)
        find_bus(BUS)
        require_tools("system")
    except HarnessError as error:
        raise pytest.UsageError(str(error)) from None


@pytest.fixture(scope="session")
def system(request: pytest.FixtureRequest) -> System:
    """What all machines are made of. Building it takes minutes, and says so."""
    return find_system(Cache(default_folder(), progress(request.config)), find_release(RELEASE), BUS)


@pytest.fixture
def boot(request: pytest.FixtureRequest) -> Iterator[Boot]:
    """Makes pristine machines; all end with the test."""
    machines: list[Container] = []
    request.node.stash[MACHINES] = machines

    def one_more(layers: Sequence[Path], files: Mapping[str, str] | None = None) -> Container:
        machines.append(Container(layers, files))
        machines[-1].wait_until_up()
        return machines[-1]

    yield one_more
    for machine in machines:
        machine.kill()


@pytest.fixture
def machine(boot: Boot, system: System) -> Container:
    """A pristine machine with the project in it, of the test's own."""
    return boot(system.installed)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    show_machines(item, call, report)
    return report
