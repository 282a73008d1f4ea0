"""The looks for holders that matter: one that tells nothing, and the last one before what cannot be undone."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from gpuswitch.errors import Failed
from gpuswitch.gpu.actor import Actor
from gpuswitch.host.simulated.faults import Delay, Errno, Hang
from gpuswitch.host.simulated.kernel import IN_FLIGHT
from gpuswitch.host.simulated.scenarios import DISPLAY_MANAGER
from gpuswitch.model.address import PciAddress
from gpuswitch.model.holders import HolderQuery, Unit
from gpuswitch.model.policy import Options
from gpuswitch.model.states import State
from gpuswitch.switch.engine import Status, StepEvent
from gpuswitch.switch.record import THE_SERVICE, Result, Switch
from gpuswitch.switch.steps.holders import CheckHolders
from gpuswitch.switch.steps.pci import Unbind
from tests.simulated.bed import Bed, Snapshot
from tests.simulated.test_holders import DISPLAY, SOUND, refused, reverted, when

LAST_LOOK = CheckHolders(HolderQuery(())).title


@pytest.fixture
async def bed(tmp_path: Path) -> Bed:
    """A laptop with nobody on its GeForce."""
    return await Bed.of("plain", tmp_path)


@pytest.fixture
def actor(bed: Bed) -> Actor:
    return bed.fleet.find("01:00.0")


class TestNobodyCanTell:
    async def test_a_scan_that_fails_is_busy(self, bed: Bed, actor: Actor) -> None:
        bed.host.faults.add(Errno(5), operation="scan")
        assert "nobody can tell who has 0000:01:00.0 open, so it counts as busy: " in await refused(bed, actor)

    async def test_a_scan_that_hangs_is_busy_within_its_deadline(self, bed: Bed, actor: Actor) -> None:
        bed.host.faults.add(Hang(), operation="scan")
        started = asyncio.get_running_loop().time()
        assert "so it counts as busy: " in await refused(bed, actor)
        assert asyncio.get_running_loop().time() - started == bed.fleet.config.deadlines.holders

    async def test_the_last_look_too(self, bed: Bed, actor: Actor) -> None:
        when(bed, LAST_LOOK, Status.RUNNING, self.break_scans(bed, Errno(5)))
        assert "so 0000:01:00.0 counts as busy" in await reverted(bed, actor)

    async def test_the_last_look_under_its_deadline(self, bed: Bed, actor: Actor) -> None:
        when(bed, LAST_LOOK, Status.RUNNING, self.break_scans(bed, Hang()))
        assert await reverted(bed, actor) == "the look for programs that have it open is not over after 15 s"

    async def test_a_second_look_does_not_blame_who_is_gone_by_then(self, bed: Bed, actor: Actor) -> None:
        when(bed, LAST_LOOK, Status.RUNNING, lambda: bed.machine.open(DISPLAY, "late"))
        loop = asyncio.get_running_loop()
        loop.call_later(0.5, self.break_scans(bed, Hang()))
        loop.call_later(0.5, bed.machine.close, DISPLAY, "late")
        assert await reverted(bed, actor) == "the look for programs that have it open is not over after 15 s"

    async def test_who_asks_is_told(self, bed: Bed, actor: Actor) -> None:
        bed.host.faults.add(Errno(5), operation="scan")
        with pytest.raises(Failed, match=r"^nobody can tell who has 0000:01:00\.0 open: "):
            await actor.holders()
        bed.host.faults.add(Hang(), operation="scan")
        with pytest.raises(Failed, match=r"the look for them took longer than 10 s"):
            await actor.holders()

    @staticmethod
    def break_scans(bed: Bed, fault: Errno | Hang) -> Callable[[], object]:
        return lambda: bed.host.faults.add(fault, operation="scan", nth=None)


class TestAtTheLastMoment:
    @pytest.mark.parametrize("function", [DISPLAY, SOUND], ids=str)
    async def test_somebody_who_appears_after_the_first_look(
        self, function: PciAddress, bed: Bed, actor: Actor
    ) -> None:
        when(bed, "keep all", Status.RUNNING, lambda: bed.machine.open(function, "late"))
        unbound: list[str] = []
        hear = bed.witness.on_step

        def count(actor: Actor, event: StepEvent) -> None:
            assert hear is not None
            hear(actor, event)
            if isinstance(event.step, Unbind):
                unbound.append(event.step.title)

        bed.witness.on_step = count
        assert re.match(r"late \(pid \d+, user root\) has /dev/", await reverted(bed, actor))
        assert unbound == []

    async def test_somebody_who_still_has_it_when_it_is_pulled(self, bed: Bed, actor: Actor) -> None:
        """Sysfs shows no node of it any more."""
        loop = asyncio.get_running_loop()
        when(bed, LAST_LOOK, Status.RUNNING, lambda: bed.machine.open(DISPLAY, "late"))
        loop.call_later(0.5, lambda: asyncio.ensure_future(bed.machine.unplug("0000:01:00")))
        switch = await bed.switch(actor, State.VFIO)
        assert [step.kind for step in switch.steps if step.status is Status.FAILED] == ["holders"]

    async def test_somebody_who_only_has_a_look(self, bed: Bed, actor: Actor) -> None:
        """As PipeWire does when a session ends: the card is opened, probed, and closed."""
        loop = asyncio.get_running_loop()
        when(bed, LAST_LOOK, Status.RUNNING, lambda: bed.machine.open(SOUND, "wireplumber"))
        loop.call_later(3, bed.machine.close, SOUND, "wireplumber")
        await bed.moved(actor, State.VFIO)
        assert loop.time() == 3

    async def test_pipewire_that_finds_the_card_when_its_session_comes_to_the_front(
        self, bed: Bed, actor: Actor
    ) -> None:
        """A moment after the display manager has ended: the card has been announced as gone by then, and is again."""
        bed.machine.units.add(DISPLAY_MANAGER)
        bed.machine.run("wireplumber", uid=1000, polite=True)

        when(bed, LAST_LOOK, Status.RUNNING, lambda: bed.machine.open(SOUND, "wireplumber"))
        await bed.moved(actor, State.VFIO, Options(stop_units=(DISPLAY_MANAGER.name,)))
        assert "wireplumber" not in bed.machine.users(SOUND)

    async def test_pipewire_that_takes_the_card_for_new_when_another_session_comes_to_the_front(
        self, bed: Bed, actor: Actor
    ) -> None:
        """After it had let go: since systemd 258 logind has udev look at it again, which undoes what was announced."""
        bed.machine.units.add(DISPLAY_MANAGER)
        bed.machine.run("wireplumber", uid=1000, polite=True)
        bed.machine.open(SOUND, "wireplumber")
        when(bed, LAST_LOOK, Status.RUNNING, bed.machine.to_the_front)
        await bed.moved(actor, State.VFIO, Options(stop_units=(DISPLAY_MANAGER.name,)))
        assert "wireplumber" not in bed.machine.users(SOUND)

    async def test_what_udev_runs_when_another_session_comes_to_the_front(self, bed: Bed, actor: Actor) -> None:
        """Before the switch it is waited for, not refused, and so it is at the last look."""
        bed.machine.to_the_front()
        await asyncio.sleep(0)
        when(bed, LAST_LOOK, Status.RUNNING, bed.machine.to_the_front)
        await bed.moved(actor, State.VFIO)
        assert not bed.machine.users(DISPLAY)

    async def test_what_udev_runs_and_does_not_end(self, bed: Bed, actor: Actor) -> None:
        bed.machine.run("stuck", unit=Unit("systemd-udevd.service"))
        bed.machine.open(DISPLAY, "stuck")
        assert await reverted(bed, actor) == await self.sentence(bed)

    @staticmethod
    async def sentence(bed: Bed) -> str:
        [node] = [node for holder in await bed.fleet.find("01:00.0").holders() for node in holder.nodes]
        pid = next(program.process.pid for program in bed.machine.processes.running() if program.name == "stuck")
        who = f"stuck (pid {pid}, systemd-udevd.service) has {node} open"
        return f"{who}; udev runs it to see what that is: try again in a moment"

    async def test_who_only_passes_calls_nobody(self, bed: Bed, actor: Actor) -> None:
        """PipeWire has let go; to announce the card as there, for the sake of somebody else, would bring it back."""
        bed.machine.units.add(DISPLAY_MANAGER)
        bed.machine.run("wireplumber", uid=1000, polite=True)
        bed.machine.open(SOUND, "wireplumber")
        bed.machine.run("mpv", uid=1000)
        when(bed, LAST_LOOK, Status.RUNNING, lambda: bed.machine.open(SOUND, "mpv"))
        asyncio.get_running_loop().call_later(4.5, bed.machine.close, SOUND, "mpv")
        await bed.moved(actor, State.VFIO, Options(stop_units=(DISPLAY_MANAGER.name,)))

    async def held_by_pipewire(self, bed: Bed, actor: Actor, fault: Errno | Delay | Hang) -> tuple[Switch, Snapshot]:
        """WirePlumber takes the card up at the last look, and something is wrong with the word to it."""
        bed.machine.units.add(DISPLAY_MANAGER)
        bed.machine.run("wireplumber", uid=1000, polite=True)
        before = bed.snapshot()

        def takes_up() -> None:
            bed.machine.open(SOUND, "wireplumber")
            bed.host.faults.add(fault, operation="announce")

        when(bed, LAST_LOOK, Status.RUNNING, takes_up)
        return await actor.request(State.VFIO, Options(stop_units=(DISPLAY_MANAGER.name,))), before

    async def test_a_word_that_cannot_be_said_is_not_the_end(self, bed: Bed, actor: Actor) -> None:
        switch, _ = await self.held_by_pipewire(bed, actor, Errno(12))
        asyncio.get_running_loop().call_later(3.5, bed.machine.close, SOUND, "wireplumber")
        await switch.wait()
        assert (switch.result, actor.state) == (Result.DONE, State.VFIO)

    async def test_a_cancel_in_the_middle_of_a_word_waits_for_its_end(self, bed: Bed, actor: Actor) -> None:
        switch, before = await self.held_by_pipewire(bed, actor, Delay(2))
        asyncio.get_running_loop().call_later(1.5, lambda: actor.cancel(switch.id, THE_SERVICE))
        await switch.wait()
        assert (switch.result, actor.state) == (Result.CANCELLED, State.HOST)
        assert (bed.snapshot(), bed.pages) == (before, [])

    async def test_a_word_that_hangs_is_wedged_soon(self, bed: Bed, actor: Actor) -> None:
        hang = Hang()
        switch, before = await self.held_by_pipewire(bed, actor, hang)
        await switch.wait()
        assert (switch.result, actor.state) == (Result.WEDGED, State.WEDGED)
        assert asyncio.get_running_loop().time() <= 1 + bed.fleet.config.deadlines.announce
        hang.release()
        await bed.witness.until(lambda: actor.state is State.HOST)
        assert (bed.snapshot(), bed.pages) == (before, [])

    @pytest.mark.parametrize(
        ("holder", "words"),
        [
            ("wireplumber", [(1, "add"), (2, "remove"), (4, "add"), (5, "remove"), (9, "add"), (10, "remove")]),
            # it would not heed it, and others would
            ("jackd", []),
        ],
    )
    async def test_ever_more_rarely_and_only_those_who_may_heed_it(
        self, holder: str, words: list[tuple[int, str]], bed: Bed, actor: Actor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bed.machine.units.add(DISPLAY_MANAGER)
        bed.machine.run(holder, uid=1000)
        bed.machine.open(SOUND, holder)
        said: list[tuple[int, str]] = []

        def hear(_function: object, _kind: object, action: str) -> None:
            said.append((round(asyncio.get_running_loop().time()), action))

        monkeypatch.setattr(bed.machine.processes, "announced", hear)
        await reverted(bed, actor, Options(stop_units=(DISPLAY_MANAGER.name,), wait_seconds=13))
        assert said == [(0, "remove"), *words, (13, "add")]

    async def test_a_descriptor_that_is_passed_on_just_then(self, bed: Bed, actor: Actor) -> None:
        when(bed, LAST_LOOK, Status.RUNNING, lambda: bed.machine.hide(DISPLAY, "nvidia"))
        asyncio.get_running_loop().call_later(3, bed.machine.close, DISPLAY, IN_FLIGHT)
        await bed.moved(actor, State.VFIO)

    async def test_who_came_to_stay_can_be_given_up_on(self, bed: Bed, actor: Actor) -> None:
        """A cancel does not wait until the look is over."""
        when(bed, LAST_LOOK, Status.RUNNING, lambda: bed.machine.open(DISPLAY, "late"))
        loop = asyncio.get_running_loop()
        loop.call_later(2, lambda: actor.cancel(actor.switch.id if actor.switch else "", THE_SERVICE))
        switch = await bed.switch(actor, State.VFIO)
        assert (switch.result, actor.state, loop.time()) == (Result.CANCELLED, State.HOST, 2)
