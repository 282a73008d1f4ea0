"""`watch` and `wait`: what happens to GPUs, as it happens, over the end of the service too."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from os import openpty
from pathlib import Path
from typing import Any

import pytest
from jeepney import HeaderFields

from tests.harness.buses.private import PrivateBus
from tests.harness.service.peers import scripted_bus, watching
from tests.harness.service.services import ANY_PORT, ROOT, environment
from tests.real_bus.conftest import CTL, Start

CARD, SOUND, INTEGRATED = "0000:01:00.0", "0000:01:00.1", "0000:00:02.0"
CALLED = f"geforce ({CARD})"
"""In sentences."""
PATH = f"{ROOT}/gpu/0000_01_00_0"
MOMENT = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d"
CONFIG = f'{ANY_PORT}[[gpu]]\naddress = "{CARD}"\nname = "geforce"\n'
Event = dict[str, Any]


class Watching:
    """`gpuswitchctl watch` or `wait`, its output in a pipe."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def line(self) -> str:
        """The next; "" at the end."""
        assert self.process.stdout is not None
        line: str = self.process.stdout.readline()
        return line

    def until(self, text: str) -> list[str]:
        """The next lines up to the first with these words."""
        lines = [self.line()]
        while text not in lines[-1]:
            assert lines[-1], f"{text!r} never came, but {lines}"
            lines.append(self.line())
        return lines

    def events(self, last: Callable[[Event], bool]) -> list[Event]:
        """The next events up to the first of which `last` is true."""
        events = [json.loads(self.line())]
        while not last(events[-1]):
            events.append(json.loads(self.line()))
        return events

    def interrupted(self) -> tuple[int, str]:
        """Its exit status after ^C, and what it said of that."""
        self.process.send_signal(signal.SIGINT)
        return self.ended()

    def ended(self) -> tuple[int, str]:
        _, err = self.process.communicate()
        return self.process.returncode, err


Watch = Callable[..., Watching]


def socketpair() -> tuple[int, int]:
    ours, theirs = socket.socketpair()
    return ours.detach(), theirs.detach()


@pytest.fixture
def watch(private_bus: PrivateBus) -> Iterator[Watch]:
    """Start to follow: `watch("watch", "--json")`."""
    environ = environment(GPUSWITCH_BUS=private_bus.address)
    started: list[subprocess.Popen[str]] = []

    def watch(*arguments: str, out: int = subprocess.PIPE) -> Watching:
        started.append(subprocess.Popen([CTL, *arguments], env=environ, stdout=out, stderr=subprocess.PIPE, text=True))
        return Watching(started[-1])

    yield watch
    for process in started:
        process.kill()
        process.communicate()


def is_(event: str, **values: object) -> Callable[[Event], bool]:
    """Whether it is this event, with these values."""
    return lambda found: found["event"] == event and values.items() <= found.items()


async def test_everything_that_happens_is_told_in_a_line(start: Start, watch: Watch) -> None:
    service = await start("laptop", f"probe@{SOUND}#1=EINVAL", config=CONFIG)
    watching = watch("watch")
    first, second = watching.line(), watching.line()
    assert re.fullmatch(rf"{MOMENT}  {INTEGRATED}: host-i915\n", first)
    assert re.fullmatch(rf"{MOMENT}  {re.escape(CALLED)}: host-nvidia\n", second)
    switch = await service.move(PATH, "vfio")
    lines = [line.partition("  ")[2] for line in watching.until("is reverted")]
    assert f"{CALLED}: detaching\n" in lines
    assert any(
        re.fullmatch(rf"{re.escape(CALLED)}: \[ *\d+/\d+\] bind {SOUND} to vfio-pci: failed \(.*\)\n", line)
        for line in lines
    )
    assert lines[-1] == f"{CALLED}: switch {switch} is reverted: cannot bind {SOUND} to vfio-pci: Invalid argument\n"
    assert not [line for line in lines if "running" in line]
    assert watching.interrupted() == (130, "")


async def test_a_step_that_takes_its_time_is_told_while_it_does_with_its_limit(start: Start, watch: Watch) -> None:
    service = await start("laptop", f"unbind@{SOUND}=hang", config=f"{CONFIG}[deadlines]\nunbind = 600\n")
    watching = watch("watch")
    watching.until(CALLED)
    await service.move(PATH, "vfio")
    *_before, line = watching.until("running")
    assert re.fullmatch(
        rf".*: \[ *\d+/\d+\] unbind {SOUND} from snd_hda_intel \(within 600 s\): running \(1.00 s\)\n", line
    )


