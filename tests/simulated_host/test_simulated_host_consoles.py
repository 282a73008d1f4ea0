"""The consoles of a simulated host: who shows them, and what fbcon keeps."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from gpuswitch.host.simulated.catalogue import MODULES
from gpuswitch.host.simulated.consoles import TERMINALS, VTCONSOLE
from gpuswitch.host.simulated.faults import Errno, Operation, Silent
from gpuswitch.host.simulated.host import SimulatedHost
from gpuswitch.host.simulated.scenarios import plain, server, shared
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import VFIO_DRIVER, VFIO_MODULE, BootFramebuffer, Consoles
from tests.host_contract.harness import refused

GPU, INTEGRATED = PciAddress.parse("0000:01:00.0"), PciAddress.parse("0000:00:02.0")
EFI = BootFramebuffer("efi-framebuffer.0", "efi-framebuffer", GPU)


def shown(number: int | None, **frame_buffers: PciAddress | None) -> Consoles:
    """All terminals on one frame buffer, or none on any; `frame_buffers` by name."""
    numbers = {int(name.removeprefix("fb")): function for name, function in frame_buffers.items()}
    mapped = {} if number is None else dict.fromkeys(TERMINALS, number)
    return Consoles(numbers, mapped, {VTCONSOLE: number is not None} if numbers else {})


async def consoles(host: SimulatedHost) -> Consoles:
    return await host.kernel(str(GPU)).consoles()


def pinning(host_driver: str) -> SimulatedHost:
    return shared(modules=[replace(m, pins=True) if m.name == host_driver else m for m in MODULES])


async def test_boot_display_shows_all_terminals() -> None:
    assert await consoles(plain()) == shown(0, fb0=INTEGRATED, fb1=GPU)
    assert await consoles(server()) == shown(None)


async def test_boot_display_that_goes_takes_the_console_driver_along_and_brings_it_back() -> None:
    host = plain()
    kernel = host.kernel(str(GPU))
    await kernel.unbind(INTEGRATED, "i915")
    assert await consoles(host) == shown(None, fb1=GPU)
    await kernel.probe(INTEGRATED)
    assert await consoles(host) == shown(0, fb0=INTEGRATED, fb1=GPU)


async def test_no_frame_buffer_shows_nothing() -> None:
    host = shared()
    kernel = host.kernel(str(GPU))
    assert await consoles(host) == shown(0, fb0=GPU)
    await kernel.unbind(GPU, "nvidia")
    assert await consoles(host) == shown(None)
    await refused(kernel.bind_console(VTCONSOLE, bound=True), errno.ENOENT)
    await kernel.probe(GPU)
    assert await consoles(host) == shown(0, fb0=GPU)


async def test_boot_display_that_is_gone_leaves_its_terminals_to_who_binds_the_console_driver() -> None:
    host = plain()
    kernel = host.kernel(str(GPU))
    await kernel.unbind(INTEGRATED, "i915")
    await kernel.bind_console(VTCONSOLE, bound=True)
    assert await consoles(host) == shown(1, fb1=GPU)


async def test_shown_frame_buffer_pins_its_module() -> None:
    host = pinning("nvidia_drm")
    kernel = host.kernel(str(GPU))
    assert host.look().modules["nvidia_drm"].references == 1
    await refused(kernel.unload("nvidia_drm"), errno.EAGAIN)
    await kernel.bind_console(VTCONSOLE, bound=False)
    await kernel.unload("nvidia_drm")
    assert await consoles(host) == shown(None)


async def test_frame_buffer_that_shows_nothing_pins_nothing() -> None:
    host = plain()
    kernel = host.kernel(str(GPU))
    await refused(kernel.unload("i915"), errno.EAGAIN)
    await kernel.map_consoles(TERMINALS, 1)
    await kernel.unload("i915")
    assert await consoles(host) == shown(1, fb1=GPU)


async def test_frame_buffer_of_the_firmware_is_taken_and_given_back() -> None:
    host = shared(modules=[], boot_framebuffers=[EFI])
    kernel = host.kernel(str(GPU))
    assert host.look().boot_framebuffers == (replace(EFI, nodes=("fb0",)),)
    assert await consoles(host) == shown(0, fb0=None)
    for _ in range(2):
        await kernel.unbind_platform(EFI.device, EFI.driver)
        assert host.look().boot_framebuffers == ()
    assert await consoles(host) == shown(None)
    for _ in range(2):
        await kernel.bind_platform(EFI.device, EFI.driver)
        assert host.look().boot_framebuffers == (replace(EFI, nodes=("fb0",)),)
    await refused(kernel.bind_platform(EFI.device, "simple-framebuffer"), errno.ENODEV)


async def test_driver_of_the_gpu_evicts_the_frame_buffer_of_the_firmware() -> None:
    host = shared(boot_framebuffers=[EFI])
    assert host.look().boot_framebuffers == ()
    await refused(host.kernel(str(GPU)).bind_platform(EFI.device, EFI.driver), errno.ENODEV)
    host = shared(modules=[m for m in MODULES if m.name == VFIO_MODULE], boot_framebuffers=[EFI])
    kernel = host.kernel(str(GPU))
    await kernel.load(VFIO_MODULE)
    await kernel.set_override({GPU: VFIO_DRIVER})
    await kernel.probe(GPU)
    assert host.look().boot_framebuffers == ()


@pytest.mark.parametrize(
    ("operation", "subject"),
    [
        ("consoles", VTCONSOLE),
        ("map_consoles", 1),
        ("bind_console", VTCONSOLE),
        ("unbind_platform", EFI.device),
        ("bind_platform", EFI.device),
        ("persistence", GPU),
        ("announce", GPU),
    ],
)
async def test_faults_hit_what_they_are_meant_for(operation: Operation, subject: object) -> None:
    host = plain(modules=[m for m in MODULES if m.name in {"i915", "nvidia"}], boot_framebuffers=[EFI])
    kernel = host.kernel(str(GPU))
    before = await consoles(host)
    host.faults.add(Errno(errno.EIO), operation=operation, subject=subject)
    calls: dict[Operation, Callable[[], Awaitable[object]]] = {
        "consoles": kernel.consoles,
        "map_consoles": lambda: kernel.map_consoles([1], 1),
        "bind_console": lambda: kernel.bind_console(VTCONSOLE, bound=False),
        "unbind_platform": lambda: kernel.unbind_platform(EFI.device, EFI.driver),
        "bind_platform": lambda: kernel.bind_platform(EFI.device, EFI.driver),
        "persistence": lambda: kernel.persistence(GPU),
        "announce": lambda: kernel.announce([GPU], "drm", "remove"),
    }
    await refused(calls[operation](), errno.EIO)
    assert await consoles(host) == before
    host.faults.add(Silent(), operation="bind_console")
    await kernel.bind_console(VTCONSOLE, bound=False)
    assert await consoles(host) == before
