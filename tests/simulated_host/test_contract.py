"""The simulated host keeps the contract. tests/real_kernel/test_contract.py asks the same of the real one."""

from __future__ import annotations

import asyncio

import pytest

from tests.harness.simulated.contract_host import contract_harness
from tests.host_contract.cases import CASES
from tests.host_contract.harness import DEADLINE


@pytest.mark.parametrize("name", CASES)
async def test_simulated_host(name: str) -> None:
    async with asyncio.timeout(DEADLINE):
        await CASES[name](contract_harness())