async def test_a_switch_that_the_service_was_killed_in_is_told_to_its_end(start: Start, watch: Watch) -> None:
    service = await start("laptop", f"unbind@{SOUND}=hang", config=CONFIG)
    watching = watch("watch")
    watching.until(CALLED)
    switch = await service.move(PATH, "vfio")
    watching.until(" see that nobody has it open: done")
    await service.end(signal.SIGKILL)
    (service.folder / "notify").unlink()
    watching.until("the service has ended")
    again = await start("laptop", config=CONFIG)
    watching.until(f"{CALLED}: switch {switch} is reverted: the service ended at step ")
    # The next one puts right what is beside the GPU, and was at any step of that when it was first heard of.
    lines = watching.until(f"{CALLED}: ")
    await again.end(signal.SIGKILL)
    lines += watching.until("the service has ended")
    assert "reverted" not in "".join(lines)
    steps = [int(found[1]) for line in lines if (found := re.search(r"\[(\d+)/\d+\]", line))]
    assert steps == sorted(steps)


async def test_what_an_earlier_switch_met_is_told_with_its_time(start: Start, watch: Watch) -> None:
    """Not as if it were so now."""
    service = await start("laptop", f"probe@{SOUND}#1=EINVAL", config=CONFIG)
    switch = await service.move(PATH, "vfio")
    await service.wait(PATH, switch)
    watching = watch("watch", "geforce")
    assert re.fullmatch(
        rf"{MOMENT}  {re.escape(CALLED)}: host-nvidia, since \d+-\d\d-\d\d \d\d:\d\d:\d\d\S+, "
        rf"when switch {switch} to vfio was reverted: cannot bind {SOUND} to vfio-pci: Invalid argument\n",
        watching.line(),
    )
    again = await service.move(PATH, "vfio")
    assert watching.until(f"switch {again} is ")[-1].endswith("is done\n")


async def test_programs_get_each_event_with_its_values(start: Start, watch: Watch) -> None:
    service = await start("laptop", config=CONFIG)
    watching = watch("watch", "geforce", "--json")
    [first] = watching.events(is_("state"))
    assert (first["gpu"], first["now"]["state_label"], first["now"]["name"]) == (CARD, "host-nvidia", "geforce")
    switch = await service.move(PATH, "vfio")
    events = watching.events(is_("finished"))
    assert {each["version"] for each in events} == {1}
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", each["at"]) for each in events)
    steps = [each for each in events if each["event"] == "step"]
    assert {each["status"] for each in steps} == {"running", "done"}
    assert {(each["id"], each["gpu"]) for each in steps} == {(switch, CARD)}
    assert events[-1].items() >= {"id": switch, "gpu": CARD, "result": "done", "reason": ""}.items()
    states = [each["now"]["state"] for each in events if each["event"] == "state"]
    assert states[0] == "detaching"
    assert states[-1] == "vfio"


async def test_for_whom_a_switch_waits_is_told(start: Start, watch: Watch) -> None:
    config = f'{CONFIG}[defaults]\nallow_boot_display = true\nwait_seconds = 600\nbusy = "wait"\n'
    service = await start("single", config=config)
    plain, told = watch("watch"), watch("watch", "--json")
    plain.line()
    told.line()
    switch = await service.move(PATH, "vfio")
    [*_, line] = plain.until("waiting until ")
    assert re.search(rf"{re.escape(CALLED)}: waiting until \d\d:\d\d:\d\d: .*Xorg \(pid ", line)
    [*_, event] = told.events(is_("waiting"))
    assert (event["id"], "Xorg (pid " in event["for"]) == (switch, True)
    assert event["since"] < event["until"]


async def test_only_those_that_are_named_are_told_of(start: Start, watch: Watch) -> None:
    service = await start("laptop", config=CONFIG)
    watching = watch("watch", INTEGRATED, "--json")
    [first] = watching.events(is_("state"))
    assert first["gpu"] == INTEGRATED
    await service.wait(PATH, await service.move(PATH, "vfio"))
    await service.end(signal.SIGTERM)
    [ended] = watching.events(is_("service"))
    assert ended["running"] is False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_a_service_that_starts_again_is_watched_on(number: int, start: Start, watch: Watch) -> None:
    service = await start("laptop", config=CONFIG)
    plain, told = watch("watch"), watch("watch", "--json", "geforce")
    plain.until(CARD)
    told.line()
    await service.end(number)
    [ended] = plain.until("service")
    assert ended.partition("  ")[2] == "the service has ended; it is waited for\n"
    [gone] = told.events(is_("service"))
    assert gone["running"] is False
    (service.folder / "notify").unlink()
    again = await start("laptop", config=CONFIG)
    assert [line.partition("  ")[2] for line in plain.until(CARD)] == [
        "the service is there\n",
        f"{INTEGRATED}: host-i915\n",
        f"{CALLED}: host-nvidia\n",
    ]
    back, state = told.events(is_("state"))
    assert (back["event"], back["running"], state["gpu"]) == ("service", True, CARD)
    switch = await again.move(PATH, "vfio")
    assert plain.until("is done")[-1].endswith(f"  {CALLED}: switch {switch} is done\n")
    assert told.events(is_("finished"))[-1]["id"] == switch


