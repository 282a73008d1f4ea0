"""Every test that asks for `machine` gets a pristine one, in about a second."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator

import pytest

from tests.debian.cache import Cache, default_folder
from tests.debian.progress import progress
from tests.debian.tools import require_tools
from tests.machines.reports import MACHINES, show_machines
from tests.vm.rig.machine import Machine
from tests.vm.rig.template import Template, find_template

RELEASE = os.environ.get("RELEASE", "bookworm")


@pytest.fixture(scope="session")
def template(request: pytest.FixtureRequest) -> Template:
    """The saved machine that all others are clones of. Building it takes minutes, and says so."""
    say = progress(request.config)
    require_tools("vm")
    template = find_template(Cache(default_folder(), say), RELEASE)
    say(f"machines of {RELEASE}: {template.versions}")
    return template


@pytest.fixture
def clone(request: pytest.FixtureRequest, template: Template) -> Iterator[Callable[[], Machine]]:
    """Makes pristine machines, for tests that need several; all end with the test."""
    machines: list[Machine] = []
    request.node.stash[MACHINES] = machines

    def one_more() -> Machine:
        machines.append(template.clone())
        return machines[-1]

    yield one_more
    for machine in machines:
        machine.kill()


@pytest.fixture
def machine(clone: Callable[[], Machine]) -> Machine:
    """A pristine machine of the test's own."""
    return clone()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    show_machines(item, call, report)
    return report
