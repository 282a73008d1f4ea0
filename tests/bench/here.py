"""What can be measured without a GPU: the service on a private bus, on a simulated host and on this one at rest."""

from __future__ import annotations

import os
import re
import resource
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jeepney import DBusAddress, new_method_call
from jeepney.io.blocking import DBusConnection, open_dbus_connection

from gpuswitch.host.linux.sysfs import Sysfs
from tests.bench.builds import DEVELOPED, Build
from tests.bench.rounds import Experiment, Quantity, figures, ratios
from tests.bench.table import Compared, Row, count, median, megabytes
from tests.harness.debian.errors import HarnessError
from tests.harness.domains import write
from tests.harness.service.services import environment
from tests.harness.sysfs_tree import Tree, big_host

GPU = DBusAddress("/org/gpuswitch1/gpu/0000_01_00_0", "org.gpuswitch1", "org.gpuswitch1.Gpu")
PROPERTIES = DBusAddress(GPU.object_path, GPU.bus_name, "org.freedesktop.DBus.Properties")
IDLE_SECONDS = 5.0
READS = 200
SWITCHES = ("ToVfio", "ToHost")


@dataclass(frozen=True)
class Running:
    """A gpuswitchd that was `start_seconds` on its way to READY=1, and at work for `cpu_seconds` of them."""

    process: subprocess.Popen[bytes]
    start_seconds: float
    cpu_seconds: float

    def share(self) -> int:
        """Kibibytes of the service and of all processes below it, what they share with others in parts (PSS)."""
        return sum(map(_share, (self.process.pid, *_below(self.process.pid))))

    def status(self, field: str) -> int:
        """A number from /proc/PID/status."""
        found = re.search(rf"^{field}:\s+(\d+)", Path(f"/proc/{self.process.pid}/status").read_text(), re.MULTILINE)
        assert found is not None  # every kernel that we run on has it
        return int(found[1])


@dataclass(frozen=True)
class Place:
    """A build, with a folder and a bus of its own."""

    build: Build
    folder: Path
    bus: str


@dataclass(frozen=True)
class Service:
    """A gpuswitchd on a simulated laptop, and somebody on its bus who stays connected."""

    place: Place
    running: Running
    connection: DBusConnection


def measure() -> Iterator[Row]:
    with placed(DEVELOPED) as place:
        yield from figures(STARTS, place)
    with serving(DEVELOPED) as service:
        yield from figures(SERVICE, service)
    yield _look()


def compare(this: Build, base: Build) -> Iterator[Compared]:
    with placed(this) as ours, placed(base) as theirs:
        yield from ratios(STARTS, ours, theirs)
    with serving(this) as mine, serving(base) as other:
        yield from ratios(SERVICE, mine, other)


@contextmanager
def placed(build: Build) -> Iterator[Place]:
    with tempfile.TemporaryDirectory(prefix="gpuswitch-bench-") as folder, private_bus(Path(folder)) as bus:
        yield Place(build, Path(folder), bus)


@contextmanager
def serving(build: Build, config: str = "") -> Iterator[Service]:
    """With this configuration, in TOML."""
    with placed(build) as place:
        write(place.folder / "etc", config=config)
        with daemon(place, "--simulate=laptop") as running, open_dbus_connection(place.bus) as connection:
            yield Service(place, running, connection)


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
def daemon(place: Place, *options: str) -> Iterator[Running]:
    """A gpuswitchd as systemd would start it, the watchdog included. Raises HarnessError if it does not get ready."""
    folder = place.folder
    told = {
        "NOTIFY_SOCKET": str(folder / "notify"),
        "WATCHDOG_USEC": "30000000",
        "STATE_DIRECTORY": str(folder / "state"),
    }
    write(folder / "etc", d_metrics="[metrics]\nport = 0\n")
    places = [f"--bus={place.bus}", f"--config={folder}/etc", f"--runtime={folder}/run"]
    command = [*place.build.command("gpuswitchd"), *places, *options]
    (folder / "notify").unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener, (folder / "log").open("w+") as log:
        listener.bind(told["NOTIFY_SOCKET"])
        begun = time.perf_counter()
        with subprocess.Popen(command, env=environment(**told), stderr=log) as process:
            try:
                if not _is_ready(process, listener):
                    said = (folder / "log").read_text()
                    raise HarnessError(f"cannot measure {place.build.name}: its gpuswitchd did not get ready:\n{said}")
                yield Running(process, time.perf_counter() - begun, at_work(process.pid))
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


