"""Cases about what is read and written beside binding: driver_override, power/control, modules, aliases."""

from __future__ import annotations

import errno

from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import VFIO_DRIVER, VFIO_MODULE
from tests.host_contract.harness import ContractHarness, case, refused

NOBODY = PciAddress.parse("0000:ff:1f.7")
"""No device is there."""


@case
async def capture_reads_what_is_there(harness: ContractHarness) -> None:
    captured = await harness.kernel.capture(harness.functions)
    assert set(captured) == set(harness.functions)
    assert captured[harness.display].driver == harness.display_driver
    assert captured[harness.audio].driver == harness.audio_driver
    assert [c.override for c in captured.values()] == [None, None]
    assert {c.power_control for c in captured.values()} <= {"auto", "on"}


@case
async def capture_reads_what_was_written(harness: ContractHarness) -> None:
    await harness.kernel.set_override({harness.display: "somebody", harness.audio: None})
    await harness.kernel.set_power_control({harness.display: "auto", harness.audio: "on"})
    captured = await harness.kernel.capture(harness.functions)
    assert (captured[harness.display].override, captured[harness.display].power_control) == ("somebody", "auto")
    assert (captured[harness.audio].override, captured[harness.audio].power_control) == (None, "on")


@case
async def capture_of_a_driverless_function(harness: ContractHarness) -> None:
    await harness.unbind(harness.audio)
    captured = await harness.kernel.capture([harness.audio])
    assert captured[harness.audio].driver is None


@case
async def capture_of_a_bridge(harness: ContractHarness) -> None:
    """By its own address, as that of any function."""
    bridge = harness.look(harness.display).parent
    assert bridge is not None
    captured = (await harness.kernel.capture([bridge]))[bridge]
    assert (captured.driver, captured.override) == (harness.look(bridge).driver, None)
    assert captured.power_control in {"auto", "on"}


@case
async def attribute_of_a_bridge(harness: ContractHarness) -> None:
    """Read, written, and read again, by any kernel: bridges are above several GPUs."""
    bridge, path = harness.look(harness.display).parent, "d3cold_allowed"
    assert bridge is not None
    before = await harness.kernel.attribute(bridge, path)
    assert before in {"0", "1"}
    for value in ("0", "1"):
        await harness.kernel.set_attribute(bridge, path, value)
        assert await harness.kernel.attribute(bridge, path) == value


@case
async def attribute_that_is_cleared(harness: ContractHarness) -> None:
    await harness.kernel.set_attribute(harness.audio, "driver_override", "somebody")
    assert await harness.kernel.attribute(harness.audio, "driver_override") == "somebody"
    await harness.kernel.set_attribute(harness.audio, "driver_override", "")
    assert await harness.kernel.attribute(harness.audio, "driver_override") == ""


@case
async def attribute_that_there_is_not(harness: ContractHarness) -> None:
    assert await harness.kernel.attribute(harness.audio, "no_such_attribute") is None
    await refused(harness.kernel.set_attribute(harness.audio, "no_such_attribute", "1"), errno.ENOENT)


@case
async def override_none_clears(harness: ContractHarness) -> None:
    await harness.kernel.set_override({harness.audio: VFIO_DRIVER})
    await harness.kernel.set_override({harness.audio: None})
    assert (await harness.kernel.capture([harness.audio]))[harness.audio].override is None


@case
async def override_longer_than_a_page_is_refused(harness: ContractHarness) -> None:
    await refused(harness.kernel.set_override({harness.audio: "x" * 4095}), errno.EINVAL)
    assert (await harness.kernel.capture([harness.audio]))[harness.audio].override is None


@case
async def override_moves_no_bound_function(harness: ContractHarness) -> None:
    await harness.kernel.load(VFIO_MODULE)
    await harness.kernel.set_override(dict.fromkeys(harness.functions, VFIO_DRIVER))
    assert harness.look(harness.display).driver == harness.display_driver
    assert harness.look(harness.audio).driver == harness.audio_driver


@case
async def power_control_has_two_values(harness: ContractHarness) -> None:
    before = await harness.kernel.capture([harness.audio])
    await refused(harness.kernel.set_power_control({harness.audio: "off"}), errno.EINVAL)
    assert await harness.kernel.capture([harness.audio]) == before


