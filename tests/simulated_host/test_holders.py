"""Whoever has the GPU open: named, waited for, asked to let go, and never met by an unbind."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

from gpuswitch.config.schema import Defaults
from gpuswitch.config.settings import Config
from gpuswitch.errors import Busy as BusyError
from gpuswitch.errors import InProgress, KernelError
from gpuswitch.gpu.actor import Actor
from gpuswitch.host.simulated.faults import Errno, Silent
from gpuswitch.host.simulated.kernel import IN_FLIGHT
from gpuswitch.host.simulated.scenarios import PERSISTENCED, SCENARIOS
from gpuswitch.model.address import PciAddress
from gpuswitch.model.holders import Unit
from gpuswitch.model.policy import Busy, Options
from gpuswitch.model.states import State
from gpuswitch.switch.engine import Status, StepEvent
from gpuswitch.switch.record import Result
from gpuswitch.switch.steps.holders import AwaitHolders
from gpuswitch.switch.steps.step import Step
from tests.harness.simulated.harness import Harness

DISPLAY, SOUND = PciAddress.parse("0000:01:00.0"), PciAddress.parse("0000:01:00.1")
OLLAMA, OLLAMA_SOCKET = Unit("ollama.service"), Unit("ollama.socket")
WIREPLUMBER = Unit("wireplumber.service", 1000)
TERMINATE, KILL = Options(busy=Busy.TERMINATE), Options(busy=Busy.KILL)


@pytest.fixture
async def harness(tmp_path: Path) -> Harness:
    """A laptop with nobody on its GeForce."""
    return await Harness.of("plain", tmp_path, grace_seconds=10, wait_seconds=60)


@pytest.fixture
def actor(harness: Harness) -> Actor:
    return harness.fleet.find("01:00.0")


def blender(harness: Harness, *, stubborn: bool = False, restarts: bool = False) -> None:
    harness.machine.run("blender", uid=1000, stubborn=stubborn, restarts=restarts)
    harness.machine.open(DISPLAY, "blender", "nvidia")


async def refused(harness: Harness, actor: Actor, options: Options = Options()) -> str:  # noqa: B008 -- frozen
    """See that it is refused and nothing at all is changed; the sentences."""
    before, running = harness.snapshot(), {program.process for program in harness.machine.processes.running()}
    with pytest.raises(BusyError) as refusal:
        await actor.request(State.VFIO, options)
    assert (harness.snapshot(), harness.pages, actor.state, actor.switch) == (before, [], State.HOST, None)
    assert {program.process for program in harness.machine.processes.running()} == running
    return str(refusal.value)


async def reverted(harness: Harness, actor: Actor, options: Options = Options()) -> str:  # noqa: B008 -- frozen
    """See that it begins, fails, and leaves no trace; the sentence."""
    before = harness.snapshot()
    switch = await harness.switch(actor, State.VFIO, options)
    assert (switch.result, actor.state) == (Result.REVERTED, State.HOST)
    assert (harness.snapshot(), harness.pages) == (before, [])
    return switch.reason


def when(harness: Harness, wanted: type[Step], status: Status, then: object) -> None:
    """Do something at the first step of this kind."""
    done: list[object] = []

    def hear(_: Actor, event: StepEvent) -> None:
        if not done and event.status is status and isinstance(event.step, wanted):
            assert callable(then)
            done.append(then() or True)

    harness.witness.on_step = hear


class TestRefuse:
    async def test_a_program_by_name_unit_and_remedy(self, harness: Harness, actor: Actor) -> None:
        harness.machine.run("ollama", unit=OLLAMA)
        harness.machine.open(DISPLAY, "ollama", "nvidia")
        assert re.fullmatch(
            r"ollama \(pid \d+, ollama\.service\) has /dev/nvidia0, /dev/nvidiactl open; "
            r"stop it: systemctl stop ollama\.service",
            await refused(harness, actor),
        )

    async def test_all_of_them_at_once(self, harness: Harness, actor: Actor) -> None:
        blender(harness)
        harness.machine.run("kwin_wayland", uid=1000, unit=Unit("session-2.scope"), session="2")
        harness.machine.open(DISPLAY, "kwin_wayland", "drm")
        first, second = (await refused(harness, actor)).splitlines()
        assert re.match(r"blender \(pid \d+, user alice\) has /dev/nvidia0", first)
        assert re.match(r"kwin_wayland \(pid \d+, session 2 of alice\) has /dev/dri/card\d open; close it, or", second)

    async def test_with_all_else_that_is_in_the_way(self, tmp_path: Path) -> None:
        """The neighbour is not there alone to be put right, and then the program, and then the name of a unit."""
        rules = Defaults(stop_units=("no-such-thing.service",))
        harness = await Harness.start(SCENARIOS["shared"](), tmp_path, Config(defaults=rules))
        actor = harness.fleet.find("01:00.0")
        harness.machine.run("blender", uid=1000)
        harness.machine.open(DISPLAY, "blender")
        for ask in (actor.request, actor.plan):
            before = harness.snapshot()
            with pytest.raises(BusyError) as refusal:
                await ask(State.VFIO)
            neighbour, unit, program = str(refusal.value).splitlines()
            assert "0000:02:00.0" in neighbour
            assert unit == (
                "there is no no-such-thing.service, which is to be stopped first: correct its name, or leave it out: "
                "set `stop_units = []` in the [defaults] table in /etc/gpuswitch/config.toml, then run: "
                "systemctl reload gpuswitchd"
            )
            assert program.startswith("blender (pid ")
            assert (harness.snapshot(), harness.pages, actor.state, actor.switch) == (before, [], State.HOST, None)

    async def test_what_cannot_be_told_is_said_beside_what_is_in_the_way(self, tmp_path: Path) -> None:
        harness = await Harness.start(SCENARIOS["shared"](), tmp_path, Config())
        harness.host.faults.add(Errno(5), operation="scan", nth=None)
        with pytest.raises(BusyError, match=r"stays on r8169[^\n]*\nnobody can tell who has 0000:01:00\.0 open"):
            await harness.fleet.find("01:00.0").request(State.VFIO)

    async def test_somebody_at_a_companion(self, harness: Harness, actor: Actor) -> None:
        """Sound that does not follow udev."""
        harness.machine.run("jackd", uid=1000)
        harness.machine.open(SOUND, "jackd")
        harness.fleet.reconfigure(harness.fleet.config)
        assert "has /dev/snd/controlC1 open" in (await reverted(harness, actor))

    async def test_a_reference_of_the_kernel_that_nobody_explains(self, harness: Harness, actor: Actor) -> None:
        harness.machine.hide(DISPLAY, "nvidia")
        assert await refused(harness, actor) == (
            "0000:01:00.0 is in use by the kernel: module nvidia has 1 user that no process explains"
        )

    async def test_a_plan_is_refused_alike(self, harness: Harness, actor: Actor) -> None:
        blender(harness)
        with pytest.raises(BusyError, match=r"^blender .* has /dev/nvidia0"):
            await actor.plan(State.VFIO)

    async def test_who_has_it_open_can_be_asked_without_a_switch(self, harness: Harness, actor: Actor) -> None:
        blender(harness)
        assert [holder.command for holder in await actor.holders()] == ["blender"]
        harness.machine.end("blender")
        await harness.moved(actor, State.VFIO)
        harness.machine.start_vm("win11", actor.gpu.functions)
        assert [holder.command for holder in await actor.holders()] == ["qemu-system-x86"]


class TestWait:
    async def test_until_the_last_one_ends(self, harness: Harness, actor: Actor) -> None:
        blender(harness)
        harness.machine.open(DISPLAY, "other", "drm")
        loop = asyncio.get_running_loop()
        loop.call_later(20, harness.machine.end, "blender")
        loop.call_later(40, harness.machine.close, DISPLAY, "other")
        started = loop.time()
        await harness.moved(actor, State.VFIO, Options(busy=Busy.WAIT, wait_seconds=50))
        assert loop.time() - started == 40

    async def test_seconds_alone_mean_wait(self, harness: Harness, actor: Actor) -> None:
        blender(harness)
        asyncio.get_running_loop().call_later(20, harness.machine.end, "blender")
        await harness.moved(actor, State.VFIO, Options(wait_seconds=50))

    async def test_where_no_event_would_tell(
        self, harness: Harness, actor: Actor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def deaf(*_: object) -> None:
            raise KernelError("watch", "the holders", 24, "Too many open files")

        monkeypatch.setattr(harness.host.processes, "wait_for_change", deaf)
        blender(harness)
        asyncio.get_running_loop().call_later(20.5, harness.machine.end, "blender")
        started = asyncio.get_running_loop().time()
        await harness.moved(actor, State.VFIO, Options(wait_seconds=50))
        assert asyncio.get_running_loop().time() - started == 21

    async def test_meanwhile_it_says_for_whom_and_until_when(self, harness: Harness, actor: Actor) -> None:
        blender(harness)
        switch = await actor.request(State.VFIO, Options(wait_seconds=50))
        await harness.witness.until_step(actor.gpu, AwaitHolders)
        began = switch.step_started
        await asyncio.sleep(20)
        assert switch.waiting_for.startswith("blender (pid ")
        # It looks again each second, and nobody is told the same twice.
        assert [text.startswith("blender (pid ") for text in harness.witness.waited].count(True) == 1
        assert (round(began - switch.started), round(switch.waiting_until - began)) == (0, 50)
        harness.machine.end("blender")
        await switch.wait()
        assert (switch.result, switch.waiting_for, switch.waiting_until, switch.error) == (Result.DONE, "", 0.0, "")

    async def test_what_was_in_vain_is_busy(self, harness: Harness, actor: Actor) -> None:
        blender(harness)
        assert (await harness.switch(actor, State.VFIO, Options(wait_seconds=50))).error == "Busy"
        assert (await harness.switch(actor, State.VFIO, Options(busy=Busy.TERMINATE))).error == ""

    async def test_in_vain(self, harness: Harness, actor: Actor) -> None:
        blender(harness)
        started = asyncio.get_running_loop().time()
        reason = await reverted(harness, actor, Options(wait_seconds=50))
        assert re.match(r"blender \(pid \d+, user alice\) has /dev/nvidia0, /dev/nvidiactl open; close it", reason)
        assert asyncio.get_running_loop().time() - started == 50

    async def test_as_long_as_configured_and_restores_the_units_that_it_stopped(self, tmp_path: Path) -> None:
        harness = await Harness.of("laptop", tmp_path, busy="wait", wait_seconds=120)
        actor = harness.fleet.find("01:00.0")
        blender(harness)
        started = asyncio.get_running_loop().time()
        assert "blender" in await reverted(harness, actor)
        assert asyncio.get_running_loop().time() - started == 120
        assert harness.state(PERSISTENCED) == "active"

    async def test_for_what_makes_no_event(self, harness: Harness, actor: Actor) -> None:
        """The kernel's own use ends without telling anybody: looked at again each second."""
        harness.machine.hide(DISPLAY, "nvidia")
        asyncio.get_running_loop().call_later(20.5, harness.machine.close, DISPLAY, IN_FLIGHT)
        started = asyncio.get_running_loop().time()
        await harness.moved(actor, State.VFIO, Options(wait_seconds=50))
        assert asyncio.get_running_loop().time() - started <= 21.5

    async def test_nobody_who_waits_is_in_the_way_of_the_services_end(self, harness: Harness, actor: Actor) -> None:
        blender(harness)
        before = harness.snapshot()
        switch = await actor.request(State.VFIO, Options(wait_seconds=50))
        await asyncio.sleep(10)
        started = asyncio.get_running_loop().time()
        await harness.fleet.stop("the service is stopping")
        assert asyncio.get_running_loop().time() == started
        assert (switch.result, switch.reason) == (Result.CANCELLED, "the service is stopping")
        assert (harness.snapshot(), harness.pages) == (before, [])


