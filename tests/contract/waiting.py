"""Cases about operations that the kernel does not return from, and about those behind them."""

from __future__ import annotations

import asyncio
import errno
from dataclasses import replace

from gpuswitch.host.port import Pending
from gpuswitch.model.facts import VFIO_DRIVER
from gpuswitch.model.holders import Process
from tests.contract.bench import Bench, case, refused


async def start_to_wait(bench: Bench) -> asyncio.Task[None]:
    """An unbind of the sound function, which waits for somebody who has the sound card open."""
    await bench.outside.open(bench.audio)
    waiting = asyncio.create_task(bench.kernel.unbind(bench.audio, bench.audio_driver.name))
    await bench.until(lambda: bench.driver(bench.audio) is None and pending(bench).process_state == "D")
    return waiting


async def drm_nodes(bench: Bench) -> set[str]:
    """Those of the display, ready: by one and the same look, since udev may touch them again a moment later."""
    seen = bench.look(bench.display)

    def are_ready() -> bool:
        nonlocal seen
        seen = bench.look(bench.display)
        return not seen.nodes_pending

    await bench.until(are_ready)
    return {node for node in seen.nodes if node.startswith("/dev/dri/")}


def pending(bench: Bench) -> Pending:
    return bench.kernel.pending or Pending("")


@case
async def unbind_waits_for_who_has_the_sound_card(bench: Bench) -> None:
    """The driver link is gone from the start, so it does not tell that the unbind is over."""
    assert bench.kernel.pending is None
    waiting = await start_to_wait(bench)
    assert not waiting.done()
    assert bench.driver(bench.audio) is None
    assert str(bench.audio) in pending(bench).what
    assert bench.audio_driver.name in pending(bench).what
    assert "snd_card" in pending(bench).kernel_wait
    await bench.outside.close(bench.audio)
    await waiting
    assert bench.kernel.pending is None
    await bench.kernel.probe(bench.audio)
    assert bench.look(bench.audio).driver == bench.audio_driver


@case
async def second_call_is_refused_while_one_is_pending(bench: Bench) -> None:
    waiting = await start_to_wait(bench)
    await refused(bench.kernel.probe(bench.audio), errno.EBUSY)
    await refused(bench.kernel.capture(bench.functions), errno.EBUSY)
    await refused(bench.kernel.hold_group(bench.group), errno.EBUSY)
    assert not waiting.done()
    await bench.outside.close(bench.audio)
    await waiting


@case
async def abandoned_call_stays_pending(bench: Bench) -> None:
    """To cancel the caller does not end the operation, and it still comes to its own end."""
    waiting = await start_to_wait(bench)
    waiting.cancel()
    await asyncio.wait([waiting])
    assert waiting.cancelled()
    assert str(bench.audio) in pending(bench).what
    await refused(bench.kernel.probe(bench.audio), errno.EBUSY)
    returned = asyncio.create_task(bench.kernel.returned())
    await bench.outside.close(bench.audio)
    await returned
    assert bench.kernel.pending is None
    captured = await bench.kernel.capture([bench.audio])
    assert captured[bench.audio].driver is None
    await bench.kernel.returned()


@case
async def next_run_adopts_what_is_left(bench: Bench) -> None:
    """The service ended meanwhile; the operation did not."""
    waiting = await start_to_wait(bench)
    waiting.cancel()
    await asyncio.wait([waiting])
    left = pending(bench)
    assert left.worker is not None
    await bench.host.close()
    kernel = bench.outside.next_run().kernel(str(bench.display))
    assert kernel.pending is None
    assert not kernel.adopt(replace(left, worker=Process(left.worker.pid, left.worker.started + 1)))
    assert kernel.adopt(left)
    assert kernel.pending is not None
    assert (kernel.pending.what, kernel.pending.worker) == (left.what, left.worker)
    assert kernel.pending.process_state == "D"
    await refused(kernel.probe(bench.audio), errno.EBUSY)
    returned = asyncio.create_task(kernel.returned())
    await bench.outside.close(bench.audio)
    await returned
    assert kernel.pending is None
    assert not kernel.adopt(left)
    await kernel.probe(bench.audio)
    assert bench.look(bench.audio).driver == bench.audio_driver


@case
async def power_control_waits_behind_it(bench: Bench) -> None:
    """It takes the device lock. Only that function's: the sibling still moves, and a look takes none."""
    await bench.to_vfio(bench.display)
    waiting = await start_to_wait(bench)
    other = bench.another_kernel("0000:ff:00.0")
    behind = asyncio.create_task(other.set_power_control({bench.audio: "on"}))
    await bench.until(lambda: (other.pending or Pending("")).process_state == "D")
    sibling = bench.another_kernel("0000:ff:00.1")
    await sibling.set_override({bench.display: None})
    await sibling.unbind(bench.display, VFIO_DRIVER)
    await sibling.probe(bench.display)
    assert bench.look(bench.display).driver == bench.display_driver
    assert not waiting.done()
    assert not behind.done()
    await bench.outside.close(bench.audio)
    await waiting
    await behind


@case
async def override_may_wait_behind_it(bench: Bench) -> None:
    """It takes the device lock in Linux 6.1, not so in 6.12.117: nobody may count on either, and it comes through."""
    waiting = await start_to_wait(bench)
    behind = [
        asyncio.create_task(bench.another_kernel("0000:ff:00.0").set_override({bench.audio: VFIO_DRIVER})),
        asyncio.create_task(bench.another_kernel("0000:ff:00.1").capture([bench.audio])),
    ]
    await bench.outside.close(bench.audio)
    await waiting
    await asyncio.gather(*behind)
    assert (await bench.kernel.capture([bench.audio]))[bench.audio].override == VFIO_DRIVER


@case
async def probe_waits_for_no_unbind(bench: Bench) -> None:
    """The function still has its driver until the unbind is over, so there is nothing to probe: success, no lock."""
    waiting = await start_to_wait(bench)
    await bench.another_kernel("0000:ff:00.0").probe(bench.audio)
    assert bench.driver(bench.audio) is None
    assert not waiting.done()
    await bench.outside.close(bench.audio)
    await waiting
    assert bench.driver(bench.audio) is None


@case
async def second_unbind_waits_and_finds_nothing_left(bench: Bench) -> None:
    """It succeeds: its look at what is bound was before the wait for the lock (unbind_store in drivers/base/bus.c)."""
    waiting = await start_to_wait(bench)
    other = bench.another_kernel("0000:ff:00.0")
    second = asyncio.create_task(other.unbind(bench.audio, bench.audio_driver.name))
    await bench.until(lambda: (other.pending or Pending("")).process_state == "D")
    assert not second.done()
    await bench.outside.close(bench.audio)
    await waiting
    await second
    assert bench.driver(bench.audio) is None


@case
async def drm_driver_waits_for_nobody(bench: Bench) -> None:
    """It goes at once, its users keep what is left of it, and the next card has another number."""
    before = await drm_nodes(bench)
    await bench.outside.open(bench.display)
    await bench.unbind(bench.display)
    await bench.kernel.probe(bench.display)
    after = await drm_nodes(bench)
    assert after
    assert not before & after
    await bench.outside.close(bench.display)


@case
async def drm_number_is_free_again_when_nobody_has_it(bench: Bench) -> None:
    before = await drm_nodes(bench)
    await bench.unbind(bench.display)
    await bench.kernel.probe(bench.display)
    assert await drm_nodes(bench) == before
