"""The modules of a simulated host: who needs whom, and what is in the way of an unload."""

from __future__ import annotations

import asyncio
import errno
from dataclasses import replace

import pytest

from gpuswitch.errors import KernelError
from gpuswitch.host.simulated.catalogue import MODULES
from gpuswitch.host.simulated.faults import Delay, Errno, Hang, Silent
from gpuswitch.host.simulated.host import SimulatedHost
from gpuswitch.host.simulated.kernel import IN_FLIGHT
from gpuswitch.host.simulated.scenarios import plain, server
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import VFIO_DRIVER, Module
from gpuswitch.model.gpu import discover
from tests.host_contract.harness import refused

GPU, AUDIO = PciAddress.parse("0000:01:00.0"), PciAddress.parse("0000:01:00.1")
CHAIN = ("nvidia_drm", "nvidia_modeset", "nvidia_uvm", "nvidia")


def seen(host: SimulatedHost, module: str) -> Module:
    return host.look().modules[module]


def references(host: SimulatedHost) -> dict[str, int | None]:
    modules = host.look().modules
    return {name: modules[name].references for name in CHAIN if name in modules}


async def test_chain_shows_who_needs_whom() -> None:
    host = plain()
    assert set(CHAIN) <= set(host.look().modules)
    assert "ccp" not in host.look().modules
    assert references(host) == {"nvidia_drm": 0, "nvidia_modeset": 1, "nvidia_uvm": 0, "nvidia": 2}
    assert set(seen(host, "nvidia").users) == {"nvidia_uvm", "nvidia_modeset"}
    assert seen(host, "nvidia_modeset").users == ("nvidia_drm",)
    assert seen(host, "nvidia_drm") == Module(0, (), "580.105.08", modeset=True)


async def test_chain_is_unloaded_from_its_top_only() -> None:
    host = plain()
    kernel = host.kernel(str(GPU))
    for module in ("nvidia", "nvidia_modeset"):
        await refused(kernel.unload(module), errno.EAGAIN)
    for module in CHAIN:
        await kernel.unload(module)
    assert references(host) == {}
    assert host.look().functions[GPU].driver is None
    assert "nvidia" not in host.look().pci_drivers
    await kernel.load("nvidia_drm")
    assert references(host) == {"nvidia_drm": 0, "nvidia_modeset": 1, "nvidia": 1}
    assert host.look().functions[GPU].driver_name == "nvidia"
    assert host.look().functions[GPU].nodes


async def test_nodes_of_a_card_come_from_the_module_above_its_driver() -> None:
    host = plain()
    kernel = host.kernel(str(GPU))
    nodes = host.look().functions[GPU].nodes
    await kernel.unload("nvidia_drm")
    seen = host.look().functions[GPU]
    assert (seen.driver_name, seen.nodes, seen.nodes_pending) == ("nvidia", (), False)
    await kernel.load("nvidia_drm")
    assert host.look().functions[GPU].nodes == nodes
    await kernel.unbind(GPU, "nvidia")
    await kernel.probe(GPU)
    assert host.look().functions[GPU].nodes == nodes


async def test_who_has_a_node_open_uses_the_module_that_made_it() -> None:
    host = plain()
    kernel = host.kernel(str(GPU))
    host.machine.open(GPU, "Xorg")
    await refused(kernel.unload("nvidia_drm"), errno.EAGAIN)
    host.machine.close(GPU, "Xorg")
    host.machine.open(GPU, "ollama", "nvidia")
    assert references(host) == {"nvidia_drm": 0, "nvidia_modeset": 1, "nvidia_uvm": 0, "nvidia": 3}
    for module in ("nvidia_drm", "nvidia_modeset", "nvidia_uvm"):
        await kernel.unload(module)
    await refused(kernel.unload("nvidia"), errno.EAGAIN)
    assert host.look().functions[GPU].driver_name == "nvidia"
    host.machine.end("ollama")
    await kernel.unload("nvidia")


async def test_hidden_descriptor_is_in_the_way_of_an_unload() -> None:
    host = plain()
    kernel = host.kernel(str(GPU))
    host.machine.hide(AUDIO)
    assert host.machine.users(AUDIO) == {IN_FLIGHT}
    await refused(kernel.unload("snd_hda_intel"), errno.EAGAIN)
    host.machine.close(AUDIO, IN_FLIGHT)
    await kernel.unload("snd_hda_intel")
    assert host.look().functions[AUDIO].driver is None


