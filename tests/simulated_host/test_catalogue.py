"""What the modules of the catalogue say that they are for is what real ones say (`modules.alias`, beside this)."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from gpuswitch.host.simulated.catalogue import MODULES
from gpuswitch.host.simulated.drivers import Module
from gpuswitch.host.simulated.scenarios import SCENARIOS
from tests.harness.simulation.machines import MACHINES

_LINES = Path(__file__).with_name("modules.alias").read_text().splitlines()
REAL = [(pattern, module) for _, pattern, module in (line.split() for line in _LINES if line.startswith("alias "))]
MODALIASES = sorted(
    {
        device.shape.modalias
        for boot in (*SCENARIOS.values(), *(spec.boot for spec in MACHINES.values()))
        for device in boot().machine.devices.values()
    }
)


def claimed(module: Module) -> Iterator[str]:
    """The patterns that a module of the catalogue has."""
    yield from module.aliases
    for driver in module.drivers:
        yield from (*driver.aliases, *driver.vfio)


def real(module: str) -> list[str]:
    return [pattern for pattern, name in REAL if name == module]


def test_each_is_told() -> None:
    assert {name for _, name in REAL} == {module.name for module in MODULES if [*claimed(module)]}


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.name)
def test_nothing_is_claimed_that_no_real_module_says(module: Module) -> None:
    assert set(claimed(module)) <= set(real(module.name))


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.name)
def test_it_is_for_the_devices_that_the_real_one_is_for(module: Module) -> None:
    patterns = real(module.name)
    for modalias in MODALIASES:
        assert module.is_for(modalias) == any(fnmatchcase(modalias, pattern) for pattern in patterns), modalias
