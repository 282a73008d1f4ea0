"""Who may open the nodes of vfio: access control lists of files, which the kernel that we run on keeps."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from gpuswitch.errors import InvalidArgument, KernelError
from gpuswitch.host.linux.device_nodes import LinuxDeviceNodes
from gpuswitch.host.linux.sysfs import Roots
from gpuswitch.model.access import UserAccess
from tests.harness.facts import at

GROUP, OWN, IOMMU = "/dev/vfio/12", "/dev/vfio/devices/vfio0", "/dev/iommu"
KIM, MAX = UserAccess(1234, GROUP), UserAccess(1235, GROUP)
CARD, SOUND = at("0000:01:00.0"), at("0000:01:00.1")
OWNER, USER, OWNING_GROUP, NAMED_GROUP, MASK, OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
"""include/uapi/linux/posix_acl.h"""
ANY = 2**32 - 1

Acl = list[tuple[int, int, int]]
"""Tag, permissions, id."""


@pytest.fixture
def roots(tmp_path: Path) -> Roots:
    return Roots(sysfs=str(tmp_path / "sys"), dev=str(tmp_path / "dev"), udev=str(tmp_path / "udev"))


@pytest.fixture
def nodes(roots: Roots) -> LinuxDeviceNodes:
    return LinuxDeviceNodes(roots)


@pytest.fixture
def node(roots: Roots) -> Path:
    return made(roots, GROUP)


def made(roots: Roots, name: str, mode: int = 0o600) -> Path:
    path = Path(roots.dev + name.removeprefix("/dev"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    path.chmod(mode)
    return path


def acl(path: Path) -> Acl:
    """Empty: there is none beside the mode."""
    try:
        content = os.getxattr(path, "system.posix_acl_access")
    except OSError as error:
        if error.errno != errno.ENODATA:
            raise
        return []
    return [(tag, bits, id_) for tag, bits, id_ in struct.iter_unpack("<HHI", content[4:])]


def set_acl(path: Path, *entries: tuple[int, int, int]) -> None:
    content = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    os.setxattr(path, "system.posix_acl_access", content)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.mark.parametrize("before", [0o600, 0o660, 0o640, 0o666])
def test_what_is_given_is_taken_and_the_mode_is_as_before(before: int, nodes: LinuxDeviceNodes, node: Path) -> None:
    node.chmod(before)
    assert nodes.permissions(KIM) is None
    nodes.give(KIM)
    assert nodes.permissions(KIM) == "rw"
    group, others = before >> 3 & 7, before & 7
    assert acl(node) == [
        (OWNER, 6, ANY),
        (USER, 6, 1234),
        (OWNING_GROUP, group, ANY),
        (MASK, 6, ANY),
        (OTHER, others, ANY),
    ]
    nodes.give(MAX)
    nodes.take(KIM)
    assert (nodes.permissions(KIM), nodes.permissions(MAX)) == (None, "rw")
    nodes.take(MAX)
    nodes.take(MAX)
    assert (acl(node), mode(node)) == ([], before)


def test_what_others_have_stays(nodes: LinuxDeviceNodes, node: Path) -> None:
    """An entry of another user, and of a group; and nobody has more than the mask has let him."""
    set_acl(
        node,
        (OWNER, 6, ANY),
        (USER, 6, 77),
        (OWNING_GROUP, 6, ANY),
        (NAMED_GROUP, 7, 88),
        (MASK, 4, ANY),
        (OTHER, 0, ANY),
    )
    nodes.give(KIM)
    assert acl(node) == [
        (OWNER, 6, ANY),
        (USER, 4, 77),
        (USER, 6, 1234),
        (OWNING_GROUP, 4, ANY),
        (NAMED_GROUP, 4, 88),
        (MASK, 6, ANY),
        (OTHER, 0, ANY),
    ]
    assert nodes.permissions(UserAccess(77, GROUP)) == "r"
    nodes.take(KIM)
    assert acl(node) == [
        (OWNER, 6, ANY),
        (USER, 4, 77),
        (OWNING_GROUP, 4, ANY),
        (NAMED_GROUP, 4, 88),
        (MASK, 4, ANY),
        (OTHER, 0, ANY),
    ]


def test_a_node_that_is_not_there(nodes: LinuxDeviceNodes) -> None:
    for ask in (nodes.permissions, nodes.give):
        with pytest.raises(KernelError, match=GROUP) as raised:
            ask(KIM)
        assert raised.value.errno == errno.ENOENT
    nodes.take(KIM)


@pytest.mark.parametrize("put", [lambda path: path.symlink_to("/dev/null"), Path.mkdir], ids=["a link", "a folder"])
def test_what_is_no_node_is_left_alone(put: Callable[[Path], None], roots: Roots, nodes: LinuxDeviceNodes) -> None:
    path = Path(roots.dev, "vfio", "12")
    path.parent.mkdir(parents=True)
    put(path)
    before = os.lstat(path).st_mode
    with pytest.raises(KernelError, match="it is no device node"):
        nodes.give(KIM)
    assert os.lstat(path).st_mode == before


def test_a_file_system_without_lists_says_so(nodes: LinuxDeviceNodes, roots: Roots) -> None:
    """As tmpfs is without CONFIG_TMPFS_POSIX_ACL; procfs has none on any kernel."""
    elsewhere = LinuxDeviceNodes(Roots(dev="/proc", sysfs=roots.sysfs, udev=roots.udev))
    with pytest.raises(KernelError, match="its file system has no access control lists") as raised:
        elsewhere.give(UserAccess(1234, "/dev/version"))
    assert raised.value.errno == errno.EOPNOTSUPP


# Which nodes there are ----------------------------------------------------------------------------------------------


def write(root: str, path: str, text: str = "") -> None:
    file = Path(root, path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def in_group(roots: Roots, number: int = 12) -> None:
    for function in (CARD, SOUND):
        folder = Path(roots.sysfs, "bus/pci/devices", str(function))
        folder.mkdir(parents=True)
        (folder / "iommu_group").symlink_to(f"../../../kernel/iommu_groups/{number}")


def on_vfio(roots: Roots, *, own: bool) -> None:
    """`own`: each function has a node of its own (CONFIG_VFIO_DEVICE_CDEV)."""
    write(roots.sysfs, "class/vfio/12/dev", "237:0\n")
    for number, function in enumerate((CARD, SOUND)):
        folder = f"bus/pci/devices/{function}/vfio-dev/vfio{number}"
        Path(roots.sysfs, folder).mkdir(parents=True)
        if own:
            write(roots.sysfs, f"{folder}/dev", f"511:{number}\n")
    if own:
        write(roots.sysfs, "class/misc/iommu/dev", "10:124\n")


def test_nothing_is_on_vfio(roots: Roots, nodes: LinuxDeviceNodes) -> None:
    in_group(roots)
    assert nodes.of([CARD, SOUND]) == ((), False)


@pytest.mark.parametrize("own", [False, True])
def test_the_group_and_where_there_are_such_what_iommufd_wants(
    roots: Roots, nodes: LinuxDeviceNodes, *, own: bool
) -> None:
    in_group(roots)
    on_vfio(roots, own=own)
    names = (IOMMU, GROUP, OWN, "/dev/vfio/devices/vfio1") if own else (GROUP,)
    assert nodes.of([CARD, SOUND]) == (names, True)
    for name in names:
        made(roots, name)
    assert nodes.of([CARD, SOUND]) == (names, False)


def test_udev_is_waited_for_where_it_runs(roots: Roots, nodes: LinuxDeviceNodes) -> None:
    in_group(roots)
    on_vfio(roots, own=False)
    node = made(roots, GROUP)
    write(roots.udev, "control")
    assert nodes.of([CARD]).pending
    write(roots.udev, "data/c237:0")
    assert not nodes.of([CARD]).pending
    # Of an earlier node of that number.
    os.utime(Path(roots.udev, "data/c237:0"), ns=(0, node.stat().st_mtime_ns - 1))
    assert nodes.of([CARD]).pending


@pytest.mark.parametrize(
    "text",
    [
        *("", "1000", "/dev/vfio/12", "-1 /dev/vfio/12", "01 /dev/vfio/12", "4294967295 /dev/vfio/12", "x /dev/vfio/1"),
        *("1 /etc/passwd", "1 /dev/../etc/passwd", "1 /dev/vfio//1", "1 /dev", "1 /dev/vfio/1\n", "1  /dev/vfio/1"),
    ],
)
def test_nothing_else_is_an_access(text: str) -> None:
    with pytest.raises(InvalidArgument):
        UserAccess.parse(text)
    assert UserAccess.parse(str(KIM)) == KIM
