"""A gpuswitchd that is there at once, forked from a process that has imported all of it; and that fails where it is to.

    forkserver.py FOLDER GPU [COMPANION...]

Run with the service's own Python. In FOLDER are two fifos: a line in `ask` is answered by a line of JSON in `told`.

start [TRAP]            start the service
kill                    kill it
switch METHOD [TRAP]    ToVfio or ToHost
terminal N              which frame buffer shows that virtual terminal

TRAP is `DEED CALL N`: something is done at the Nth such call on the journal until the switch is over, or the service
is ready. CALL is an audit event of Python. kill: right before it the service dies of SIGKILL; fail: it fails with
ENOSPC, and so do all after it; fill: before it, and before all after it, what is free in the runtime directory is
filled up.

The answer to start and switch has `state`, `drivers` and `moving` (where a switch is under way to, "" for none) as they
are right then, and what there is to say of `restore_state` (the units that it is to start when it is home), `ended`
(its status), `result` (the switch's), `refused` (in words) and `met` (to how many calls something was done).
"""

from __future__ import annotations

import errno
import fcntl
import gc
import json
import mmap
import os
import select
import signal
import socket
import struct
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from jeepney import DBusAddress, MessageType, Properties, new_method_call
from jeepney.io.blocking import DBusConnection, open_dbus_connection

from gpuswitch import daemon, service
from gpuswitch.config.loading import load
from gpuswitch.config.settings import DIRECTORY

NOTIFY = "\0gpuswitch-forkserver"
JOURNAL = "/run/gpuswitch/gpus/"
FILLER = "/run/gpuswitch/filler"
CALLS = ("", "os.rename", "os.remove")
PATIENCE = 100.0
FBIOGET_CON2FBMAP = 0x460F
"""Of uapi/linux/fb.h."""


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fill() -> None:
    with suppress(OSError), Path(FILLER).open("ab", buffering=0) as file:
        while True:
            file.write(bytes(mmap.PAGESIZE))


DEEDS = {"": None, "kill": kill, "fail": fail, "fill": fill}


class Trap:
    """What is to go wrong: in memory that the service has too, so that it can be told while it runs."""

    _layout = struct.Struct("4I")

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)

    def set(self, deed: str = "", call: str = "", number: str = "0") -> None:
        self._layout.pack_into(self._memory, 0, list(DEEDS).index(deed), CALLS.index(call), int(number), 0)

    @property
    def met(self) -> int:
        return int(self._layout.unpack_from(self._memory)[3])

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        """The audit hook of the service (PEP 578): runs right before a call, which does not happen if it raises."""
        if event == "socket.connect" and arguments[1] == NOTIFY:
            self.set()
        deed, call, left, met = self._layout.unpack_from(self._memory)
        if event != CALLS[call] or not os.fspath(arguments[0]).startswith(JOURNAL):
            return
        due = left <= 1
        self._layout.pack_into(self._memory, 0, deed, call, 1 if due else left - 1, met + due)
        if due and (do := list(DEEDS.values())[deed]):
            do()


class Service:
    """One run of the service."""

    def __init__(self, trap: Trap) -> None:
        """Start it; it is ready, or `ended`, when this returns."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
            listening.bind(NOTIFY)
            self.pid = os.fork()
            if self.pid == 0:
                os.environ["NOTIFY_SOCKET"] = NOTIFY.replace("\0", "@")
                sys.addaudithook(trap)
                os._exit(daemon.run(service.parser().parse_args([]), partial(load, DIRECTORY)))
            pidfd = os.pidfd_open(self.pid)
            ready = False
            while not ready and listening.fileno() in select.select([listening.fileno(), pidfd], [], [])[0]:
                ready = b"READY=1" in listening.recv(4096).splitlines()
            os.close(pidfd)
        self.ended = None if ready else self.wait()

    def wait(self) -> int:
        """Wait until it has ended: its status, negative for the signal that it died of."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


class Gpu:
    """One GPU, as the service has it on the bus, and as the kernel shows it."""

    def __init__(self, bus: DBusConnection, functions: list[str]) -> None:
        self._bus = bus
        self._functions = functions
        path = "/org/gpuswitch1/gpu/" + functions[0].replace(":", "_").replace(".", "_")
        self._object = DBusAddress(path, bus_name="org.gpuswitch1", interface="org.gpuswitch1.Gpu")

    def switch(self, method: str) -> dict[str, str]:
        started = self._bus.send_and_get_reply(new_method_call(self._object, method, "a{sv}", ({},)), timeout=PATIENCE)
        if started.header.message_type is MessageType.error:
            return {"refused": str(started.body[0])}
        waited = self._bus.send_and_get_reply(
            new_method_call(self._object, "Wait", "s", started.body), timeout=PATIENCE
        )
        if waited.header.message_type is MessageType.error:
            return {"refused": str(waited.body[0])}
        return {"result": waited.body[0]["result"][1]}

    def seen(self) -> dict[str, Any]:
        [properties] = self._bus.send_and_get_reply(Properties(self._object).get_all(), timeout=60).body
        switch = {name: value for name, (_, value) in properties["Switch"][1].items()}
        links = [Path("/sys/bus/pci/devices", function, "driver") for function in self._functions]
        return {
            "state": properties["State"][1],
            "moving": switch["target"] if switch and not switch["result"] else "",
            "drivers": [link.resolve().name if link.exists() else "" for link in links],
        }

    @property
    def restore_state(self) -> list[str]:
        """The units that are to be started, by the journal."""
        page = Path(JOURNAL, self._functions[0].replace(":", "_").replace(".", "_") + ".json")
        if not page.exists():
            return []
        return [unit["name"] for unit in json.loads(page.read_text())["restore_state"]["units"]]


class Server:
    def __init__(self, functions: list[str]) -> None:
        self._trap = Trap()
        self._service: Service | None = None
        self._gpu = Gpu(open_dbus_connection("SYSTEM"), functions)

    def start(self, *trap: str) -> dict[str, Any]:
        self._trap.set(*trap)
        restore_state = self._gpu.restore_state
        self._service = Service(self._trap)
        if self._service.ended is not None:
            return {"ended": self._service.ended}
        return self._gpu.seen() | {"restore_state": restore_state}

    def kill(self) -> dict[str, Any]:
        assert self._service is not None
        os.kill(self._service.pid, signal.SIGKILL)
        return {"ended": self._service.wait()}

    def switch(self, method: str, *trap: str) -> dict[str, Any]:
        assert self._service is not None
        self._trap.set(*trap)
        came = self._gpu.switch(method)
        met = self._trap.met
        self._trap.set()
        if met and "kill" in trap:
            return {"ended": self._service.wait()}
        return {"met": met} | came | self._gpu.seen()

    @staticmethod
    def terminal(number: str) -> int:
        with Path("/dev/fb0").open("rb") as device:
            mapped = fcntl.ioctl(device, FBIOGET_CON2FBMAP, struct.pack("2I", int(number), 0))
        return int(struct.unpack("2I", mapped)[1])


def main() -> None:
    folder = Path(sys.argv[1])
    server = Server(sys.argv[2:])
    # Else each service would copy all of it as soon as it looks for garbage.
    gc.freeze()
    while True:
        command, *arguments = (folder / "ask").read_text().split()
        (folder / "told").write_text(json.dumps(getattr(server, command)(*arguments)) + "\n")


if __name__ == "__main__":
    main()
