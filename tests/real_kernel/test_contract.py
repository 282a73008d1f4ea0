"""The real host keeps the contract, on a real kernel. tests/simulated_host asks the same of the other."""

from __future__ import annotations

import pytest

from tests.harness.setups.preloaded import Suite
from tests.harness.virtual_machines.hardware import CROWDED_GPU, GPU, SINGLE_GPU
from tests.host_contract.cases import CASES

GPUS = ("--gpu", GPU, "--crowded", CROWDED_GPU, "--lone", SINGLE_GPU)


@pytest.mark.parametrize("name", CASES)
def test_real_host(name: str, suite: Suite) -> None:
    run = suite.run("tests.host_contract.__main__", name, *GPUS, check=False)
    assert (run.stdout, run.status) == (f"{name}: kept\n", 0), run.stdout + run.stderr
