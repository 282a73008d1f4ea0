"""The last resort step by step: what each says, does, waits for, and fails with."""

from __future__ import annotations

import asyncio
import errno

import pytest

from gpuswitch.config.schema import Deadlines
from gpuswitch.host.simulated.faults import Errno, Hang, Silent
from gpuswitch.host.simulated.host import SimulatedHost
from gpuswitch.host.simulated.scenarios import plain
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import VFIO_DRIVER
from gpuswitch.switch.engine import Engine, StepEvent, StuckError
from gpuswitch.switch.restore_state import RestoreState
from gpuswitch.switch.shared.arbiter import Arbiter
from gpuswitch.switch.steps.reset import RemoveFunctions, Rescan, ResetFunction
from gpuswitch.switch.steps.step import Step, StepContext, StepError

GPU, AUDIO = PciAddress.parse("0000:01:00.0"), PciAddress.parse("0000:01:00.1")
BOTH = (GPU, AUDIO)


def ignore(told: StepEvent | RestoreState) -> None:
    """Nobody listens."""


def engine(host: SimulatedHost, *steps: Step) -> Engine:
    context = StepContext(
        GPU,
        host,
        host.kernel(str(GPU)),
        Arbiter(host.systemd),
        ignore,
        deadlines=Deadlines().by_kind(),
    )
    return Engine(context, steps, ignore, ignore)


async def failure(host: SimulatedHost, *steps: Step) -> str:
    with pytest.raises(StepError) as caught:
        await engine(host, *steps).forward()
    return str(caught.value)


async def test_each_says_what_it_does() -> None:
    titles = [step.title for step in (ResetFunction(GPU), RemoveFunctions(BOTH), Rescan(BOTH), Rescan((GPU,)))]
    assert titles == [
        "reset 0000:01:00.0",
        "remove 0000:01:00.0 and 0000:01:00.1 from the PCI bus",
        "find 0000:01:00.0 and 0000:01:00.1 on the PCI bus again",
        "find 0000:01:00.0 on the PCI bus again",
    ]


async def test_what_was_set_survives_a_reset_and_not_a_removal() -> None:
    host = plain()
    kernel = host.kernel(str(GPU))
    home = await kernel.capture(BOTH)
    await kernel.set_override(dict.fromkeys(BOTH, VFIO_DRIVER))
    before = await kernel.capture(BOTH)
    await engine(host, ResetFunction(GPU)).forward()
    assert await kernel.capture(BOTH) == before
    await engine(host, RemoveFunctions(BOTH), Rescan(BOTH)).forward()
    assert await kernel.capture(BOTH) == home


async def test_a_function_without_a_reset_method_is_named() -> None:
    host = plain()
    host.machine.devices[AUDIO].reset_errno = errno.ENOENT
    assert await failure(host, ResetFunction(AUDIO)) == "cannot reset 0000:01:00.1: it has no reset method"


async def test_a_removal_that_says_it_worked_is_looked_after() -> None:
    host = plain()
    host.faults.add(Silent(), operation="remove", subject=AUDIO)
    assert await failure(host, RemoveFunctions(BOTH)) == "0000:01:00.1 did not leave the PCI bus"
    assert GPU not in host.look().functions


async def test_a_removal_that_fails_half_way_is_made_whole_by_a_rescan() -> None:
    """The last function goes first."""
    host = plain()
    host.faults.add(Errno(errno.EIO), operation="remove", subject=GPU)
    await failure(host, RemoveFunctions(BOTH))
    assert set(BOTH) & set(host.look().functions) == {GPU}
    await engine(host, Rescan(BOTH)).forward()
    assert set(BOTH) <= set(host.look().functions)


async def test_a_function_that_comes_later_is_waited_for() -> None:
    host = plain()
    await engine(host, RemoveFunctions(BOTH)).forward()
    host.faults.add(Silent(), operation="rescan", subject=AUDIO, nth=None)
    assert "0000:01:00.1 did not come back to the PCI bus" in await failure(host, Rescan(BOTH))
    waiting = asyncio.create_task(engine(host, Rescan(BOTH)).forward())
    await asyncio.sleep(10)
    assert not waiting.done()
    host.faults.clear()
    await host.kernel("somebody else").rescan([AUDIO])
    await waiting


async def test_a_removal_that_hangs_has_sixty_seconds() -> None:
    host = plain()
    host.faults.add(Hang(), operation="remove")
    with pytest.raises(StuckError, match=r"within 60 s"):
        await engine(host, RemoveFunctions(BOTH)).forward()


async def test_what_is_found_is_bound_when_the_step_is_done_also_where_the_kernel_binds_it_later() -> None:
    host = plain()
    host.machine.set_autoprobe(on=True, later=True)
    await engine(host, RemoveFunctions(BOTH), Rescan(BOTH)).forward()
    assert [host.look().functions[a].driver_name for a in BOTH] == ["nvidia", "snd_hda_intel"]


async def test_nothing_is_bound_that_is_not_to_be_bound_by_itself() -> None:
    host = plain()
    host.machine.set_autoprobe(on=False)
    await engine(host, RemoveFunctions(BOTH), Rescan(BOTH)).forward()
    assert [host.look().functions[a].driver_name for a in BOTH] == [None, None]


async def test_a_driver_that_does_not_take_what_is_found_is_told_later() -> None:
    host = plain()
    host.faults.add(Errno(errno.EIO), operation="probe", nth=None)
    host.machine.set_autoprobe(on=True, later=True)
    await engine(host, RemoveFunctions(BOTH), Rescan(BOTH)).forward()
    assert set(BOTH) <= set(host.look().functions)