async def test_one_that_is_not_there_after_a_restart_is_told_and_waited_for(start: Start, watch: Watch) -> None:
    service = await start("laptop", config=CONFIG)
    watching = watch("watch", "geforce", "--json")
    watching.line()
    await service.end(signal.SIGTERM)
    (service.folder / "notify").unlink()
    nameless = await start("laptop")
    *_, told = watching.events(lambda event: "geforce" in event.get("text", "") or event.get("running") is True)
    assert told["running"] is True
    await nameless.end(signal.SIGTERM)
    (service.folder / "notify").unlink()
    await start("laptop", config=CONFIG)
    assert watching.events(is_("state"))[-1]["gpu"] == CARD


async def test_without_a_service_there_is_nothing_to_watch(watch: Watch) -> None:
    for verb in ("watch", "wait"):
        status, err = watch(verb).ended()
        assert status == 5
        assert "the gpuswitch service is not on the bus" in err


async def test_a_bus_that_ends_ends_it(start: Start, watch: Watch, private_bus: PrivateBus) -> None:
    await start("laptop", config=CONFIG)
    watching = watch("watch")
    watching.until(CARD)
    private_bus.stop()
    status, err = watching.ended()
    assert (status, "the connection to the bus is lost" in err) == (5, True)


async def test_whoever_reads_no_further_is_not_written_to(start: Start, watch: Watch) -> None:
    service = await start("laptop", config=CONFIG)
    watching = watch("watch")
    watching.until(CARD)
    assert watching.process.stdout is not None
    watching.process.stdout.close()
    await service.move(PATH, "vfio")
    assert watching.process.wait() == -signal.SIGPIPE
    assert watching.process.stderr is not None
    assert watching.process.stderr.read() == ""


@pytest.mark.parametrize(
    "arguments", [("watch",), ("watch", "--json"), ("wait", "--for", "vfio"), ("wait", "--for", "vfio", "--json")]
)
async def test_a_reader_that_has_gone_ends_it_though_nothing_happens(
    arguments: tuple[str, ...], start: Start, watch: Watch, private_bus: PrivateBus
) -> None:
    await start("laptop", config=CONFIG)
    async with watching(private_bus.address) as calls:
        following = watch(*arguments)
        while (await calls.get()).header.fields.get(HeaderFields.member) != "GetManagedObjects":
            pass
    assert following.process.stdout is not None
    if arguments[0] == "watch":
        following.line()
    following.process.stdout.close()
    assert following.process.wait() == -signal.SIGPIPE
    assert following.process.stderr is not None
    assert following.process.stderr.read() == ""


@pytest.mark.parametrize("pair", [socketpair, openpty], ids=["socket", "terminal"])
async def test_so_does_the_other_end_of_a_socket_or_a_terminal(
    pair: Callable[[], tuple[int, int]], start: Start, watch: Watch
) -> None:
    await start("laptop", config=CONFIG)
    ours, theirs = pair()
    following = watch("watch", out=theirs)
    os.close(theirs)
    os.read(ours, 1)
    os.close(ours)
    assert following.process.wait() == -signal.SIGPIPE
    assert following.process.stderr is not None
    assert following.process.stderr.read() == ""


async def test_a_switch_is_followed_while_somebody_reads_and_goes_on_without(start: Start, watch: Watch) -> None:
    service = await start("laptop", f"unbind@{SOUND}=hang", config=f"{CONFIG}[deadlines]\nunbind = 600\n")
    moving = watch("to-vfio", "geforce")
    moving.until("[")
    assert moving.process.stdout is not None
    moving.process.stdout.close()
    assert moving.process.wait() == -signal.SIGPIPE
    assert (await service.properties(PATH))["State"] == "detaching"


# wait


async def test_nothing_under_way_is_nothing_to_wait_for(start: Start, watch: Watch) -> None:
    await start("laptop", config=CONFIG)
    waiting = watch("wait")
    assert waiting.line() == f"{INTEGRATED} is host-i915\n"
    assert waiting.line() == f"{CALLED} is host-nvidia\n"
    assert waiting.ended() == (0, "")


async def test_a_state_among_the_gpus_is_told_how_it_is_waited_for(start: Start, watch: Watch) -> None:
    await start("laptop", config=CONFIG)
    status, told = watch("wait", "geforce", "vfio").ended()
    assert status == 2
    assert "no GPU is named 'vfio'" in told
    assert "a state is waited for by: gpuswitchctl wait geforce --for vfio\n" in told


