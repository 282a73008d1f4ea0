"""Which desktops the command asks about before a display manager ends: as a logind in memory has them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from gpuswitch.cli.client import Service
from gpuswitch.cli.desktops import Desktop, desktops
from tests.harness.buses.private import PrivateBus
from tests.harness.managers.doubles import logind_on


def seen(address: str, about: Mapping[str, Any]) -> list[Desktop]:
    service = Service.connect(address)
    service.about = lambda: dict(about)  # type: ignore[method-assign]  # there is no service, only its neighbour
    try:
        return desktops(service)
    finally:
        service.close()


@pytest.mark.parametrize("about", [{}, {"Simulated": ""}], ids=["older", "not simulated"])
async def test_sessions_that_people_see_are_desktops(about: Mapping[str, Any], private_bus: PrivateBus) -> None:
    """No text console, nor the one of a login screen, nor that of a user's manager."""
    async with logind_on(private_bus.address) as logind:
        logind.sessions = {"2": (1000, "user"), "c1": (120, "greeter"), "3": (1000, "user"), "1": (1000, "manager")}
        logind.consoles = {"3"}
        assert await asyncio.to_thread(seen, private_bus.address, about) == [Desktop("2", "kim", "seat0")]


async def test_of_a_machine_in_memory_none_is_seen(private_bus: PrivateBus) -> None:
    async with logind_on(private_bus.address) as logind:
        logind.sessions = {"2": (1000, "user")}
        assert await asyncio.to_thread(seen, private_bus.address, {"Simulated": "laptop"}) == []


def test_without_logind_none_is_seen(private_bus: PrivateBus) -> None:
    assert seen(private_bus.address, {}) == []
