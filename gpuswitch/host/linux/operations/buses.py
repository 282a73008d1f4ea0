"""Operations on PCI functions as devices of a bus: reset, removal, rescan."""

import errno

from gpuswitch.host.linux.operations.files import (
    OperationError,
    checked_address,
    failure,
    is_address,
    link,
    read,
    there,
    write,
)


class Buses:
    """What is left when binding does not help. `sysfs` is where that lies."""

    def __init__(self, sysfs: str) -> None:
        self._sysfs = sysfs

    def reset(self, address: str) -> list[str]:
        """The first of the function's reset methods that works (reset_store in drivers/pci/pci-sysfs.c).

        It takes the device lock and keeps the configuration space. ENOTTY: each of them would reset other functions
        too (pci_parent_bus_reset in drivers/pci/pci.c); the kernel offers such a method to function 0, which it finds
        when its bus is still empty.
        """
        device = self._device(address)
        try:
            write(f"{device}/reset", "1")
        except FileNotFoundError:
            if there(device):
                raise OperationError(errno.ENOENT, address, "it has no reset method") from None
            raise OperationError(errno.ENODEV, address, "it is not on the PCI bus") from None
        except OSError as error:
            raise failure(error, address, {errno.ENOTTY: "it cannot be reset by itself"}) from None
        return []

    def remove(self, *addresses: str) -> list[str]:
        """One after the other. The first writer takes the file away, and waits for the driver (remove_store)."""
        for address in addresses:
            device = self._device(address)
            try:
                write(f"{device}/remove", "1")
            except FileNotFoundError:
                if there(device):
                    raise OperationError(errno.EBUSY, address, "somebody else is removing it") from None
            except OSError as error:
                raise failure(error, address) from None
        return []

    def rescan(self, *addresses: str) -> list[str]:
        """Each function's bus by its own `rescan` (bus_rescan_store), which outlives the functions.

        The `rescan` of a bridge scans the bus that the bridge is on, that of /sys/bus/pci every bus, and either finds
        again what others have removed.
        """
        for bus in dict.fromkeys(checked_address(address).rpartition(":")[0] for address in addresses):
            self._rescan_bus(bus)
        return []

    def _rescan_bus(self, bus: str) -> None:
        """Below a bridge that is awake: one with nothing below it may sleep, and this way to scan does not wake it."""
        folder = f"{self._sysfs}/class/pci_bus/{bus}"
        bridge = link(f"{folder}/device")
        control = f"{folder}/device/power/control" if is_address(bridge) else ""
        try:
            before = read(control) if control else "on"
            if before != "on":
                write(control, "on")
            try:
                write(f"{folder}/rescan", "1")
            finally:
                if before != "on":
                    write(control, before)
        except FileNotFoundError:
            raise OperationError(errno.ENODEV, bus, "there is no such bus any more") from None
        except OSError as error:
            raise failure(error, bus) from None

    def _device(self, address: str) -> str:
        return f"{self._sysfs}/bus/pci/devices/{checked_address(address)}"
