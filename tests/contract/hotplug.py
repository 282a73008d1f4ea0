"""Cases about a reset, and about functions that leave the bus and are found again."""

from __future__ import annotations

import asyncio
import errno

from gpuswitch.host.port import Captured
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import VFIO_DRIVER, VFIO_MODULE
from tests.contract.bench import Bench, case, refused


async def settings(bench: Bench, *functions: PciAddress) -> list[Captured]:
    return list((await bench.kernel.capture(functions)).values())


@case
async def reset_of_a_driverless_function_leaves_it_as_it_was(bench: Bench) -> None:
    driver = bench.driver(bench.lone)
    await bench.unbind(bench.lone)
    await bench.kernel.set_override({bench.lone: "somebody"})
    before = await settings(bench, bench.lone)
    await bench.kernel.reset(bench.lone)
    assert await settings(bench, bench.lone) == before
    await bench.kernel.set_override({bench.lone: None})
    await bench.kernel.probe(bench.lone)
    assert bench.driver(bench.lone) == driver


@case
async def reset_that_is_not_possible_changes_nothing(bench: Bench) -> None:
    """One function has no reset method at all; the other one's would reset both."""
    for function in bench.functions:
        await bench.unbind(function)
    before = await settings(bench, *bench.functions)
    await refused(bench.kernel.reset(bench.audio), errno.ENOENT)
    await refused(bench.kernel.reset(bench.display), errno.ENOTTY)
    assert await settings(bench, *bench.functions) == before


@case
async def removed_functions_are_found_again_as_if_new(bench: Bench) -> None:
    """They get the drivers that match, and nothing of what was set is left. Others have not moved."""
    home = await bench.kernel.capture(bench.functions)
    others = set(bench.host.look().functions) - set(bench.functions)
    await bench.to_vfio(*bench.functions)
    async with bench.changes() as changed:
        await bench.kernel.remove(tuple(reversed(bench.functions)))
        assert set(bench.host.look().functions) == others
        await bench.kernel.remove(bench.functions)
        await bench.kernel.rescan(bench.functions)
        assert set(bench.host.look().functions) == {*others, *bench.functions}
        await bench.until_told(lambda: bench.look(bench.display).driver == bench.display_driver, changed)
        await bench.until_told(lambda: bench.look(bench.audio).driver == bench.audio_driver, changed)
        await bench.until_told(lambda: not bench.look(bench.display).nodes_pending, changed)
    assert bench.look(bench.display).nodes
    assert await bench.kernel.capture(bench.functions) == home


@case
async def rescan_finds_one_of_several_functions(bench: Bench) -> None:
    await bench.kernel.remove([bench.audio])
    assert bench.audio not in bench.host.look().functions
    assert bench.look(bench.display).driver == bench.display_driver
    await bench.kernel.rescan(bench.functions)
    await bench.until(lambda: bench.look(bench.audio).driver == bench.audio_driver)
    assert bench.look(bench.display).driver == bench.display_driver


@case
async def rescan_finds_nothing_on_other_buses(bench: Bench) -> None:
    """Who has removed something elsewhere may have meant it."""
    await bench.kernel.remove([bench.lone])
    await bench.kernel.remove([bench.audio])
    await bench.kernel.rescan([bench.audio])
    assert bench.audio in bench.host.look().functions
    assert bench.lone not in bench.host.look().functions
    await bench.kernel.rescan([bench.lone])
    assert bench.lone in bench.host.look().functions


@case
async def rescan_with_nothing_missing_changes_nothing(bench: Bench) -> None:
    await bench.to_vfio(bench.audio)
    before = await settings(bench, *bench.functions)
    await bench.kernel.rescan(bench.functions)
    assert await settings(bench, *bench.functions) == before
    assert bench.driver(bench.audio) == VFIO_DRIVER


@case
async def remove_waits_for_the_user_of_a_function(bench: Bench) -> None:
    """As an unbind does; and meanwhile nobody in the machine can remove or find anything else."""
    await bench.outside.open(bench.audio)
    removing = asyncio.create_task(bench.kernel.remove([bench.audio]))
    await bench.until(lambda: bench.kernel.pending is not None and bench.kernel.pending.process_state == "D")
    assert bench.kernel.pending is not None
    assert str(bench.audio) in bench.kernel.pending.what
    other = bench.another_kernel(str(bench.lone))
    rescanning = asyncio.create_task(other.rescan([bench.lone]))
    await bench.until(lambda: other.pending is not None and other.pending.process_state == "D")
    assert bench.audio in bench.host.look().functions
    await bench.outside.close(bench.audio)
    await asyncio.gather(removing, rescanning)
    assert bench.audio not in bench.host.look().functions


@case
async def without_autoprobe_a_probe_binds_and_a_module_does_not(bench: Bench) -> None:
    """bus_add_driver() looks at it; drivers_probe_store() does not (drivers/base/bus.c)."""
    assert bench.host.look().autoprobe
    await bench.outside.set_autoprobe(on=False)
    assert not bench.host.look().autoprobe
    await bench.kernel.set_override({bench.audio: VFIO_DRIVER})
    await bench.unbind(bench.audio)
    await bench.kernel.load(VFIO_MODULE)
    assert bench.driver(bench.audio) is None
    await bench.kernel.probe(bench.audio)
    assert bench.driver(bench.audio) == VFIO_DRIVER
    await bench.outside.set_autoprobe(on=True)
    assert bench.host.look().autoprobe


@case
async def without_autoprobe_what_is_found_again_can_be_bound(bench: Bench) -> None:
    """Until 6.16 a rescan binds it all the same (pci_bus_add_device in drivers/pci/bus.c)."""
    await bench.outside.set_autoprobe(on=False)
    await bench.kernel.remove(tuple(reversed(bench.functions)))
    await bench.kernel.rescan(bench.functions)
    for function in bench.functions:
        await bench.kernel.probe(function)
    drivers = bench.look(bench.display).driver, bench.look(bench.audio).driver
    assert drivers == (bench.display_driver, bench.audio_driver)
