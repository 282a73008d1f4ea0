"""Functions of the simulated host that leave the bus and come back, and what can go wrong with that."""

from __future__ import annotations

import asyncio
import errno

import pytest

from gpuswitch.errors import KernelError
from gpuswitch.host.simulated.faults import Errno, Hang, Silent
from gpuswitch.host.simulated.host import SimulatedHost
from gpuswitch.host.simulated.scenarios import plain, server
from gpuswitch.model.address import PciAddress

GPU, AUDIO = PciAddress.parse("0000:01:00.0"), PciAddress.parse("0000:01:00.1")
SLOT = "0000:01:00"
NVIDIA = ("nvidia_drm", "nvidia_modeset", "nvidia_uvm", "nvidia")


def gpu_functions(host: SimulatedHost) -> list[PciAddress]:
    return [address for address in host.look().functions if address.slot_name == SLOT]


async def settled() -> None:
    """Until what goes on by itself has been done: the clock of these tests moves when nothing else is left."""
    await asyncio.sleep(1)


async def fails(operation: object, number: int) -> None:
    assert asyncio.iscoroutine(operation)
    with pytest.raises(KernelError) as caught:
        await operation
    assert caught.value.errno == number


async def test_udev_loads_what_a_function_asks_for_when_it_is_found() -> None:
    host = plain()
    kernel, there = host.kernel(str(GPU)), gpu_functions(host)
    before = host.look()
    await kernel.remove(there)
    for module in NVIDIA:
        await kernel.unload(module)
    await kernel.rescan(there)
    assert gpu_functions(host) == there
    await settled()
    assert host.look().functions == before.functions
    assert host.look().modules == before.modules


@pytest.mark.parametrize("operation", ["reset", "remove", "rescan"])
async def test_what_fails_has_changed_nothing(operation: str) -> None:
    host = plain()
    kernel = host.kernel(str(GPU))
    if operation == "rescan":
        await kernel.remove([AUDIO])
    before = host.look()
    host.faults.add(Errno(errno.EIO), operation=operation, subject=AUDIO)
    work = {"reset": kernel.reset(AUDIO), "remove": kernel.remove([AUDIO]), "rescan": kernel.rescan([AUDIO])}
    await fails(work.pop(operation), errno.EIO)
    for other in work.values():
        other.close()
    assert host.look() == before


async def test_a_function_that_does_not_answer_is_not_found() -> None:
    host = plain()
    kernel, there = host.kernel(str(GPU)), gpu_functions(host)
    await kernel.remove(there)
    host.faults.add(Silent(), operation="rescan", subject=AUDIO)
    await kernel.rescan(there)
    assert AUDIO not in host.look().functions
    assert GPU in host.look().functions
    await kernel.rescan(there)
    assert gpu_functions(host) == there


async def test_a_removal_that_hangs_holds_up_the_whole_machine() -> None:
    host = server()
    hang = host.faults.add(Hang(), operation="remove")
    first, second = PciAddress.parse("0000:11:00.0"), PciAddress.parse("0000:21:00.0")
    for gpu in (first, second):
        host.machine.processes.close_all("nvidia-persistenced")
        assert not host.machine.users(gpu)
    removing = asyncio.create_task(host.kernel(str(first)).remove([first]))
    await hang.reached.wait()
    unplugging = asyncio.create_task(host.machine.unplug("0000:31:00"))
    other = host.kernel(str(second))
    rescanning = asyncio.create_task(other.rescan([second]))
    await settled()
    assert other.pending is not None
    assert (other.pending.process_state, other.pending.kernel_wait) == ("D", "pci_lock_rescan_remove")
    assert {first, PciAddress.parse("0000:31:00.0")} <= set(host.look().functions)
    hang.release()
    await asyncio.gather(removing, unplugging, rescanning)
    assert first not in host.look().functions


async def test_what_was_removed_and_then_pulled_is_not_found_until_it_is_back() -> None:
    host = plain()
    kernel, there = host.kernel(str(GPU)), gpu_functions(host)
    await kernel.remove([AUDIO])
    await host.machine.unplug(SLOT)
    await fails(kernel.rescan(there), errno.ENODEV)
    host.machine.replug(SLOT)
    assert gpu_functions(host) == there
