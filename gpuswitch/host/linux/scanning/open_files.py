"""What processes have open and mapped, by device number: a container's own nodes have their own inodes and paths."""

import ctypes
import errno
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from stat import S_IFMT, S_IFREG
from typing import Generic, TypeVar

from gpuswitch.host.linux.scanning.files import contents, is_gone, last, names, number_text, target, text
from gpuswitch.host.linux.scanning.watch import in_turn

_LIBC = ctypes.CDLL(None, use_errno=True)
# Declared argument types would make each call a fifth slower, and this is the call that there are 20,000 of.
_STATX = _LIBC.statx
_LIBC.syscall.argtypes = (ctypes.c_long,) * 6
_LIBC.syscall.restype = ctypes.c_long
# AT_STATX_DONT_SYNC | AT_NO_AUTOMOUNT
_DO_NOT_ASK = 0x4000 | 0x800
# include/uapi/asm-generic/unistd.h, and the tables of the others. The C library has no function for it.
_KCMP = {"x86_64": 312, "aarch64": 272, "riscv64": 272, "loongarch64": 272, "ppc64le": 354}.get(os.uname().machine, -1)
_KCMP_FILE = 0
_KCMP_FILES = 2
_GONE = frozenset({errno.ENOENT, errno.ESRCH})
_DENIED = frozenset({errno.EACCES, errno.EPERM})
MACHINE_NODES = ("kvm", "mshv", "vboxdrv", "vmmon", "vfio/*", "vfio/devices/*")
"""What those have open who run virtual machines: KVM, Hyper-V, VirtualBox, VMware; and what is passed through."""
# kvm_dev_ioctl_create_vm in virt/kvm/kvm_main.c and vfio_device_open_file in drivers/vfio/group.c: they outlive the
# descriptor of the node that they were made by.
_VFIO_DEVICE = "anon_inode:[vfio-device]"
_MACHINE_INODES = ("anon_inode:kvm-vm", _VFIO_DEVICE)
_DRM = "c226:"
_DRM_DEVICE = re.compile(r"^drm-pdev:\s*(\S+)", re.MULTILINE)
# Since Linux 7.2 it is told whose it is (vfio_device_show_fdinfo in drivers/vfio/vfio_main.c).
_VFIO_PATH = re.compile(r"^vfio-device-syspath:\s*(\S+)", re.MULTILINE)
# Address, permissions, offset; then device, inode and path, which together tell a file (btrfs gives an inode number out
# more than once). What has inode 0 is no file.
_MAPPING = re.compile(rb"^(\S++) \S++ \S++ (\S++ [1-9].*+)$", re.MULTILINE)

