#!/usr/bin/python3 -ISE
"""The command channel, the machine's side: runs shell commands as root that come in over a virtio-serial port.

    agent.py PORT

In a container the port is a Unix socket that the other side listens on.

Request:  a JSON line {"id": I, "sh": COMMAND, "in": N, "timeout": SECONDS}, then N bytes for its standard input.
Reply:    a JSON line {"id": I, "status": S, "timed_out": B, "out": N, "err": M}, then N + M bytes: its outputs.
At start: a JSON line {"ready": BOOT_ID} on a line of its own.

Commands run side by side, each in a session of its own. Their input and outputs are files: a pipe would stay open
in whatever they leave running in the background.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import IO, Any

REAP = 2.0
"""Seconds for a killed command to end. One that hangs in the kernel does not, and is left behind."""


def ended(process: subprocess.Popen[bytes], timeout: float) -> bool:
    """Whether the process ends within so many seconds. Popen.wait() would poll; a pidfd wakes at once."""
    pidfd = os.pidfd_open(process.pid)
    try:
        return bool(select.select([pidfd], [], [], timeout)[0])
    finally:
        os.close(pidfd)


def run(request: dict[str, Any], stdin: IO[bytes], stdout: IO[bytes], stderr: IO[bytes]) -> tuple[int, bool]:
    """Run one command; gives its status as a shell says it, and whether its time was up."""
    process = subprocess.Popen(
        ["/bin/sh", "-c", request["sh"]], stdin=stdin, stdout=stdout, stderr=stderr, start_new_session=True, cwd="/"
    )
    if timed_out := not ended(process, request["timeout"]):
        os.killpg(process.pid, signal.SIGKILL)
        if not ended(process, REAP):
            return 128 + signal.SIGKILL, True
    status = process.wait()
    return (status if status >= 0 else 128 - status), timed_out


def connected(path: str) -> int:
    with socket.socket(socket.AF_UNIX) as end:
        end.connect(path)
        return end.detach()


class Port:
    def __init__(self, path: str) -> None:
        self._fd = connected(path) if Path(path).is_socket() else os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self.reader = os.fdopen(self._fd, "rb", closefd=False)
        self._lock = threading.Lock()

    def write(self, *parts: bytes) -> None:
        """Write the parts unmixed with those of other threads."""
        with self._lock:
            for part in parts:
                rest = memoryview(part)
                while rest:
                    rest = rest[os.write(self._fd, rest[: 1 << 16]) :]


def serve(port: Port, request: dict[str, Any], data: bytes) -> None:
    """Run one command and reply. A command that cannot even be started is replied to like a shell does."""
    with (
        tempfile.TemporaryFile(dir="/run") as stdin,
        tempfile.TemporaryFile(dir="/run") as stdout,
        tempfile.TemporaryFile(dir="/run") as stderr,
    ):
        stdin.write(data)
        stdin.seek(0)
        try:
            status, timed_out = run(request, stdin, stdout, stderr)
        except OSError as error:
            status, timed_out = 127, False
            stderr.write(str(error).encode())
        stdout.seek(0)
        stderr.seek(0)
        out, err = stdout.read(), stderr.read()
    head = {"id": request["id"], "status": status, "timed_out": timed_out, "out": len(out), "err": len(err)}
    port.write(json.dumps(head).encode() + b"\n", out, err)


def main() -> None:
    port = Port(sys.argv[1])
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    port.write(f'\n{{"ready": "{boot_id}"}}\n'.encode())
    while line := port.reader.readline():
        request = json.loads(line)
        data = port.reader.read(request["in"])
        threading.Thread(target=serve, args=(port, request, data), daemon=True).start()


if __name__ == "__main__":
    main()
