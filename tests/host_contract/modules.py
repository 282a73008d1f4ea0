"""Cases about taking modules out of the kernel, and about what is told to those who follow udev."""

from __future__ import annotations

import errno

from gpuswitch.model.facts import VFIO_MODULE
from tests.host_contract.harness import ContractHarness, case, refused


def references(harness: ContractHarness) -> int:
    return harness.host.look().modules[str(harness.audio_driver.module)].references or 0


@case
async def unload_detaches_and_load_brings_back(harness: ContractHarness) -> None:
    module = str(harness.audio_driver.module)
    assert references(harness) == 0
    await harness.kernel.unload(module)
    after = harness.host.look()
    assert after.functions[harness.audio].driver is None
    assert module not in after.modules
    assert harness.audio_driver.name not in after.pci_drivers
    assert after.functions[harness.display].driver == harness.display_driver
    await harness.kernel.unload(module)
    await harness.kernel.load(module)
    assert harness.look(harness.audio).driver == harness.audio_driver


@case
async def unload_of_what_is_open_is_refused(harness: ContractHarness) -> None:
    await harness.external.open(harness.audio)
    assert references(harness) > 0
    await refused(harness.kernel.unload(str(harness.audio_driver.module)), errno.EAGAIN)
    assert harness.look(harness.audio).driver == harness.audio_driver
    assert len((await harness.scan(harness.audio)).holders) == 1
    await harness.external.close(harness.audio)
    await harness.kernel.unload(str(harness.audio_driver.module))


@case
async def unload_is_refused_for_a_descriptor_that_nobody_has(harness: ContractHarness) -> None:
    await harness.external.hide(harness.audio)
    await refused(harness.kernel.unload(str(harness.audio_driver.module)), errno.EAGAIN)
    assert harness.look(harness.audio).driver == harness.audio_driver
    await harness.external.close(harness.audio)


@case
async def unload_of_what_is_not_there(harness: ContractHarness) -> None:
    await harness.kernel.unload(VFIO_MODULE)
    await harness.kernel.unload("no_such_module_here")


@case
async def modules_are_installed_or_not(harness: ContractHarness) -> None:
    """Loaded or not is no matter."""
    for module in (str(harness.audio_driver.module), VFIO_MODULE):
        assert harness.host.installed(module)
    for module in ("no_such_module_here", f"{VFIO_MODULE}_not"):
        assert not harness.host.installed(module)


@case
async def announcement_changes_nothing(harness: ContractHarness) -> None:
    """Who follows udev is told, and the card stays as it is."""
    for action in ("remove", "add"):
        async with harness.changes() as changed:
            await harness.kernel.announce(harness.functions, "sound", action)
            await changed.wait()
        assert harness.look(harness.audio).driver == harness.audio_driver
    await harness.unbind(harness.audio)
    await harness.kernel.announce(harness.functions, "sound", "remove")


@case
async def persistence_is_nobodys_without_nvidia(harness: ContractHarness) -> None:
    assert await harness.kernel.persistence(harness.display) is None
