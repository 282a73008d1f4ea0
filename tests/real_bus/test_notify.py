"""`gpuswitchctl notify`: what a desktop shows of switches, whoever asked for them."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import jeepney
import pytest

from tests.harness.buses.private import PrivateBus
from tests.harness.managers.memory import RefusedError
from tests.harness.managers.notifications import FakeDesktop, Shown
from tests.harness.service.peers import watching
from tests.harness.service.services import BIN, GPU, ROOT, environment
from tests.real_bus.conftest import Start

DISCRETE = f"{ROOT}/gpu/0000_01_00_0"
CONFIG = '[metrics]\nport = 0\n[[gpu]]\naddress = "0000:01:00.0"\nname = "card"\n'
LOW, NORMAL, CRITICAL = 0, 1, 2


@pytest.fixture
async def desktop(private_bus: PrivateBus) -> AsyncIterator[FakeDesktop]:
    async with FakeDesktop.on(private_bus.address) as desktop:
        yield desktop


@asynccontextmanager
async def notifying(bus: PrivateBus, session: str | None = None) -> AsyncIterator[asyncio.subprocess.Process]:
    """The command, from when it has subscribed to what the service tells."""
    where = environment(GPUSWITCH_BUS=bus.address, DBUS_SESSION_BUS_ADDRESS=session or bus.address)
    async with watching(bus.address) as messages:
        process = await asyncio.create_subprocess_exec(
            BIN / "gpuswitchctl", "notify", env=where, stderr=asyncio.subprocess.PIPE
        )
        try:
            while session is None and await _member(messages) != "GetManagedObjects":
                pass
            yield process
        finally:
            if process.returncode is None:
                process.terminate()
            await process.wait()


async def _member(calls: asyncio.Queue[jeepney.Message]) -> str:
    return str((await calls.get()).header.fields.get(jeepney.HeaderFields.member))


async def test_a_switch_that_is_done_is_shown_and_the_next_one_takes_its_place(
    start: Start, private_bus: PrivateBus, desktop: FakeDesktop
) -> None:
    service = await start("laptop", config=CONFIG)
    async with notifying(private_bus):
        await service.wait(DISCRETE, await service.move(DISCRETE, "vfio"))
        assert await desktop.shown.get() == Shown(1, 0, "card is vfio now", "", LOW)
        await service.wait(DISCRETE, await service.move(DISCRETE, "host"))
        assert await desktop.shown.get() == Shown(1, 1, "card is host-nvidia now", "", LOW)


async def test_whom_it_waits_for_is_shown_while_it_waits(
    start: Start, private_bus: PrivateBus, desktop: FakeDesktop
) -> None:
    service = await start("single", config=f"{CONFIG}allow_boot_display = true\n")
    async with notifying(private_bus):
        switch = await service.call(DISCRETE, f"{GPU}.ToVfio", "a{sv}", {"wait_seconds": ("u", 600)})
        waits = await desktop.shown.get()
        assert re.fullmatch(r"card waits until \d\d:\d\d:\d\d", waits.summary)
        assert re.match(r"\w+ \(pid \d+", waits.body)
        await service.call(DISCRETE, f"{GPU}.Cancel", "s", switch)
        ended = await desktop.shown.get()
        assert (ended.summary, ended.replaces, ended.urgency) == ("The switch of card is cancelled", 1, NORMAL)


async def test_whom_it_waits_for_is_shown_also_where_that_was_begun_before(
    start: Start, private_bus: PrivateBus, desktop: FakeDesktop
) -> None:
    service = await start("single", config=f"{CONFIG}allow_boot_display = true\n")
    switch = await service.call(DISCRETE, f"{GPU}.ToVfio", "a{sv}", {"wait_seconds": ("u", 600)})
    async with notifying(private_bus):
        waits = await desktop.shown.get()
        assert re.fullmatch(r"card waits until \d\d:\d\d:\d\d", waits.summary)
        await service.call(DISCRETE, f"{GPU}.Cancel", "s", switch)
        assert (await desktop.shown.get()).summary == "The switch of card is cancelled"


async def test_a_failure_is_shown_above_all_else_and_its_text_is_no_markup(
    start: Start, private_bus: PrivateBus, desktop: FakeDesktop
) -> None:
    service = await start("laptop", "unbind@0000:01:00.1=hang", config=f"{CONFIG}[deadlines]\nunbind = 0.5\n")
    async with notifying(private_bus):
        await service.wait(DISCRETE, await service.move(DISCRETE, "vfio"))
        shown = await desktop.shown.get()
        assert shown.summary in {"The switch of card is wedged", "card is wedged"}
        assert shown.urgency == CRITICAL
        assert "<" not in shown.body


async def test_a_desktop_that_shows_nothing_is_told_of_once(
    start: Start, private_bus: PrivateBus, desktop: FakeDesktop
) -> None:
    desktop.refuses = RefusedError("org.freedesktop.DBus.Error.Failed", "not today")
    service = await start("laptop", config=CONFIG)
    async with notifying(private_bus) as process:
        for target in ("vfio", "host"):
            await service.wait(DISCRETE, await service.move(DISCRETE, target))
            await desktop.shown.get()
        process.terminate()
        _, said = await process.communicate()
    assert said.decode() == "gpuswitchctl: cannot show a notification: not today\n"


async def test_without_a_session_it_says_where_to_run_it(start: Start, private_bus: PrivateBus) -> None:
    await start("laptop", config=CONFIG)
    async with notifying(private_bus, "unix:path=/nonexistent") as process:
        _, said = await process.communicate()
    assert process.returncode == 5
    assert said.decode() == (
        "gpuswitchctl: cannot connect to the bus of this session: No such file or directory; "
        "run this in a desktop's session\n"
    )
