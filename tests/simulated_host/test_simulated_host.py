"""The simulated host itself: what can go wrong with it, who uses its devices, and that it is the same each time."""

from __future__ import annotations

import asyncio
import errno

import pytest

from gpuswitch.errors import KernelError
from gpuswitch.host.simulated.faults import Delay, Errno, Hang, Silent
from gpuswitch.host.simulated.host import SimulatedHost
from gpuswitch.host.simulated.scenarios import PERSISTENCED, SCENARIOS, plain, server, shared
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import VFIO_DRIVER, VFIO_MODULE
from gpuswitch.model.gpu import discover

GPU, AUDIO = PciAddress.parse("0000:01:00.0"), PciAddress.parse("0000:01:00.1")
NIC = PciAddress.parse("0000:02:00.0")


def driver(host: SimulatedHost, function: PciAddress) -> str | None:
    return host.look().functions[function].driver_name


async def fails(operation: object, number: int) -> None:
    assert asyncio.iscoroutine(operation)
    with pytest.raises(KernelError) as caught:
        await operation
    assert caught.value.errno == number


async def to_vfio(host: SimulatedHost, function: PciAddress) -> None:
    kernel = host.kernel(str(GPU))
    await kernel.load(VFIO_MODULE)
    await kernel.set_override({function: VFIO_DRIVER})
    await kernel.unbind(function, str(driver(host, function)))
    await kernel.probe(function)


async def test_errno_hits_the_nth_operation_and_changes_nothing() -> None:
    host = plain()
    kernel = host.kernel(str(GPU))
    host.faults.add(Errno(errno.EIO), operation="unbind", nth=2)
    await kernel.unbind(AUDIO, "snd_hda_intel")
    await fails(kernel.unbind(GPU, "nvidia"), errno.EIO)
    assert driver(host, GPU) == "nvidia"
    await kernel.unbind(GPU, "nvidia")
    assert driver(host, GPU) is None


async def test_fault_hits_its_subject_only() -> None:
    host = plain()
    kernel = host.kernel(str(GPU))
    host.faults.add(Errno(errno.EIO), operation="set_override", subject=AUDIO)
    host.faults.add(Errno(errno.EPERM), operation="load", subject="nouveau")
    await kernel.set_override({GPU: VFIO_DRIVER})
    await fails(kernel.set_override({GPU: None, AUDIO: VFIO_DRIVER}), errno.EIO)
    assert (await kernel.capture([GPU]))[GPU].override is None
    await kernel.load(VFIO_MODULE)
    await fails(kernel.load("nouveau"), errno.EPERM)


async def test_fault_can_hit_each_time() -> None:
    host = plain()
    host.faults.add(Errno(errno.EIO), operation="capture", nth=None)
    for _ in range(3):
        await fails(host.kernel(str(GPU)).capture([GPU]), errno.EIO)
    host.faults.clear()
    assert await host.kernel(str(GPU)).capture([GPU])


async def test_silent_operation_says_that_it_worked() -> None:
    host = plain()
    kernel = host.kernel(str(GPU))
    await kernel.unbind(AUDIO, "snd_hda_intel")
    host.faults.add(Silent(), operation="probe")
    await kernel.probe(AUDIO)
    assert driver(host, AUDIO) is None
    await kernel.probe(AUDIO)
    assert driver(host, AUDIO) == "snd_hda_intel"


async def test_delay_takes_the_loops_time() -> None:
    host = plain()
    loop = asyncio.get_running_loop()
    before = loop.time()
    host.faults.add(Delay(3600), operation="load")
    await host.kernel(str(GPU)).load(VFIO_MODULE)
    assert loop.time() == pytest.approx(before + 3600)


async def test_hang_in_unbind_has_taken_the_link_already() -> None:
    host = plain()
    kernel = host.kernel(str(GPU))
    hang = host.faults.add(Hang(kernel_wait="nv_pci_remove"), operation="unbind", subject=GPU)
    unbinding = asyncio.create_task(kernel.unbind(GPU, "nvidia"))
    await hang.reached.wait()
    assert driver(host, GPU) is None
    assert kernel.pending is not None
    assert (kernel.pending.process_state, kernel.pending.kernel_wait) == ("D", "nv_pci_remove")
    assert kernel.pending.what == "unbind 0000:01:00.0 from nvidia"
    await fails(kernel.load(VFIO_MODULE), errno.EBUSY)
    hang.release()
    await unbinding
    assert kernel.pending is None


