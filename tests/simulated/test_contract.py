"""The simulated host keeps the contract. tests/vm/test_contract.py asks the same of the real one."""

from __future__ import annotations

import asyncio

import pytest

from tests.contract.cases import CASES
from tests.contract.harness import DEADLINE
from tests.simulated.contract_host import contract_harness


@pytest.mark.parametrize("name", CASES)
async def test_simulated_host(name: str) -> None:
    async with asyncio.timeout(DEADLINE):
        await CASES[name](contract_harness())
