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
from gpuswitch.model.holders import Unit
from gpuswitch.model.policy import Options
from gpuswitch.model.states import State
from gpuswitch.switch.engine import Status, StepEvent
from gpuswitch.switch.record import THE_SERVICE, Result, Switch
from gpuswitch.switch.steps.holders import CheckHolders
from gpuswitch.switch.steps.pci import DisableRuntimePm, Unbind
from tests.harness.simulated.harness import Harness, Snapshot
from tests.simulated_host.test_holders import DISPLAY, SOUND, refused, reverted, when


@pytest.fixture
async def harness(tmp_path: Path) -> Harness:
    """A laptop with nobody on its GeForce."""
    return await Harness.of("plain", tmp_path)


@pytest.fixture
def actor(harness: Harness) -> Actor:
    return harness.fleet.find("01:00.0")


class TestNobodyCanTell:
    async def test_a_scan_that_fails_is_busy(self, harness: Harness, actor: Actor) -> None:
        harness.host.faults.add(Errno(5), operation="scan")
        assert "nobody can tell who has 0000:01:00.0 open, so it counts as busy: " in await refused(harness, actor)

    async def test_a_scan_that_hangs_is_busy_within_its_deadline(self, harness: Harness, actor: Actor) -> None:
        harness.host.faults.add(Hang(), operation="scan")
        started = asyncio.get_running_loop().time()
        assert "so it counts as busy: " in await refused(harness, actor)
        assert asyncio.get_running_loop().time() - started == harness.fleet.config.deadlines.holders

    async def test_the_last_look_too(self, harness: Harness, actor: Actor) -> None:
        when(harness, CheckHolders, Status.RUNNING, self.break_scans(harness, Errno(5)))
        assert "so 0000:01:00.0 counts as busy" in await reverted(harness, actor)

    async def test_the_last_look_under_its_deadline(self, harness: Harness, actor: Actor) -> None:
        when(harness, CheckHolders, Status.RUNNING, self.break_scans(harness, Hang()))
        assert await reverted(harness, actor) == "the look for programs that have it open is not over after 15 s"

    async def test_a_second_look_does_not_blame_who_is_gone_by_then(self, harness: Harness, actor: Actor) -> None:
        when(harness, CheckHolders, Status.RUNNING, lambda: harness.machine.open(DISPLAY, "late"))
        loop = asyncio.get_running_loop()
        loop.call_later(0.5, self.break_scans(harness, Hang()))
        loop.call_later(0.5, harness.machine.close, DISPLAY, "late")
        assert await reverted(harness, actor) == "the look for programs that have it open is not over after 15 s"

    async def test_who_asks_is_told(self, harness: Harness, actor: Actor) -> None:
        harness.host.faults.add(Errno(5), operation="scan")
        with pytest.raises(Failed, match=r"^nobody can tell who has 0000:01:00\.0 open: "):
            await actor.holders()
        harness.host.faults.add(Hang(), operation="scan")
        with pytest.raises(Failed, match=r"the look for them took longer than 10 s"):
            await actor.holders()

    @staticmethod
    def break_scans(harness: Harness, fault: Errno | Hang) -> Callable[[], object]:
        return lambda: harness.host.faults.add(fault, operation="scan", nth=None)