def _starts(which: str, *options: str) -> Experiment[Place]:
    def sample(place: Place) -> Iterable[float]:
        with daemon(place, *options) as running:
            return running.start_seconds, running.cpu_seconds, running.status("VmRSS"), running.share()

    quantities = (
        Quantity(f"start to READY, {which}", target="< 0.5 s; ≤ 0.6 of eda53dd"),
        Quantity("  of it at work, not waiting for a processor", target="≤ 0.6 of eda53dd"),
        Quantity(f"resident memory, {which}", megabytes, "< 50 MB"),
        Quantity("  its share, with the processes below it", megabytes, "≤ 0.8 of eda53dd"),
    )
    return Experiment(quantities, sample, times=5, pairs=20)


def _status(service: Service) -> Iterable[float]:
    command = [*service.place.build.command("gpuswitchctl"), "status", "01:00.0", "--bus", service.place.bus]
    before = children_at_work()
    yield from timed(1, lambda: subprocess.run(command, env=environment(), stdout=subprocess.DEVNULL, check=True))
    yield children_at_work() - before


def _reads(service: Service) -> Iterable[float]:
    read = new_method_call(PROPERTIES, "Get", "ss", (GPU.interface, "State"))
    before = at_work(service.running.process.pid)
    seconds = timed(READS, lambda: service.connection.send_and_get_reply(read, timeout=10))
    return percentile(seconds, 0.5), percentile(seconds, 0.99), (at_work(service.running.process.pid) - before) / READS


def _switches(service: Service) -> Iterable[float]:
    for method in SWITCHES:
        before = at_work(service.running.process.pid)
        yield from timed(1, partial(switch, service.connection, method))
        yield at_work(service.running.process.pid) - before


def _wakeups(service: Service) -> Iterable[float]:
    before = service.running.status("voluntary_ctxt_switches")
    with suppress(subprocess.TimeoutExpired):
        service.running.process.wait(IDLE_SECONDS)
    yield service.running.status("voluntary_ctxt_switches") - before


STARTS = (_starts("simulated host", "--simulate=laptop"), _starts("this host"))
SERVICE = (
    Experiment(
        [Quantity("gpuswitchctl status", target="< 0.2 s"), Quantity("  of it at work")], _status, times=10, pairs=20
    ),
    Experiment(
        [
            Quantity(f"property read, p50 of {READS}", target="< 1 ms"),
            Quantity(f"property read, p99 of {READS}", target="< 5 ms"),
            Quantity("  the service at work for one"),
        ],
        _reads,
        times=10,
        pairs=50,
    ),
    Experiment(
        [
            quantity
            for method in SWITCHES
            for quantity in (Quantity(f"{method} of 4 functions in memory"), Quantity("  the service at work"))
        ],
        _switches,
        times=20,
        pairs=40,
    ),
    Experiment(
        [Quantity(f"wakeups of an idle service in {IDLE_SECONDS:g} s", count, "one in 15 s, for the watchdog")],
        _wakeups,
        times=1,
        pairs=1,
    ),
)


def _look() -> Row:
    with tempfile.TemporaryDirectory(prefix="gpuswitch-bench-") as folder:
        tree = Tree(Path(folder))
        big_host(tree)
        sysfs = Sysfs(tree.roots)
        first, *others = timed(11, sysfs.look)
    return Row("look at 300 functions (first; median of 10 more)", f"{first * 1e3:.1f}; {median(others)}", "< 20 ms")


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


def _share(pid: int) -> int:
    found = re.search(r"^Pss:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    assert found is not None  # as above
    return int(found[1])


def _below(pid: int) -> Iterator[int]:
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        yield int(child)
        yield from _below(int(child))


def at_work(pid: int) -> float:
    """Seconds that a process has had a processor, which a busy machine changes little.

    Its clock is the one that clock_getcpuclockid(3) names: make_process_cpuclock(pid, CPUCLOCK_SCHED) in the kernel's
    include/linux/posix-timers.h.
    """
    return time.clock_gettime(~pid << 3 | 2)


def children_at_work() -> float:
    """The same of all processes that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def percentile(seconds: Sequence[float], part: float) -> float:
    return sorted(seconds)[min(int(len(seconds) * part), len(seconds) - 1)]
