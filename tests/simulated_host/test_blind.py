"""Looks that could not see everything: nothing follows from them, and they are taken again."""

from __future__ import annotations

import asyncio
import errno
import logging
from pathlib import Path

import pytest

from gpuswitch.errors import Failed
from gpuswitch.host.simulated.faults import Errno, Hang
from gpuswitch.host.simulated.host import SimulatedHost
from gpuswitch.host.simulated.scenarios import DISPLAY_MANAGER
from gpuswitch.model.states import State
from gpuswitch.switch.journal.store import DirectoryStore
from gpuswitch.switch.record import Result
from tests.harness.simulated.harness import Harness

EMFILE = Errno(errno.EMFILE)


def blind(harness: Harness, looks: int) -> None:
    """So many looks from now on see nothing."""
    for nth in range(1, looks + 1):
        harness.host.faults.add(EMFILE, operation="look", nth=nth)


class TestAtRest:
    async def test_a_gpu_that_is_away_is_away_all_the_while(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Nothing is started that it needs stopped, and what it is owed comes back with it."""
        harness = await Harness.of("single", tmp_path)
        actor, before = harness.fleet.find(""), harness.snapshot()
        await harness.moved(actor, State.VFIO)
        away = harness.snapshot()
        blind(harness, 3)
        harness.machine.uevent()
        await asyncio.sleep(0.5)
        assert (harness.snapshot(), actor.state, harness.pages) == (away, State.VFIO, ["0000_01_00_0.json"])
        assert [r.levelno for r in caplog.records if "cannot look at the host" in r.message] == [logging.WARNING]
        await asyncio.sleep(100)
        assert (harness.snapshot(), actor.state, harness.state(DISPLAY_MANAGER)) == (away, State.VFIO, "inactive")
        await harness.moved(actor, State.HOST)
        assert (harness.snapshot(), harness.pages) == (before, [])

    async def test_what_happened_meanwhile_is_seen_without_another_event(self, tmp_path: Path) -> None:
        harness = await Harness.of("plain", tmp_path)
        actor = harness.fleet.find("01:00.0")
        blind(harness, 4)
        await harness.machine.unplug("0000:01:00")
        await asyncio.sleep(100)
        assert str(actor.state) == "absent"

    async def test_who_looks_again_does_so_ever_more_rarely_and_ends_with_the_service(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        harness = await Harness.of("plain", tmp_path)
        looks = 0

        def blinded() -> int:
            nonlocal looks
            looks += 1
            return errno.ENFILE

        monkeypatch.setattr(harness.host, "_blind", blinded)
        harness.machine.uevent()
        await asyncio.sleep(600)
        assert 10 < looks < 20
        await harness.fleet.stop("the service is stopping")
        before = looks
        await asyncio.sleep(600)
        assert looks == before


class TestWhileItMoves:
    async def test_at_any_look_of_a_way_out_and_home(self, tmp_path: Path) -> None:
        nth, hit = 0, True
        while hit:
            nth += 1
            harness = await Harness.of("plain", tmp_path / str(nth))
            actor, before = harness.fleet.find("01:00.0"), harness.snapshot()
            for again in range(3):
                harness.host.faults.add(EMFILE, operation="look", nth=nth + again)
            await harness.moved(actor, State.VFIO)
            assert harness.pages
            await harness.moved(actor, State.HOST)
            hit = _reached(harness, nth)
            harness.host.faults.clear()
            await asyncio.sleep(100)
            assert (harness.snapshot(), harness.pages, actor.state) == (before, [], State.HOST)
        assert nth > 20

    async def test_while_it_is_taken_back(self, tmp_path: Path) -> None:
        harness = await Harness.of("plain", tmp_path)
        actor, before = harness.fleet.find("01:00.0"), harness.snapshot()
        harness.host.faults.add(Errno(5), operation="probe", subject="0000:01:00.0")
        harness.witness.on_step = lambda _, event: blind(harness, 2) if event.status == "failed" else None
        switch = await harness.switch(actor, State.VFIO)
        assert (switch.result, actor.state, harness.snapshot()) == (Result.REVERTED, State.HOST, before)

    async def test_one_that_is_wedged_comes_home_when_it_can_be_seen(self, tmp_path: Path) -> None:
        harness = await Harness.of("plain", tmp_path)
        actor, before = harness.fleet.find("01:00.0"), harness.snapshot()
        hang = harness.host.faults.add(Hang(), operation="unbind")
        switch = await actor.request(State.VFIO)
        await hang.reached.wait()
        blind(harness, 6)
        await switch.wait()
        assert (switch.result, actor.state) == (Result.WEDGED, State.WEDGED)
        hang.release()
        await harness.witness.until(lambda: not actor.bound)
        assert (actor.state, harness.snapshot(), harness.pages) == (State.HOST, before, [])


class TestAsked:
    async def test_for_longer_than_an_answer_may_take(self, tmp_path: Path) -> None:
        harness = await Harness.of("plain", tmp_path)
        actor, before = harness.fleet.find("01:00.0"), harness.snapshot()
        harness.host.faults.add(EMFILE, operation="look", nth=None)
        for work in (actor.request(State.VFIO), actor.plan(State.VFIO), actor.recover()):
            with pytest.raises(Failed, match=r"^cannot look at the host: Too many open files; nothing was changed$"):
                await work
        assert (harness.snapshot(), harness.pages, actor.state) == (before, [], State.HOST)
        harness.host.faults.clear()
        await harness.moved(actor, State.VFIO)


class TestStart:
    async def test_it_is_not_ready_before_it_has_seen_its_gpus(self, tmp_path: Path) -> None:
        harness = await Harness.of("single", tmp_path)
        before = harness.snapshot()
        await harness.moved(harness.fleet.find(""), State.VFIO)
        away = harness.snapshot()
        await harness.host.close()
        blind(harness, 5)
        harness = await Harness.start(SimulatedHost(harness.machine), harness.directory, harness.fleet.config)
        assert (harness.snapshot(), harness.fleet.find("").state) == (away, State.VFIO)
        await harness.moved(harness.fleet.find(""), State.HOST)
        assert (harness.snapshot(), harness.pages) == (before, [])

    async def test_what_was_under_way_comes_home_all_the_same(self, tmp_path: Path) -> None:
        harness = await Harness.of("plain", tmp_path)
        actor, before = harness.fleet.find("01:00.0"), harness.snapshot()
        hang = harness.host.faults.add(Hang(), operation="probe")
        await actor.request(State.VFIO)
        await hang.reached.wait()
        hang.release()
        blind(harness, 7)
        harness = await harness.crash(actor)
        await harness.witness.until(lambda: not harness.fleet.find("01:00.0").bound)
        assert (harness.fleet.find("01:00.0").state, harness.snapshot(), harness.pages) == (State.HOST, before, [])

    async def test_a_journal_that_cannot_be_read_now_is_not_set_aside(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        harness = await Harness.of("single", tmp_path)
        before = harness.snapshot()
        await harness.moved(harness.fleet.find(""), State.VFIO)
        await harness.host.close()
        read, names, failing = DirectoryStore.read, DirectoryStore.names, [2, 2]

        def unreadable(store: DirectoryStore, name: str) -> bytes:
            failing[0] -= 1
            if failing[0] >= 0:
                raise OSError(errno.EMFILE, "Too many open files")
            return read(store, name)

        def unlisted(store: DirectoryStore) -> list[str]:
            failing[1] -= 1
            if failing[1] >= 0:
                raise OSError(errno.ENFILE, "Too many open files in system")
            return names(store)

        monkeypatch.setattr(DirectoryStore, "read", unreadable)
        monkeypatch.setattr(DirectoryStore, "names", unlisted)
        harness = await Harness.start(SimulatedHost(harness.machine), harness.directory, harness.fleet.config)
        assert failing[0] < 0
        assert failing[1] < 0
        await harness.moved(harness.fleet.find(""), State.HOST)
        assert (harness.snapshot(), harness.pages) == (before, [])


def _reached(harness: Harness, nth: int) -> bool:
    """Whether there was an nth look."""
    return any(rule.operation == "look" and rule.seen >= nth for rule in harness.host.faults._rules)
