"""How long many readers wait for a property while a GPU is on its way: each a connection of its own, all at once."""

from __future__ import annotations

import select
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

from jeepney import MessageFlag, new_method_call
from jeepney.io.blocking import DBusConnection, open_dbus_connection

from tests.bench import here
from tests.bench.builds import DEVELOPED
from tests.bench.here import GPU, PROPERTIES, SWITCHES
from tests.bench.table import Row, text

CLIENTS = 50
EACH_SECOND = 200
"""Reads by all clients together."""
SECONDS = 5.0


def measure() -> Iterator[Row]:
    with here.serving(DEVELOPED) as service, ExitStack() as until_the_end:
        clients = [until_the_end.enter_context(open_dbus_connection(service.place.bus)) for _ in range(CLIENTS)]
        over = threading.Event()
        switching = threading.Thread(target=_switch_on_and_on, args=(service.connection, over))
        switching.start()
        try:
            seconds = list(_reads(clients))
        finally:
            over.set()
            switching.join()
    what = f"property read, {CLIENTS} clients with {EACH_SECOND} reads a second, a switch under way"
    yield Row(f"{what}, p50 of {len(seconds)}", text(here.percentile(seconds, 0.5)), "< 1 ms")
    yield Row(f"{what}, p99 of {len(seconds)}", text(here.percentile(seconds, 0.99)), "< 5 ms")


def _switch_on_and_on(connection: DBusConnection, over: threading.Event) -> None:
    while not over.is_set():
        for method in SWITCHES:
            here.switch(connection, method)


def _reads(clients: list[DBusConnection]) -> Iterator[float]:
    """Each read is asked at its own time, whether or not those before it were answered."""
    read = new_method_call(PROPERTIES, "Get", "ss", (GPU.interface, "State"))
    assert not read.header.flags & MessageFlag.no_reply_expected
    by_number = {client.sock.fileno(): client for client in clients}
    asked: dict[int, float] = {}
    begun = time.perf_counter()
    due = [begun + number / EACH_SECOND for number in range(int(EACH_SECOND * SECONDS))]
    idle = list(clients)
    while due or asked:
        now = time.perf_counter()
        while due and due[0] <= now and idle:
            client = idle.pop(0)
            client.send(read, serial=next(client.outgoing_serial))
            asked[client.sock.fileno()] = due.pop(0)
        wait = max(due[0] - now, 0.0) if due and idle else None
        for number in select.select(list(asked), [], [], wait)[0]:
            client = by_number[number]
            client.receive(timeout=10)
            yield time.perf_counter() - asked.pop(number)
            idle.append(client)
