"""Tests on simulated hosts run on a virtual clock."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping

import pytest

from tests.harness.simulated.clock import VirtualClockLoop
from tests.harness.simulated.harness import Witness


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"virtual clock": VirtualClockLoop}


@pytest.fixture(autouse=True)
def nothing_broken() -> Iterator[None]:
    """Whatever a test is about, no witness has seen what must never be so."""
    Witness.broken.clear()
    yield
    assert Witness.broken == []
