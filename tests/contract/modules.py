"""Cases about taking modules out of the kernel, and about what is told to those who follow udev."""

from __future__ import annotations

import errno

from gpuswitch.model.facts import VFIO_MODULE
from tests.contract.bench import Bench, case, refused


def references(bench: Bench) -> int:
    return bench.host.look().modules[str(bench.audio_driver.module)].references or 0


@case
async def unload_detaches_and_load_brings_back(bench: Bench) -> None:
    module = str(bench.audio_driver.module)
    assert references(bench) == 0
    await bench.kernel.unload(module)
    after = bench.host.look()
    assert after.functions[bench.audio].driver is None
    assert module not in after.modules
    assert bench.audio_driver.name not in after.pci_drivers
    assert after.functions[bench.display].driver == bench.display_driver
    await bench.kernel.unload(module)
    await bench.kernel.load(module)
    assert bench.look(bench.audio).driver == bench.audio_driver


@case
async def unload_of_what_is_open_is_refused(bench: Bench) -> None:
    await bench.outside.open(bench.audio)
    assert references(bench) > 0
    await refused(bench.kernel.unload(str(bench.audio_driver.module)), errno.EAGAIN)
    assert bench.look(bench.audio).driver == bench.audio_driver
    assert len((await bench.scan(bench.audio)).holders) == 1
    await bench.outside.close(bench.audio)
    await bench.kernel.unload(str(bench.audio_driver.module))


@case
async def unload_is_refused_for_a_descriptor_that_nobody_has(bench: Bench) -> None:
    await bench.outside.hide(bench.audio)
    await refused(bench.kernel.unload(str(bench.audio_driver.module)), errno.EAGAIN)
    assert bench.look(bench.audio).driver == bench.audio_driver
    await bench.outside.close(bench.audio)


@case
async def unload_of_what_is_not_there(bench: Bench) -> None:
    await bench.kernel.unload(VFIO_MODULE)
    await bench.kernel.unload("no_such_module_here")


@case
async def announcement_changes_nothing(bench: Bench) -> None:
    """Who follows udev is told, and the card stays as it is."""
    for action in ("remove", "add"):
        async with bench.changes() as changed:
            await bench.kernel.announce(bench.functions, "sound", action)
            await changed.wait()
        assert bench.look(bench.audio).driver == bench.audio_driver
    await bench.unbind(bench.audio)
    await bench.kernel.announce(bench.functions, "sound", "remove")


@case
async def persistence_is_nobodys_without_nvidia(bench: Bench) -> None:
    assert await bench.kernel.persistence(bench.display) is None
