"""The clock that goes on while the machine sleeps, by a timer of the kernel."""

from __future__ import annotations

import asyncio
import resource
import time
from pathlib import Path

import pytest

from gpuswitch.errors import KernelError
from gpuswitch.host.linux import clock


def descriptors() -> list[Path]:
    return list(Path("/proc/self/fd").iterdir())


async def test_it_is_waited_for_by_the_clock_of_the_machine() -> None:
    began = time.clock_gettime(time.CLOCK_BOOTTIME)
    await clock.until(began + 0.05)
    assert began + 0.05 <= clock.boottime() <= time.clock_gettime(time.CLOCK_BOOTTIME)


@pytest.mark.parametrize("moment", [0.0, 1e-12, 0.999_999_999_9, 1.0, -1.0])
async def test_what_is_past_is_over(moment: float) -> None:
    await clock.until(moment)


async def test_nothing_is_left_open() -> None:
    before = len(descriptors())
    waiting = [asyncio.create_task(clock.until(clock.boottime() + 1e6)) for _ in range(3)]
    await asyncio.sleep(0)
    assert len(descriptors()) == before + 3
    for task in waiting:
        task.cancel()
    await asyncio.wait(waiting)
    await clock.until(0.0)
    assert len(descriptors()) == before


async def test_without_a_descriptor_it_says_so() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        with pytest.raises(KernelError, match="cannot set a timer: Too many open files"):
            await clock.until(1.0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
