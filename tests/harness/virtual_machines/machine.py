"""An emulated machine, as tests see it."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import IO

from tests.harness.machines import machine
from tests.harness.machines.agent import Agent
from tests.harness.machines.bus import Bus
from tests.harness.machines.channel import Channel
from tests.harness.machines.errors import MachineGoneError
from tests.harness.machines.inside import words
from tests.harness.machines.machine import BOOT_SECONDS, COMMAND_SECONDS
from tests.harness.virtual_machines.hardware import Hardware
from tests.harness.virtual_machines.qemu import STATE, Qemu, make_overlay
from tests.harness.virtual_machines.qmp import Qmp


class Machine(machine.Machine):
    """An emulated PC."""

    SETTLE = "udevadm settle"

    def __init__(self, hardware: Hardware, template: Path, *, clone: bool = True) -> None:
        """Start a clone of the template; or the template itself, which is booted where nothing is saved yet.

        It is there when this returns.
        """
        load = clone or (template / STATE).exists()
        self._hardware = hardware
        self._template = template
        self._overlay = make_overlay(template) if clone else None
        self._initrd: IO[bytes] | None = None
        self._bus: Bus | None = None
        self._qemu = self._start(load=load)
        self.agent = Agent(self._qemu.channels["agent"])
        try:
            with self.explained("not started"):
                self._begin(load=load)
        except BaseException:
            self.kill()
            raise

    @property
    def qmp(self) -> Qmp:
        return self._qemu.qmp

    @property
    def bus_address(self) -> str:
        """Where programs out here, who run as root, find the machine's system bus."""
        return self._qemu.relay.address

    @property
    def bus(self) -> Bus:
        """A client of the machine's system bus, out here; connected when it is first asked for."""
        if self._bus is None:
            with self.explained("no answer from the system bus"):
                self._bus = Bus(self.bus_address)
        return self._bus

    @property
    def shell(self) -> Channel:
        """The other end of the machine's terminal /dev/hvc0."""
        return self._qemu.channels["shell"]

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

    def reset(self, *, timeout: float = BOOT_SECONDS) -> None:
        """Press the reset button and wait until the command channel of the new boot is there. The disk stays."""
        self._leave_bus()
        with self.explained("not booted"):
            self._qemu.relay.forget()
            self.qmp.execute("system_reset")
            self.agent.wait_ready(timeout)

    def cut_power(self, *, timeout: float = BOOT_SECONDS) -> None:
        """Pull the plug of a clone, and wait until the command channel of the new boot is there.

        The disk is as the machine's kernel left it: what it had not written by then is lost.
        """
        self._leave_bus()
        self._qemu.kill()
        self._qemu = self._start(load=False)
        with self.explained("not booted"):
            self.agent.reconnect(self._qemu.channels["agent"])
            self.agent.wait_ready(timeout)

    def boot_with(self, initrd: str, *, timeout: float = BOOT_SECONDS) -> None:
        """Switch a clone off in order, and boot it with an initrd of its own (a path in it), from then on.

        Returns when the command channel of the new boot is there.
        """
        with self.explained(f"{initrd} not read"):
            data = self.agent.reply(self.agent.start(f"cat {initrd}", b"", COMMAND_SECONDS)).stdout
        self.agent.start("systemctl poweroff", b"", COMMAND_SECONDS)
        self.wait_off()
        if self._initrd is not None:
            self._initrd.close()
        # a file without a name: QEMU reads it when it starts
        self._initrd = os.fdopen(os.memfd_create("initrd"), "w+b")
        self._initrd.write(data)
        self._initrd.flush()
        self.cut_power(timeout=timeout)

    def wait_off(self, *, timeout: float = COMMAND_SECONDS) -> None:
        """Wait until the machine has switched itself off."""
        with self.explained("not off"):
            self.qmp.wait_event("SHUTDOWN", timeout=timeout)
        self._qemu.process.wait(timeout)

    def kill(self) -> None:
        self._leave_bus()
        self._qemu.kill()
        for file in (self._overlay, self._initrd):
            if file is not None:
                file.close()

    def save(self) -> None:
        """Make the booted template ready to be cloned, and end it."""
        with self.explained("not saved"):
            self._qemu.relay.wait_up(COMMAND_SECONDS)
            self._qemu.save()

    def console_tail(self, lines: int = 60) -> str:
        return self._qemu.console_tail(lines)

    def gone(self) -> MachineGoneError:
        return self._qemu.gone()

    def _leave_bus(self) -> None:
        if self._bus is not None:
            self._bus.close()
            self._bus = None

    def _start(self, *, load: bool) -> Qemu:
        overlay, initrd = (None if file is None else file.fileno() for file in (self._overlay, self._initrd))
        return Qemu(self._hardware, self._template, overlay, initrd, load=load)

    def _begin(self, *, load: bool) -> None:
        if load:
            self._qemu.load()
            # the time stood still while the template lay in its file
            self.do(words.set_clock, time.time())
        else:
            self.agent.wait_ready(BOOT_SECONDS)