async def test_hang_in_probe_shows_the_link_already() -> None:
    host = plain()
    kernel = host.kernel(str(GPU))
    await kernel.unbind(GPU, "nvidia")
    hang = host.faults.add(Hang(), operation="probe")
    host.faults.add(Errno(errno.EINVAL), operation="probe")
    probing = asyncio.create_task(kernel.probe(GPU))
    await hang.reached.wait()
    assert driver(host, GPU) == "nvidia"
    hang.release()
    await fails(asyncio.wait_for(probing, 1), errno.EINVAL)
    assert driver(host, GPU) is None


async def test_abandoned_operation_goes_on_to_its_end() -> None:
    host = plain()
    kernel = host.kernel(str(GPU))
    hang = host.faults.add(Hang(), operation="set_override", subject=GPU)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(kernel.set_override({GPU: VFIO_DRIVER, AUDIO: VFIO_DRIVER}), 20)
    assert kernel.pending is not None
    hang.release()
    await kernel.returned()
    captured = await kernel.capture([GPU, AUDIO])
    assert [c.override for c in captured.values()] == [VFIO_DRIVER, VFIO_DRIVER]


async def test_nodes_come_later_where_told_to() -> None:
    host = plain()
    kernel = host.kernel(str(GPU))
    host.faults.add(Delay(2), operation="nodes", subject=GPU)
    await kernel.unbind(GPU, "nvidia")
    await kernel.probe(GPU)
    seen = host.look().functions[GPU]
    assert (seen.driver_name, seen.nodes, seen.nodes_pending) == ("nvidia", (), True)
    await asyncio.sleep(3)
    seen = host.look().functions[GPU]
    assert (seen.nodes, seen.nodes_pending) == (("/dev/dri/card1", "/dev/dri/renderD129"), False)


def test_faults_that_make_no_sense_are_refused() -> None:
    host = plain()
    with pytest.raises(ValueError, match="'unbound'"):
        host.faults.add(Errno(errno.EIO), operation="unbound")
    with pytest.raises(ValueError, match="Silent"):
        host.faults.add(Errno(errno.EIO), operation="nodes")


async def test_watch_tells_once_for_all_that_happens_in_one_turn() -> None:
    host = plain()
    kernel = host.kernel(str(GPU))
    told: list[str | None] = []
    stop = host.watch(lambda: told.append(driver(host, AUDIO)))
    await host.machine.unplug(NIC.slot_name)
    host.machine.replug(NIC.slot_name)
    await asyncio.sleep(0)
    assert told == ["snd_hda_intel"]
    await kernel.unbind(AUDIO, "snd_hda_intel")
    await asyncio.sleep(0)
    assert told == ["snd_hda_intel", None]
    stop()
    await kernel.probe(AUDIO)
    await asyncio.sleep(0)
    assert told == ["snd_hda_intel", None]


async def test_driver_that_counts_its_users_waits_for_the_last_one() -> None:
    host = plain()
    kernel = host.kernel(str(GPU))
    host.machine.open(GPU, "Xorg")
    host.machine.open(GPU, "ollama")
    assert host.machine.users(GPU) == {"Xorg", "ollama"}
    unbinding = asyncio.create_task(kernel.unbind(GPU, "nvidia"))
    await asyncio.sleep(60)
    assert kernel.pending is not None
    assert kernel.pending.process_state == "S"
    host.machine.close(GPU, "ollama")
    await asyncio.sleep(60)
    assert not unbinding.done()
    with pytest.raises(KernelError):
        host.machine.open(GPU, "glxgears")
    host.machine.end("Xorg")
    await unbinding
    assert host.machine.users(GPU) == frozenset()


async def test_functions_without_nodes_cannot_be_opened() -> None:
    host = plain()
    with pytest.raises(KernelError):
        host.machine.open(PciAddress.parse("0000:01:00.2"), "somebody")


