"""A running container, as tests see it."""

from __future__ import annotations

import io
import os
import socket
import struct
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from tests.harness.containers import keeper
from tests.harness.debian.timers import TIMERS
from tests.harness.machines import inside
from tests.harness.machines.agent import Agent
from tests.harness.machines.channel import Channel
from tests.harness.machines.errors import MachineGoneError
from tests.harness.machines.machine import BOOT_SECONDS, COMMAND_SECONDS, Machine

PORT = "/run/host/agent"
SYSTEM_UNITS = "/run/systemd/system"
PEER = struct.Struct("3i")
"""Process, user and group of who is at the other end: unix(7), SO_PEERCRED."""

HARNESS: Mapping[str, str] = {
    **{f"/run/harness/{file.name}": file.read_text() for file in Path(*inside.__path__).glob("*.py")},
    f"{SYSTEM_UNITS}/harness-agent.service": f"""\
[Unit]
Description=Command channel of the test harness
# From early boot until the very end of a shutdown: tests look at both.
DefaultDependencies=no

[Service]
ExecStart=/usr/bin/python3 -ISE /run/harness/agent.py {PORT}
# sets HOME and SHELL
User=root
Environment=LANG=C.UTF-8
# What commands left in the background is theirs.
KillMode=process
""",
    f"{SYSTEM_UNITS}/sysinit.target.d/harness.conf": "[Unit]\nWants=harness-agent.service\n",
    # an empty file masks a unit; the console is systemd's log
    **{f"{SYSTEM_UNITS}/{unit}": "" for unit in (*TIMERS, "console-getty.service")},
}
"""What the harness puts into each container: below /run, so that all else is as packages and project have it."""


class Container(Machine):
    """A container of its own, pristine: layers are folders, the uppermost first, and files by their path lie on top.

    It dies with this process, if not before, and nothing of it is left then.
    """

    JOURNAL = "-n 200"

    def __init__(self, layers: Sequence[Path], files: Mapping[str, str] | None = None) -> None:
        """Boot it; the command channel is there when this returns. MachineGoneError: it does not boot."""
        # a file without a name: nothing is left behind, however we end
        self._console = os.memfd_create("console")
        self._control, theirs = socket.socketpair()
        program = (sys.executable, "-ISE", keeper.__file__, str(theirs.fileno()), str(self._console))
        with theirs, os.fdopen(os.memfd_create("archive"), "w+b") as archive:
            write_archive(archive, {**HARNESS, **(files or {})})
            self.keeper = subprocess.Popen(
                ["unshare", "--mount", "--propagation=private", *program, *layers],
                stdin=archive,
                stdout=self._console,
                stderr=self._console,
                pass_fds=(theirs.fileno(), self._console),
                # ctrl-c ends us, and that ends it
                start_new_session=True,
            )
        try:
            with self.explained("not booted"):
                connection = self._connection(BOOT_SECONDS)
                self.pid: int = PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER.size))[0]
                """Of a process that has the container's namespaces, as this machine counts."""
                self.agent = Agent(Channel(connection))
                self.agent.wait_ready(BOOT_SECONDS)
        except BaseException:
            self.kill()
            raise

    def wait_off(self, *, timeout: float = COMMAND_SECONDS) -> None:
        """Wait until the container has switched itself off."""
        self.keeper.wait(timeout)

    def kill(self) -> None:
        self._control.close()
        self.keeper.wait()

    def console_tail(self, lines: int = 20) -> str:
        text = os.pread(self._console, os.fstat(self._console).st_size, 0).decode(errors="replace")
        return "\n".join(text.replace("\r", "").splitlines()[-lines:])

    def gone(self) -> MachineGoneError:
        self.kill()
        return MachineGoneError(f"cannot go on: the container has ended\n{self.console_tail()}".rstrip())

    def _connection(self, timeout: float) -> socket.socket:
        """The connection to the program inside."""
        self._control.settimeout(timeout)
        data, descriptors, _, _ = socket.recv_fds(self._control, 1, 1)
        if not data:
            raise EOFError
        return socket.socket(fileno=descriptors[0])


def write_archive(archive: IO[bytes], files: Mapping[str, str]) -> None:
    """A tar of these files, to be read from its beginning."""
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for path, text in files.items():
            data = text.encode()
            entry = tarfile.TarInfo(path.lstrip("/"))
            entry.size, entry.mode, entry.mtime = len(data), 0o644, int(time.time())
            tar.addfile(entry, io.BytesIO(data))
    archive.seek(0)
