"""Cases about what is read and written beside binding: driver_override, power/control, modules, aliases."""

from __future__ import annotations

import errno

from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import VFIO_DRIVER, VFIO_MODULE
from tests.contract.bench import Bench, case, refused

NOBODY = PciAddress.parse("0000:ff:1f.7")
"""No device is there."""


@case
async def capture_reads_what_is_there(bench: Bench) -> None:
    captured = await bench.kernel.capture(bench.functions)
    assert set(captured) == set(bench.functions)
    assert captured[bench.display].driver == bench.display_driver
    assert captured[bench.audio].driver == bench.audio_driver
    assert [c.override for c in captured.values()] == [None, None]
    assert {c.power_control for c in captured.values()} <= {"auto", "on"}


@case
async def capture_reads_what_was_written(bench: Bench) -> None:
    await bench.kernel.set_override({bench.display: "somebody", bench.audio: None})
    await bench.kernel.set_power_control({bench.display: "auto", bench.audio: "on"})
    captured = await bench.kernel.capture(bench.functions)
    assert (captured[bench.display].override, captured[bench.display].power_control) == ("somebody", "auto")
    assert (captured[bench.audio].override, captured[bench.audio].power_control) == (None, "on")


@case
async def capture_of_a_driverless_function(bench: Bench) -> None:
    await bench.unbind(bench.audio)
    captured = await bench.kernel.capture([bench.audio])
    assert captured[bench.audio].driver is None


@case
async def override_none_clears(bench: Bench) -> None:
    await bench.kernel.set_override({bench.audio: VFIO_DRIVER})
    await bench.kernel.set_override({bench.audio: None})
    assert (await bench.kernel.capture([bench.audio]))[bench.audio].override is None


@case
async def override_longer_than_a_page_is_refused(bench: Bench) -> None:
    await refused(bench.kernel.set_override({bench.audio: "x" * 4095}), errno.EINVAL)
    assert (await bench.kernel.capture([bench.audio]))[bench.audio].override is None


@case
async def override_moves_no_bound_function(bench: Bench) -> None:
    await bench.kernel.load(VFIO_MODULE)
    await bench.kernel.set_override(dict.fromkeys(bench.functions, VFIO_DRIVER))
    assert bench.look(bench.display).driver == bench.display_driver
    assert bench.look(bench.audio).driver == bench.audio_driver


@case
async def power_control_has_two_values(bench: Bench) -> None:
    before = await bench.kernel.capture([bench.audio])
    await refused(bench.kernel.set_power_control({bench.audio: "off"}), errno.EINVAL)
    assert await bench.kernel.capture([bench.audio]) == before


@case
async def kept_awake(bench: Bench) -> None:
    """Without a driver it sleeps as soon as it may, whatever the hardware."""
    await bench.unbind(bench.display)
    await bench.kernel.set_power_control({bench.display: "auto"})
    await bench.until(lambda: bench.look(bench.display).asleep)
    await bench.kernel.keep_awake(bench.functions)
    assert [bench.look(f).asleep for f in bench.functions] == [False, False]
    captured = await bench.kernel.capture(bench.functions)
    assert [c.power_control for c in captured.values()] == ["on", "on"]


@case
async def vfio_undoes_what_was_written_to_power_control(bench: Bench) -> None:
    """It allows runtime suspend when it binds, and forbids it when it lets go (drivers/vfio/pci/vfio_pci_core.c)."""
    await bench.kernel.keep_awake(bench.functions)
    await bench.to_vfio(bench.audio)
    assert (await bench.kernel.capture([bench.audio]))[bench.audio].power_control == "auto"
    await bench.until(lambda: bench.look(bench.audio).asleep)
    await bench.kernel.keep_awake([bench.audio])
    assert not bench.look(bench.audio).asleep
    await bench.kernel.set_power_control({bench.audio: "auto"})
    await bench.unbind(bench.audio)
    assert (await bench.kernel.capture([bench.audio]))[bench.audio].power_control == "on"


@case
async def functions_that_are_not_there(bench: Bench) -> None:
    kernel = bench.kernel
    assert NOBODY not in bench.host.look().functions
    await refused(kernel.capture([NOBODY]), errno.ENODEV)
    await refused(kernel.candidates(NOBODY), errno.ENODEV)
    await refused(kernel.keep_awake([NOBODY]), errno.ENODEV)
    await refused(kernel.set_power_control({NOBODY: "on"}), errno.ENODEV)
    await refused(kernel.set_override({NOBODY: VFIO_DRIVER}), errno.ENODEV)
    await refused(kernel.unbind(NOBODY, bench.audio_driver.name), errno.ENODEV)
    await refused(kernel.probe(NOBODY), errno.ENODEV)
    await refused(kernel.reset(NOBODY), errno.ENODEV)
    await refused(kernel.rescan([NOBODY]), errno.ENODEV)
    await kernel.remove([NOBODY])


@case
async def module_that_is_not_installed(bench: Bench) -> None:
    await refused(bench.kernel.load("no_such_module_here"), errno.ENOENT)


@case
async def module_brings_its_driver(bench: Bench) -> None:
    before = bench.host.look()
    assert before.vfio_available
    assert VFIO_DRIVER not in before.pci_drivers
    await bench.kernel.load(VFIO_MODULE)
    assert bench.host.look().pci_drivers[VFIO_DRIVER] == VFIO_MODULE
    await bench.kernel.load(VFIO_MODULE)
    assert bench.host.look().pci_drivers[VFIO_DRIVER] == VFIO_MODULE


@case
async def module_binds_what_waits_for_it(bench: Bench) -> None:
    """A driver that registers probes every driverless function that it matches, by override too."""
    await bench.kernel.set_override({bench.audio: VFIO_DRIVER})
    await bench.unbind(bench.audio)
    await bench.kernel.load(VFIO_MODULE)
    assert bench.driver(bench.audio) == VFIO_DRIVER
    assert bench.look(bench.display).driver == bench.display_driver


@case
async def loadable_are_those_that_are_installed(bench: Bench) -> None:
    own = str(bench.audio_driver.module)
    asked = (own, "no_such_module", VFIO_MODULE)
    assert await bench.kernel.loadable(asked) == (own, VFIO_MODULE)
    assert await bench.kernel.loadable(asked, by_name=True) == (own, VFIO_MODULE)


@case
async def candidates_are_the_modules_of_the_function(bench: Bench) -> None:
    assert bench.display_driver.module in {each.module for each in await bench.kernel.candidates(bench.display)}
    audio = {each.module: each.needs for each in await bench.kernel.candidates(bench.audio)}
    assert bench.audio_driver.module in audio
    assert VFIO_MODULE not in audio
    assert all(module not in needs for module, needs in audio.items())