class TestAtTheLastMoment:
    @pytest.mark.parametrize("function", [DISPLAY, SOUND], ids=str)
    async def test_somebody_who_appears_after_the_first_look(
        self, function: PciAddress, harness: Harness, actor: Actor
    ) -> None:
        when(harness, DisableRuntimePm, Status.RUNNING, lambda: harness.machine.open(function, "late"))
        unbound: list[str] = []
        hear = harness.witness.on_step

        def count(actor: Actor, event: StepEvent) -> None:
            assert hear is not None
            hear(actor, event)
            if isinstance(event.step, Unbind):
                unbound.append(event.step.title)

        harness.witness.on_step = count
        assert re.match(r"late \(pid \d+, user root\) has /dev/", await reverted(harness, actor))
        assert unbound == []

    async def test_somebody_who_still_has_it_when_it_is_pulled(self, harness: Harness, actor: Actor) -> None:
        """Sysfs shows no node of it any more."""
        loop = asyncio.get_running_loop()
        when(harness, CheckHolders, Status.RUNNING, lambda: harness.machine.open(DISPLAY, "late"))
        loop.call_later(0.5, lambda: asyncio.ensure_future(harness.machine.unplug("0000:01:00")))
        switch = await harness.switch(actor, State.VFIO)
        assert [step.kind for step in switch.steps if step.status is Status.FAILED] == ["holders"]

    async def test_somebody_who_only_has_a_look(self, harness: Harness, actor: Actor) -> None:
        """As PipeWire does when a session ends: the card is opened, probed, and closed."""
        loop = asyncio.get_running_loop()
        when(harness, CheckHolders, Status.RUNNING, lambda: harness.machine.open(SOUND, "wireplumber"))
        loop.call_later(3, harness.machine.close, SOUND, "wireplumber")
        await harness.moved(actor, State.VFIO)
        assert loop.time() == 3

    async def test_pipewire_that_finds_the_card_when_its_session_comes_to_the_front(
        self, harness: Harness, actor: Actor
    ) -> None:
        """A moment after the display manager has ended: the card has been announced as gone by then, and is again."""
        harness.machine.units.add(DISPLAY_MANAGER)
        harness.machine.run("wireplumber", uid=1000, polite=True)

        when(harness, CheckHolders, Status.RUNNING, lambda: harness.machine.open(SOUND, "wireplumber"))
        await harness.moved(actor, State.VFIO, Options(stop_units=(DISPLAY_MANAGER.name,)))
        assert "wireplumber" not in harness.machine.users(SOUND)

    async def test_pipewire_that_takes_the_card_for_new_when_another_session_comes_to_the_front(
        self, harness: Harness, actor: Actor
    ) -> None:
        """After it had let go: since systemd 258 logind has udev look at it again, which undoes what was announced."""
        harness.machine.units.add(DISPLAY_MANAGER)
        harness.machine.run("wireplumber", uid=1000, polite=True)
        harness.machine.open(SOUND, "wireplumber")
        when(harness, CheckHolders, Status.RUNNING, harness.machine.to_the_front)
        await harness.moved(actor, State.VFIO, Options(stop_units=(DISPLAY_MANAGER.name,)))
        assert "wireplumber" not in harness.machine.users(SOUND)

    async def test_what_udev_runs_when_another_session_comes_to_the_front(self, harness: Harness, actor: Actor) -> None:
        """Before the switch it is waited for, not refused, and so it is at the last look."""
        harness.machine.to_the_front()
        await asyncio.sleep(0)
        when(harness, CheckHolders, Status.RUNNING, harness.machine.to_the_front)
        await harness.moved(actor, State.VFIO)
        assert not harness.machine.users(DISPLAY)

    async def test_what_udev_runs_and_does_not_end(self, harness: Harness, actor: Actor) -> None:
        harness.machine.run("stuck", unit=Unit("systemd-udevd.service"))
        harness.machine.open(DISPLAY, "stuck")
        assert await reverted(harness, actor) == await self.sentence(harness)

    @staticmethod
    async def sentence(harness: Harness) -> str:
        [node] = [node for holder in await harness.fleet.find("01:00.0").holders() for node in holder.nodes]
        pid = next(program.process.pid for program in harness.machine.processes.running() if program.name == "stuck")
        who = f"stuck (pid {pid}, systemd-udevd.service) has {node} open"
        return f"{who}; udev runs it to see what that is: try again in a moment"

    async def test_who_only_passes_calls_nobody(self, harness: Harness, actor: Actor) -> None:
        """PipeWire has let go; to announce the card as there, for the sake of somebody else, would bring it back."""
        harness.machine.units.add(DISPLAY_MANAGER)
        harness.machine.run("wireplumber", uid=1000, polite=True)
        harness.machine.open(SOUND, "wireplumber")
        harness.machine.run("mpv", uid=1000)
        when(harness, CheckHolders, Status.RUNNING, lambda: harness.machine.open(SOUND, "mpv"))
        asyncio.get_running_loop().call_later(4.5, harness.machine.close, SOUND, "mpv")
        await harness.moved(actor, State.VFIO, Options(stop_units=(DISPLAY_MANAGER.name,)))

    async def held_by_pipewire(
        self, harness: Harness, actor: Actor, fault: Errno | Delay | Hang
    ) -> tuple[Switch, Snapshot]:
        """WirePlumber takes the card up at the last look, and something is wrong with the word to it."""
        harness.machine.units.add(DISPLAY_MANAGER)
        harness.machine.run("wireplumber", uid=1000, polite=True)
        before = harness.snapshot()

        def takes_up() -> None:
            harness.machine.open(SOUND, "wireplumber")
            harness.host.faults.add(fault, operation="announce")

        when(harness, CheckHolders, Status.RUNNING, takes_up)
        return await actor.request(State.VFIO, Options(stop_units=(DISPLAY_MANAGER.name,))), before

    async def test_a_word_that_cannot_be_said_is_not_the_end(self, harness: Harness, actor: Actor) -> None:
        switch, _ = await self.held_by_pipewire(harness, actor, Errno(12))
        asyncio.get_running_loop().call_later(3.5, harness.machine.close, SOUND, "wireplumber")
        await switch.wait()
        assert (switch.result, actor.state) == (Result.DONE, State.VFIO)

    async def test_a_cancel_in_the_middle_of_a_word_waits_for_its_end(self, harness: Harness, actor: Actor) -> None:
        switch, before = await self.held_by_pipewire(harness, actor, Delay(2))
        asyncio.get_running_loop().call_later(1.5, lambda: actor.cancel(switch.id, THE_SERVICE))
        await switch.wait()
        assert (switch.result, actor.state) == (Result.CANCELLED, State.HOST)
        assert (harness.snapshot(), harness.pages) == (before, [])

    async def test_a_word_that_hangs_is_wedged_soon(self, harness: Harness, actor: Actor) -> None:
        hang = Hang()
        switch, before = await self.held_by_pipewire(harness, actor, hang)
        await switch.wait()
        assert (switch.result, actor.state) == (Result.WEDGED, State.WEDGED)
        assert asyncio.get_running_loop().time() <= 1 + harness.fleet.config.deadlines.announce
        hang.release()
        await harness.witness.until(lambda: actor.state is State.HOST)
        assert (harness.snapshot(), harness.pages) == (before, [])

    @pytest.mark.parametrize(
        ("holder", "words"),
        [
            ("wireplumber", [(1, "add"), (2, "remove"), (4, "add"), (5, "remove"), (9, "add"), (10, "remove")]),
            # it would not heed it, and others would
            ("jackd", []),
        ],
    )
    async def test_ever_more_rarely_and_only_those_who_may_heed_it(
        self, holder: str, words: list[tuple[int, str]], harness: Harness, actor: Actor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        harness.machine.units.add(DISPLAY_MANAGER)
        harness.machine.run(holder, uid=1000)
        harness.machine.open(SOUND, holder)
        said: list[tuple[int, str]] = []

        def hear(_function: object, _kind: object, action: str) -> None:
            said.append((round(asyncio.get_running_loop().time()), action))

        monkeypatch.setattr(harness.machine.processes, "announced", hear)
        await reverted(harness, actor, Options(stop_units=(DISPLAY_MANAGER.name,), wait_seconds=13))
        assert said == [(0, "remove"), *words, (13, "add")]

    async def test_a_descriptor_that_is_passed_on_just_then(self, harness: Harness, actor: Actor) -> None:
        when(harness, CheckHolders, Status.RUNNING, lambda: harness.machine.hide(DISPLAY, "nvidia"))
        asyncio.get_running_loop().call_later(3, harness.machine.close, DISPLAY, IN_FLIGHT)
        await harness.moved(actor, State.VFIO)

    async def test_who_came_to_stay_can_be_given_up_on(self, harness: Harness, actor: Actor) -> None:
        """A cancel does not wait until the look is over."""
        when(harness, CheckHolders, Status.RUNNING, lambda: harness.machine.open(DISPLAY, "late"))
        loop = asyncio.get_running_loop()
        loop.call_later(2, lambda: actor.cancel(actor.switch.id if actor.switch else "", THE_SERVICE))
        switch = await harness.switch(actor, State.VFIO)
        assert (switch.result, actor.state, loop.time()) == (Result.CANCELLED, State.HOST, 2)
