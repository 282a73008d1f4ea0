"""Cases about operations that the kernel does not return from, and about those behind them."""

from __future__ import annotations

import asyncio
import errno
from dataclasses import replace

from gpuswitch.host.port import Pending
from gpuswitch.model.facts import VFIO_DRIVER
from gpuswitch.model.holders import Process
from tests.host_contract.harness import ContractHarness, case, refused


async def start_to_wait(harness: ContractHarness) -> asyncio.Task[None]:
    """An unbind of the sound function, which waits for somebody who has the sound card open."""
    await harness.external.open(harness.audio)
    waiting = asyncio.create_task(harness.kernel.unbind(harness.audio, harness.audio_driver.name))
    await harness.until(lambda: harness.driver(harness.audio) is None and pending(harness).process_state == "D")
    return waiting


async def drm_nodes(harness: ContractHarness) -> set[str]:
    """Those of the display, ready: by one and the same look, since udev may touch them again a moment later."""
    seen = harness.look(harness.display)

    def are_ready() -> bool:
        nonlocal seen
        seen = harness.look(harness.display)
        return not seen.nodes_pending

    await harness.until(are_ready)
    return {node for node in seen.nodes if node.startswith("/dev/dri/")}


def pending(harness: ContractHarness) -> Pending:
    return harness.kernel.pending or Pending("")


@case
async def unbind_waits_for_who_has_the_sound_card(harness: ContractHarness) -> None:
    """The driver link is gone from the start, so it does not tell that the unbind is over."""
    assert harness.kernel.pending is None
    waiting = await start_to_wait(harness)
    assert not waiting.done()
    assert harness.driver(harness.audio) is None
    assert str(harness.audio) in pending(harness).what
    assert harness.audio_driver.name in pending(harness).what
    assert "snd_card" in pending(harness).kernel_wait
    await harness.external.close(harness.audio)
    await waiting
    assert harness.kernel.pending is None
    await harness.kernel.probe(harness.audio)
    assert harness.look(harness.audio).driver == harness.audio_driver


@case
async def second_call_is_refused_while_one_is_pending(harness: ContractHarness) -> None:
    waiting = await start_to_wait(harness)
    await refused(harness.kernel.probe(harness.audio), errno.EBUSY)
    await refused(harness.kernel.capture(harness.functions), errno.EBUSY)
    await refused(harness.kernel.hold_group(harness.group), errno.EBUSY)
    assert not waiting.done()
    await harness.external.close(harness.audio)
    await waiting


@case
async def abandoned_call_stays_pending(harness: ContractHarness) -> None:
    """To cancel the caller does not end the operation, and it still comes to its own end."""
    waiting = await start_to_wait(harness)
    waiting.cancel()
    await asyncio.wait([waiting])
    assert waiting.cancelled()
    assert str(harness.audio) in pending(harness).what
    await refused(harness.kernel.probe(harness.audio), errno.EBUSY)
    returned = asyncio.create_task(harness.kernel.returned())
    await harness.external.close(harness.audio)
    await returned
    assert harness.kernel.pending is None
    captured = await harness.kernel.capture([harness.audio])
    assert captured[harness.audio].driver is None
    await harness.kernel.returned()


@case
async def next_run_adopts_what_is_left(harness: ContractHarness) -> None:
    """The service ended meanwhile; the operation did not."""
    waiting = await start_to_wait(harness)
    waiting.cancel()
    await asyncio.wait([waiting])
    left = pending(harness)
    assert left.worker is not None
    await harness.host.close()
    kernel = harness.external.next_run().kernel(str(harness.display))
    assert kernel.pending is None
    assert not kernel.adopt(replace(left, worker=Process(left.worker.pid, left.worker.started + 1)))
    assert kernel.adopt(left)
    assert kernel.pending is not None
    assert (kernel.pending.what, kernel.pending.worker) == (left.what, left.worker)
    assert kernel.pending.process_state == "D"
    await refused(kernel.probe(harness.audio), errno.EBUSY)
    returned = asyncio.create_task(kernel.returned())
    await harness.external.close(harness.audio)
    await returned
    assert kernel.pending is None
    assert not kernel.adopt(left)
    await kernel.probe(harness.audio)
    assert harness.look(harness.audio).driver == harness.audio_driver


@case
async def power_control_waits_behind_it(harness: ContractHarness) -> None:
    """It takes the device lock. Only that function's: the sibling still moves, and a look takes none."""
    await harness.to_vfio(harness.display)
    waiting = await start_to_wait(harness)
    other = harness.another_kernel("0000:ff:00.0")
    behind = asyncio.create_task(other.set_power_control({harness.audio: "on"}))
    await harness.until(lambda: (other.pending or Pending("")).process_state == "D")
    sibling = harness.another_kernel("0000:ff:00.1")
    await sibling.set_override({harness.display: None})
    await sibling.unbind(harness.display, VFIO_DRIVER)
    await sibling.probe(harness.display)
    assert harness.look(harness.display).driver == harness.display_driver
    assert not waiting.done()
    assert not behind.done()
    await harness.external.close(harness.audio)
    await waiting
    await behind


@case
async def override_may_wait_behind_it(harness: ContractHarness) -> None:
    """It takes the device lock in Linux 6.1, not so in 6.12.117: nobody may count on either, and it comes through."""
    waiting = await start_to_wait(harness)
    behind = [
        asyncio.create_task(harness.another_kernel("0000:ff:00.0").set_override({harness.audio: VFIO_DRIVER})),
        asyncio.create_task(harness.another_kernel("0000:ff:00.1").capture([harness.audio])),
    ]
    await harness.external.close(harness.audio)
    await waiting
    await asyncio.gather(*behind)
    assert (await harness.kernel.capture([harness.audio]))[harness.audio].override == VFIO_DRIVER


@case
async def probe_waits_for_no_unbind(harness: ContractHarness) -> None:
    """The function still has its driver until the unbind is over, so there is nothing to probe: success, no lock."""
    waiting = await start_to_wait(harness)
    await harness.another_kernel("0000:ff:00.0").probe(harness.audio)
    assert harness.driver(harness.audio) is None
    assert not waiting.done()
    await harness.external.close(harness.audio)
    await waiting
    assert harness.driver(harness.audio) is None


@case
async def second_unbind_waits_and_finds_nothing_left(harness: ContractHarness) -> None:
    """It succeeds: its look at what is bound was before the wait for the lock (unbind_store in drivers/base/bus.c)."""
    waiting = await start_to_wait(harness)
    other = harness.another_kernel("0000:ff:00.0")
    second = asyncio.create_task(other.unbind(harness.audio, harness.audio_driver.name))
    await harness.until(lambda: (other.pending or Pending("")).process_state == "D")
    assert not second.done()
    await harness.external.close(harness.audio)
    await waiting
    await second
    assert harness.driver(harness.audio) is None


@case
async def drm_driver_waits_for_nobody(harness: ContractHarness) -> None:
    """It goes at once, its users keep what is left of it, and the next card has another number."""
    before = await drm_nodes(harness)
    await harness.external.open(harness.display)
    await harness.unbind(harness.display)
    await harness.kernel.probe(harness.display)
    after = await drm_nodes(harness)
    assert after
    assert not before & after
    await harness.external.close(harness.display)


@case
async def drm_number_is_free_again_when_nobody_has_it(harness: ContractHarness) -> None:
    before = await drm_nodes(harness)
    await harness.unbind(harness.display)
    await harness.kernel.probe(harness.display)
    assert await drm_nodes(harness) == before
