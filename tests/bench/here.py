"""What can be measured without a GPU: the service on a private bus, on a simulated host and on this one at rest."""

from __future__ import annotations

import os
import re
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jeepney import DBusAddress, new_method_call
from jeepney.io.blocking import DBusConnection, open_dbus_connection

from gpuswitch.host.linux.sysfs import Sysfs
from tests.bench.table import Row, median, percentile
from tests.debian.errors import RigError
from tests.service.services import environment
from tests.unit.sysfs_tree import Tree
from tests.unit.test_sysfs import big_host

BIN = Path(sys.executable).parent
GPU = DBusAddress("/org/gpuswitch1/gpu/0000_01_00_0", "org.gpuswitch1", "org.gpuswitch1.Gpu")
PROPERTIES = DBusAddress(GPU.object_path, GPU.bus_name, "org.freedesktop.DBus.Properties")
IDLE_SECONDS = 5.0


@dataclass(frozen=True)
class Running:
    """A gpuswitchd that was `start_seconds` on its way to READY=1, and at work for `cpu_seconds` of them."""

    process: subprocess.Popen[bytes]
    start_seconds: float
    cpu_seconds: float

    def status(self, field: str) -> int:
        """A number from /proc/PID/status."""
        found = re.search(rf"^{field}:\s+(\d+)", Path(f"/proc/{self.process.pid}/status").read_text(), re.MULTILINE)
        assert found is not None  # every kernel that we run on has it
        return int(found[1])


def measure() -> list[Row]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gpuswitch-bench-")))
        bus = stack.enter_context(private_bus(folder))
        rows = [*_starts(bus, folder, "simulated host", "--simulate=laptop"), *_starts(bus, folder, "this host")]
        simulated = stack.enter_context(daemon(bus, folder, "--simulate=laptop"))
        connection = stack.enter_context(open_dbus_connection(bus))
        rows += [*_client(bus, connection), _idle(simulated), _look(folder)]
    return rows


@contextmanager
def private_bus(folder: Path) -> Iterator[str]:
    program = shutil.which("dbus-daemon")
    if program is None:
        sys.exit("dbus-daemon is missing; install it: apt-get install dbus-daemon")
    options = ["--session", "--nofork", "--nopidfile", "--print-address", f"--address=unix:path={folder}/bus"]
    with subprocess.Popen([program, *options], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.kill()


@contextmanager
def daemon(bus: str, folder: Path, *options: str) -> Iterator[Running]:
    """A gpuswitchd as systemd would start it, the watchdog included. Raises RigError where it does not get ready."""
    told = {
        "NOTIFY_SOCKET": str(folder / "notify"),
        "WATCHDOG_USEC": "30000000",
        "STATE_DIRECTORY": str(folder / "state"),
        "GPUSWITCH_METRICS__PORT": "0",
    }
    command = [str(BIN / "gpuswitchd"), f"--bus={bus}", f"--config={folder}/etc", f"--runtime={folder}/run", *options]
    (folder / "notify").unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener, (folder / "log").open("w+") as log:
        listener.bind(told["NOTIFY_SOCKET"])
        begun = time.perf_counter()
        with subprocess.Popen(command, env=environment(**told), stderr=log) as process:
            try:
                if not _is_ready(process, listener):
                    raise RigError(f"cannot measure gpuswitchd: it was not ready:\n{(folder / 'log').read_text()}")
                yield Running(process, time.perf_counter() - begun, _cpu_seconds(process.pid))
            finally:
                process.terminate()


def _is_ready(process: subprocess.Popen[bytes], listener: socket.socket) -> bool:
    """Wait for READY=1; False when the process ends before, or has not said it within a minute."""
    ended = os.pidfd_open(process.pid)
    try:
        while listener.fileno() in select.select([listener.fileno(), ended], [], [], 60)[0]:
            if listener.recv(4096).startswith(b"READY=1"):
                return True
        return False
    finally:
        os.close(ended)


def _starts(bus: str, folder: Path, which: str, *options: str) -> Iterator[Row]:
    seconds, cpu_seconds, rss = [], [], 0
    for _ in range(5):
        with daemon(bus, folder, *options) as running:
            seconds.append(running.start_seconds)
            cpu_seconds.append(running.cpu_seconds)
            rss = running.status("VmRSS")
    yield Row(f"start to READY, {which} (median of 5)", median(seconds), "< 0.5 s")
    yield Row("  of it at work, not waiting for a processor", median(cpu_seconds))
    yield Row(f"resident memory, {which}", f"{rss / 1024:.1f} MB", "< 50 MB")


def _cpu_seconds(pid: int) -> float:
    """proc(5): utime and stime, fields 14 and 15 of stat, in clock ticks."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _client(bus: str, connection: DBusConnection) -> Iterator[Row]:
    command = [str(BIN / "gpuswitchctl"), "status", "01:00.0", "--bus", bus]
    seconds = timed(10, lambda: subprocess.run(command, env=environment(), stdout=subprocess.DEVNULL, check=True))
    yield Row("gpuswitchctl status (median of 10)", median(seconds), "< 0.2 s")

    read = new_method_call(PROPERTIES, "Get", "ss", (GPU.interface, "State"))
    seconds = timed(2000, lambda: connection.send_and_get_reply(read, timeout=10))
    yield Row("property read (p50 of 2000)", percentile(seconds, 0.5))
    yield Row("property read (p99 of 2000)", percentile(seconds, 0.99))

    both: dict[str, list[float]] = {"ToVfio": [], "ToHost": []}
    for _ in range(20):
        for method, seconds in both.items():
            seconds.extend(timed(1, partial(switch, connection, method)))
    for method, seconds in both.items():
        yield Row(f"{method} of 4 functions in memory (median of 20)", median(seconds))


def _idle(running: Running) -> Row:
    before = running.status("voluntary_ctxt_switches")
    with suppress(subprocess.TimeoutExpired):
        running.process.wait(IDLE_SECONDS)
    woken = running.status("voluntary_ctxt_switches") - before
    return Row(f"wakeups of an idle service in {IDLE_SECONDS:g} s", str(woken), "one in 15 s, for the watchdog")


def _look(folder: Path) -> Row:
    tree = Tree(folder / "host")
    big_host(tree)
    sysfs = Sysfs(tree.roots)
    first, *others = timed(11, sysfs.look)
    return Row("look at 300 functions (first; median of 10 more)", f"{first * 1e3:.1f}; {median(others)}", "< 50 ms")


def switch(connection: DBusConnection, method: str) -> dict[str, Any]:
    """One switch from its request to its end; the record of it."""
    reply = connection.send_and_get_reply(new_method_call(GPU, method, "a{sv}", ({},)), timeout=60)
    reply = connection.send_and_get_reply(new_method_call(GPU, "Wait", "s", (reply.body[0],)), timeout=60)
    record: dict[str, Any] = {key: value for key, (_, value) in reply.body[0].items()}
    if record["result"] != "done":
        sys.exit(f"cannot measure {method}: it ended as {record['result']}: {record['reason']}")
    return record


def timed(times: int, work: Callable[[], object]) -> list[float]:
    """How many seconds each call took."""
    seconds = []
    for _ in range(times):
        begun = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begun)
    return seconds
