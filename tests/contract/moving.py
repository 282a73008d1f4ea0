"""Cases about bind and unbind, and how what is bound is seen."""

from __future__ import annotations

import errno

from gpuswitch.model.facts import VFIO_DRIVER, VFIO_MODULE
from tests.contract.bench import Bench, case, refused


@case
async def whole_gpu_to_vfio_and_back(bench: Bench) -> None:
    kernel = bench.kernel
    captured = await kernel.capture(bench.functions)
    await kernel.load(VFIO_MODULE)
    await kernel.set_override(dict.fromkeys(bench.functions, VFIO_DRIVER))
    for function in (bench.audio, bench.display):
        await bench.unbind(function)
        assert bench.driver(function) is None
        await kernel.probe(function)
        assert bench.driver(function) == VFIO_DRIVER
    await bench.until(lambda: str(bench.group) in bench.host.look().vfio_nodes)

    await kernel.hold_group(bench.group)
    await kernel.set_override({bench.display: bench.display_driver.name, bench.audio: bench.audio_driver.name})
    for function in bench.functions:
        await kernel.unbind(function, VFIO_DRIVER)
    await kernel.release_group(bench.group)
    for function in bench.functions:
        await kernel.probe(function)
        assert bench.look(function).driver == captured[function].driver
    await kernel.set_override(dict.fromkeys(bench.functions, None))
    await kernel.set_power_control({f: captured[f].power_control for f in bench.functions})
    assert await kernel.capture(bench.functions) == captured
    await bench.until(lambda: str(bench.group) not in bench.host.look().vfio_nodes)
    await bench.until(lambda: not bench.look(bench.display).nodes_pending)
    assert bench.look(bench.display).nodes


@case
async def probe_without_a_match_succeeds(bench: Bench) -> None:
    await bench.kernel.set_override({bench.audio: "no-such-driver"})
    await bench.unbind(bench.audio)
    await bench.kernel.probe(bench.audio)
    assert bench.driver(bench.audio) is None
    await bench.kernel.set_override({bench.audio: None})
    assert bench.driver(bench.audio) is None
    await bench.kernel.probe(bench.audio)
    assert bench.look(bench.audio).driver == bench.audio_driver


@case
async def probe_of_a_bound_function_succeeds(bench: Bench) -> None:
    await bench.kernel.load(VFIO_MODULE)
    await bench.kernel.set_override({bench.audio: VFIO_DRIVER})
    await bench.kernel.probe(bench.audio)
    assert bench.look(bench.audio).driver == bench.audio_driver


@case
async def unbind_of_a_driverless_function(bench: Bench) -> None:
    await bench.unbind(bench.audio)
    await refused(bench.kernel.unbind(bench.audio, bench.audio_driver.name), errno.ENODEV)


@case
async def unbind_from_the_wrong_driver(bench: Bench) -> None:
    await refused(bench.kernel.unbind(bench.audio, bench.display_driver.name), errno.ENODEV)
    await refused(bench.kernel.unbind(bench.audio, "no-such-driver"), errno.ENODEV)
    assert bench.look(bench.audio).driver == bench.audio_driver


@case
async def watch_tells_of_bind_and_unbind(bench: Bench) -> None:
    async with bench.changes() as changed:
        await bench.unbind(bench.audio)
        await changed.wait()
        changed.clear()
        await bench.kernel.probe(bench.audio)
        await changed.wait()
    assert bench.look(bench.audio).driver == bench.audio_driver


@case
async def watch_tells_of_all_until_a_node_is_ready(bench: Bench) -> None:
    """Who looks at each event, and at no other time, sees the last change too."""
    await bench.unbind(bench.display)
    assert bench.look(bench.display).nodes == ()
    async with bench.changes() as changed:
        await bench.kernel.probe(bench.display)
        await bench.until_told(lambda: not bench.look(bench.display).nodes_pending, changed)
    assert any(node.startswith("/dev/dri/card") for node in bench.look(bench.display).nodes)


@case
async def watch_tells_of_a_group_node(bench: Bench) -> None:
    async with bench.changes() as changed:
        await bench.to_vfio(bench.audio)
        await bench.until_told(lambda: str(bench.group) in bench.host.look().vfio_nodes, changed)
        await bench.unbind(bench.audio)
        await bench.until_told(lambda: str(bench.group) not in bench.host.look().vfio_nodes, changed)


@case
async def watch_stops(bench: Bench) -> None:
    told: list[str] = []
    stop = bench.host.watch(lambda: told.append("one"))
    stop()
    stop()
    async with bench.changes() as changed:
        await bench.unbind(bench.audio)
        await changed.wait()
    assert told == []


@case
async def device_leaves_and_comes_back(bench: Bench) -> None:
    await bench.kernel.set_override({bench.display: "somebody"})
    async with bench.changes() as changed:
        await bench.outside.unplug(bench.functions)
        await bench.until_told(lambda: not set(bench.functions) & set(bench.host.look().functions), changed)
        await refused(bench.kernel.unbind(bench.display, bench.display_driver.name), errno.ENODEV)
        await refused(bench.kernel.capture(bench.functions), errno.ENODEV)
        await bench.outside.replug()
        await bench.until_told(lambda: set(bench.functions) <= set(bench.host.look().functions), changed)
    await bench.until(lambda: bench.look(bench.display).driver == bench.display_driver)
    await bench.until(lambda: bench.look(bench.audio).driver == bench.audio_driver)
    assert (await bench.kernel.capture([bench.display]))[bench.display].override is None


@case
async def booted_display_is_known_whoever_has_it(bench: Bench) -> None:
    """Neither its driver nor a DRM card has to be there to say so."""
    [booted] = [address for address, function in bench.host.look().functions.items() if function.boot_display]
    assert booted not in bench.functions
    await bench.unbind(booted)
    assert bench.look(booted).boot_display
    await bench.to_vfio(booted)
    assert [a for a, function in bench.host.look().functions.items() if function.boot_display] == [booted]
