"""What is said of connections that end with something on its way, on a real bus."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator

import jeepney
import pytest
from jeepney.io.blocking import DBusConnection, open_dbus_connection

from gpuswitch.api.bus import Bus
from gpuswitch.api.interface import Interface, dbus_method
from gpuswitch.api.signatures import Str
from tests.harness.buses.private import PrivateBus

OBJECT = "/org/example1"
INTERFACE = "org.example1.Slow"
CALLER = """
import sys, jeepney
from jeepney.io.blocking import open_dbus_connection
bus, name = sys.argv[1:]
with open_dbus_connection(bus) as connection:
    print(connection.unique_name, flush=True)
    to = jeepney.DBusAddress("/org/example1", name, "org.example1.Slow")
    connection.send_and_get_reply(jeepney.new_method_call(to, "Wait"))
"""


class Slow(Interface, name=INTERFACE):
    def __init__(self) -> None:
        self.waiting = asyncio.Semaphore(0)
        self.telling = asyncio.Semaphore(0)

    @dbus_method()
    def tell(self) -> Str:
        self.telling.release()
        return "x" * 1000

    @dbus_method()
    async def wait(self) -> None:
        self.waiting.release()
        await asyncio.Event().wait()


class Log(logging.Handler):
    """What is logged, to be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: asyncio.Queue[str] = asyncio.Queue()

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.put_nowait(record.getMessage())


@pytest.fixture
async def slow(bus: Bus) -> AsyncIterator[Slow]:
    slow = Slow()
    bus.export(OBJECT, slow)
    yield slow
    bus.unexport(OBJECT)


@pytest.fixture
async def log() -> AsyncIterator[asyncio.Queue[str]]:
    log, ours = Log(), logging.getLogger("gpuswitch")
    level = ours.level
    ours.addHandler(log)
    ours.setLevel(logging.INFO)
    yield log.lines
    ours.removeHandler(log)
    ours.setLevel(level)


def flood(caller: DBusConnection, name: str, member: str, count: int) -> None:
    call = jeepney.new_method_call(jeepney.DBusAddress(OBJECT, name, INTERFACE), member)
    for _ in range(count):
        caller.send(call)


async def acquire(semaphore: asyncio.Semaphore, count: int) -> None:
    for _ in range(count):
        await semaphore.acquire()


async def test_a_caller_that_is_killed_before_its_answer(
    bus: Bus, slow: Slow, private_bus: PrivateBus, log: asyncio.Queue[str]
) -> None:
    command = [sys.executable, "-c", CALLER, private_bus.address, bus.name]
    caller = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    assert caller.stdout is not None
    name = (await caller.stdout.readline()).decode().strip()
    await slow.waiting.acquire()
    await bus.user(name)  # its process has been asked for before this
    caller.kill()
    await caller.communicate()
    who = f"{name} (user {os.geteuid()}, pid {caller.pid})"
    assert await log.get() == f"{who} left the bus, or was ended by it, with 1 call without an answer (Wait)"


async def test_a_caller_that_reads_none_of_its_answers(
    bus: Bus, slow: Slow, private_bus: PrivateBus, log: asyncio.Queue[str]
) -> None:
    """One call keeps us listening for who leaves; the line is about another connection."""
    with open_dbus_connection(private_bus.address) as waits:
        flood(waits, bus.name, "Wait", 1)
        await slow.waiting.acquire()
        with open_dbus_connection(private_bus.address) as deaf:
            flood(deaf, bus.name, "Tell", 100)
            await acquire(slow.telling, 100)
            answers, size = bus._connection.answered(deaf.unique_name)
        assert answers == 100
        said = f"left the bus, or was ended by it, with 100 answers of {size} bytes sent to it"
        assert await log.get() == f"{deaf.unique_name} {said}"


async def test_a_caller_that_has_read_what_it_asked_for_is_not_told_of(
    bus: Bus, slow: Slow, private_bus: PrivateBus, log: asyncio.Queue[str]
) -> None:
    with open_dbus_connection(private_bus.address) as first:
        flood(first, bus.name, "Wait", 1)
        await slow.waiting.acquire()
        with open_dbus_connection(private_bus.address) as second:
            flood(second, bus.name, "Tell", 1)
            await asyncio.to_thread(second.receive)
    assert (await log.get()).startswith(first.unique_name)


async def test_the_loss_of_the_bus_tells_what_was_on_its_way(
    bus: Bus, slow: Slow, private_bus: PrivateBus, log: asyncio.Queue[str]
) -> None:
    with open_dbus_connection(private_bus.address) as caller:
        flood(caller, bus.name, "Wait", 3)
        await acquire(slow.waiting, 3)
        private_bus.stop()
        await bus.lost()
    assert re.fullmatch("the connection to the bus is lost: .*, with 3 calls under way", await log.get())


async def test_who_had_most_waiting_is_named_when_the_bus_is_lost(
    bus: Bus, slow: Slow, private_bus: PrivateBus, log: asyncio.Queue[str]
) -> None:
    """Put where they wait, as a bus that ends in the middle of a flood leaves them."""
    with open_dbus_connection(private_bus.address) as caller:
        call = jeepney.new_method_call(jeepney.DBusAddress(OBJECT, bus.name, INTERFACE), "Tell")
        call.header.fields[jeepney.HeaderFields.sender] = caller.unique_name
        user = await bus._users.of(caller.unique_name)
        await bus.user(caller.unique_name)  # its process has been asked for before this
        for serial in range(1, 8):
            bus._connection._inbox.put(user, call.serialise(serial))
        private_bus.stop()
        await bus.lost()
    assert re.fullmatch(
        rf"the connection to the bus is lost: .*, with 7 calls not served yet \(7 of user {user}\)", await log.get()
    )
