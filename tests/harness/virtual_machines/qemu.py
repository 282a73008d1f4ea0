"""QEMU as a process: its arguments, its streams, and its way into and out of a saved state."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from tests.harness.debian.tools import run
from tests.harness.machines.channel import Channel
from tests.harness.machines.errors import MachineGoneError
from tests.harness.virtual_machines.hardware import Hardware
from tests.harness.virtual_machines.qmp import Qmp
from tests.harness.virtual_machines.relay import Relay

RAM, STATE, DISK, KERNEL, INITRD = "ram", "state", "disk.qcow2", "vmlinux", "initrd"
"""The files of a template's folder. QEMU runs in there, so that no path needs quoting."""

STREAMS = ("qmp", "agent", "shell", "bus")


def arguments(
    hardware: Hardware, streams: dict[str, int], console: int, overlay: int | None, initrd: int | None, *, load: bool
) -> list[str]:
    """QEMU's arguments; streams are the numbers of connected sockets, console, overlay and initrd those of files.

    A template and its clones must differ in nothing but whether RAM and disk are written to.
    """
    memory = f"memory-backend-file,id=ram,size={hardware.memory_mib}M,mem-path={RAM}"
    disk = DISK if overlay is None else f"/dev/fd/{overlay}"
    return [
        *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none"),
        *("-machine", f"{hardware.machine},memory-backend=ram", "-m", f"{hardware.memory_mib}M"),
        *("-object", f"{memory},share={'on' if overlay is None else 'off'}"),
        *("-accel", "tcg,thread=multi", "-cpu", hardware.processor, "-smp", str(hardware.processors)),
        *("-kernel", KERNEL, "-initrd", INITRD if initrd is None else f"/dev/fd/{initrd}"),
        *("-append", hardware.kernel_arguments),
        *("-chardev", f"file,id=console,path=/dev/fd/{console}", "-serial", "chardev:console"),
        *(word for name, fd in streams.items() for word in ("-chardev", f"socket,id={name},fd={fd}")),
        *("-mon", "chardev=qmp,mode=control"),
        *("-audiodev", "none,id=silence"),
        *(word for device in hardware.devices for word in ("-device", json.dumps(dict(device)))),
        *("-drive", f"file={disk},format=qcow2,if=none,id=disk,cache=unsafe"),
        *("-device", "virtio-blk-pci,drive=disk,bus=pcie.0,addr=03.0,iommu_platform=on,disable-legacy=on"),
        *("-device", "virtio-serial-pci,bus=pcie.0,addr=04.0"),
        *("-device", "virtconsole,chardev=shell", "-device", "virtserialport,chardev=agent,name=harness.agent"),
        *("-device", "virtserialport,chardev=bus,name=harness.bus"),
        # tells a clone's kernel that it is one, so that no two draw the same random numbers
        *("-device", "vmgenid,guid=auto"),
        *(["-incoming", "defer"] if load else []),
    ]


def make_overlay(template: Path) -> IO[bytes]:
    """A file without a name, for what a clone writes to its disk."""
    file = tempfile.TemporaryFile(dir=os.environ.get("TMPDIR", "/var/tmp"))  # noqa: SIM115, S108 -- the caller closes it; where QEMU has its own
    name = f"/dev/fd/{file.fileno()}"
    backing = ("-b", template.resolve() / DISK, "-F", "qcow2")
    run(["qemu-img", "create", "-q", "-f", "qcow2", *backing, name], pass_fds=[file.fileno()])
    return file


class Qemu:
    """One QEMU process and the host's ends of its streams. It dies with the thread that made it."""

    def __init__(
        self, hardware: Hardware, template: Path, overlay: int | None, initrd: int | None = None, *, load: bool
    ) -> None:
        """Start it; MachineGoneError with QEMU's own words when it cannot.

        With an overlay (see `make_overlay`) it writes to that, without it to the template. `initrd`: another one than
        the template's. `load`: load() follows.
        """
        self._open = ExitStack()
        # files without a name: nothing is left behind, however we end
        self._console, self._log = os.memfd_create("console"), os.memfd_create("qemu.log")
        for file in (self._console, self._log):
            self._open.callback(os.close, file)
        ours, theirs = zip(*(socket.socketpair() for _ in STREAMS), strict=True)
        fds = {name: end.fileno() for name, end in zip(STREAMS, theirs, strict=True)}
        self.process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *arguments(hardware, fds, self._console, overlay, initrd, load=load)],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            cwd=template,
            pass_fds=(*fds.values(), self._console, *(fd for fd in (overlay, initrd) if fd is not None)),
        )
        for end in theirs:
            end.close()
        ends = {name: self._open.enter_context(end) for name, end in zip(STREAMS, ours, strict=True)}
        self.relay = Relay(ends.pop("bus"), booting=not load)
        self._open.callback(self.relay.close)
        self.channels = {name: Channel(end) for name, end in ends.items()}
        try:
            self.qmp = Qmp(self.channels["qmp"])
        except EOFError:
            gone = self.gone()
            self.kill()
            raise gone from None
        except BaseException:
            self.kill()
            raise

    def save(self) -> None:
        """Write the state of the devices to the template's folder and end. RAM is in its file already."""
        self.qmp.execute("stop")
        self._prepare_migration()
        self.qmp.execute("migrate-set-parameters", {"max-bandwidth": 1 << 40})
        self.qmp.execute("migrate", {"uri": f"exec:cat >{STATE}"})
        self._finish_migration()
        self.qmp.execute("quit")
        self.process.wait()

    def load(self) -> None:
        """Take the state of the devices from the template's folder and run on from there."""
        self._prepare_migration()
        self.qmp.execute("migrate-incoming", {"uri": f"exec:cat {STATE}"})
        self._finish_migration()
        self.qmp.execute("cont")

    def kill(self) -> None:
        """End it, whatever it is doing."""
        self.process.kill()
        self.process.wait()
        self._open.close()

    def gone(self) -> MachineGoneError:
        """The error that tells why QEMU is not there any more."""
        status = self.process.wait()
        logs = f"{contents(self._log)}\n{self.console_tail()}"
        return MachineGoneError(f"cannot go on: QEMU ended with status {status}\n{logs}".rstrip())

    def console_tail(self, lines: int = 60) -> str:
        """The last lines of the kernel's console."""
        return "\n".join(contents(self._console).splitlines()[-lines:])

    def _prepare_migration(self) -> None:
        capabilities = [{"capability": name, "state": True} for name in ("x-ignore-shared", "events")]
        self.qmp.execute("migrate-set-capabilities", {"capabilities": capabilities})

    def _finish_migration(self) -> None:
        ends = ("completed", "failed")
        event = self.qmp.wait_event("MIGRATION", lambda data: data["status"] in ends, timeout=300)
        if event["data"]["status"] == "failed":
            raise MachineGoneError(f"cannot save or load the machine: {contents(self._log)}")


def contents(file: int) -> str:
    """All that was written to a file, without moving the position that QEMU shares with us."""
    return os.pread(file, os.fstat(file).st_size, 0).decode(errors="replace").strip()
