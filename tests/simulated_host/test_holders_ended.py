"""Whoever has the GPU open and may be ended: units through their manager, others by a signal, and some never."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

from gpuswitch.gpu.actor import Actor
from gpuswitch.host.simulated.faults import Delay, Errno
from gpuswitch.model.holders import Process, Unit
from gpuswitch.model.policy import Options
from gpuswitch.model.states import State
from gpuswitch.switch.engine import Status
from gpuswitch.switch.steps.holders import AwaitHolders
from tests.harness.simulated.harness import Harness
from tests.simulated_host.test_holders import (
    DISPLAY,
    KILL,
    OLLAMA,
    OLLAMA_SOCKET,
    TERMINATE,
    blender,
    refused,
    reverted,
    when,
)


@pytest.fixture
async def harness(tmp_path: Path) -> Harness:
    """A laptop with nobody on its GeForce."""
    return await Harness.of("plain", tmp_path, grace_seconds=10, wait_seconds=60)


@pytest.fixture
def actor(harness: Harness) -> Actor:
    return harness.fleet.find("01:00.0")


class TestTerminate:
    async def test_a_program(self, harness: Harness, actor: Actor) -> None:
        blender(harness)
        await harness.moved(actor, State.VFIO, TERMINATE)
        assert harness.machine.processes.named("blender") is None

    async def test_a_stubborn_one_stays_and_is_told(self, harness: Harness, actor: Actor) -> None:
        blender(harness, stubborn=True)
        started = asyncio.get_running_loop().time()
        assert re.match(r"blender \(pid \d+", await reverted(harness, actor, TERMINATE))
        assert asyncio.get_running_loop().time() - started == 10
        assert harness.machine.processes.named("blender") is not None

    async def test_a_unit_through_its_manager_with_what_would_start_it_again(
        self, harness: Harness, actor: Actor
    ) -> None:
        harness.machine.units.add(OLLAMA, triggered_by=[OLLAMA_SOCKET])
        harness.machine.run("ollama", unit=OLLAMA, restarts=True)
        harness.machine.open(DISPLAY, "ollama", "nvidia")
        before = harness.snapshot()
        await harness.moved(actor, State.VFIO, TERMINATE)
        assert (harness.state(OLLAMA), harness.state(OLLAMA_SOCKET)) == ("inactive", "inactive")
        await harness.moved(actor, State.HOST)
        assert harness.snapshot() == before
        assert harness.machine.processes.named("ollama") is not None

    @pytest.mark.parametrize("policy", [TERMINATE, KILL], ids=["terminate", "kill"])
    async def test_units_that_take_what_systemd_gives_them(
        self, policy: Options, harness: Harness, actor: Actor
    ) -> None:
        """Side by side: one after the other, two of them would take longer than that."""
        for name in ("ollama", "comfyui"):
            harness.machine.run(name, unit=Unit(f"{name}.service"))
            harness.machine.open(DISPLAY, name, "nvidia")
            harness.host.faults.add(Delay(90), operation="stop_unit", subject=f"{name}.service")
        before, started = harness.snapshot(), asyncio.get_running_loop().time()
        await harness.moved(actor, State.VFIO, policy)
        assert asyncio.get_running_loop().time() - started == 90
        await harness.moved(actor, State.HOST)
        assert harness.snapshot() == before

    async def test_one_that_does_not_come_back_keeps_no_other_from_it(self, harness: Harness, actor: Actor) -> None:
        harness.machine.units.add(OLLAMA, triggered_by=[OLLAMA_SOCKET])
        harness.machine.run("ollama", unit=OLLAMA)
        harness.machine.open(DISPLAY, "ollama", "nvidia")
        blender(harness, stubborn=True)
        harness.host.faults.add(Errno(5), operation="start_unit", subject=OLLAMA)
        await harness.switch(actor, State.VFIO, TERMINATE)
        assert (harness.state(OLLAMA), harness.state(OLLAMA_SOCKET)) == ("failed", "active")

    async def test_a_unit_of_a_user(self, harness: Harness, actor: Actor) -> None:
        game = Unit("app-game.service", 1000)
        harness.machine.run("game", uid=1000, unit=game)
        harness.machine.open(DISPLAY, "game", "nvidia")
        before = harness.snapshot()
        await harness.moved(actor, State.VFIO, TERMINATE)
        assert harness.state(game) == "inactive"
        await harness.moved(actor, State.HOST)
        assert harness.snapshot() == before

    async def test_what_a_stopped_unit_left_behind_is_ended_itself(self, harness: Harness, actor: Actor) -> None:
        """KillMode=process: its manager ends nothing any more, and a unit that did not run is not started."""
        harness.machine.run("worker", unit=OLLAMA)
        harness.machine.open(DISPLAY, "worker", "nvidia")
        harness.machine.units._records[OLLAMA].state = "inactive"
        await harness.moved(actor, State.VFIO, TERMINATE)
        await harness.moved(actor, State.HOST)
        assert (harness.state(OLLAMA), harness.machine.processes.named("worker")) == ("inactive", None)

    async def test_units_come_back_where_somebody_else_stays(self, harness: Harness, actor: Actor) -> None:
        harness.machine.units.add(OLLAMA, triggered_by=[OLLAMA_SOCKET])
        harness.machine.run("ollama", unit=OLLAMA)
        harness.machine.open(DISPLAY, "ollama", "nvidia")
        blender(harness, stubborn=True)
        assert "blender" in await reverted(harness, actor, TERMINATE)
        assert (harness.state(OLLAMA), harness.state(OLLAMA_SOCKET)) == ("active", "active")

    async def test_units_that_take_their_time_to_come_back(self, harness: Harness, actor: Actor) -> None:
        harness.machine.run("ollama", unit=OLLAMA)
        harness.machine.open(DISPLAY, "ollama", "nvidia")
        harness.host.faults.add(Delay(30), operation="start_unit", subject=OLLAMA)
        blender(harness, stubborn=True)
        assert "blender" in await reverted(harness, actor, TERMINATE)

    async def test_a_unit_that_refuses(self, harness: Harness, actor: Actor) -> None:
        harness.machine.run("ollama", unit=OLLAMA)
        harness.machine.open(DISPLAY, "ollama", "nvidia")
        harness.host.faults.add(Errno(1), operation="stop_unit", subject=OLLAMA)
        assert "ollama.service" in await reverted(harness, actor, TERMINATE)

    async def test_a_signal_that_is_not_allowed(self, harness: Harness, actor: Actor) -> None:
        blender(harness)
        harness.host.faults.add(Errno(1), operation="signal", subject="blender")
        assert "Operation not permitted" in await reverted(harness, actor, TERMINATE)

    async def test_a_later_process_of_the_same_number_is_not_meant(self, harness: Harness, actor: Actor) -> None:
        """The holder has ended by itself when the policy comes to it."""
        blender(harness)
        first = harness.machine.processes.named("blender")
        assert first is not None

        def replace_it() -> None:
            harness.machine.end("blender")
            harness.machine.run("innocent")
            innocent = harness.machine.processes.named("innocent")
            assert innocent is not None
            innocent.process = Process(first.process.pid, first.process.started + 1)

        when(harness, AwaitHolders, Status.RUNNING, replace_it)
        await harness.moved(actor, State.VFIO, TERMINATE)
        assert harness.machine.processes.named("innocent") is not None


class TestKill:
    async def test_whoever_is_stubborn(self, harness: Harness, actor: Actor) -> None:
        blender(harness, stubborn=True)
        started = asyncio.get_running_loop().time()
        await harness.moved(actor, State.VFIO, KILL)
        assert harness.machine.processes.named("blender") is None
        assert asyncio.get_running_loop().time() - started == 10

    async def test_politely_first(self, harness: Harness, actor: Actor) -> None:
        blender(harness)
        started = asyncio.get_running_loop().time()
        await harness.moved(actor, State.VFIO, KILL)
        assert asyncio.get_running_loop().time() == started

    async def test_one_that_comes_back_is_told(self, harness: Harness, actor: Actor) -> None:
        blender(harness, restarts=True)
        harness.host.faults.add(Delay(1), operation="keep_awake")
        assert "blender" in await reverted(harness, actor, KILL)

    @pytest.mark.parametrize("policy", [TERMINATE, KILL], ids=["terminate", "kill"])
    async def test_never_a_virtual_machine_nor_what_the_system_lives_by(
        self, policy: Options, harness: Harness, actor: Actor
    ) -> None:
        harness.machine.run("vm", command="crosvm", machine=True)
        harness.machine.run("dbus-daemon", unit=Unit("dbus.service"))
        blender(harness)
        for user in ("vm", "dbus-daemon"):
            harness.machine.open(DISPLAY, user, "drm")
        told = (await refused(harness, actor, policy)).splitlines()
        assert [line.rpartition("; ")[2] for line in told] == [
            "it is a virtual machine: shut it down (libvirt: virsh list, then virsh shutdown NAME)",
            "the system lives by it, and it is not to be ended",
        ]
        assert harness.machine.processes.named("blender") is not None

    @pytest.mark.parametrize("policy", [TERMINATE, KILL], ids=["terminate", "kill"])
    async def test_never_the_init_process_nor_logind(self, policy: Options, harness: Harness, actor: Actor) -> None:
        """They have it open for a session, and may let go when that ends; this one has nobody else on it."""
        harness.machine.run("systemd")
        init = harness.machine.processes.named("systemd")
        assert init is not None
        init.process = Process(1, 0)
        harness.machine.run("systemd-logind", unit=Unit("systemd-logind.service"))
        for user in ("systemd", "systemd-logind"):
            harness.machine.open(DISPLAY, user, "drm")
        assert "end the session that draws on it" in await reverted(harness, actor, policy)
        assert harness.state(Unit("systemd-logind.service")) == "active"
        assert list(harness.machine.processes.running(Process(1, 0))) == [init]