async def test_the_end_of_a_switch_is_waited_for(start: Start, watch: Watch) -> None:
    service = await start("laptop", "unbind=0.5s", config=CONFIG)
    switch = await service.move(PATH, "vfio")
    waiting, told = watch("wait", "GeForce"), watch("wait", "geforce", "--json")
    assert waiting.line() == f"{CALLED} is vfio\n"
    assert waiting.ended() == (0, "")
    [event] = told.events(is_("state"))
    assert (event["gpu"], event["now"]["state"], event["now"]["switch"]["id"]) == (CARD, "vfio", switch)
    assert told.ended() == (0, "")


async def test_a_state_is_waited_for_until_somebody_brings_it_there(start: Start, watch: Watch) -> None:
    service = await start("laptop", config=CONFIG)
    seen, waiting = watch("watch", "geforce"), watch("wait", "geforce", "--for", "VFIO")
    seen.line()
    await service.wait(PATH, await service.move(PATH, "vfio"))
    assert waiting.line() == f"{CALLED} is vfio\n"
    assert waiting.ended() == (0, "")


async def test_the_time_may_be_over_before(start: Start, watch: Watch) -> None:
    service = await start("laptop", f"unbind@{SOUND}=hang", config=f"{CONFIG}[deadlines]\nunbind = 600\n")
    late = watch("wait", "geforce", "--for", "vfio", "--timeout", "2")
    assert late.ended() == (6, f"gpuswitchctl: the time is over: not on vfio within 2 s: {CALLED} is host-nvidia\n")
    await service.move(PATH, "vfio")
    late = watch("wait", "geforce", "--timeout", "2", "--json")
    status, err = late.ended()
    assert (status, f"not at rest within 2 s: {CALLED} is detaching" in err) == (6, True)


@pytest.mark.parametrize("typed", [["wait", "geforce"], ["to-vfio", "geforce"], ["recover", "geforce"]])
async def test_a_service_that_answers_nothing_takes_no_longer_than_its_user_lets_it(
    typed: list[str], start: Start, watch: Watch
) -> None:
    service = await start("laptop", config=CONFIG)
    service.process.send_signal(signal.SIGSTOP)
    try:
        late = watch(*typed, "--timeout", "0.3").ended()
    finally:
        service.process.send_signal(signal.SIGCONT)
    assert late == (6, "gpuswitchctl: the time is over: the service has not answered within 0.3 s\n")


async def test_a_bus_that_answers_nothing_takes_no_longer_either(tmp_path: Path, watch: Watch) -> None:
    """Neither one that lets nobody in, nor one that has, and does not greet."""
    async with scripted_bus(tmp_path) as (address, connections):
        words = f"the bus at {address}: it did not answer within 0.3 s\n"
        late = watch("wait", "--bus", address, "--timeout", "0.3")
        far_end = await connections.get()
        status, err = await asyncio.to_thread(late.ended)
        assert (status, err.endswith(words)) == (6, True)
        await far_end.close()
        late = watch("wait", "--bus", address, "--timeout", "0.3")
        far_end = await connections.get()
        await far_end.receive_hello()
        status, err = await asyncio.to_thread(late.ended)
        assert (status, err.endswith(words)) == (6, True)
        await far_end.close()


def _wait_for(text: str) -> str:
    return f"cannot wait until no switch of geforce is under way: {text}"


@pytest.mark.parametrize(("fault", "status", "state"), [("unbind=hang", 7, "wedged"), ("probe=EINVAL", 1, "failed")])
async def test_one_that_is_lost_is_told_by_the_status(
    fault: str, status: int, state: str, start: Start, watch: Watch
) -> None:
    gentle = "[defaults]\nreset_on_failure = false\nrescan_on_failure = false\n[deadlines]\nunbind = 0.2\n"
    service = await start("laptop", fault, config=f"{CONFIG}{gentle}")
    await service.move(PATH, "vfio")
    waiting = watch("wait", "geforce")
    assert waiting.line() == f"{CALLED} is {state}\n"
    assert waiting.ended() == (status, "")


async def test_of_one_that_is_wedged_each_thing_is_told_once(start: Start, watch: Watch) -> None:
    service = await start("plain", "unbind=hang", config="[deadlines]\nunbind = 0.2\n")
    watching = watch("watch", "01:00.0")
    watching.line()
    await service.move(PATH, "vfio")
    told = ""
    while "so most likely" not in told:
        told += watching.line()
    for once in ("has not returned from", "nothing more is written", "it recovers by itself"):
        assert told.count(once) == 1, told


async def test_a_service_that_goes_is_not_waited_for(start: Start, watch: Watch, private_bus: PrivateBus) -> None:
    service = await start("laptop", config=CONFIG)
    async with watching(private_bus.address) as calls:
        waiting = watch("wait", "--for", "vfio")
        while (await calls.get()).header.fields.get(HeaderFields.member) != "GetManagedObjects":
            pass
    service.process.kill()
    status, err = waiting.ended()
    assert (status, "the service went away" in err) == (5, True)
