"""A running machine, as tests see it."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from tests.debian.errors import RigError
from tests.vm.rig.agent import Agent
from tests.vm.rig.channel import Channel
from tests.vm.rig.errors import CommandFailedError, CommandTimeoutError, Result
from tests.vm.rig.hardware import Hardware
from tests.vm.rig.qemu import Qemu, make_overlay
from tests.vm.rig.qmp import Qmp

COMMAND_SECONDS = 120.0
BOOT_SECONDS = 300.0

COME_UP = """\
systemctl is-system-running --wait >/dev/null
udevadm settle
bad=$({
    # systemd does not call a service failed, or the system degraded, that crashes and is started anew
    systemctl list-units --state=failed,auto-restart --plain --no-legend | cut -d ' ' -f 1
    systemctl show -p Id -p NRestarts '*.service' |
        awk 'BEGIN { RS = ""; FS = "\\n" } !/NRestarts=0/ { sub(/.*Id=/, ""); sub(/\\n.*/, ""); print }'
} | sort -u)
test -n "$bad" || exit 0
echo $bad
for unit in $bad; do journalctl -b -n 40 -o cat --no-pager -u "$unit"; done
exit 1
"""


class Job:
    """A command that runs in a machine while the test does something else."""

    def __init__(self, machine: Machine, command: str, number: int) -> None:
        self._machine = machine
        self._command = command
        self._number = number

    def ended(self) -> bool:
        """Whether it has ended by now. Raises MachineGoneError as wait() does."""
        with self._machine.explained(f"no reply to {self._command!r}"):
            return self._machine.agent.has_reply(self._number)

    def wait(self, *, check: bool = True) -> Result:
        """Wait until it ends; once. With check, another status than 0 is an error.

        Raises:
            CommandFailedError, CommandTimeoutError: with both outputs and the end of the console.
            MachineGoneError: QEMU ended, or the machine was booted anew.
        """
        with self._machine.explained(f"no reply to {self._command!r}"):
            reply = self._machine.agent.reply(self._number)
        stdout, stderr = (data.decode(errors="replace") for data in (reply.stdout, reply.stderr))
        result = Result(self._command, reply.status, stdout, stderr)
        if reply.timed_out:
            raise CommandTimeoutError("ran out of time", result, self._machine.console_tail())
        if check and reply.status != 0:
            raise CommandFailedError(f"ended with status {reply.status}", result, self._machine.console_tail())
        return result


class Machine:
    """An emulated PC with a command channel. For one thread; use start() to have commands run side by side.

    All methods that talk to it raise MachineGoneError when QEMU has ended, and TimeoutError when it does not answer.
    """

    def __init__(self, hardware: Hardware, template: Path, *, clone: bool = True) -> None:
        """Start a clone of the template, or boot the template itself; both are there when this returns."""
        self._hardware = hardware
        self._template = template
        self._overlay = make_overlay(template) if clone else None
        self._qemu = self._start(load=clone)
        self.agent = Agent(self._qemu.channels["agent"])
        try:
            with self.explained("not started"):
                self._begin(clone=clone)
        except BaseException:
            self.kill()
            raise

    @property
    def qmp(self) -> Qmp:
        return self._qemu.qmp

    @property
    def shell(self) -> Channel:
        """The other end of the machine's terminal /dev/hvc0."""
        return self._qemu.channels["shell"]

    def sh(
        self, command: str, *, stdin: str | bytes = b"", check: bool = True, timeout: float = COMMAND_SECONDS
    ) -> Result:
        """Run a command with /bin/sh as root in `/` and wait for it; timeout in seconds, then SIGKILL to its group.

        A command may leave processes in the background. Raises as Job.wait() does.
        """
        return self.start(command, stdin=stdin, timeout=timeout).wait(check=check)

    def start(self, command: str, *, stdin: str | bytes = b"", timeout: float = COMMAND_SECONDS) -> Job:
        """Start a command as sh() does, without waiting for it."""
        data = stdin.encode() if isinstance(stdin, str) else stdin
        with self.explained(f"{command!r} not started"):
            return Job(self, command, self.agent.start(command, data, timeout))

    def push(self, content: str | bytes, path: str, *, mode: int = 0o644) -> None:
        """Write a file, making its folders."""
        quoted = shlex.quote(path)
        self.sh(f"mkdir -p $(dirname {quoted}) && cat >{quoted} && chmod {mode:o} {quoted}", stdin=content)

    def device_del(self, device_id: str, *, timeout: float = 60) -> None:
        """Pull a device (an id of hardware.DEVICE_IDS), and with it all functions of its slot.

        Returns when the machine's kernel has let go of it: QEMU's event DEVICE_DELETED.
        """
        with self.explained(f"device {device_id} not let go"):
            self.qmp.execute("device_del", {"id": device_id})
            self.qmp.wait_event("DEVICE_DELETED", lambda data: data.get("device") == device_id, timeout=timeout)

    def device_add(self, device_id: str) -> None:
        """Put a device back as it was. Of several functions of a slot, function 0 comes last: it brings all.

        Returns at once; wait_for_device() waits until the machine has it.
        """
        with self.explained(f"device {device_id} not added"):
            self.qmp.execute("device_add", self._hardware.device(device_id))

    def wait_for_device(self, address: str, driver: str, *, timeout: float = 60) -> None:
        """Wait until a PCI function is there and bound to that driver, and udev is done with both."""
        link = f"/sys/bus/pci/drivers/{driver}/{address}"
        self.sh(f"udevadm wait --timeout={timeout:g} {link} && udevadm settle", timeout=timeout + 30)

    def wait_until_up(self, *, timeout: float = BOOT_SECONDS) -> None:
        """Wait until systemd has started everything and udev is done.

        Raises:
            RigError: units have failed, or fail and are started over and over; with their names and their log.
        """
        up = self.sh(COME_UP, check=False, timeout=timeout)
        if up.status != 0:
            raise RigError(f"cannot go on: units have failed while the machine came up: {up.stdout}{up.stderr}")

    def reset(self, *, timeout: float = BOOT_SECONDS) -> None:
        """Press the reset button and wait until the command channel of the new boot is there. The disk stays."""
        with self.explained("not booted"):
            self.qmp.execute("system_reset")
            self.agent.wait_ready(timeout)

    def cut_power(self, *, timeout: float = BOOT_SECONDS) -> None:
        """Pull the plug of a clone, and wait until the command channel of the new boot is there.

        The disk is as the machine's kernel left it: what it had not written by then is lost.
        """
        self._qemu.kill()
        self._qemu = self._start(load=False)
        with self.explained("not booted"):
            self.agent.reconnect(self._qemu.channels["agent"])
            self.agent.wait_ready(timeout)

    def wait_off(self, *, timeout: float = COMMAND_SECONDS) -> None:
        """Wait until the machine has switched itself off."""
        with self.explained("not off"):
            self.qmp.wait_event("SHUTDOWN", timeout=timeout)
        self._qemu.process.wait(timeout)

    def kill(self) -> None:
        self._qemu.kill()
        if self._overlay is not None:
            self._overlay.close()

    def save(self) -> None:
        """Make the booted template ready to be cloned, and end it."""
        with self.explained("not saved"):
            self._qemu.save()

    def console_tail(self, lines: int = 60) -> str:
        """The last lines of the kernel's console."""
        return self._qemu.console_tail(lines)

    def __enter__(self) -> Machine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    @contextmanager
    def explained(self, what: str) -> Iterator[None]:
        """Let errors of the channels say what they stopped, and what QEMU and the console have to say."""
        try:
            yield
        except EOFError:
            raise self._qemu.gone() from None
        except TimeoutError:
            raise TimeoutError(f"{what} in time; the console:\n{self.console_tail()}") from None

    def _start(self, *, load: bool) -> Qemu:
        overlay = None if self._overlay is None else self._overlay.fileno()
        return Qemu(self._hardware, self._template, overlay, load=load)

    def _begin(self, *, clone: bool) -> None:
        if clone:
            self._qemu.load()
            # the time stood still while the template lay in its file
            self.sh(f"date -s @{time.time():.3f}")
        else:
            self.agent.wait_ready(BOOT_SECONDS)
