"""An actor that stands still in our own code is noticed; one that waits for the kernel or for people is not."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from gpuswitch.fleet.watchdog import Watchdog
from gpuswitch.gpu.planner import Planner
from gpuswitch.gpu.runner import Runner
from gpuswitch.host.simulated.faults import Hang
from gpuswitch.log.events import STALLED
from gpuswitch.log.fields import fields_of
from gpuswitch.model.policy import Busy, Options
from gpuswitch.model.states import State
from gpuswitch.runtime.stacks import where
from tests.harness.simulated.harness import Harness

LONG = 3600.0
"""Seconds: longer than all deadlines together."""


async def never(*_: object, **__: object) -> None:
    await asyncio.Event().wait()


async def test_one_that_never_decides(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """The log says so once, and where; systemd is told that all is well no more."""
    harness = await Harness.of("plain", tmp_path)
    actor = harness.fleet.find("01:00.0")
    monkeypatch.setattr(Planner, "plan", never)
    asked = asyncio.create_task(actor.request(State.VFIO))
    await asyncio.sleep(60)
    assert harness.fleet.stalled() == []
    await asyncio.sleep(LONG)
    assert harness.fleet.stalled() == [actor]
    place = actor.stalled
    assert place == where(asked)
    assert place.index("gpu/actor.py") < place.index("test_stalled.py") < place.index("locks.py")
    well: list[None] = []
    watchdog = Watchdog(harness.fleet, lambda: well.append(None))
    for _ in range(3):
        watchdog.look()
    [said] = [record for record in caplog.records if record.levelno == logging.CRITICAL]
    assert said.getMessage().startswith("0000:01:00.0 stands still: a fault of gpuswitch itself")
    assert "gpu/actor.py" in said.getMessage()
    assert (fields_of(said)["GPU"], fields_of(said)["MESSAGE_ID"]) == ("0000:01:00.0", STALLED.message_id)
    assert well == []
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    assert harness.fleet.stalled() == []
    watchdog.look()
    assert well == [None]


async def test_one_that_never_takes_its_next_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    harness = await Harness.of("plain", tmp_path)
    actor = harness.fleet.find("01:00.0")
    monkeypatch.setattr(Runner, "_run", never)
    await actor.request(State.VFIO)
    await asyncio.sleep(LONG)
    assert harness.fleet.stalled() == [actor]
    assert actor.runner.task is not None
    assert actor.stalled == where(actor.runner.task)


async def test_one_that_is_under_way_while_nothing_works_on_it(tmp_path: Path) -> None:
    harness = await Harness.of("plain", tmp_path)
    actor = harness.fleet.find("01:00.0")
    actor.record.fire("detach")
    await asyncio.sleep(LONG)
    assert harness.fleet.stalled() == [actor]
    assert actor.stalled == "it is detaching, and nothing works on it"


async def test_a_kernel_that_does_not_return_to_who_decides_is_no_fault_of_ours(tmp_path: Path) -> None:
    harness = await Harness.of("plain", tmp_path)
    actor = harness.fleet.find("01:00.0")
    hang = harness.host.faults.add(Hang(), operation="capture")
    asked = asyncio.create_task(actor.request(State.VFIO))
    for _ in range(100):
        await asyncio.sleep(LONG / 100)
        assert harness.fleet.stalled() == []
    await asyncio.gather(asked, return_exceptions=True)
    assert actor.state is State.WEDGED
    hang.release()
    await harness.witness.until(lambda: actor.state is State.HOST)


async def test_who_waits_for_people_stands_still_for_a_reason(tmp_path: Path) -> None:
    harness = await Harness.of("workstation", tmp_path)
    actor = harness.fleet.find("01:00.0")
    switch = await actor.request(State.VFIO, Options(busy=Busy.WAIT, wait_seconds=86400, stop_units=()))
    for _ in range(50):
        await asyncio.sleep(LONG)
        assert harness.fleet.stalled() == []
    await switch.wait()
