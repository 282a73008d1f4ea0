"""Tests on simulated hosts run on a virtual clock."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from tests.simulated.clock import VirtualClockLoop


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"virtual clock": VirtualClockLoop}