class TestPolite:
    async def test_pipewire_lets_go_when_it_hears_of_it_and_takes_the_card_up_again(self, tmp_path: Path) -> None:
        harness = await Harness.of("laptop", tmp_path)
        actor = harness.fleet.find("01:00.0")
        assert "wireplumber" in harness.machine.users(SOUND)
        await harness.moved(actor, State.VFIO)
        assert harness.state(WIREPLUMBER) == "active"
        await harness.moved(actor, State.HOST)
        await asyncio.sleep(1)
        assert "wireplumber" in harness.machine.users(SOUND)

    async def test_and_takes_it_up_again_after_a_failure(self, tmp_path: Path) -> None:
        harness = await Harness.of("laptop", tmp_path)
        harness.host.faults.add(Errno(5), operation="set_override")
        await reverted(harness, harness.fleet.find("01:00.0"))
        await asyncio.sleep(1)
        assert "wireplumber" in harness.machine.users(SOUND)

    async def test_one_that_does_not_let_go_is_told(self, tmp_path: Path) -> None:
        harness = await Harness.of("laptop", tmp_path)
        harness.host.faults.add(Silent(), operation="let_go", subject="wireplumber", nth=None)
        reason = await reverted(harness, harness.fleet.find("01:00.0"))
        assert "systemctl --user --machine=alice@ stop wireplumber.service" in reason

    async def test_unless_nobody_is_to_be_told(self, tmp_path: Path) -> None:
        harness = await Harness.of("laptop", tmp_path, announce_sound=False)
        assert "wireplumber" in await refused(harness, harness.fleet.find("01:00.0"))


async def test_a_plan_meanwhile_does_not_disturb_who_waits(tmp_path: Path) -> None:
    """Anybody may ask for one; how long the switch may take is not theirs to change."""
    harness = await Harness.of("plain", tmp_path)
    actor = harness.fleet.find("01:00.0")
    harness.machine.open(actor.gpu.address, "game")
    switch = await actor.request(State.VFIO, Options(wait_seconds=3000.0))
    patience = actor.runner.patience
    with pytest.raises(InProgress):
        await actor.plan(State.VFIO)
    assert actor.runner.patience == patience > 3000.0
    harness.machine.close(actor.gpu.address, "game")
    await switch.wait()
    assert actor.state is State.VFIO
