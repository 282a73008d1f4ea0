"""libvirt's books, read from its state folder: who has what, and whether the daemon is there."""

from __future__ import annotations

import asyncio
import errno
import itertools
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gpuswitch.errors import KernelError
from gpuswitch.host.linux.libvirt import LinuxLibvirt
from gpuswitch.model.address import PciAddress
from gpuswitch.model.owner import Owner

UUID = "5b0f6c9a-1c43-4d8c-9d4e-1d2f3a4b5c6d"
GPU, SOUND, CARD = map(PciAddress.parse, ("0000:01:00.0", "0000:01:00.1", "10000:e1:00.0"))
DISKS = frozenset(map(PciAddress.parse, ("0000:02:00.0", "0000:03:00.0")))
STATUS = f"""\
<!--
WARNING: THIS IS AN AUTO-GENERATED FILE.
-->

<domstatus state='running' reason='booted' pid='4711'>
  <monitor path='/var/lib/libvirt/qemu/domain-1-win11/monitor.sock' type='unix'/>
  <domain type='kvm' id='1'>
    <name>win11</name>
    <uuid>{UUID}</uuid>
    <devices>
      <disk type='block' device='disk'><source dev='/dev/sda'><address type='drive' bus='0'/></source></disk>
      <hostdev mode='subsystem' type='pci' managed='yes'>
        <source><address domain='0x0000' bus='0x01' slot='0x00' function='0x0'/></source>
        <address type='pci' domain='0x0000' bus='0x05' slot='0x00' function='0x0'/>
      </hostdev>
      <hostdev mode='subsystem' type='pci' managed='no'>
        <source><address domain='0x0000' bus='0x01' slot='0x00' function='0x1'/></source>
      </hostdev>
      <disk type='nvme' device='disk'>
        <source type='pci' managed='yes' namespace='1'>
          <address domain='0x0000' bus='0x02' slot='0x00' function='0x0'/>
        </source>
        <backingStore type='nvme'><source type='pci'><address bus='0x03'/></source></backingStore>
      </disk>
      <hostdev mode='subsystem' type='usb'>
        <source><address bus='1' device='2'/></source>
      </hostdev>
      <interface type='hostdev' managed='yes'>
        <source><address type='pci' domain='0x10000' bus='0xe1' slot='0x00' function='0x0'/></source>
      </interface>
    </devices>
  </domain>
</domstatus>
"""
DAEMON = """
import fcntl, sys
with open(sys.argv[1], "w") as file:
    fcntl.lockf(file, fcntl.LOCK_EX, 1)
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "qemu"
    folder.mkdir()
    return folder


@pytest.fixture
def libvirt(folder: Path) -> LinuxLibvirt:
    return LinuxLibvirt(str(folder))


@pytest.fixture
async def daemon(folder: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    command = (sys.executable, "-c", DAEMON, str(folder / "driver.pid"))
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
    assert process.stdout is not None
    assert await process.stdout.readline() == b"locked\n"
    yield process
    if process.returncode is None:
        process.kill()
    await process.wait()


def test_the_functions_of_a_machine(folder: Path, libvirt: LinuxLibvirt) -> None:
    (folder / "win11.xml").write_text(STATUS)
    (folder / "win11.pid").write_text("4711\n")
    [(owner, functions)] = libvirt.machines().items()
    assert (owner, owner.name, functions) == (Owner("win11", UUID), "win11", frozenset({GPU, SOUND, CARD}) | DISKS)
    assert libvirt.file_of(owner) == str(folder / "win11.xml")


def test_no_libvirt(tmp_path: Path) -> None:
    libvirt = LinuxLibvirt(str(tmp_path / "nowhere"))
    assert (dict(libvirt.machines()), libvirt.running()) == ({}, False)


@pytest.mark.parametrize(
    "content",
    [
        *("", "<domstatus>", "<domstatus/>", STATUS.replace("'0x01'", "'one'")),
        *(STATUS.replace("'0x01'", wrong) for wrong in ("'-1'", "'0x100'")),
        *(f"<?xml version='1.0' encoding='{name}'?>{STATUS[STATUS.index('<dom') :]}" for name in ("x", "utf-7")),
    ],
    ids=[
        *("empty", "cut short", "no domain", "no address", "below all addresses", "above all addresses"),
        *("unknown encoding", "encoding of several bytes"),
    ],
)
def test_what_libvirt_does_not_know_again(content: str, folder: Path, libvirt: LinuxLibvirt) -> None:
    (folder / "other.xml").write_text(content.replace(UUID, "another"))
    (folder / "folder.xml").mkdir()
    (folder / "win11.xml").write_text(STATUS)
    assert list(libvirt.machines()) == [Owner("win11", UUID)]


def test_what_cannot_be_read_is_named(folder: Path, libvirt: LinuxLibvirt) -> None:
    (folder / "win11.xml").symlink_to("win11.xml")
    with pytest.raises(KernelError, match=r"cannot read .*win11\.xml: Too many levels") as caught:
        libvirt.machines()
    assert caught.value.errno == errno.ELOOP


async def test_the_daemon_has_the_lock(daemon: asyncio.subprocess.Process, libvirt: LinuxLibvirt) -> None:
    assert libvirt.running()
    daemon.kill()
    await daemon.wait()
    assert not libvirt.running()


async def test_a_pid_that_was_left_behind_is_no_daemon(folder: Path, libvirt: LinuxLibvirt) -> None:
    (folder / "driver.pid").write_text("1\n")
    assert not libvirt.running()


async def test_a_watch_that_fails_leaves_nothing_behind(folder: Path, libvirt: LinuxLibvirt) -> None:
    """What is left with the loop makes the next descriptor of that number deaf."""
    pid = folder / "driver.pid"
    pid.symlink_to("driver.pid")
    with pytest.raises(KernelError):
        libvirt.watch(pytest.fail)
    pid.unlink()
    changed = asyncio.Event()
    unwatch = libvirt.watch(changed.set)
    pid.write_text("1\n")
    await changed.wait()
    unwatch()


async def test_it_is_told_once(folder: Path, libvirt: LinuxLibvirt) -> None:
    told, count = asyncio.Event(), itertools.count(1)

    def tell() -> None:
        assert next(count) == 1
        told.set()

    unwatch = libvirt.watch(tell)
    (folder / "driver.pid").write_text("1\n")
    await told.wait()
    for _ in range(1000):
        await asyncio.sleep(0)
    unwatch()
    assert next(count) == 2


class TestWatch:
    @pytest.fixture
    def changed(self) -> asyncio.Event:
        return asyncio.Event()

    async def test_a_machine_comes_and_goes(self, folder: Path, libvirt: LinuxLibvirt, changed: asyncio.Event) -> None:
        file, new = folder / "win11.xml", folder / "win11.xml.new"
        new.write_text(STATUS)
        for act in (lambda: new.rename(file), file.unlink):
            unwatch = libvirt.watch(changed.set)
            act()
            await changed.wait()
            unwatch()
            changed.clear()

    async def test_the_daemon_ends(
        self, daemon: asyncio.subprocess.Process, libvirt: LinuxLibvirt, changed: asyncio.Event
    ) -> None:
        unwatch = libvirt.watch(changed.set)
        daemon.kill()
        await changed.wait()
        unwatch()

    async def test_the_daemon_comes(self, folder: Path, libvirt: LinuxLibvirt, changed: asyncio.Event) -> None:
        unwatch = libvirt.watch(changed.set)
        (folder / "driver.pid").write_text("1\n")
        await changed.wait()
        unwatch()

    async def test_where_there_is_no_libvirt_yet(self, tmp_path: Path, changed: asyncio.Event) -> None:
        unwatch = LinuxLibvirt(str(tmp_path / "libvirt/qemu")).watch(changed.set)
        (tmp_path / "libvirt").mkdir()
        await changed.wait()
        unwatch()