async def test_users_of_a_card_that_is_gone_keep_its_module() -> None:
    host = plain()
    kernel = host.kernel(str(GPU))
    integrated = PciAddress.parse("0000:00:02.0")
    host.machine.open(integrated, "Xorg")
    await kernel.unbind(integrated, "i915")
    await refused(kernel.unload("i915"), errno.EAGAIN)
    host.machine.end("Xorg")
    await kernel.unload("i915")


async def test_load_brings_what_a_module_needs() -> None:
    host = plain(modules=[module for module in MODULES if module.name != "nvidia_modeset"])
    kernel = host.kernel(str(GPU))
    assert "nvidia_drm" not in host.look().modules
    await refused(kernel.load("nvidia_drm"), errno.ENOENT)
    host = plain()
    kernel = host.kernel(str(GPU))
    for module in CHAIN:
        await kernel.unload(module)
    await kernel.set_override({GPU: VFIO_DRIVER})
    await refused(kernel.load("nvidia_drm"), errno.ENODEV)
    assert references(host) == {}


@pytest.mark.parametrize(("fault", "number"), [(Errno(errno.EPERM), errno.EPERM), (Silent(), 0), (Delay(30), 0)])
async def test_faults_hit_an_unload(fault: Errno | Silent | Delay, number: int) -> None:
    host = plain()
    host.faults.add(fault, operation="unload", subject="snd_hda_intel")
    ended = 0
    try:
        await host.kernel(str(GPU)).unload("snd_hda_intel")
    except KernelError as error:
        ended = error.errno
    assert ended == number
    assert ("snd_hda_intel" in host.look().modules) is not isinstance(fault, Delay)
    assert asyncio.get_running_loop().time() == (30 if isinstance(fault, Delay) else 0)


async def test_nobody_opens_what_is_being_unloaded() -> None:
    host = plain()
    kernel = host.kernel(str(GPU))
    hang = host.faults.add(Hang(), operation="unload")
    unloading = asyncio.create_task(kernel.unload("snd_hda_intel"))
    await hang.reached.wait()
    with pytest.raises(KernelError):
        host.machine.open(AUDIO, "pipewire")
    await refused(host.kernel("another").unload("snd_hda_intel"), errno.EAGAIN)
    hang.release()
    await unloading
    assert "snd_hda_intel" not in host.look().modules


async def test_unload_waits_for_whoever_has_the_device_lock() -> None:
    host = plain()
    hang = host.faults.add(Hang(), operation="capture")
    capturing = asyncio.create_task(host.kernel("one").capture([AUDIO]))
    await hang.reached.wait()
    kernel = host.kernel(str(GPU))
    unloading = asyncio.create_task(kernel.unload("snd_hda_intel"))
    await asyncio.sleep(60)
    assert kernel.pending is not None
    assert (kernel.pending.what, kernel.pending.process_state) == ("unload snd_hda_intel", "D")
    hang.release()
    await capturing
    await unloading


async def test_old_driver_lets_go_of_one_device_only_without_its_modeset_module() -> None:
    host = server(modules=[replace(m, keeps=True) if m.name == "nvidia_drm" else m for m in MODULES])
    host.machine.end("nvidia-persistenced")
    gpu = discover(host.look())[0].address
    kernel = host.kernel(str(gpu))
    unbinding = asyncio.create_task(kernel.unbind(gpu, "nvidia"))
    await asyncio.sleep(3600)
    assert not unbinding.done()
    await host.kernel("another").unload("nvidia_drm")
    await unbinding
    assert host.look().functions[gpu].driver is None


async def test_persistence_is_kept_by_the_daemon() -> None:
    host = server()
    one, two = (gpu.address for gpu in discover(host.look())[:2])
    kernel = host.kernel(str(one))
    assert await kernel.persistence(one) is True
    await kernel.set_persistence(one, on=False)
    assert await kernel.persistence(one) is False
    assert [host.machine.users(gpu) for gpu in (one, two)] == [set(), {"nvidia-persistenced"}]
    await kernel.set_persistence(one, on=True)
    assert host.machine.users(one) == {"nvidia-persistenced"}
    host.faults.add(Errno(errno.EIO), operation="set_persistence")
    await refused(kernel.set_persistence(one, on=False), errno.EIO)
    assert await kernel.persistence(one) is True


async def test_persistence_of_a_gpu_without_daemon() -> None:
    host = plain()
    kernel = host.kernel(str(GPU))
    assert await kernel.persistence(GPU) is False
    await kernel.set_persistence(GPU, on=True)
    assert await kernel.persistence(GPU) is True
    assert await kernel.persistence(PciAddress.parse("0000:00:02.0")) is None
    await kernel.unbind(GPU, "nvidia")
    assert await kernel.persistence(GPU) is None
    await refused(kernel.set_persistence(GPU, on=True), errno.ENODEV)
