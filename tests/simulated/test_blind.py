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
from tests.simulated.bed import Bed

EMFILE = Errno(errno.EMFILE)


def blind(bed: Bed, looks: int) -> None:
    """So many looks from now on see nothing."""
    for nth in range(1, looks + 1):
        bed.host.faults.add(EMFILE, operation="look", nth=nth)


class TestAtRest:
    async def test_a_gpu_that_is_away_is_away_all_the_while(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Nothing is started that it needs stopped, and what it is owed comes back with it."""
        bed = await Bed.of("single", tmp_path)
        actor, before = bed.fleet.find(""), bed.snapshot()
        await bed.moved(actor, State.VFIO)
        away = bed.snapshot()
        blind(bed, 3)
        bed.machine.uevent()
        await asyncio.sleep(0.5)
        assert (bed.snapshot(), actor.state, bed.pages) == (away, State.VFIO, ["0000_01_00_0.json"])
        assert [r.levelno for r in caplog.records if "cannot look at the host" in r.message] == [logging.WARNING]
        await asyncio.sleep(100)
        assert (bed.snapshot(), actor.state, bed.state(DISPLAY_MANAGER)) == (away, State.VFIO, "inactive")
        await bed.moved(actor, State.HOST)
        assert (bed.snapshot(), bed.pages) == (before, [])

    async def test_what_happened_meanwhile_is_seen_without_another_event(self, tmp_path: Path) -> None:
        bed = await Bed.of("plain", tmp_path)
        actor = bed.fleet.find("01:00.0")
        blind(bed, 4)
        await bed.machine.unplug("0000:01:00")
        await asyncio.sleep(100)
        assert str(actor.state) == "absent"

    async def test_who_looks_again_does_so_ever_more_rarely_and_ends_with_the_service(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bed = await Bed.of("plain", tmp_path)
        looks = 0

        def blinded() -> int:
            nonlocal looks
            looks += 1
            return errno.ENFILE

        monkeypatch.setattr(bed.host, "_blind", blinded)
        bed.machine.uevent()
        await asyncio.sleep(600)
        assert 10 < looks < 20
        await bed.fleet.stop("the service is stopping")
        before = looks
        await asyncio.sleep(600)
        assert looks == before


class TestWhileItMoves:
    async def test_at_any_look_of_a_way_out_and_home(self, tmp_path: Path) -> None:
        nth, hit = 0, True
        while hit:
            nth += 1
            bed = await Bed.of("plain", tmp_path / str(nth))
            actor, before = bed.fleet.find("01:00.0"), bed.snapshot()
            for again in range(3):
                bed.host.faults.add(EMFILE, operation="look", nth=nth + again)
            await bed.moved(actor, State.VFIO)
            assert bed.pages
            await bed.moved(actor, State.HOST)
            hit = _reached(bed, nth)
            bed.host.faults.clear()
            await asyncio.sleep(100)
            assert (bed.snapshot(), bed.pages, actor.state) == (before, [], State.HOST)
        assert nth > 20

    async def test_while_it_is_taken_back(self, tmp_path: Path) -> None:
        bed = await Bed.of("plain", tmp_path)
        actor, before = bed.fleet.find("01:00.0"), bed.snapshot()
        bed.host.faults.add(Errno(5), operation="probe", subject="0000:01:00.0")
        bed.witness.on_step = lambda _, event: blind(bed, 2) if event.status == "failed" else None
        switch = await bed.switch(actor, State.VFIO)
        assert (switch.result, actor.state, bed.snapshot()) == (Result.REVERTED, State.HOST, before)

    async def test_one_that_is_wedged_comes_home_when_it_can_be_seen(self, tmp_path: Path) -> None:
        bed = await Bed.of("plain", tmp_path)
        actor, before = bed.fleet.find("01:00.0"), bed.snapshot()
        hang = bed.host.faults.add(Hang(), operation="unbind")
        switch = await actor.request(State.VFIO)
        await hang.reached.wait()
        blind(bed, 6)
        await switch.wait()
        assert (switch.result, actor.state) == (Result.WEDGED, State.WEDGED)
        hang.release()
        await bed.witness.until(lambda: not actor.bound)
        assert (actor.state, bed.snapshot(), bed.pages) == (State.HOST, before, [])


class TestAsked:
    async def test_for_longer_than_an_answer_may_take(self, tmp_path: Path) -> None:
        bed = await Bed.of("plain", tmp_path)
        actor, before = bed.fleet.find("01:00.0"), bed.snapshot()
        bed.host.faults.add(EMFILE, operation="look", nth=None)
        for work in (actor.request(State.VFIO), actor.plan(State.VFIO), actor.recover()):
            with pytest.raises(Failed, match=r"^cannot look at the host: Too many open files; nothing was changed$"):
                await work
        assert (bed.snapshot(), bed.pages, actor.state) == (before, [], State.HOST)
        bed.host.faults.clear()
        await bed.moved(actor, State.VFIO)


class TestStart:
    async def test_it_is_not_ready_before_it_has_seen_its_gpus(self, tmp_path: Path) -> None:
        bed = await Bed.of("single", tmp_path)
        before = bed.snapshot()
        await bed.moved(bed.fleet.find(""), State.VFIO)
        away = bed.snapshot()
        await bed.host.close()
        blind(bed, 5)
        bed = await Bed.made(SimulatedHost(bed.machine), bed.directory, bed.fleet.config)
        assert (bed.snapshot(), bed.fleet.find("").state) == (away, State.VFIO)
        await bed.moved(bed.fleet.find(""), State.HOST)
        assert (bed.snapshot(), bed.pages) == (before, [])

    async def test_what_was_under_way_comes_home_all_the_same(self, tmp_path: Path) -> None:
        bed = await Bed.of("plain", tmp_path)
        actor, before = bed.fleet.find("01:00.0"), bed.snapshot()
        hang = bed.host.faults.add(Hang(), operation="probe")
        await actor.request(State.VFIO)
        await hang.reached.wait()
        hang.release()
        blind(bed, 7)
        bed = await bed.crash(actor)
        await bed.witness.until(lambda: not bed.fleet.find("01:00.0").bound)
        assert (bed.fleet.find("01:00.0").state, bed.snapshot(), bed.pages) == (State.HOST, before, [])

    async def test_a_journal_that_cannot_be_read_now_is_not_set_aside(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bed = await Bed.of("single", tmp_path)
        before = bed.snapshot()
        await bed.moved(bed.fleet.find(""), State.VFIO)
        await bed.host.close()
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
        bed = await Bed.made(SimulatedHost(bed.machine), bed.directory, bed.fleet.config)
        assert failing[0] < 0
        assert failing[1] < 0
        await bed.moved(bed.fleet.find(""), State.HOST)
        assert (bed.snapshot(), bed.pages) == (before, [])


def _reached(bed: Bed, nth: int) -> bool:
    """Whether there was an nth look."""
    return any(rule.operation == "look" and rule.seen >= nth for rule in bed.host.faults._rules)