async def test_pulled_card_waits_for_its_driver_and_forgets_its_settings() -> None:
    host = plain()
    host.machine.open(AUDIO, "pipewire")
    await host.kernel(str(GPU)).set_override({GPU: VFIO_DRIVER})
    pulling = asyncio.create_task(host.machine.unplug("0000:01:00"))
    await asyncio.sleep(60)
    assert GPU in host.look().functions
    host.machine.close(AUDIO, "pipewire")
    await pulling
    assert GPU not in host.look().functions
    host.machine.replug("0000:01:00")
    assert driver(host, GPU) == "nvidia"
    assert (await host.kernel(str(GPU)).capture([GPU]))[GPU].override is None


async def test_override_waits_for_the_device_lock() -> None:
    """As in Linux 6.1: the kernel to be prepared for, since later ones only wait less."""
    host = plain()
    host.machine.open(AUDIO, "pipewire")
    unbinding = asyncio.create_task(host.kernel(str(GPU)).unbind(AUDIO, "snd_hda_intel"))
    await asyncio.sleep(1)
    behind = [
        asyncio.create_task(host.kernel("one").set_override({AUDIO: VFIO_DRIVER})),
        asyncio.create_task(host.kernel("another").capture([AUDIO])),
    ]
    await asyncio.sleep(60)
    assert [task.done() for task in behind] == [False, False]
    host.machine.close(AUDIO, "pipewire")
    await unbinding
    _, captured = await asyncio.gather(*behind)
    assert captured is not None
    assert captured[AUDIO].override == VFIO_DRIVER


async def test_operation_that_waited_for_a_device_finds_it_gone() -> None:
    host = plain()
    host.machine.open(AUDIO, "pipewire")
    pulling = asyncio.create_task(host.machine.unplug("0000:01:00"))
    await asyncio.sleep(1)
    behind = asyncio.create_task(host.kernel(str(GPU)).capture([AUDIO]))
    await asyncio.sleep(1)
    host.machine.close(AUDIO, "pipewire")
    await fails(asyncio.wait_for(behind, 1), errno.ENODEV)
    await pulling


async def test_module_that_wants_a_device_refuses_where_none_is_free() -> None:
    host = plain(vfio_ids=[(0x10DE, 0x2484)])
    kernel = host.kernel(str(GPU))
    assert driver(host, GPU) == VFIO_DRIVER
    await fails(kernel.load("nvidia"), errno.ENODEV)
    assert "nvidia" not in host.look().pci_drivers
    await kernel.set_override({GPU: "nvidia"})
    await kernel.unbind(GPU, VFIO_DRIVER)
    await kernel.load("nvidia")
    assert driver(host, GPU) == "nvidia"


async def test_machine_without_modules() -> None:
    host = plain(modules=[])
    await fails(host.kernel(str(GPU)).load(VFIO_MODULE), errno.ENOENT)
    assert not host.look().vfio_available
    assert driver(host, GPU) is None


async def test_ids_on_the_command_line_win_a_probe_that_is_not_aimed() -> None:
    host = plain(vfio_ids=[(0x10DE, 0x228B)])
    kernel = host.kernel(str(GPU))
    await kernel.unbind(AUDIO, VFIO_DRIVER)
    await kernel.probe(AUDIO)
    assert driver(host, AUDIO) == VFIO_DRIVER
    await kernel.set_override({AUDIO: "snd_hda_intel"})
    await kernel.unbind(AUDIO, VFIO_DRIVER)
    await kernel.probe(AUDIO)
    assert driver(host, AUDIO) == "snd_hda_intel"


async def test_without_an_iommu_there_are_no_groups() -> None:
    host = plain(iommu=False)
    facts = host.look()
    assert not facts.iommu
    assert {f.iommu_group for f in facts.functions.values()} == {None}
    await to_vfio(host, AUDIO)
    assert driver(host, AUDIO) is None
    assert host.look().vfio_nodes == {"vfio"}


async def test_vm_takes_viable_groups_only() -> None:
    host = shared()
    await to_vfio(host, AUDIO)
    with pytest.raises(KernelError) as caught:
        host.machine.start_vm("win11", [AUDIO])
    assert caught.value.errno == errno.EPERM
    host.machine.open_group(1, "somebody")
    with pytest.raises(KernelError) as caught:
        host.machine.start_vm("win11", [AUDIO])
    assert caught.value.errno == errno.EBUSY