_Found = TypeVar("_Found")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to look for: device numbers; and these functions' DRM devices that are no more, but still open.

    `machines` are the numbers of `MACHINE_NODES`: who has one open is looked for no more than others are, but told.
    `vfio`: and descriptors of the functions themselves, as VFIO gives them out of a group that somebody else may have.
    """

    proc: str
    sysfs: str
    numbers: frozenset[str]
    functions: frozenset[str]
    machines: frozenset[str] = frozenset()
    vfio: bool = False


@dataclass(frozen=True, slots=True)
class Opened:
    """A descriptor of a device. `task` is the process, or the thread of it that has a table of its own."""

    number: str
    task: int
    descriptor: int


@dataclass(slots=True)
class Seen:
    """What one process has of the devices. `folder` is its folder in /proc, open for as long as it is looked at.

    `machine`: it runs a virtual machine.
    """

    pid: int
    folder: int
    opened: list[Opened] = field(default_factory=list)
    mapped: set[str] = field(default_factory=set)
    doubt: str = ""
    machine: bool = False


def order(one: Opened, other: Opened) -> int:
    """Of two descriptors: 0 if they are the same open file, else the kernel's order of the files (kcmp(2)).

    Two that nobody can compare count as the same. (The kernel's graphics drivers cannot be built without kcmp.)
    """
    found = _LIBC.syscall(_KCMP, one.task, other.task, _KCMP_FILE, one.descriptor, other.descriptor)
    return {1: -1, 2: 1}.get(found, 0)


def look(wanted: Wanted, pids: Sequence[str], judge: Callable[[Seen], _Found]) -> tuple[list[_Found], list[str]]:
    """Look at these processes: what `judge` makes of each that has a wanted device, or may have one.

    And those that did not let themselves be looked at.
    """
    return in_turn(lambda: _Look(wanted, judge), pids)


class _Look(Generic[_Found]):
    """Looks at one process after the other."""

    def __init__(self, wanted: Wanted, judge: Callable[[Seen], _Found]) -> None:
        self.ticks = 0
        self._wanted = wanted
        self._judge = judge
        # The mapped files seen so far, those of all processes; and which of them are wanted devices.
        self._files: set[bytes] = set()
        self._devices: dict[bytes, str] = {}
        self._buffer = ctypes.create_string_buffer(256)
        self._address = ctypes.c_void_p(ctypes.addressof(self._buffer))
        # struct statx in include/uapi/linux/stat.h: stx_mode; stx_rdev_major and stx_rdev_minor.
        view = memoryview(self._buffer).cast("B")
        self._mode = view[28:30].cast("H")
        self._numbers = view[128:136].cast("I")

    def process(self, pid: str, tell: Callable[[_Found], None]) -> None:
        self.ticks += 1
        try:
            folder = os.open(f"{self._wanted.proc}/{pid}", os.O_PATH | os.O_DIRECTORY)
        except OSError as error:
            if is_gone(error):
                return
            raise
        try:
            seen = Seen(int(pid), folder)
            self._task(seen, seen.pid, folder)
            self._threads(seen)
            if seen.opened or seen.mapped or seen.doubt:
                seen.machine = seen.machine or _has_machine(folder)
                tell(self._judge(seen))
        finally:
            os.close(folder)

    def _threads(self, seen: Seen) -> None:
        """Those threads whose descriptors are not the process's (clone(2) without CLONE_FILES), or that outlived it.

        The kernel compares the tables of two of them in a microsecond, so each thread can be asked about.
        """
        try:
            # A link for each, beside the folder's own two (proc_task_getattr in fs/proc/base.c).
            threads = os.stat("task", dir_fd=seen.folder).st_nlink - 2
        except OSError as error:
            if is_gone(error):
                return
            raise
        for name in names(f"{self._wanted.proc}/{seen.pid}/task") if threads > 1 else ():
            task = int(name)
            if task == seen.pid or _LIBC.syscall(_KCMP, seen.pid, task, _KCMP_FILES, 0, 0) == 0:
                continue
            try:
                folder = os.open(f"{self._wanted.proc}/{name}", os.O_PATH | os.O_DIRECTORY)
            except OSError as error:
                if is_gone(error):
                    continue
                raise
            try:
                self._task(seen, task, folder)
            finally:
                os.close(folder)

    def _task(self, seen: Seen, task: int, folder: int) -> None:
        try:
            self._descriptors(seen, task, folder)
        except OSError as error:
            if error.errno not in _GONE:
                seen.doubt = "its descriptors cannot be read"
        try:
            self._mappings(seen, folder)
        except OSError as error:
            if error.errno not in _GONE:
                seen.doubt = seen.doubt or "its mappings cannot be read"

    def _descriptors(self, seen: Seen, task: int, folder: int) -> None:
        table = os.open("fd", os.O_RDONLY | os.O_DIRECTORY, dir_fd=folder)
        try:
            for name in os.listdir(table):  # noqa: PTH208 - a Path cannot be a descriptor
                number = self._number(table, name.encode())
                if not number:
                    if self._wanted.vfio and number is not None and self._is_vfio_device(table, folder, name):
                        seen.opened.append(Opened(_VFIO_DEVICE, task, int(name)))
                    continue
                if number in self._wanted.machines:
                    seen.machine = True
                if number in self._wanted.numbers or (
                    number.startswith(_DRM) and self._is_left_over(number, folder, name)
                ):
                    seen.opened.append(Opened(number, task, int(name)))
        finally:
            os.close(table)

    def _is_vfio_device(self, table: int, folder: int, name: str) -> bool:
        """Neither it nor any file without a type has a number: its name tells, and then its driver whose it is."""
        if S_IFMT(self._mode[0]) not in {0, S_IFREG} or target(name, table) != _VFIO_DEVICE:
            return False
        device = _VFIO_PATH.search(text(f"fdinfo/{name}", folder))
        return device is not None and last(device[1]) in self._wanted.functions

    def _is_left_over(self, number: str, folder: int, name: str) -> bool:
        """A DRM device that the kernel shows no more stays open, and keeps its number; its driver may say whose it was.

        What is still there is somebody else's, or it would be wanted; asking its driver can wait for that GPU.
        """
        if os.path.exists(f"{self._wanted.sysfs}/dev/char/{number[1:]}"):  # noqa: PTH110 - a Path takes ten times as long
            return False
        device = _DRM_DEVICE.search(text(f"fdinfo/{name}", folder))
        return device is not None and device[1] in self._wanted.functions

    def _mappings(self, seen: Seen, folder: int) -> None:
        """Each file is looked at once, in the first process that has it mapped."""
        mapped = {file: addresses for addresses, file in _MAPPING.findall(contents("maps", folder))}
        for file in mapped.keys() - self._files:
            # In map_files, addresses have no zeros in front (dname_to_vma_addr in fs/proc/base.c).
            first, last = (address.lstrip(b"0") or b"0" for address in mapped[file].split(b"-"))
            number = self._number(folder, b"map_files/%b-%b" % (first, last))
            if number is not None:
                self._files.add(file)
                if number in self._wanted.numbers:
                    self._devices[file] = number
        seen.mapped.update(self._devices[file] for file in mapped.keys() & self._devices.keys())

    def _number(self, folder: int, name: bytes) -> str | None:
        """The device number of what a link in /proc leads to: "" for what is no device, None for what is gone.

        statx(2) can be told not to ask a file server, which may be dead. What its file system cannot tell is no device
        node: those need no asking.

        Raises:
            OSError: this may not be known.
        """
        self.ticks += 1
        if _STATX(folder, name, _DO_NOT_ASK, 0, self._address) == 0:
            major = self._numbers[0]
            return number_text(self._mode[0], major, self._numbers[1]) if major else ""
        error = ctypes.get_errno()
        if error in _DENIED:
            raise OSError(error, os.strerror(error))
        return None if error in _GONE else ""


def _has_machine(folder: int) -> bool:
    """Whether a process has a virtual machine that has no node; False where its descriptors cannot be read."""
    try:
        table = os.open("fd", os.O_RDONLY | os.O_DIRECTORY, dir_fd=folder)
    except OSError:
        return False
    try:
        return any(target(name, table) in _MACHINE_INODES for name in os.listdir(table))  # noqa: PTH208 - a Path cannot be a descriptor
    finally:
        os.close(table)
