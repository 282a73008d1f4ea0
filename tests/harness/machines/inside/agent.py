#!/usr/bin/python3 -ISE
"""The command channel, the machine's side: runs shell commands as root that come in over a virtio-serial port.

    agent.py PORT

In a container the port is a Unix socket that the other side listens on.

Request:  a JSON line {"id": I, "sh": COMMAND, "in": N, "timeout": SECONDS}, then N bytes for its standard input.
Reply:    a JSON line {"id": I, "status": S, "timed_out": B, "out": N, "err": M}, then N + M bytes: its outputs.
Or:       a JSON line {"id": I, "do": WORD, "with": [ARGUMENT...]}: one of words.py, which lies beside this file.
Reply:    as above; status 0 and the result as JSON in place of the outputs, or 1 and what was raised.
At start: a JSON line {"ready": BOOT_ID} on a line of its own.

Commands run side by side, each in a session of its own. Their input and outputs are files: a pipe would stay open
in whatever they leave running in the background.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
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


def memory(name: str) -> IO[bytes]:
    """A file without a place."""
    return os.fdopen(os.memfd_create(name), "w+b")


def serve(port: Port, request: dict[str, Any], data: bytes) -> None:
    """Run one command and reply. A command that cannot even be started is replied to like a shell does."""
    with memory("stdin") as stdin, memory("stdout") as stdout, memory("stderr") as stderr:
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
    reply(port, request, status, timed_out=timed_out, out=out, err=err)


def do(port: Port, request: dict[str, Any]) -> None:
    """Do what a word says and reply."""
    try:
        word = getattr(importlib.import_module("words"), request["do"])
        out, err = json.dumps(word(*request["with"])).encode(), b""
    except Exception as error:  # noqa: BLE001 -- whatever it is, the test is told
        out, err = b"", repr(error).encode()
    reply(port, request, 1 if err else 0, timed_out=False, out=out, err=err)


def reply(port: Port, request: dict[str, Any], status: int, *, timed_out: bool, out: bytes, err: bytes) -> None:
    head = {"id": request["id"], "status": status, "timed_out": timed_out, "out": len(out), "err": len(err)}
    port.write(json.dumps(head).encode() + b"\n", out, err)


def main() -> None:
    # -I leaves it out
    sys.path.append(str(Path(__file__).parent))
    port = Port(sys.argv[1])
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    port.write(f'\n{{"ready": "{boot_id}"}}\n'.encode())
    while line := port.reader.readline():
        request = json.loads(line)
        work = (serve, (port, request, port.reader.read(request["in"]))) if "sh" in request else (do, (port, request))
        threading.Thread(target=work[0], args=work[1], daemon=True).start()


if __name__ == "__main__":
    main()
