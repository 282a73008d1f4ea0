"""What the log says of a switch, and what each line is about."""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from gpuswitch.host.simulated.faults import Errno, Hang
from gpuswitch.log import events
from gpuswitch.log.fields import fields_of
from gpuswitch.log.observer import LogObserver
from gpuswitch.model.address import PciAddress
from gpuswitch.model.owner import Owner
from gpuswitch.model.states import State
from gpuswitch.switch.steps.pci import Bind
from tests.harness.simulated.harness import Harness, Witness

GPU, OTHER = "0000:01:00.0", PciAddress.parse("0000:00:02.0")


class Lines(logging.Handler):
    """Each line with what it is about."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, Mapping[str, str]]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append((record.getMessage(), fields_of(record)))

    def of(self, event: events.LogEvent) -> list[Mapping[str, str]]:
        return [fields for _, fields in self.found if fields.get("MESSAGE_ID") == event.message_id]


@pytest.fixture
def lines() -> Iterator[Lines]:
    log, heard = logging.getLogger("gpuswitch"), Lines()
    log.addHandler(heard)
    log.setLevel(logging.INFO)
    yield heard
    log.removeHandler(heard)
    log.setLevel(logging.NOTSET)


async def logged(scenario: str, folder: Path) -> Harness:
    """A service whose witness tells the log too, as the daemon's observers do."""
    harness = await Harness.of(scenario, folder)
    observer = LogObserver()
    witness: Witness = harness.witness
    for name in ("changed", "finished", "drifted", "recovered"):
        seen, told = getattr(witness, name), getattr(observer, name)

        def both(*what: object, seen: object = seen, told: object = told) -> None:
            told(*what)  # type: ignore[operator] # both are methods
            seen(*what)  # type: ignore[operator] # as above

        setattr(witness, name, both)
    return harness


async def test_each_state_has_one_line(lines: Lines, tmp_path: Path) -> None:
    harness = await logged("plain", tmp_path)
    actor = harness.fleet.find("01:00.0")
    await harness.moved(actor, State.VFIO)
    for _ in range(3):
        actor.record.tell()
    await harness.moved(actor, State.HOST)
    states = [fields["STATE"] for fields in lines.of(events.STATE)]
    assert states == ["detaching", "vfio", "reattaching", "host"]
    assert {fields["GPU"] for fields in lines.of(events.STATE)} == {GPU}


async def test_the_end_of_a_switch_has_all_that_it_is_about(lines: Lines, tmp_path: Path) -> None:
    harness = await logged("plain", tmp_path)
    actor = harness.fleet.find("01:00.0")
    switch = await harness.switch(actor, State.VFIO)
    [done] = lines.of(events.SWITCH_DONE)
    about = {"GPU": GPU, "STATE": "vfio", "SWITCH_ID": switch.id, "TARGET": "vfio", "RESULT": "done"}
    assert {name: done[name] for name in about} == about
    assert not done.keys() & {"OWNER", "REASON", "STEP"}


async def test_one_that_is_taken_back_says_at_which_step_and_why(lines: Lines, tmp_path: Path) -> None:
    harness = await logged("plain", tmp_path)
    harness.host.faults.add(Errno(errno.EIO), operation="unbind")
    switch = await harness.switch(harness.fleet.find("01:00.0"), State.VFIO)
    [taken_back] = lines.of(events.SWITCH_REVERTED)
    assert taken_back["REASON"] == switch.reason
    assert taken_back["RESULT"] == "reverted"


async def test_what_any_module_says_meanwhile_is_about_the_switch(lines: Lines, tmp_path: Path) -> None:
    """Here of the kernel that does not return, which no observer tells."""
    harness = await logged("plain", tmp_path)
    actor = harness.fleet.find("01:00.0")
    hang = harness.host.faults.add(Hang(), operation="unbind")
    switch = await actor.request(State.VFIO)
    await harness.witness.until(lambda: actor.state is State.WEDGED)
    [wedged] = lines.of(events.WEDGED)
    assert (wedged["GPU"], wedged["SWITCH_ID"], wedged["STEP"]) == (GPU, switch.id, "unbind")
    hang.release()
    await harness.witness.until(lambda: actor.state is State.HOST)


async def test_what_is_found_at_its_end_is_not_about_it(lines: Lines, tmp_path: Path) -> None:
    """A look follows each switch, and it is about all GPUs."""
    harness = await logged("plain", tmp_path)
    actor = harness.fleet.find("01:00.0")
    actor.own(Owner("win11", "9f3c"))
    switch = await actor.request(State.VFIO)
    await harness.witness.until_step(actor.gpu, Bind)
    await harness.machine.unplug(OTHER.slot_name)
    await switch.wait()
    await harness.witness.until(lambda: harness.fleet.actors[OTHER].state is State.ABSENT)
    [drift] = lines.of(events.DRIFT)
    assert (drift["GPU"], drift.get("OWNER")) == (str(OTHER), None)
    assert {fields["OWNER"] for fields in lines.of(events.SWITCH_DONE)} == {"win11"}


async def test_what_is_said_before_a_switch_is_about_its_gpu(lines: Lines, tmp_path: Path) -> None:
    harness = await logged("plain", tmp_path)
    actor = harness.fleet.find("01:00.0")
    await actor.try_again("somebody asked")
    assert [fields for text, fields in lines.found if "once more" in text] == [{"GPU": GPU}]


async def test_what_is_said_after_it_is_not(lines: Lines, tmp_path: Path) -> None:
    harness = await logged("plain", tmp_path)
    actor = harness.fleet.find("01:00.0")
    await harness.moved(actor, State.VFIO)
    await asyncio.sleep(0)
    lines.found.clear()
    logging.getLogger("gpuswitch.test").warning("something else")
    assert lines.found == [("something else", {})]
