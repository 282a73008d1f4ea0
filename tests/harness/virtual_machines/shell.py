"""A developer's shell in a machine: the terminal here and the machine's /dev/hvc0, joined byte by byte."""

from __future__ import annotations

import os
import select
import shlex
import shutil
import signal
import socket
import sys
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager

from tests.harness.debian.errors import HarnessError
from tests.harness.machines.machine import Job
from tests.harness.virtual_machines.machine import Machine

A_DAY = 86400.0


def interact(machine: Machine) -> None:
    """Run a login shell on this terminal until it exits; what it changed is lost with the machine.

    The shell is a unit of the machine's systemd with a real terminal: line editing, job control and ctrl-c are its own.
    """
    if not sys.stdin.isatty():
        raise HarnessError("cannot give a shell: standard input is not a terminal")
    sys.stdout.write("A machine of your own; `exit` or ctrl-d ends it, and what you changed is gone.\r\n")
    sys.stdout.flush()
    places = "".join(f" -p Standard{name}=tty" for name in ("Input", "Output", "Error"))
    unit = f"systemd-run --quiet --wait --collect --unit=harness-shell{places} -p TTYPath=/dev/hvc0 -p User=root"
    term = shlex.quote(os.environ.get("TERM", "vt100"))
    shell = shlex.quote(f"{set_size()}; exec /bin/bash --login")
    job = machine.start(f"{unit} -p WorkingDirectory=~ -E TERM={term} /bin/sh -c {shell}", timeout=A_DAY)
    with raw_terminal(), resizes() as resized:
        pump(machine, job, resized)
    job.wait(check=False)


def set_size() -> str:
    """The command that gives the machine's terminal the size of this one."""
    size = shutil.get_terminal_size()
    return f"stty -F /dev/hvc0 rows {size.lines} cols {size.columns}"


def pump(machine: Machine, job: Job, resized: socket.socket) -> None:
    """Carry bytes both ways until the shell has ended and all that it wrote is here, or a side is gone."""
    keyboard, screen, terminal = sys.stdin.fileno(), sys.stdout.fileno(), machine.shell.fileno()
    while True:
        ready = select.select([keyboard, terminal, machine.agent.fileno(), resized], [], [])[0]
        if keyboard in ready and not carry(keyboard, terminal):
            return
        if terminal in ready:
            if not carry(terminal, screen):
                return
        elif job.ended():
            return
        if resized in ready:
            resized.recv(4096)
            machine.start(set_size())


def carry(source: int, target: int) -> bool:
    """Carry what is there; False when the source is at its end."""
    data = rest = os.read(source, 1 << 16)
    while rest:
        rest = rest[os.write(target, rest) :]
    return bool(data)


@contextmanager
def raw_terminal() -> Iterator[None]:
    """Every key goes to the machine, ctrl-c too."""
    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setraw(sys.stdin)
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


@contextmanager
def resizes() -> Iterator[socket.socket]:
    """A socket that becomes readable when the window changes its size."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = signal.signal(signal.SIGWINCH, lambda _number, _frame: None)
    signal.set_wakeup_fd(writer.fileno())
    try:
        yield reader
    finally:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGWINCH, before)
        reader.close()
        writer.close()
