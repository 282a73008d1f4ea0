"""Operations on PCI functions, on the boot's frame buffer, and on VFIO groups."""

import errno
import os

from gpuswitch.host.linux.framebuffers import BOOT_DRIVERS
from gpuswitch.host.linux.operations.files import (
    OperationError,
    checked_address,
    checked_name,
    checked_number,
    failure,
    is_name,
    is_number,
    last,
    link,
    names,
    read,
    there,
    write,
)


class Functions:
    """Binding, power, driver overrides, uevents. `sysfs` and `dev` are where those lie."""

    def __init__(self, sysfs: str, dev: str) -> None:
        self._sysfs = sysfs
        self._dev = dev
        self._groups: dict[str, int] = {}

    def capture(self, attributes: str, *addresses: str) -> list[str]:
        """For each function: its address, driver, the driver's module, and each of the attributes; "" for none.

        `attributes` are paths below its folder, joined by commas; with a `?`, it may have none such.

        driver_override comes first: on 6.1 reading it takes the device lock (driver_override_show in
        drivers/pci/pci-sysfs.c), so a bind or unbind that was under way is over before the driver link is read. Where
        the driver core has it (drivers/base/bus.c in 7.2, and in Debian's 6.12 since 6.12.94-1), neither reading nor
        writing takes more than a spinlock. There the first write to power/control waits, and a function whose unbind by
        somebody else hangs counts as driverless, which it is about to be.
        """
        values = []
        for address in addresses:
            settings = [self._setting(address, attribute) for attribute in attributes.split(",")]
            driver = link(f"{self._device(address)}/driver")
            module = link(f"{self._sysfs}/bus/pci/drivers/{driver}/module") if driver else ""
            # A module that is built in has a folder too, but was never initialised from a file.
            if module and not there(f"{self._sysfs}/module/{module}/initstate"):
                module = ""
            values += [address, driver, module, *settings]
        return values

    def _setting(self, address: str, attribute: str) -> str:
        path = _checked_attribute(attribute.rstrip("?"))
        if attribute.endswith("?") and not there(f"{self._device(address)}/{path}"):
            return ""
        value = self._read(address, path)
        return "" if value == "(null)" else value

    def write(self, attribute: str, *pairs: str) -> list[str]:
        """ADDRESS VALUE pairs; "" clears by a newline, since the kernel ignores an empty write."""
        _checked_attribute(attribute)
        for address, value in _pairs(pairs):
            self._write(address, attribute, checked_name(value) if value else "\n")
        return []

    def attribute(self, address: str, path: str) -> list[str]:
        """What one attribute says; no value where the function has no such attribute."""
        there_is = there(f"{self._device(address)}/{_checked_attribute(path)}")
        # Of a function that is not there, reading says so.
        return [self._setting(address, path)] if there_is or not there(self._device(address)) else []

    def set_attribute(self, address: str, path: str, value: str) -> list[str]:
        """Whatever sysfs shows in one line can be written back; "" as in `write`."""
        if not (value.isascii() and value.isprintable()):
            raise OperationError(errno.EINVAL, address, f"{_checked_attribute(path)} is no text of one line")
        self._write(address, _checked_attribute(path), value or "\n")
        return []

    def keep_awake(self, *addresses: str) -> list[str]:
        """Forbid runtime suspend, which resumes synchronously, and see that it did.

        pm_runtime_forbid in drivers/base/power/runtime.c calls rpm_resume and drops its result, so the state has to be
        looked at. `unsupported`: no runtime power management, and so nothing that could put the device to sleep.
        """
        for address in addresses:
            self._write(address, "power/control", "on")
            status = self._read(address, "power/runtime_status")
            if status not in {"active", "unsupported"}:
                raise OperationError(errno.EIO, address, f"it is {status} although power/control is on")
        return []

    def unbind(self, address: str, driver: str) -> list[str]:
        """Through the driver's own folder: there the kernel checks that the function is bound to it."""
        checked_address(address)
        path = f"{self._sysfs}/bus/pci/drivers/{checked_name(driver)}/unbind"
        try:
            write(path, address)
        except FileNotFoundError:
            raise OperationError(errno.ENODEV, address, f"there is no driver {driver}") from None
        except OSError as error:
            raise failure(error, address, {errno.ENODEV: f"it is not bound to {driver}"}) from None
        return []

    def probe(self, address: str, _driver: str) -> list[str]:
        """Let the drivers look at the function; the kernel says EINVAL for whatever a driver's probe failed with."""
        try:
            write(f"{self._sysfs}/bus/pci/drivers_probe", checked_address(address))
        except OSError as error:
            meanings = {errno.ENODEV: "it is not on the PCI bus", errno.EINVAL: "its driver could not take it"}
            raise failure(error, address, meanings) from None
        return []

    def hold_group(self, group: str) -> list[str]:
        """Open /dev/vfio/GROUP; kept until `release_group`, or until this process ends."""
        checked_number(group, "an IOMMU group")
        if group not in self._groups:
            try:
                self._groups[group] = os.open(f"{self._dev}/vfio/{group}", os.O_RDWR | os.O_NOFOLLOW)
            except OSError as error:
                raise failure(error, f"/dev/vfio/{group}", {errno.EBUSY: "somebody else has it open"}) from None
        return []

    def release_group(self, group: str) -> list[str]:
        descriptor = self._groups.pop(group, None)
        if descriptor is not None:
            os.close(descriptor)
        return []

    def announce(self, subsystem: str, action: str, *addresses: str) -> list[str]:
        """A synthetic uevent on each card that lies right below the functions; one that leaves meanwhile is left out.

        The action alone is enough (kobject_synth_uevent in lib/kobject_uevent.c; it adds SYNTH_UUID=0). After such a
        `remove` the kernel still sends its own when the card really goes: device_del does so in any case. udev's rules
        give a sound card back to its listeners (SOUND_INITIALIZED in 78-sound-card.rules) on `change` alone.
        """
        if subsystem not in {"sound", "drm"} or action not in {"remove", "add"}:
            raise OperationError(errno.EINVAL, f"{subsystem} {action}", "this is not announced")
        for address in addresses:
            for card in self._cards(address, subsystem):
                try:
                    for each in ("add", "change") if (subsystem, action) == ("sound", "add") else (action,):
                        write(f"{card}/uevent", each)
                except OSError as error:
                    if error.errno not in {errno.ENOENT, errno.ENODEV}:
                        raise failure(error, f"{address} ({last(card)})") from None
        return []

    def _cards(self, address: str, subsystem: str) -> list[str]:
        """Right below the function, or below an auxiliary device of it (`_places` in ../sysfs.py)."""
        device = self._device(address)
        places = [device, *(f"{device}/{name}" for name in names(device) if name.count(".") == 2)]
        cards = [f"{place}/{subsystem}/{card}" for place in places for card in names(f"{place}/{subsystem}")]
        return [card for card in cards if last(card).startswith("card") and is_number(last(card)[4:])]

    def unbind_platform(self, device: str, driver: str) -> list[str]:
        """ENODEV: it is not bound to that driver (unbind_store in drivers/base/bus.c), or not there any more."""
        folder = self._platform_driver(device, driver)
        try:
            write(f"{folder}/unbind", device)
        except OSError as error:
            if error.errno not in {errno.ENOENT, errno.ENODEV}:
                raise failure(error, device) from None
        return []

    def bind_platform(self, device: str, driver: str) -> list[str]:
        folder = self._platform_driver(device, driver)
        if there(f"{folder}/{device}"):
            return []
        try:
            write(f"{folder}/bind", device)
        except FileNotFoundError:
            raise OperationError(errno.ENODEV, device, f"there is no driver {driver}") from None
        except OSError as error:
            # A driver that takes over a device of the boot's display removes the boot's own (drivers/firmware/sysfb.c).
            meanings = {errno.ENODEV: "it is not there any more", errno.EBUSY: "another driver has it"}
            raise failure(error, device, meanings) from None
        return []

    def _platform_driver(self, device: str, driver: str) -> str:
        """The driver's folder. Both are checked: they become part of a path."""
        name, _, number = device.rpartition(".")
        if driver not in BOOT_DRIVERS or not is_name(name) or not is_number(number):
            raise OperationError(errno.EINVAL, device, f"it is not a boot frame buffer of {driver}")
        return f"{self._sysfs}/bus/platform/drivers/{driver}"

    def _device(self, address: str) -> str:
        return f"{self._sysfs}/bus/pci/devices/{checked_address(address)}"

    def _read(self, address: str, attribute: str) -> str:
        try:
            return read(f"{self._device(address)}/{attribute}")
        except OSError as error:
            raise self._attribute_failure(error, address, attribute) from None

    def _write(self, address: str, attribute: str, value: str) -> None:
        try:
            write(f"{self._device(address)}/{attribute}", value)
        except OSError as error:
            raise self._attribute_failure(error, address, attribute) from None

    def _attribute_failure(self, error: OSError, address: str, attribute: str) -> OperationError:
        """A missing file: either the device is gone, or this kernel has no such attribute."""
        if error.errno != errno.ENOENT:
            return failure(error, address)
        if there(self._device(address)):
            return OperationError(errno.ENOENT, address, f"it has no {attribute}")
        return OperationError(errno.ENODEV, address, "it is not on the PCI bus")


def _pairs(values: tuple[str, ...]) -> list[tuple[str, str]]:
    return list(zip(values[::2], values[1::2], strict=True))


def _checked_attribute(path: str) -> str:
    """An attribute of a function: it becomes part of a path."""
    if not all(map(is_name, path.split("/"))):
        raise OperationError(errno.EINVAL, path, "this is not an attribute of a function")
    return path
