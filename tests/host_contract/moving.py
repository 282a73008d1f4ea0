"""Cases about bind and unbind, and how what is bound is seen."""

from __future__ import annotations

import errno

from gpuswitch.model.facts import VFIO_DRIVER, VFIO_MODULE
from tests.host_contract.harness import ContractHarness, case, refused


@case
async def whole_gpu_to_vfio_and_back(harness: ContractHarness) -> None:
    kernel = harness.kernel
    captured = await kernel.capture(harness.functions)
    await kernel.load(VFIO_MODULE)
    await kernel.set_override(dict.fromkeys(harness.functions, VFIO_DRIVER))
    for function in (harness.audio, harness.display):
        await harness.unbind(function)
        assert harness.driver(function) is None
        await kernel.probe(function)
        assert harness.driver(function) == VFIO_DRIVER
    await harness.until(lambda: str(harness.group) in harness.host.look().vfio_nodes)

    await kernel.hold_group(harness.group)
    await kernel.set_override({harness.display: harness.display_driver.name, harness.audio: harness.audio_driver.name})
    for function in harness.functions:
        await kernel.unbind(function, VFIO_DRIVER)
    await kernel.release_group(harness.group)
    for function in harness.functions:
        await kernel.probe(function)
        assert harness.look(function).driver == captured[function].driver
    await kernel.set_override(dict.fromkeys(harness.functions, None))
    await kernel.set_power_control({f: captured[f].power_control for f in harness.functions})
    assert await kernel.capture(harness.functions) == captured
    await harness.until(lambda: str(harness.group) not in harness.host.look().vfio_nodes)
    await harness.until(lambda: not harness.look(harness.display).nodes_pending)
    assert harness.look(harness.display).nodes


@case
async def probe_without_a_match_succeeds(harness: ContractHarness) -> None:
    await harness.kernel.set_override({harness.audio: "no-such-driver"})
    await harness.unbind(harness.audio)
    await harness.kernel.probe(harness.audio)
    assert harness.driver(harness.audio) is None
    await harness.kernel.set_override({harness.audio: None})
    assert harness.driver(harness.audio) is None
    await harness.kernel.probe(harness.audio)
    assert harness.look(harness.audio).driver == harness.audio_driver


@case
async def probe_of_a_bound_function_succeeds(harness: ContractHarness) -> None:
    await harness.kernel.load(VFIO_MODULE)
    await harness.kernel.set_override({harness.audio: VFIO_DRIVER})
    await harness.kernel.probe(harness.audio)
    assert harness.look(harness.audio).driver == harness.audio_driver


@case
async def unbind_of_a_driverless_function(harness: ContractHarness) -> None:
    await harness.unbind(harness.audio)
    await refused(harness.kernel.unbind(harness.audio, harness.audio_driver.name), errno.ENODEV)


@case
async def unbind_from_the_wrong_driver(harness: ContractHarness) -> None:
    await refused(harness.kernel.unbind(harness.audio, harness.display_driver.name), errno.ENODEV)
    await refused(harness.kernel.unbind(harness.audio, "no-such-driver"), errno.ENODEV)
    assert harness.look(harness.audio).driver == harness.audio_driver


@case
async def watch_tells_of_bind_and_unbind(harness: ContractHarness) -> None:
    async with harness.changes() as changed:
        await harness.unbind(harness.audio)
        await changed.wait()
        changed.clear()
        await harness.kernel.probe(harness.audio)
        await changed.wait()
    assert harness.look(harness.audio).driver == harness.audio_driver


@case
async def watch_tells_of_all_until_a_node_is_ready(harness: ContractHarness) -> None:
    """Who looks at each event, and at no other time, sees the last change too."""
    await harness.unbind(harness.display)
    assert harness.look(harness.display).nodes == ()
    async with harness.changes() as changed:
        await harness.kernel.probe(harness.display)
        await harness.until_told(lambda: not harness.look(harness.display).nodes_pending, changed)
    assert any(node.startswith("/dev/dri/card") for node in harness.look(harness.display).nodes)


@case
async def watch_tells_of_a_group_node(harness: ContractHarness) -> None:
    async with harness.changes() as changed:
        await harness.to_vfio(harness.audio)
        await harness.until_told(lambda: str(harness.group) in harness.host.look().vfio_nodes, changed)
        await harness.unbind(harness.audio)
        await harness.until_told(lambda: str(harness.group) not in harness.host.look().vfio_nodes, changed)


@case
async def watch_stops(harness: ContractHarness) -> None:
    told: list[str] = []
    stop = harness.host.watch(lambda: told.append("one"))
    stop()
    stop()
    async with harness.changes() as changed:
        await harness.unbind(harness.audio)
        await changed.wait()
    assert told == []


@case
async def device_leaves_and_comes_back(harness: ContractHarness) -> None:
    await harness.kernel.set_override({harness.display: "somebody"})
    async with harness.changes() as changed:
        await harness.external.unplug(harness.functions)
        await harness.until_told(lambda: not set(harness.functions) & set(harness.host.look().functions), changed)
        await refused(harness.kernel.unbind(harness.display, harness.display_driver.name), errno.ENODEV)
        await refused(harness.kernel.capture(harness.functions), errno.ENODEV)
        await harness.external.replug()
        await harness.until_told(lambda: set(harness.functions) <= set(harness.host.look().functions), changed)
    await harness.until(lambda: harness.look(harness.display).driver == harness.display_driver)
    await harness.until(lambda: harness.look(harness.audio).driver == harness.audio_driver)
    assert (await harness.kernel.capture([harness.display]))[harness.display].override is None


@case
async def booted_display_is_known_whoever_has_it(harness: ContractHarness) -> None:
    """Neither its driver nor a DRM card has to be there to say so."""
    [booted] = [address for address, function in harness.host.look().functions.items() if function.boot_display]
    assert booted not in harness.functions
    await harness.unbind(booted)
    assert harness.look(booted).boot_display
    await harness.to_vfio(booted)
    assert [a for a, function in harness.host.look().functions.items() if function.boot_display] == [booted]
