"""The nodes of vfio, and who may open them: POSIX access control lists, as acl(5) has them.

Kernel: drivers/vfio/group.c (/dev/vfio/GROUP, mode 0600), device_cdev.c (/dev/vfio/devices/vfioN, 0600) and container.c
(/dev/vfio/vfio, 0666: nobody needs more), drivers/iommu/iommufd/main.c (/dev/iommu, 0660). QEMU's `host=` opens the
first and the third, its `iommufd=` the others. Nothing here blocks: /dev is a file system in memory, and no driver
hears of what is written there (shmem_xattr_handlers in mm/shmem.c, posix_acl_xattr_set in fs/posix_acl.c).
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Collection, Iterator
from functools import reduce
from operator import or_
from stat import S_ISCHR, S_ISREG
from typing import NamedTuple

from gpuswitch.errors import KernelError
from gpuswitch.host.linux.reading import entries, first_line, link, there, written
from gpuswitch.host.linux.sysfs import Roots
from gpuswitch.host.port import DeviceNodes, NodesOfVfio
from gpuswitch.model.access import UserAccess
from gpuswitch.model.address import PciAddress

_NAME = "system.posix_acl_access"
# include/uapi/linux/posix_acl_xattr.h: a version, then entries of a tag, permissions and an id, all little-endian.
_HEADER, _ENTRY = struct.Struct("<I"), struct.Struct("<HHI")
_VERSION, _NOBODY = 2, 0xFFFFFFFF
_OWNER, _USER, _OWNING_GROUP, _GROUP, _MASK, _OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
_BEHIND_THE_MASK = frozenset({_USER, _OWNING_GROUP, _GROUP})
_READ, _WRITE = 0o4, 0o2
_MEANINGS = {
    errno.EOPNOTSUPP: "its file system has no access control lists (CONFIG_TMPFS_POSIX_ACL of the kernel is not set)",
    errno.EPERM: "the service lacks CAP_FOWNER",
}


class _Entry(NamedTuple):
    tag: int
    id: int
    permissions: int


class LinuxDeviceNodes(DeviceNodes):
    """Those of the machine that we run on; `roots` say where its files lie."""

    def __init__(self, roots: Roots) -> None:
        self._roots = roots

    def of(self, functions: Collection[PciAddress]) -> NodesOfVfio:
        try:
            found = dict(sorted(self._found(functions)))
            udev_runs = there(f"{self._roots.udev}/control")
            pending = [node for node, numbers in found.items() if self._is_pending(node, numbers, udev_runs=udev_runs)]
            return NodesOfVfio(tuple(found), bool(pending))
        except OSError as error:
            number = error.errno or errno.EIO
            raise KernelError("find", "the device nodes of vfio", number, os.strerror(number)) from error

    def _found(self, functions: Collection[PciAddress]) -> Iterator[tuple[str, str]]:
        """Each node, and its MAJOR:MINOR, as the driver core has them."""
        sysfs, own = self._roots.sysfs, False
        for function in functions:
            folder = f"{sysfs}/bus/pci/devices/{function}"
            group = link(f"{folder}/iommu_group")
            if numbers := group and first_line(f"{sysfs}/class/vfio/{group}/dev"):
                yield f"/dev/vfio/{group}", numbers
            for name, _ in entries(f"{folder}/vfio-dev"):
                # The folder is there without a node where the kernel makes none (CONFIG_VFIO_DEVICE_CDEV).
                if numbers := first_line(f"{folder}/vfio-dev/{name}/dev"):
                    own = True
                    yield f"/dev/vfio/devices/{name}", numbers
        if own and (numbers := first_line(f"{sysfs}/class/misc/iommu/dev")):
            yield "/dev/iommu", numbers

    def _is_pending(self, node: str, numbers: str, *, udev_runs: bool) -> bool:
        """As `nodes.py` tells it: udev writes down what it has done with the node, and that is not older than it."""
        made = written(self._where(node))
        done = written(f"{self._roots.udev}/data/c{numbers}") if udev_runs else made
        return made is None or done is None or done < made

    def permissions(self, access: UserAccess) -> str | None:
        with _Node(self._where(access.node), access.node) as node:
            bits = next((e.permissions for e in _unmasked(node.acl) if (e.tag, e.id) == (_USER, access.uid)), None)
        return None if bits is None else "".join(sign for sign, bit in (("r", _READ), ("w", _WRITE)) if bits & bit)

    def give(self, access: UserAccess) -> None:
        with _Node(self._where(access.node), access.node) as node:
            node.write(_with(node.acl, access.uid))

    def take(self, access: UserAccess) -> None:
        try:
            with _Node(self._where(access.node), access.node) as node:
                if any((e.tag, e.id) == (_USER, access.uid) for e in node.acl):
                    node.write(_without(node.acl, access.uid))
        except KernelError as error:
            # With the node, all that was said of it is gone.
            if error.errno != errno.ENOENT:
                raise

    def _where(self, node: str) -> str:
        return self._roots.dev + node.removeprefix("/dev")


class _Node:
    """One node, without opening it: to open a group is to have it. Raises `KernelError` with what the kernel says."""

    def __init__(self, path: str, name: str) -> None:
        self._path, self._name, self._descriptor = path, name, -1

    def __enter__(self) -> _Node:
        try:
            self._descriptor = os.open(self._path, os.O_PATH | os.O_NOFOLLOW)
            mode = os.fstat(self._descriptor).st_mode
        except OSError as error:
            raise self._failure("find", error) from None
        # A file of a test is taken, too; never a link, or a folder.
        if not (S_ISCHR(mode) or S_ISREG(mode)):
            raise KernelError("use", self._name, errno.ENODEV, "it is no device node")
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    @property
    def _file(self) -> str:
        # An xattr call takes no descriptor of O_PATH (fgetxattr(2)), but what this link stands for is that very node.
        return f"/proc/self/fd/{self._descriptor}"

    @property
    def acl(self) -> list[_Entry]:
        """Its list; what its mode says, where it has none."""
        try:
            content = os.getxattr(self._file, _NAME)
        except OSError as error:
            if error.errno != errno.ENODATA:
                raise self._failure("read the access control list of", error) from None
            mode = os.fstat(self._descriptor).st_mode
            tags = ((_OWNER, 6), (_OWNING_GROUP, 3), (_OTHER, 0))
            return [_Entry(tag, _NOBODY, mode >> shift & 0o7) for tag, shift in tags]
        (version,) = _HEADER.unpack_from(content)
        if version != _VERSION:
            raise KernelError("read the access control list of", self._name, errno.EINVAL, f"it has version {version}")
        return [_Entry(tag, id_, bits) for tag, bits, id_ in _ENTRY.iter_unpack(content[_HEADER.size :])]

    def write(self, acl: list[_Entry]) -> None:
        """The kernel keeps no list that says no more than a mode does, and sets the mode (posix_acl_update_mode)."""
        # In this order (posix_acl_valid in fs/posix_acl.c).
        content = b"".join(_ENTRY.pack(e.tag, e.permissions, e.id) for e in sorted(acl))
        try:
            os.setxattr(self._file, _NAME, _HEADER.pack(_VERSION) + content)
        except OSError as error:
            raise self._failure("change the access control list of", error) from None

    def _failure(self, verb: str, error: OSError) -> KernelError:
        number = error.errno or errno.EIO
        return KernelError(verb, self._name, number, _MEANINGS.get(number, os.strerror(number)))


def _with(acl: list[_Entry], uid: int) -> list[_Entry]:
    """With read and write for this user, and nobody else having more or less than before.

    A mask limits what it covers, and is to let this user through: so the others are given what it left them.
    """
    others = [e for e in _unmasked(acl) if (e.tag, e.id) != (_USER, uid)]
    return _masked([*others, _Entry(_USER, uid, _READ | _WRITE)])


def _without(acl: list[_Entry], uid: int) -> list[_Entry]:
    """Without this user; a list that has none is what a mode says, and needs no mask."""
    others = [e for e in _unmasked(acl) if (e.tag, e.id) != (_USER, uid)]
    return _masked(others) if any(e.tag in {_USER, _GROUP} for e in others) else others


def _masked(acl: list[_Entry]) -> list[_Entry]:
    """With a mask that lets everybody have what their entry says."""
    mask = reduce(or_, (e.permissions for e in acl if e.tag in _BEHIND_THE_MASK), 0)
    return [*acl, _Entry(_MASK, _NOBODY, mask)]


def _unmasked(acl: list[_Entry]) -> list[_Entry]:
    """What each may do in fact, without a mask."""
    mask = next((e.permissions for e in acl if e.tag == _MASK), 0o7)
    return [
        e._replace(permissions=e.permissions & mask) if e.tag in _BEHIND_THE_MASK else e for e in acl if e.tag != _MASK
    ]
