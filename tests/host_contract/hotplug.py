"""Cases about a reset, and about functions that leave the bus and are found again."""

from __future__ import annotations

import asyncio
import errno

from gpuswitch.host.port import Captured
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import VFIO_DRIVER, VFIO_MODULE
from tests.host_contract.harness import ContractHarness, case, refused


async def settings(harness: ContractHarness, *functions: PciAddress) -> list[Captured]:
    return list((await harness.kernel.capture(functions)).values())


@case
async def reset_of_a_driverless_function_leaves_it_as_it_was(harness: ContractHarness) -> None:
    driver = harness.driver(harness.lone)
    await harness.unbind(harness.lone)
    await harness.kernel.set_override({harness.lone: "somebody"})
    before = await settings(harness, harness.lone)
    await harness.kernel.reset(harness.lone)
    assert await settings(harness, harness.lone) == before
    await harness.kernel.set_override({harness.lone: None})
    await harness.kernel.probe(harness.lone)
    assert harness.driver(harness.lone) == driver


@case
async def reset_that_is_not_possible_changes_nothing(harness: ContractHarness) -> None:
    """One function has no reset method at all; the other one's would reset both."""
    for function in harness.functions:
        await harness.unbind(function)
    before = await settings(harness, *harness.functions)
    await refused(harness.kernel.reset(harness.audio), errno.ENOENT)
    await refused(harness.kernel.reset(harness.display), errno.ENOTTY)
    assert await settings(harness, *harness.functions) == before


@case
async def removed_functions_are_found_again_as_if_new(harness: ContractHarness) -> None:
    """They get the drivers that match, and nothing of what was set is left. Others have not moved."""
    home = await harness.kernel.capture(harness.functions)
    others = set(harness.host.look().functions) - set(harness.functions)
    await harness.to_vfio(*harness.functions)
    async with harness.changes() as changed:
        await harness.kernel.remove(tuple(reversed(harness.functions)))
        assert set(harness.host.look().functions) == others
        await harness.kernel.remove(harness.functions)
        await harness.kernel.rescan(harness.functions)
        assert set(harness.host.look().functions) == {*others, *harness.functions}
        await harness.until_told(lambda: harness.look(harness.display).driver == harness.display_driver, changed)
        await harness.until_told(lambda: harness.look(harness.audio).driver == harness.audio_driver, changed)
        await harness.until_told(lambda: not harness.look(harness.display).nodes_pending, changed)
    assert harness.look(harness.display).nodes
    assert await harness.kernel.capture(harness.functions) == home


@case
async def rescan_finds_one_of_several_functions(harness: ContractHarness) -> None:
    await harness.kernel.remove([harness.audio])
    assert harness.audio not in harness.host.look().functions
    assert harness.look(harness.display).driver == harness.display_driver
    await harness.kernel.rescan(harness.functions)
    await harness.until(lambda: harness.look(harness.audio).driver == harness.audio_driver)
    assert harness.look(harness.display).driver == harness.display_driver


@case
async def rescan_finds_nothing_on_other_buses(harness: ContractHarness) -> None:
    """Who has removed something elsewhere may have meant it."""
    await harness.kernel.remove([harness.lone])
    await harness.kernel.remove([harness.audio])
    await harness.kernel.rescan([harness.audio])
    assert harness.audio in harness.host.look().functions
    assert harness.lone not in harness.host.look().functions
    await harness.kernel.rescan([harness.lone])
    assert harness.lone in harness.host.look().functions


@case
async def rescan_with_nothing_missing_changes_nothing(harness: ContractHarness) -> None:
    await harness.to_vfio(harness.audio)
    before = await settings(harness, *harness.functions)
    await harness.kernel.rescan(harness.functions)
    assert await settings(harness, *harness.functions) == before
    assert harness.driver(harness.audio) == VFIO_DRIVER


@case
async def remove_waits_for_the_user_of_a_function(harness: ContractHarness) -> None:
    """As an unbind does; and meanwhile nobody in the machine can remove or find anything else."""
    await harness.external.open(harness.audio)
    removing = asyncio.create_task(harness.kernel.remove([harness.audio]))
    await harness.until(lambda: harness.kernel.pending is not None and harness.kernel.pending.process_state == "D")
    assert harness.kernel.pending is not None
    assert str(harness.audio) in harness.kernel.pending.what
    other = harness.another_kernel(str(harness.lone))
    rescanning = asyncio.create_task(other.rescan([harness.lone]))
    await harness.until(lambda: other.pending is not None and other.pending.process_state == "D")
    assert harness.audio in harness.host.look().functions
    await harness.external.close(harness.audio)
    await asyncio.gather(removing, rescanning)
    assert harness.audio not in harness.host.look().functions


@case
async def without_autoprobe_a_probe_binds_and_a_module_does_not(harness: ContractHarness) -> None:
    """bus_add_driver() looks at it; drivers_probe_store() does not (drivers/base/bus.c)."""
    assert harness.host.look().autoprobe
    await harness.external.set_autoprobe(on=False)
    assert not harness.host.look().autoprobe
    await harness.kernel.set_override({harness.audio: VFIO_DRIVER})
    await harness.unbind(harness.audio)
    await harness.kernel.load(VFIO_MODULE)
    assert harness.driver(harness.audio) is None
    await harness.kernel.probe(harness.audio)
    assert harness.driver(harness.audio) == VFIO_DRIVER
    await harness.external.set_autoprobe(on=True)
    assert harness.host.look().autoprobe


@case
async def without_autoprobe_what_is_found_again_can_be_bound(harness: ContractHarness) -> None:
    """Until 6.16 a rescan binds it all the same (pci_bus_add_device in drivers/pci/bus.c)."""
    await harness.external.set_autoprobe(on=False)
    await harness.kernel.remove(tuple(reversed(harness.functions)))
    await harness.kernel.rescan(harness.functions)
    for function in harness.functions:
        await harness.kernel.probe(function)
    drivers = harness.look(harness.display).driver, harness.look(harness.audio).driver
    assert drivers == (harness.display_driver, harness.audio_driver)
