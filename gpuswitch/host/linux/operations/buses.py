"""Operations on PCI functions as devices of a bus: reset, removal, rescan."""

import errno
from struct import unpack_from

from gpuswitch.host.linux.operations.files import (
    OperationError,
    checked_address,
    failure,
    is_address,
    link,
    raw,
    read,
    there,
    write,
)

COMMAND, MEMORY_SPACE, NO_ANSWER = 0x04, 0x2, 0xFFFF
BASE_ADDRESSES = range(0x10, 0x28, 4)
"""Where the configuration space of an endpoint has them (include/uapi/linux/pci_regs.h)."""
IORESOURCE_MEM, IORESOURCE_MEM_64, IORESOURCE_UNSET = 0x200, 0x100000, 0x20000000
IORESOURCE_PCI_FIXED, IORESOURCE_PCI_EA_BEI = 0x10, 0x20
"""Flags in `resource` (resource_show in drivers/pci/pci-sysfs.c; include/linux/ioport.h). The last two are of memory
that no base address register has."""
_NO_BASE_ADDRESS = IORESOURCE_UNSET | IORESOURCE_PCI_FIXED | IORESOURCE_PCI_EA_BEI


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

    def lost(self, *addresses: str) -> list[str]:
        """Those that have lost what the kernel had set up in them: somebody else has reset them, or they are dead.

        A base address of 0 where there is memory, no decoding of memory where a driver has enabled it, or no answer at
        all. Reading `config` wakes a sleeping device (pci_read_config in drivers/pci/pci-sysfs.c); `enable` is how
        often it was enabled. A virtual function has no base
        addresses, its memory is in those of its physical function (pci_iov_add_virtfn in drivers/pci/iov.c).
        """
        return [address for address in addresses if self._has_lost(address)]

    def _has_lost(self, address: str) -> bool:
        device = self._device(address)
        try:
            given = [[int(word, 16) for word in line.split()] for line in raw(f"{device}/resource").splitlines()]
            enabled = read(f"{device}/enable") != "0"
            config = raw(f"{device}/config")
        except FileNotFoundError:
            raise OperationError(errno.ENODEV, address, "it is not on the PCI bus") from None
        except OSError as error:
            raise failure(error, address) from None
        bases = [
            # One of 64 bits goes on in the next register: above 4 GiB the lower half of it may be 0.
            unpack_from("<Q" if flags & IORESOURCE_MEM_64 else "<I", config, place)[0] & ~0xF
            for place, (start, _, flags) in zip(BASE_ADDRESSES, given, strict=False)
            if start and flags & IORESOURCE_MEM and not flags & _NO_BASE_ADDRESS
        ]
        (command,) = unpack_from("<H", config, COMMAND)
        if command == NO_ANSWER:
            return True
        if not bases or there(f"{device}/physfn"):
            return False
        return 0 in bases or (enabled and not command & MEMORY_SPACE)

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
