"""A message bus that nobody else knows of. Which program it is, BUS says: dbus-daemon, the default, or dbus-broker."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tests.harness.buses.broker import find_broker
from tests.harness.debian.cache import Say
from tests.harness.debian.errors import HarnessError

CONFIG = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>session</type>
  <listen>unix:path={folder}/bus</listen>
  <servicedir>{folder}/services</servicedir>
  <policy context="default">
    <allow send_destination="*"/><allow eavesdrop="false"/><allow own="*"/><allow user="*"/>
    {rules}
  </policy>
</busconfig>
"""


class BusProgram(Protocol):
    """A program that is a message bus. With `asks_systemd`, it has systemd start the services of its bus."""

    asks_systemd: bool

    def run(self, folder: Path) -> AbstractContextManager[subprocess.Popen[bytes]]:
        """The bus that `folder`/bus.conf describes; `folder`/bus takes connections by now.

        All that belongs to it has its standard output open, and ends when the process is killed.
        """


@dataclass(frozen=True)
class PrivateBus:
    """A bus that runs, with its files in `folder`."""

    folder: Path
    process: subprocess.Popen[bytes]

    @property
    def address(self) -> str:
        return f"unix:path={self.folder}/bus"

    def stop(self) -> None:
        """End it, as a crash of the system bus would. Returns when it is gone."""
        self.process.kill()
        assert self.process.stdout is not None
        self.process.stdout.read()
        self.process.wait()


class Daemon:
    """dbus-daemon, of this machine."""

    asks_systemd = False

    @contextmanager
    def run(self, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
        options = [f"--config-file={folder}/bus.conf", "--nofork", "--nopidfile", "--nosyslog", "--print-address"]
        command = ["dbus-daemon", *options]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdout is not None
            process.stdout.readline()
            yield process


def find_daemon(_: Say) -> BusProgram:
    if shutil.which("dbus-daemon") is None:
        raise HarnessError("dbus-daemon is missing; install it: apt-get install dbus-daemon")
    return Daemon()


PROGRAMS: dict[str, Callable[[Say], BusProgram]] = {"dbus-daemon": find_daemon, "dbus-broker": find_broker}


def chosen() -> str:
    """The program that BUS names. Raises HarnessError where it is none."""
    name = os.environ.get("BUS") or "dbus-daemon"
    if name not in PROGRAMS:
        raise HarnessError(f"cannot test on BUS={name}: it is one of {', '.join(PROGRAMS)}")
    return name


@contextmanager
def running(program: BusProgram, folder: Path, *, rules: str = "") -> Iterator[PrivateBus]:
    """A bus on which all may own, send and receive but for `rules`. It is at `folder`/bus, ready for connections."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "services").mkdir(exist_ok=True)
    (folder / "bus").unlink(missing_ok=True)
    (folder / "bus.conf").write_text(CONFIG.format(folder=folder, rules=rules))
    with program.run(folder) as process:
        bus = PrivateBus(folder, process)
        try:
            yield bus
        finally:
            bus.stop()