@case
async def kept_awake(harness: ContractHarness) -> None:
    """Without a driver it sleeps as soon as it may, whatever the hardware."""
    await harness.unbind(harness.display)
    await harness.kernel.set_power_control({harness.display: "auto"})
    await harness.until(lambda: harness.look(harness.display).asleep)
    await harness.kernel.keep_awake(harness.functions)
    assert [harness.look(f).asleep for f in harness.functions] == [False, False]
    captured = await harness.kernel.capture(harness.functions)
    assert [c.power_control for c in captured.values()] == ["on", "on"]


@case
async def vfio_undoes_what_was_written_to_power_control(harness: ContractHarness) -> None:
    """It allows runtime suspend when it binds, and forbids it when it lets go (drivers/vfio/pci/vfio_pci_core.c)."""
    await harness.kernel.keep_awake(harness.functions)
    await harness.to_vfio(harness.audio)
    assert (await harness.kernel.capture([harness.audio]))[harness.audio].power_control == "auto"
    await harness.until(lambda: harness.look(harness.audio).asleep)
    await harness.kernel.keep_awake([harness.audio])
    assert not harness.look(harness.audio).asleep
    await harness.kernel.set_power_control({harness.audio: "auto"})
    await harness.unbind(harness.audio)
    assert (await harness.kernel.capture([harness.audio]))[harness.audio].power_control == "on"


@case
async def functions_that_are_not_there(harness: ContractHarness) -> None:
    kernel = harness.kernel
    assert NOBODY not in harness.host.look().functions
    await refused(kernel.capture([NOBODY]), errno.ENODEV)
    await refused(kernel.candidates(NOBODY), errno.ENODEV)
    await refused(kernel.keep_awake([NOBODY]), errno.ENODEV)
    await refused(kernel.set_power_control({NOBODY: "on"}), errno.ENODEV)
    await refused(kernel.set_override({NOBODY: VFIO_DRIVER}), errno.ENODEV)
    await refused(kernel.attribute(NOBODY, "d3cold_allowed"), errno.ENODEV)
    await refused(kernel.set_attribute(NOBODY, "d3cold_allowed", "1"), errno.ENODEV)
    await refused(kernel.unbind(NOBODY, harness.audio_driver.name), errno.ENODEV)
    await refused(kernel.probe(NOBODY), errno.ENODEV)
    await refused(kernel.reset(NOBODY), errno.ENODEV)
    await refused(kernel.rescan([NOBODY]), errno.ENODEV)
    await kernel.remove([NOBODY])


@case
async def module_that_is_not_installed(harness: ContractHarness) -> None:
    await refused(harness.kernel.load("no_such_module_here"), errno.ENOENT)


@case
async def module_brings_its_driver(harness: ContractHarness) -> None:
    before = harness.host.look()
    assert before.vfio_available
    assert VFIO_DRIVER not in before.pci_drivers
    await harness.kernel.load(VFIO_MODULE)
    assert harness.host.look().pci_drivers[VFIO_DRIVER] == VFIO_MODULE
    await harness.kernel.load(VFIO_MODULE)
    assert harness.host.look().pci_drivers[VFIO_DRIVER] == VFIO_MODULE


@case
async def module_binds_what_waits_for_it(harness: ContractHarness) -> None:
    """A driver that registers probes every driverless function that it matches, by override too."""
    await harness.kernel.set_override({harness.audio: VFIO_DRIVER})
    await harness.unbind(harness.audio)
    await harness.kernel.load(VFIO_MODULE)
    assert harness.driver(harness.audio) == VFIO_DRIVER
    assert harness.look(harness.display).driver == harness.display_driver


@case
async def loadable_are_those_that_are_installed(harness: ContractHarness) -> None:
    own = str(harness.audio_driver.module)
    asked = (own, "no_such_module", VFIO_MODULE)
    assert await harness.kernel.loadable(asked) == (own, VFIO_MODULE)
    assert await harness.kernel.loadable(asked, by_name=True) == (own, VFIO_MODULE)


@case
async def candidates_are_the_modules_of_the_function(harness: ContractHarness) -> None:
    assert harness.display_driver.module in {each.module for each in await harness.kernel.candidates(harness.display)}
    audio = {each.module: each.needs for each in await harness.kernel.candidates(harness.audio)}
    assert harness.audio_driver.module in audio
    assert VFIO_MODULE not in audio
    assert all(module not in needs for module, needs in audio.items())