async def test_closed_host_keeps_what_the_kernel_has() -> None:
    host = plain()
    kernel = host.kernel(str(GPU))
    await to_vfio(host, AUDIO)
    await kernel.hold_group(13)
    hang = host.faults.add(Hang(), operation="unbind")
    unbinding = asyncio.create_task(kernel.unbind(GPU, "nvidia"))
    await hang.reached.wait()
    await host.close()
    with pytest.raises(KernelError):
        host.machine.open_group(13, "somebody")
    hang.release()
    await unbinding
    await host.close()
    host.machine.open_group(13, "somebody")


async def test_two_gpus_move_at_once() -> None:
    host = server()
    await host.systemd.stop(PERSISTENCED)
    one, two = (gpu.address for gpu in discover(host.look())[:2])
    hang = host.faults.add(Hang(), operation="unbind", subject=one)
    first = asyncio.create_task(host.kernel(str(one)).unbind(one, "nvidia"))
    await hang.reached.wait()
    await host.kernel(str(two)).unbind(two, "nvidia")
    assert driver(host, two) is None
    hang.release()
    await first


async def story(host: SimulatedHost) -> list[object]:
    """Everything that can be seen of a few operations that get in each other's way."""
    loop = asyncio.get_running_loop()
    start = loop.time()
    seen: list[object] = []
    host.watch(lambda: seen.append((loop.time() - start, host.look())))
    host.faults.add(Delay(0.25), operation="unbind", nth=None)
    host.faults.add(Errno(errno.EIO), operation="probe", nth=2)
    host.machine.open(AUDIO, "pipewire")
    loop.call_later(5, host.machine.close, AUDIO, "pipewire")
    results = await asyncio.gather(
        to_vfio(host, AUDIO),
        host.kernel("a").capture([AUDIO, GPU]),
        host.kernel("b").unbind(GPU, "nvidia"),
        host.kernel("c").probe(GPU),
        host.kernel("d").probe(AUDIO),
        return_exceptions=True,
    )
    return [*seen, *map(str, results), loop.time() - start]


async def test_same_story_each_time() -> None:
    first = await story(plain())
    assert len(first) > len("abcd")
    for _ in range(5):
        assert str(await story(plain())) == str(first)


@pytest.mark.parametrize("name", sorted(SCENARIOS.keys() - {"reserved", "driverless"}))
def test_scenario_has_a_gpu_on_its_host_driver(name: str) -> None:
    facts = SCENARIOS[name]().look()
    gpus = discover(facts)
    assert gpus
    for gpu in gpus:
        assert facts.functions[gpu.address].driver_name in {"nvidia", "i915", "amdgpu", "ast"}
        assert facts.functions[gpu.address].model
        assert facts.functions[gpu.address].nodes


def test_scenarios_are_what_they_are_called() -> None:
    sizes = {name: [len(gpu.functions) for gpu in discover(build().look())] for name, build in SCENARIOS.items()}
    assert sizes == {
        "laptop": [1, 4], "plain": [1, 4], "server": [1] * 8, "shared": [4], "apu": [2], "single": [4],
        "superchip": [1], "reserved": [4], "driverless": [1, 4],
        "rmrr": [1, 4], "plx": [1, 1], "arc": [1, 2], "hgx": [1, 1], "instinct": [1, 1, 1],
        "workstation": [2, 2, 1], "hybrid": [2, 2],
    }  # fmt: skip  # a line is long enough
    facts = shared().look()
    assert [f.address for f in discover(facts)[0].neighbours(facts)] == [NIC]
    facts = SCENARIOS["reserved"]().look()
    assert {f.driver_name for f in discover(facts)[0].present(facts)} == {"vfio-pci"}
    # It finds no card of its own; what needs it is not loaded either.
    assert not {"nvidia", "nvidia_modeset", "nvidia_drm"} & facts.modules.keys()
    facts = SCENARIOS["driverless"]().look()
    assert facts.functions[discover(facts)[1].address].driver is None
    assert [(each.device, each.nodes) for each in facts.boot_framebuffers] == [("efi-framebuffer.0", ("fb0",))]
