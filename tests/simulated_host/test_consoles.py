"""The text consoles of GPUs that leave and come back, alone and together."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from gpuswitch.gpu.actor import Actor
from gpuswitch.host.simulated.catalogue import AMD, NVIDIA, VGA, Slot, port
from gpuswitch.host.simulated.faults import Delay, Errno, Hang, Operation
from gpuswitch.host.simulated.scenarios import Options, boot, shared
from gpuswitch.model.address import PciAddress
from gpuswitch.model.states import State
from gpuswitch.switch.engine import Status, StepEvent
from gpuswitch.switch.record import Result, Switch
from tests.harness.simulated.harness import Harness, config, consoles
from tests.simulated_host.test_modules import reverted

DISPLAY = PciAddress.parse("0000:01:00.0")


class TestConsoles:
    async def test_moved_to_the_other_screen_and_back(self, tmp_path: Path) -> None:
        """On a laptop, somebody shows two of them on the GeForce."""
        harness = await Harness.of("plain", tmp_path)
        actor = harness.fleet.find("01:00.0")
        own = next(n for n, fb in harness.machine.frame_buffers._there.items() if fb.function == DISPLAY)
        await harness.host.kernel("somebody").map_consoles([3, 4], own)
        before = harness.snapshot()
        await harness.moved(actor, State.VFIO)
        assert DISPLAY not in consoles(harness.machine).values()
        await harness.moved(actor, State.HOST)
        assert harness.snapshot() == before

    async def test_unbound_where_no_other_screen_is_left(self, tmp_path: Path) -> None:
        harness = await Harness.start(shared(), tmp_path, config("shared"))
        actor, before = harness.fleet.find("01:00.0"), harness.snapshot()
        assert consoles(harness.machine)[1] == DISPLAY
        await harness.moved(actor, State.VFIO)
        assert consoles(harness.machine)["vtcon1"] is False
        await harness.moved(actor, State.HOST)
        assert harness.snapshot() == before

    async def test_back_when_one_gpu_that_showed_nothing_any_more_was_left(self, tmp_path: Path) -> None:
        """The kernel is stuck with one GPU, whose terminals are on the other; that leaves, and fbcon goes with it."""
        harness = await self.two_screens(tmp_path)
        first, second, before = harness.fleet.find("03:00.0"), harness.fleet.find("01:00.0"), harness.snapshot()
        hang = harness.host.faults.add(Hang(), operation="set_override")
        assert (await harness.switch(first, State.VFIO)).result is Result.WEDGED
        await harness.moved(second, State.VFIO)
        assert consoles(harness.machine)["vtcon1"] is False
        hang.release()
        await harness.witness.until(lambda: first.state is State.HOST)
        assert consoles(harness.machine)["vtcon1"] is True
        await harness.moved(second, State.HOST)
        assert harness.snapshot() == before

    async def test_those_of_another_gpu_stay_on_it_when_it_came_home_before(self, tmp_path: Path) -> None:
        """One GPU has them on loan when the kernel is stuck with it; whose they are is home when it recovers."""
        harness = await self.two_screens(tmp_path)
        first, second, before = harness.fleet.find("03:00.0"), harness.fleet.find("01:00.0"), harness.snapshot()
        await harness.moved(first, State.VFIO)
        hang = harness.host.faults.add(Hang(), operation="set_override")
        assert (await harness.switch(second, State.VFIO)).result is Result.WEDGED
        await harness.moved(first, State.HOST)
        hang.release()
        await harness.witness.until(lambda: second.state is State.HOST)
        assert harness.snapshot() == before

    async def test_those_of_another_gpu_come_back_when_the_console_is_bound_again(self, tmp_path: Path) -> None:
        """One GPU is about to leave, so that the other unbinds the console; the kernel binds it to that one alone."""
        harness = await self.two_screens(tmp_path, module_policy="always")
        first, second = harness.fleet.find("03:00.0"), harness.fleet.find("01:00.0")
        # From here on the kernel takes the GeForce for the one that has the console.
        await harness.moved(first, State.VFIO)
        await harness.moved(first, State.HOST)
        before = harness.snapshot()
        hang = harness.host.faults.add(Hang(), operation="consoles", nth=2)
        assert (await harness.switch(first, State.VFIO)).result is Result.WEDGED
        harness.host.faults.add(Errno(5), operation="set_override", subject=second.gpu.address)
        assert (await harness.switch(second, State.VFIO)).result is Result.REVERTED
        assert consoles(harness.machine)[1] == first.gpu.address
        hang.release()
        await harness.witness.until(lambda: first.state is State.HOST)
        assert (harness.snapshot(), harness.pages) == (before, [])

    async def test_those_of_another_gpu_stay_on_it_when_both_are_on_their_way_home(self, tmp_path: Path) -> None:
        """Whose they are shows them again, and is not home before the machine may sleep."""
        harness = await self.two_screens(tmp_path, module_policy="always")
        first, second, before = harness.fleet.find("03:00.0"), harness.fleet.find("01:00.0"), harness.snapshot()
        hangs = []
        for actor in (first, second):
            hangs.append(harness.host.faults.add(Hang(), operation="set_override", subject=actor.gpu.address))
            assert (await harness.switch(actor, State.VFIO)).result is Result.WEDGED
        harness.host.faults.add(Delay(2), operation="release_inhibitor", subject=first.gpu.address)
        for hang in hangs:
            hang.release()
            await asyncio.sleep(1)  # of the simulated clock: the kernel returns to one after the other
        await harness.witness.until(lambda: {first.state, second.state} == {State.HOST})
        assert (harness.snapshot(), harness.pages) == (before, [])

    @pytest.mark.parametrize("fails", [False, True])
    async def test_those_of_another_gpu_stay_on_it_when_frame_buffer_0_comes(
        self, tmp_path: Path, *, fails: bool
    ) -> None:
        """The kernel draws all terminals on that one."""
        harness, first, second = await self.geforce_first(tmp_path)
        before = harness.snapshot()
        assert consoles(harness.machine)[1] == first.gpu.address
        if fails:
            harness.host.faults.add(Errno(5), operation="probe", subject=second.gpu.address)
            assert (await harness.switch(second, State.VFIO)).result is Result.REVERTED
        else:
            await harness.moved(second, State.VFIO)
            await harness.moved(second, State.HOST)
        assert (harness.snapshot(), harness.pages) == (before, [])

    @pytest.mark.parametrize("kind", ["nodes", "override", "power"])
    async def test_those_that_a_gpu_on_its_way_home_was_drawn_over(self, tmp_path: Path, kind: str) -> None:
        """Whose they are leaves before they are given back to it, and they are its own all the same."""
        harness, first, second = await self.geforce_first(tmp_path)
        before = harness.snapshot()
        await harness.moved(second, State.VFIO)
        leaving: list[asyncio.Task[Switch]] = []

        def leave(actor: Actor, event: StepEvent) -> None:
            if actor is second and event.step.kind == kind and event.status is Status.DONE and at_home(harness, second):
                harness.witness.on_step = None
                harness.host.faults.add(Delay(2), operation="set_power_control", subject=second.gpu.address)
                leaving.append(asyncio.create_task(first.request(State.VFIO)))

        harness.witness.on_step = leave
        await harness.moved(second, State.HOST)
        await (await leaving[0]).wait()
        await harness.moved(first, State.HOST)
        assert (harness.snapshot(), harness.pages) == (before, [])

    async def test_one_that_somebody_moved_to_another_gpu(self, tmp_path: Path) -> None:
        """The kernel draws all on the display that the machine booted on."""
        harness = await self.two_screens(tmp_path)
        first, second = harness.fleet.find("03:00.0"), harness.fleet.find("01:00.0")
        frame_buffers = (await harness.host.kernel("somebody").consoles()).frame_buffers
        [theirs] = [number for number, function in frame_buffers.items() if function == second.gpu.address]
        await harness.host.kernel("somebody").map_consoles([2], theirs)
        before = harness.snapshot()
        await harness.moved(first, State.VFIO)
        await harness.moved(first, State.HOST)
        assert (harness.snapshot(), harness.pages) == (before, [])

    async def test_a_gpu_whose_consoles_hang_is_named_by_who_waits(self, tmp_path: Path) -> None:
        harness = await self.two_screens(tmp_path)
        hang = harness.host.faults.add(Hang(), operation="consoles", nth=3)
        first, second = [await harness.fleet.find(gpu).request(State.VFIO) for gpu in ("03:00.0", "01:00.0")]
        await asyncio.gather(first.wait(), second.wait())
        assert (first.result, second.result) == (Result.WEDGED, Result.REVERTED)
        assert second.reason == "the consoles of another GPU are still being moved after 10 s"
        hang.release()
        await harness.witness.until(lambda: harness.fleet.find("03:00.0").state is State.HOST)

    async def test_those_of_another_gpu_stay_on_it_with_a_map(self, tmp_path: Path) -> None:
        """fbcon=map:1: all terminals are drawn on frame buffer 1, which the GeForce's is again when it comes back."""
        harness = await self.two_screens(tmp_path, console_map=[1])
        frame_buffers = (await harness.host.kernel("somebody").consoles()).frame_buffers
        second = next(actor for actor in harness.fleet.actors.values() if actor.gpu.address == frame_buffers[1])
        assert {consoles(harness.machine)[terminal] for terminal in (1, 2)} == {second.gpu.address}
        await harness.host.kernel("somebody").map_consoles([2], 0)
        before = harness.snapshot()
        await harness.moved(second, State.VFIO)
        await harness.moved(second, State.HOST)
        assert (harness.snapshot(), harness.pages) == (before, [])

    async def geforce_first(self, directory: Path) -> tuple[Harness, Actor, Actor]:
        """Frame buffer 0 is the GeForce's, since that came home first; and the Radeon shows all terminals."""
        harness = await self.two_screens(directory, module_policy="always", boot_display=False)
        first, second = harness.fleet.find("03:00.0"), harness.fleet.find("01:00.0")
        for actor, state in (first, State.VFIO), (second, State.VFIO), (second, State.HOST), (first, State.HOST):
            await harness.moved(actor, state)
        return harness, first, second

    async def two_screens(
        self,
        directory: Path,
        module_policy: str = "never",
        *,
        boot_display: bool = True,
        console_map: Sequence[int] = (),
    ) -> Harness:
        """A Radeon that shows all terminals, and a GeForce."""
        slots = [Slot("0000:01:00", 11, "0000:00:01.0"), Slot("0000:03:00", 13, "0000:00:03.0")]
        geforce = slots[0].function(0, NVIDIA, 0x2484, VGA)
        radeon = slots[1].function(0, AMD, 0x73BF, VGA, boot_display=boot_display)
        options: Options = {"console_map": console_map} if console_map else {}
        host = boot([port("0000:00:01.0", 2), port("0000:00:03.0", 3), geforce, radeon], **options)
        return await Harness.start(host, directory, config("", module_policy=module_policy, allow_boot_display=True))

    async def test_one_that_is_to_be_left_alone_stays_unbound(self, tmp_path: Path) -> None:
        """For a machine that freezes when its console is bound again: nobody tries, or it would be told here."""
        harness = await Harness.start(shared(), tmp_path, config("shared", leave_consoles=["vtcon1"]))
        actor = harness.fleet.find("01:00.0")
        await harness.moved(actor, State.VFIO)
        harness.host.faults.add(Errno(5), operation="bind_console", nth=None)
        await harness.moved(actor, State.HOST)

    @pytest.mark.parametrize("operation", ["map_consoles", "set_override", "unbind"])
    async def test_back_after_a_failure(self, operation: Operation, tmp_path: Path) -> None:
        harness = await Harness.of("plain", tmp_path)
        own = next(n for n, fb in harness.machine.frame_buffers._there.items() if fb.function == DISPLAY)
        await harness.host.kernel("somebody").map_consoles([3, 4], own)
        harness.host.faults.add(Errno(5), operation=operation)
        await reverted(harness, harness.fleet.find("01:00.0"))

    async def test_one_that_does_not_come_back_takes_nothing_away(self, tmp_path: Path) -> None:
        harness = await Harness.start(shared(), tmp_path, config("shared"))
        actor = harness.fleet.find("01:00.0")
        await harness.moved(actor, State.VFIO)
        harness.host.faults.add(Errno(5), operation="map_consoles", nth=None)
        harness.host.faults.add(Errno(5), operation="bind_console", nth=None)
        switch = await harness.switch(actor, State.HOST)
        assert (switch.result, harness.pages) == (Result.DONE, [])
        assert "Input/output error" in switch.reason


def at_home(harness: Harness, actor: Actor) -> bool:
    """Whether a look would show it on its host driver."""
    return harness.machine.look().functions[actor.gpu.address].driver_name not in {None, "vfio-pci"}
