"""What libvirt's QEMU driver has in its books, and whether its daemon is there: read from its state folder, no call.

A call would wait for whatever the daemon waits for, and be lost with it. In libvirt 9.0 to 12.8 (src/qemu):

- `NAME.xml` is what a daemon that starts again knows of a machine: written when QEMU was started and at every change
  (virDomainObjSave, by way of a new file that takes its place), unlinked once what the machine had was reset and given
  back (qemuProcessStop: qemuHostdevReAttachDomainDevices, qemuProcessRemoveDomainStatus, then the hook with `release`);
- `driver.pid` is locked for as long as the driver runs, in libvirtd or virtqemud (qemuStateInitialize;
  virPidFileAcquirePath in src/util/virpidfile.c locks its first byte).
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from xml.etree import ElementTree as ET

from asyncinotify import Inotify, Mask

from gpuswitch.errors import KernelError
from gpuswitch.host.linux.descriptors import when_readable
from gpuswitch.host.port import Libvirt
from gpuswitch.model.address import PciAddress
from gpuswitch.model.owner import Owner

_LOCK = struct.Struct("@hhqqi")
"""struct flock (fcntl(2)) where off_t has 64 bits: type, whence, start, length, process."""
_PASSED_THROUGH = (
    "devices/hostdev[@type='pci']",
    "devices/interface[@type='hostdev']",
    # qemuHostdevReAttachNVMeDisks; what a disk is based on may be one, too.
    "devices/disk[@type='nvme']",
    "devices/disk//backingStore[@type='nvme']",
)
_MOST = {"domain": 0xFFFFFFFF, "bus": 0xFF, "slot": 0x1F, "function": 7}
"""What each part of an address can be (virPCIDeviceAddressParseXML in src/conf/device_conf.c)."""
_CHANGED = Mask.CREATE | Mask.MODIFY | Mask.MOVED_TO | Mask.MOVED_FROM | Mask.DELETE | Mask.DELETE_SELF


class LinuxLibvirt(Libvirt):
    """The libvirt of this machine; `folder` is where its QEMU driver keeps its state."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    def machines(self) -> Mapping[Owner, frozenset[PciAddress]]:
        found: dict[Owner, frozenset[PciAddress]] = {}
        for file in self._files():
            try:
                owner, functions = _read(file.read_bytes())
                found[owner] = functions
            except (FileNotFoundError, IsADirectoryError):
                continue
            except OSError as error:
                raise _unknown(file, error.errno, str(error.strerror)) from None
            except (ET.ParseError, ValueError, LookupError):  # the last one: in an encoding that nobody knows
                # A machine that libvirt does not know again, either (virDomainObjListLoadAllConfigs).
                continue
        return found

    def file_of(self, owner: Owner) -> str:
        return str(self._folder / f"{owner.name}.xml")

    def running(self) -> bool:
        return self._pid() is not None

    def watch(self, changed: Callable[[], None]) -> Callable[[], None]:
        with ExitStack() as stack:
            try:
                inotify = stack.enter_context(Inotify())
                inotify.add_watch(self._nearest(), _CHANGED)
                if (pid := self._pid()) is not None and (pidfd := _opened(pid)) is not None:
                    stack.callback(os.close, pidfd)
                    when_readable(stack, pidfd, changed)
                when_readable(stack, inotify.fd, changed)
            except OSError as error:
                text = f"cannot wait for a change of it: {os.strerror(error.errno or errno.EIO)}"
                raise KernelError("watch", f"{self._folder}", error.errno or errno.EIO, text) from None
            return stack.pop_all().close

    def _files(self) -> list[Path]:
        try:
            # Not glob: it takes a folder that cannot be read for an empty one.
            return sorted(file for file in self._folder.iterdir() if file.suffix == ".xml")
        except FileNotFoundError:
            return []
        except OSError as error:
            raise _unknown(self._folder, error.errno, str(error.strerror)) from None

    def _pid(self) -> int | None:
        """The process that has the driver, 0 for one of another PID namespace; None where there is none.

        Raises:
            KernelError: nobody can tell.
        """
        file = self._folder / "driver.pid"
        try:
            descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            try:
                asked = _LOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0)
                kind, _, _, _, pid = _LOCK.unpack(fcntl.fcntl(descriptor, fcntl.F_GETLK, asked))
            finally:
                os.close(descriptor)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _unknown(file, error.errno, str(error.strerror)) from None
        return None if kind == fcntl.F_UNLCK else int(pid)

    def _nearest(self) -> Path:
        """The folder, or the one in which it will come to be."""
        return next(folder for folder in (self._folder, *self._folder.parents) if folder.is_dir())


def _read(xml: bytes) -> tuple[Owner, frozenset[PciAddress]]:
    """The machine that a status file tells of, and the functions that it has.

    Raises:
        ET.ParseError, ValueError, LookupError: it makes no sense.
    """
    domain = ET.fromstring(xml).find("domain")  # noqa: S314 -- root's own file, by libvirt
    if domain is None:
        raise ValueError("it tells of no domain")
    addresses = (address for path in _PASSED_THROUGH for address in domain.iterfind(f"{path}/source/address"))
    return Owner(domain.findtext("name", ""), domain.findtext("uuid", "")), frozenset(map(_address, addresses))


def _address(element: ET.Element) -> PciAddress:
    numbers = {part: int(element.get(part, "0"), 0) for part in _MOST}
    if not all(0 <= numbers[part] <= most for part, most in _MOST.items()):
        raise ValueError("it has an address that is none")
    return PciAddress(**numbers)


def _opened(pid: int) -> int | None:
    """A descriptor of this process; None where it is gone, or of another namespace: the folder has to tell then."""
    try:
        return os.pidfd_open(pid) if pid > 0 else None
    except ProcessLookupError:
        return None


def _unknown(file: Path, number: int | None, text: str) -> KernelError:
    return KernelError("read", str(file), number or errno.EIO, text)
