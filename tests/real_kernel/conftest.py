"""Every test that asks for `machine` gets a pristine one, in about a second."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

from tests.harness.debian.cache import Cache, default_folder
from tests.harness.debian.progress import progress
from tests.harness.debian.tools import require_tools
from tests.harness.machines.reports import MACHINES, show_machines
from tests.harness.setups.preloaded import Suite, find_suite
from tests.harness.virtual_machines.machine import Machine
from tests.harness.virtual_machines.template import Template, find_template

RELEASE = os.environ.get("RELEASE", "bookworm")

WORKER_BYTES = 4 << 30
"""Of memory, for a worker of pytest-xdist: what its machines may come to use."""


def pytest_xdist_auto_num_workers() -> int:
    """A worker for each processor, which its emulated machine keeps busy, as far as the memory goes."""
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(meminfo["MemAvailable"].split()[0]) << 10
    return max(1, min(len(os.sched_getaffinity(0)), available // WORKER_BYTES))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest come first: in the end no worker is to be left with one while the others have nothing to do."""
    items.sort(key=lambda item: not item.path.name.startswith("test_crash"))


@pytest.fixture(scope="session")
def cache(request: pytest.FixtureRequest) -> Cache:
    require_tools("vm")
    return Cache(default_folder(), progress(request.config))


@pytest.fixture(scope="session")
def template(cache: Cache) -> Template:
    """The saved machine that all others are clones of. Building it takes minutes, and says so."""
    template = find_template(cache, RELEASE)
    cache.say(f"machines of {RELEASE}: {template.versions}")
    return template


@pytest.fixture
def clone_of(request: pytest.FixtureRequest) -> Iterator[Callable[[Template], Machine]]:
    """Makes clones; all end with the test."""
    machines: list[Machine] = []
    request.node.stash[MACHINES] = machines

    def one_more(template: Template) -> Machine:
        machines.append(template.clone())
        return machines[-1]

    yield one_more
    for machine in machines:
        machine.kill()


@pytest.fixture
def clone(clone_of: Callable[[Template], Machine], template: Template) -> Callable[[], Machine]:
    """Makes pristine machines, for tests that need several."""
    return lambda: clone_of(template)


@pytest.fixture
def machine(clone: Callable[[], Machine]) -> Machine:
    """A pristine machine of the test's own."""
    return clone()


@pytest.fixture(scope="session")
def suite_template(cache: Cache, template: Template) -> Template:
    return find_suite(cache, template, RELEASE)


@pytest.fixture
def suite(clone_of: Callable[[Template], Machine], suite_template: Template) -> Suite:
    """A machine of the test's own with programs of the tests in it, and without the service."""
    return Suite(clone_of(suite_template))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    show_machines(item, call, report)
    return report
