"""How long somebody else waits while two users without rights attack the service by 500 connections.

Beside the same service at rest, and beside what the bus alone takes: it answers `GetId` without anybody else, and hands
on what it has for a receiver that drops all the rest unread (`tests.bench.least`).

All messages go through the bus, which is one process and takes less than anybody can send. So who attacks mostly waits
for it, and two processors are enough for the bus and the service: what is measured is not who gets a processor. What it
takes to get through such a bus is in each figure, in that for GetAll twice. Therefore not all connections send: with
some hundred that do, dbus-daemon itself answers after more than the target. It has the limits of a system bus, 256
connections of each user among them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from jeepney import DBusAddress, Message, MessageType, new_method_call
from jeepney.io.blocking import DBusConnection, open_dbus_connection

from tests.bench import here
from tests.bench.builds import DEVELOPED, Build, open_cache
from tests.bench.here import Place
from tests.bench.rounds import Experiment, Quantity, figures, ratios
from tests.bench.table import Compared, Row, megabytes
from tests.harness.buses.private import PROGRAMS, BusProgram, running
from tests.harness.debian.errors import HarnessError
from tests.harness.debian.tools import PROJECT
from tests.harness.domains import write

USERS = ("nobody", "daemon")
KINDS = {"answered": 10, "unanswered": 10, "broken": 10, "deaf": 220}
"""Connections of each user, by what they do (`tests.bench.attackers`)."""
CONNECTIONS = len(USERS) * sum(KINDS.values())
SECONDS = 10.0
"""For one sample. How many calls that are, depends on what is measured."""

LOOK = new_method_call(here.PROPERTIES, "GetAll", "s", (here.GPU.interface,))
BUS = DBusAddress("/org/freedesktop/DBus", "org.freedesktop.DBus", "org.freedesktop.DBus")
ASK_THE_BUS = new_method_call(BUS, "GetId")


def buses() -> Iterator[tuple[str, BusProgram]]:
    """Those that can be had here, by name; of the others it is said why not."""
    if os.geteuid() != 0:
        print("\nUnder attack: only root can be several users")
        return
    for name, find in PROGRAMS.items():
        try:
            yield name, find(open_cache().say)
        except HarnessError as error:
            print(f"\nUnder attack on {name}: {error}")


def measure(program: BusProgram) -> Iterator[Row]:
    with _placed(DEVELOPED, program) as place:
        yield from figures(EXPERIMENTS, place)


def compare(program: BusProgram, this: Build, base: Build) -> Iterator[Compared]:
    with _placed(this, program) as ours, _placed(base, program) as theirs:
        yield from ratios(EXPERIMENTS, ours, theirs)


@contextmanager
def _placed(build: Build, program: BusProgram) -> Iterator[Place]:
    """A build with a bus that all users may connect to."""
    with tempfile.TemporaryDirectory(prefix="gpuswitch-bench-") as name:
        folder = Path(name)
        folder.chmod(0o711)
        with running(program, folder) as bus:
            (folder / "bus").chmod(0o666)
            write(folder / "etc", config="")
            yield Place(build, folder, bus.address)


@contextmanager
def _attackers(place: Place) -> Iterator[None]:
    """All their connections are there, and at work. They end when nobody wants them any more."""
    bus = place.bus.removeprefix("unix:path=")
    with ExitStack() as until_the_end:
        attackers = []
        for user in USERS:
            for kind, count in KINDS.items():
                command = [sys.executable, "-m", "tests.bench.attackers", bus, user, kind, str(count)]
                attacker = subprocess.Popen(command, cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
                attackers.append(until_the_end.enter_context(attacker))
        for attacker in attackers:
            assert attacker.stdout is not None
            if attacker.stdout.readline() != b"there\n":
                sys.exit("cannot measure: an attacker did not get on the bus")
        for attacker in attackers:
            assert attacker.stdin is not None
            attacker.stdin.write(b".")
            attacker.stdin.flush()
        yield


def _attacked(place: Place) -> Iterable[float]:
    """A service that is new, so that what it takes in memory is new, too."""
    with open_dbus_connection(place.bus) as connection:
        with here.daemon(place, "--simulate=laptop") as service:
            calm = _seconds(connection)
            before = service.status("VmRSS")
            with _attackers(place):
                busy = _seconds(connection)
                grown = service.status("VmRSS") - before
        with _least(place, connection.unique_name), _attackers(place):
            least = _seconds(connection)
    for seconds in (calm[0], busy[0], least[0], calm[1], busy[1]):
        yield from (here.percentile(seconds, part) for part in (0.5, 0.99))
    yield grown


@contextmanager
def _least(place: Place, peer: str) -> Iterator[None]:
    """One in the place of the service, which answers this peer alone."""
    bus = place.bus.removeprefix("unix:path=")
    command = [sys.executable, "-m", "tests.bench.least", bus, here.GPU.bus_name, peer]
    with subprocess.Popen(command, cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as least:
        assert least.stdout is not None
        if least.stdout.readline() != b"there\n":
            sys.exit("cannot measure: the bus does not let anybody else be the service")
        yield


def _seconds(connection: DBusConnection) -> tuple[list[float], list[float]]:
    """What it takes to look at a GPU, and to ask the bus itself; by turns."""
    looks: list[float] = []
    asks: list[float] = []
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        looks += here.timed(1, lambda: _answered(connection, LOOK))
        asks += here.timed(1, lambda: _answered(connection, ASK_THE_BUS))
    return looks, asks


def _answered(connection: DBusConnection, message: Message) -> None:
    reply = connection.send_and_get_reply(message, timeout=600)
    if reply.header.message_type is not MessageType.method_return:
        sys.exit(f"cannot measure: somebody who looks is told {reply.body}")


def _quantities() -> Iterator[Quantity]:
    calm, busy = "nobody else there", "under attack"
    for what, when, target in (
        ("GetAll of a GPU", calm, ""),
        ("GetAll of a GPU", busy, "< 100 ms"),
        ("the same call, of a receiver that drops all others", busy, ""),
        ("GetId of the bus itself", calm, ""),
        ("GetId of the bus itself", busy, ""),
    ):
        yield Quantity(f"{what}, {when}, p50")
        yield Quantity(f"{what}, {when}, p99", target=target)
    yield Quantity("more memory than before the attack", megabytes, "< 10 MB")


EXPERIMENTS = (Experiment(tuple(_quantities()), _attacked, times=3, pairs=6),)
