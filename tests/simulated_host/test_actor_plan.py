"""A plan that somebody asks for: it changes nothing, whatever becomes of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpuswitch.errors import Failed, Wedged
from gpuswitch.gpu.actor import Actor
from gpuswitch.host.simulated.faults import Hang
from gpuswitch.model.states import State
from tests.harness.simulated.harness import Harness


@pytest.fixture
async def harness(tmp_path: Path) -> Harness:
    return await Harness.of("plain", tmp_path)


@pytest.fixture
def actor(harness: Harness) -> Actor:
    return harness.fleet.find("01:00.0")


class TestAReadThatHangs:
    """Anyone may ask for a plan, so that is no way to take a GPU out of service."""

    async def test_the_gpu_stays_as_it_is(self, harness: Harness, actor: Actor) -> None:
        hang = harness.host.faults.add(Hang(), operation="capture")
        with pytest.raises(Failed, match=r"^0000:01:00\.0 did not answer within 5 s \('read the settings of 0000:01"):
            await actor.plan(State.VFIO)
        with pytest.raises(Failed, match="the kernel has not returned from this"):
            await actor.plan(State.VFIO)
        assert (actor.state, actor.reason) == (State.HOST, "")
        hang.release()
        await harness.host.reader(str(actor.gpu.address)).returned()
        assert (await actor.plan(State.VFIO)).steps

    async def test_who_asks_is_told_how_long_it_took_and_who_is_to_move_it_may(
        self, harness: Harness, actor: Actor
    ) -> None:
        harness.host.faults.add(Hang(), operation="consoles")
        with pytest.raises(
            Failed, match=r"did not answer within 30 s \('read the console map from the frame buffers'\)"
        ):
            await actor.plan(State.VFIO)
        await harness.moved(actor, State.VFIO)

    async def test_a_switch_says_so_too(self, harness: Harness, actor: Actor) -> None:
        harness.host.faults.add(Hang(), operation="consoles")
        with pytest.raises(Wedged, match="within 30 s"):
            await actor.request(State.VFIO)
