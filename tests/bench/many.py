"""A service with many GPUs: eight that move at once beside one, and what 128 take."""

from __future__ import annotations

import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jeepney import DBusAddress, HeaderFields, MessageType, new_method_call
from jeepney.io.blocking import DBusConnection, open_dbus_connection

from tests.bench import here
from tests.bench.builds import DEVELOPED, Build
from tests.bench.here import GPU
from tests.bench.table import Row, megabytes, text
from tests.harness.containers.inside import server

FEW, MANY = 16, 128
SLOW = ("unbind=0.5s", "unload=0.5s", "probe=0.5s")
"""What a kernel takes its time for."""


@dataclass(frozen=True)
class _Many(Build):
    """What is developed, on a machine with so many GPUs."""

    gpus: int = 1

    def command(self, name: str) -> list[str]:
        assert name == "gpuswitchd"
        return [str(self.python), "-E", "-m", server.__name__, str(self.gpus)]


def measure() -> Iterator[Row]:
    one, eight = (_at_once(gpus) for gpus in (1, 8))
    yield Row("1 GPU to vfio, operations of 500 ms", text(one))
    yield Row("8 GPUs at once / 1", f"{eight / one:.2f} x", "≤ 1.4 x")
    writers: list[tuple[str, Callable[[float], str]]] = [
        ("start to READY", text),
        ("share of memory", megabytes),
        ("one scrape", text),
        ("size of a scrape", lambda size: f"{size / 1000:.0f} kB"),
    ]
    for (what, write), less, more in zip(writers, _sizes(FEW), _sizes(MANY), strict=True):
        yield Row(f"{what}, {FEW} GPUs; {MANY}", f"{write(less)}; {write(more)}", f"≤ {MANY // FEW} x: linear")


def _at_once(gpus: int) -> float:
    """Seconds from the first call until all of them are on vfio."""
    with here.placed(_build(gpus)) as place:
        faults = [f"--fault={fault}" for fault in SLOW]
        with (
            here.daemon(place, "--simulate=server", *faults),
            open_dbus_connection(place.bus) as connection,
        ):
            begun = time.perf_counter()
            serials = [_send(connection, number, "ToVfio", "a{sv}", ({},)) for number in range(1, gpus + 1)]
            switches = _answers(connection, serials)
            serials = [_send(connection, number, "Wait", "s", switch) for number, switch in enumerate(switches, 1)]
            ended = _answers(connection, serials)
            seconds = time.perf_counter() - begun
    for [record] in ended:
        if record["result"][1] != "done":
            sys.exit(f"cannot measure {gpus} GPUs at once: {record['reason'][1]}")
    return seconds


def _sizes(gpus: int) -> tuple[float, float, float, float]:
    """Seconds to READY, kibibytes, seconds and bytes of the second scrape."""
    with here.placed(_build(gpus)) as place, here.daemon(place, "--simulate=server") as running:
        [where] = [line for line in (place.folder / "log").read_text().splitlines() if line.startswith("metrics on")]
        address, number = where.split()[2], where.split()[4]
        url = f"http://{address}:{number}/metrics"
        _scrape(url)
        begun = time.perf_counter()
        size = _scrape(url)
        return running.start_seconds, running.share(), time.perf_counter() - begun, size


def _scrape(url: str) -> int:
    with urllib.request.urlopen(url, timeout=30) as answer:  # noqa: S310 -- our own service's
        return len(answer.read())


def _build(gpus: int) -> _Many:
    return _Many(f"{gpus} GPUs", DEVELOPED.python, DEVELOPED.tree, gpus)


def _send(connection: DBusConnection, number: int, method: str, signature: str, body: tuple[object, ...]) -> int:
    """Ask one GPU; the number that its answer will have."""
    serial: int = next(connection.outgoing_serial)
    gpu = DBusAddress(f"/org/gpuswitch1/gpu/{number:04x}_01_00_0", GPU.bus_name, GPU.interface)
    connection.send(new_method_call(gpu, method, signature, body), serial=serial)
    return serial


def _answers(connection: DBusConnection, serials: Sequence[int]) -> list[tuple[Any, ...]]:
    """What was answered to each, in whatever order that came."""
    found: dict[int, tuple[Any, ...]] = {}
    while len(found) < len(serials):
        message = connection.receive(timeout=60)
        serial = message.header.fields.get(HeaderFields.reply_serial)
        if serial in serials:
            if message.header.message_type is not MessageType.method_return:
                sys.exit(f"cannot measure many GPUs: one says {message.body}")
            found[serial] = message.body
    return [found[serial] for serial in serials]
