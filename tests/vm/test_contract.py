"""The real host keeps the contract, on a real kernel. tests/simulated/test_contract.py asks the same of the other."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.contract.cases import CASES
from tests.vm import units
from tests.vm.rig.hardware import CROWDED_GPU, GPU, SINGLE_GPU
from tests.vm.rig.machine import Machine

TESTS = Path(__file__).parents[1]
SUITE = [TESTS / "__init__.py", *sorted((TESTS / "contract").glob("*.py"))]
PYTHON = "/usr/local/lib/gpuswitch/current/bin/python"


@pytest.mark.parametrize("name", CASES)
def test_real_host(name: str, machine: Machine) -> None:
    for path in SUITE:
        machine.push(path.read_bytes(), f"/srv/suite/tests/{path.relative_to(TESTS)}")
    ask = f"{PYTHON} -m tests.contract {name} --gpu {GPU} --crowded {CROWDED_GPU} --lone {SINGLE_GPU}"
    units.stop(machine, "gpuswitchd")
    run = machine.sh(f"cd /srv/suite && {ask}", check=False, timeout=300)
    assert (run.stdout, run.status) == (f"{name}: kept\n", 0), run.stdout + run.stderr
