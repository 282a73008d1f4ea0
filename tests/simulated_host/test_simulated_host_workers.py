"""The workers of a simulated host: what the kernel has outlives the service, and the next one finds it."""

from __future__ import annotations

import asyncio
import errno

from gpuswitch.host.port import Pending
from gpuswitch.host.simulated.faults import Hang
from gpuswitch.host.simulated.host import SimulatedHost
from gpuswitch.host.simulated.scenarios import plain
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import VFIO_DRIVER, VFIO_MODULE
from tests.host_contract.harness import refused

GPU, AUDIO = PciAddress.parse("0000:01:00.0"), PciAddress.parse("0000:01:00.1")


async def left_behind() -> tuple[SimulatedHost, Hang, Pending]:
    """A service that is gone while the kernel has an unbind of it, and holds a group by the same worker."""
    host = plain()
    kernel = host.kernel(str(GPU))
    await kernel.load(VFIO_MODULE)
    await kernel.set_override({AUDIO: VFIO_DRIVER})
    await kernel.unbind(AUDIO, "snd_hda_intel")
    await kernel.probe(AUDIO)
    await kernel.hold_group(13)
    hang = host.faults.add(Hang(kernel_wait="nv_pci_remove"), operation="unbind", subject=GPU)
    unbinding = asyncio.create_task(kernel.unbind(GPU, "nvidia"))
    await hang.reached.wait()
    unbinding.cancel()
    await asyncio.wait([unbinding])
    pending = kernel.pending
    assert pending is not None
    return host, hang, pending


async def test_pending_names_the_worker() -> None:
    _, _, pending = await left_behind()
    assert pending.worker is not None
    assert (pending.pid, pending.stack) == (pending.worker.pid, ("nv_pci_remove",))


async def test_next_run_takes_over_what_the_kernel_has() -> None:
    host, hang, pending = await left_behind()
    following = SimulatedHost(host.machine)
    kernel = following.kernel(str(GPU))
    assert kernel.pending is None
    assert kernel.adopt(pending)
    assert kernel.pending == pending
    await refused(kernel.capture([GPU]), errno.EBUSY)
    returned = asyncio.create_task(kernel.returned())
    await asyncio.sleep(60)
    assert not returned.done()
    hang.release()
    await returned
    assert kernel.pending is None
    assert not kernel.adopt(pending)
    assert (await kernel.capture([GPU]))[GPU].driver is None


async def test_worker_that_is_left_keeps_its_group_until_the_kernel_returns() -> None:
    host, hang, pending = await left_behind()
    following = SimulatedHost(host.machine)
    other = following.kernel(str(GPU))
    await refused(other.hold_group(13), errno.EBUSY)
    hang.release()
    await host.kernel(str(GPU)).returned()
    assert not other.adopt(pending)
    await other.hold_group(13)
    assert host.machine.group(13).opened_by is not None
    await following.close()
    assert host.machine.group(13).opened_by is None


async def test_idle_worker_ends_with_its_service() -> None:
    host = plain()
    kernel = host.kernel(str(GPU))
    await kernel.capture([GPU])
    assert len(host.machine.workers) == 1
    following = SimulatedHost(host.machine)
    assert host.machine.workers == {}
    await following.kernel(str(GPU)).capture([GPU])
    assert [worker.user for worker in host.machine.workers.values()] == [f"the worker of {GPU}"]
    assert not following.kernel(str(GPU)).adopt(Pending("unbind nothing"))


async def test_what_fails_after_its_service_is_gone_troubles_nobody() -> None:
    host, hang, pending = await left_behind()
    following = SimulatedHost(host.machine)
    kernel = following.kernel(str(GPU))
    assert kernel.adopt(pending)
    assert pending.worker is not None
    removing = asyncio.create_task(host.machine.unplug(GPU.slot_name))
    hang.release()
    await kernel.returned()
    await removing
    await refused(kernel.capture([GPU]), errno.ENODEV)
