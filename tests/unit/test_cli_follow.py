"""How the command follows what happens: a step that was joined, ^C in the midst of it, answers that nobody takes."""

from __future__ import annotations

import io
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from jeepney import DBusAddress, HeaderFields, MatchRule, Message, new_error, new_method_return, new_signal
from jeepney.io.blocking import DBusConnection

from gpuswitch.cli import switch as move
from gpuswitch.cli import watch
from gpuswitch.cli.client import GPU as INTERFACE
from gpuswitch.cli.client import NAME, OBJECTS, PROPERTIES, ROOT, Service, Signal, call
from gpuswitch.cli.failures import CtlError
from gpuswitch.cli.interrupts import INTERRUPTS
from gpuswitch.cli.output import OutputError, moment, write
from gpuswitch.cli.parser import parse
from gpuswitch.cli.watching import Watching
from tests.harness.service.fixed import A_WHILE, CARD, changed, fixed, gpu, stepped, switch

OTHER = "0000:02:00.0"
UNDER_WAY = switch(
    index=4, count=9, title="wait", step_started=1.0, waiting_for="blender", waiting_until=2.0, finished=0.0, result=""
)

_TOLD = changed(Switch={key: ("v", value) for key, value in UNDER_WAY.items()})
WAITS = Signal(*_TOLD[:3], (INTERFACE, {"Switch": ("a{sv}", _TOLD.body[1]["Switch"][1])}, []))
"""The signal that tells so, with the signatures of the bus."""


def followed(events: Iterable[Signal | str], now: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> list[Any]:
    """The index, or what is waited for, of each event that `to-vfio` tells."""
    card = gpu(Switch=now)
    move.move(fixed(card, events=events, outcomes={CARD: switch()}), parse(["to-vfio", "--json"]))
    told = map(json.loads, capsys.readouterr().out.splitlines())
    return [each.get("index", each.get("for")) for each in told if each["event"] != "result"]


def test_the_step_of_a_switch_that_was_joined_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert followed(["GetAll"], UNDER_WAY, capsys) == [4, "blender"]
    assert followed(["GetAll", stepped(5, 9, "unbind", "running")], UNDER_WAY, capsys) == [4, "blender", 5]


def test_what_was_told_already_is_not_told_again(capsys: pytest.CaptureFixture[str]) -> None:
    assert followed([stepped(4, 9, "wait", "running"), "GetAll"], UNDER_WAY, capsys) == [4]
    assert followed(["GetAll"], {**UNDER_WAY, "id": "another"}, capsys) == []
    assert followed(["GetAll"], {**UNDER_WAY, "index": 0}, capsys) == []
    assert followed(["GetAll"], {**UNDER_WAY, "result": "done"}, capsys) == []
    assert followed(["GetAll"], {}, capsys) == []
    assert followed(["GetAll", WAITS, WAITS], UNDER_WAY, capsys) == [4, "blender"]


TWO_PLANS = [
    stepped(1, 2, "stop x", "running"),
    stepped(1, 2, "stop x", "done", 0.005),
    stepped(2, 2, "bind it", "running"),
    stepped(2, 2, "bind it", "failed", 0.005),
    stepped(1, 2, "stop x", "reverting"),
    stepped(1, 2, "stop x", "revert-failed", 0.005),
    stepped(1, 1, "stop x", "running"),
    stepped(1, 1, "stop x", "done", 0.005),
]


def test_each_plan_of_a_switch_is_told_from_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    def told(*arguments: str, events: Iterable[Signal | str] = TWO_PLANS) -> list[str]:
        move.move(fixed(gpu(), events=events, outcomes={CARD: switch()}), parse(["to-vfio", *arguments]))
        return capsys.readouterr().out.splitlines()

    assert told()[:6] == [
        "[1/2] stop x: done (5.0 ms)",
        "[2/2] bind it: failed (5.0 ms)",
        "the way back:",
        "[1/2] stop x: not taken back (5.0 ms)",
        "recovery, on to a known-good state:",
        "[1/1] stop x: done (5.0 ms)",
    ]
    plans = [each.get("plan") for each in map(json.loads, told("--json")) if each["event"] == "step"]
    assert plans == [1, 1, 1, 1, 1, 1, 2, 2]


def test_of_a_switch_that_was_joined_the_plan_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    card = gpu(Switch={**UNDER_WAY, "plan": 2})
    events = ["GetAll", stepped(4, 9, "wait", "done"), stepped(1, 9, "reset it", "running")]
    move.move(fixed(card, events=events, outcomes={CARD: switch()}), parse(["to-vfio", "--json"]))
    told = map(json.loads, capsys.readouterr().out.splitlines())
    assert [each["plan"] for each in told if each["event"] == "step"] == [2, 2, 3]


def test_whom_it_waits_for_is_told_behind_its_step_also_where_it_was_heard_of_before_that(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A terminal has no place for it yet, and it comes but once."""
    assert followed([WAITS, "GetAll"], UNDER_WAY, capsys) == [4, "blender"]
    begun = stepped(4, 9, "wait", "running")
    assert followed([WAITS, begun, WAITS, "GetAll"], UNDER_WAY, capsys) == [4, "blender"]


def interrupt(happened: list[str], *, let_in: bool, wrong: bool = False) -> None:
    """An interrupt in the midst of something, and then what it goes on with."""
    with INTERRUPTS.held():
        os.kill(os.getpid(), signal.SIGINT)
        happened.append("read on")
        if wrong:
            raise CtlError("something else", 1)
        if let_in:
            with INTERRUPTS.let_in():
                happened.append("waited")
        happened.append("over")


def interrupt_while_it_waits(happened: list[str]) -> None:
    with INTERRUPTS.held(), INTERRUPTS.let_in():
        os.kill(os.getpid(), signal.SIGINT)
        happened.append("waited")


def test_an_interrupt_is_held_until_it_is_let_in() -> None:
    happened: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        interrupt(happened, let_in=True)
    assert happened == ["read on"]
    with pytest.raises(KeyboardInterrupt):
        interrupt_while_it_waits(happened)
    assert happened == ["read on"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_one_that_nobody_let_in_is_heard_at_the_end() -> None:
    happened: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        interrupt(happened, let_in=False)
    assert happened == ["read on", "over"]


def test_another_end_than_by_an_interrupt_forgets_it() -> None:
    with pytest.raises(CtlError, match="something else"):
        interrupt([], let_in=False, wrong=True)
    with INTERRUPTS.held(), INTERRUPTS.let_in():
        """It is not heard now."""


def test_a_job_in_the_background_stays_deaf_to_interrupts() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with INTERRUPTS.held(), INTERRUPTS.let_in():
            os.kill(os.getpid(), signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


class Connection:
    """One on which these messages come, an answer to each call, and nothing after them."""

    def __init__(self) -> None:
        self.outgoing_serial = itertools.count(1)
        self.incoming: list[Message] = []
        self.sent: list[Message] = []
        self.selector = SimpleNamespace(select=lambda _seconds: [])

    def send(self, message: Message, serial: int) -> None:
        message.header.serial = serial
        self.sent.append(message)

    def receive(self, *, timeout: float) -> Message:
        assert timeout == 0
        if not self.incoming:
            raise TimeoutError
        return self.incoming.pop(0)


def ping() -> Message:
    return call(":1.1", ROOT, "org.freedesktop.DBus.Peer", "Ping")


def test_an_answer_that_comes_too_late_is_offered_to_nobody() -> None:
    connection = Connection()
    service = Service(cast("DBusConnection", connection), None)
    late, kept = ping(), ping()
    serial, other = service.send(late), service.send(kept)
    with pytest.raises(CtlError, match=r"did not answer within 0\.001 s") as error:
        service.answer(serial, 0.001)
    assert error.value.exit_code == 5
    connection.incoming = [new_method_return(late), new_error(kept, "org.gpuswitch1.Error.Busy", "s", ("no",))]
    assert service.next_event(0.0) == other
    with pytest.raises(CtlError, match=r"^no$"):
        service.answer(other)
    assert service.next_event(0.0) is None


@pytest.mark.parametrize(
    ("why", "remedy"),
    [
        ("Unit gpuswitchd.service is masked.", "systemctl unmask gpuswitchd && systemctl start gpuswitchd"),
        ("Unit gpuswitchd.service not found.", "systemctl start gpuswitchd"),
    ],
)
def test_a_service_that_does_not_run_is_told_with_what_starts_it(why: str, remedy: str) -> None:
    connection = Connection()
    service = Service(cast("DBusConnection", connection), None)
    serial = service.send(asked := ping())
    connection.incoming = [new_error(asked, "org.freedesktop.systemd1.LoadFailed", "s", (why,))]
    with pytest.raises(CtlError, match=rf"is not running \({why}\); .*: {remedy}$"):
        service.answer(serial)


@pytest.mark.parametrize("variable", ["", "unix:path=/nowhere"])
def test_without_a_system_bus_it_is_said_what_is_missing_and_what_to_do(
    variable: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("DBUS_SYSTEM_BUS_ADDRESS", raising=False)
    monkeypatch.setattr("gpuswitch.cli.client.get_bus", lambda _bus: f"{tmp_path}/socket")
    if variable:
        monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", variable)
    with pytest.raises(CtlError) as none:
        Service.connect(None)
    lacking, what_to_do, *more = str(none.value).splitlines()
    assert lacking == f"cannot connect to the system bus: there is no socket {tmp_path}/socket"
    assert ("systemctl start dbus.socket" in what_to_do) != ("DBUS_SYSTEM_BUS_ADDRESS" in what_to_do)
    assert [each.rpartition(": ")[2] for each in more] == ["gpuswitchctl doctor", "gpuswitchctl demo"]
    assert none.value.exit_code == 5


def test_what_its_user_allows_bounds_every_answer_but_those_of_people() -> None:
    deadline = time.monotonic()
    service = Service(cast("DBusConnection", Connection()), None, seconds=5.0, deadline=deadline)
    with pytest.raises(CtlError, match=r"^the time is over: the service has not answered within 5 s$") as error:
        service.ask(ping())
    assert error.value.exit_code == 6
    with service.clock_stopped(), pytest.raises(CtlError, match=r"did not answer within 0\.001 s"):
        service.ask(ping(), 0.001)
    assert service.deadline is not None
    assert service.deadline > deadline


def test_what_came_while_an_answer_was_waited_for_is_offered_in_its_order() -> None:
    """An answer that says how something is, and a signal that says how it has become: never the other way round."""
    connection = Connection()
    service = Service(cast("DBusConnection", connection), None)
    service._rules.append(MatchRule(type="signal"))
    first, last, waited_for = ping(), ping(), ping()
    numbers = [service.send(each) for each in (first, last, waited_for)]
    told = new_signal(DBusAddress(ROOT, NAME, INTERFACE), "StepChanged")
    answers = map(new_method_return, (first, last, waited_for))
    connection.incoming = [next(answers), told, *answers, told]
    service.answer(numbers[2])
    offered: list[Any] = []
    while (event := service.next_event(0.0)) is not None:
        offered.append(event if isinstance(event, int) else event.member)
        if isinstance(event, int):
            service.answer(event)
    assert offered == [numbers[0], "StepChanged", numbers[1], "StepChanged"]


def test_a_rule_that_the_bus_has_dropped_already_is_given_up_all_the_same() -> None:
    connection = Connection()
    service = Service(cast("DBusConnection", connection), None)
    rule = MatchRule(type="signal", sender=":1.1")
    service.unsubscribe(rule)
    connection.incoming = [
        new_error(connection.sent[0], "org.freedesktop.DBus.Error.MatchRuleNotFound", "s", ("not found",))
    ]
    assert service.next_event(0.0) is None


def test_an_answer_that_was_interrupted_is_offered_to_nobody() -> None:
    connection = Connection()
    service = Service(cast("DBusConnection", connection), None)

    def interrupted(_seconds: float | None) -> None:
        raise KeyboardInterrupt

    connection.selector = SimpleNamespace(select=interrupted)
    call = ping()
    with pytest.raises(KeyboardInterrupt):
        service.answer(service.send(call))
    connection.incoming = [new_method_return(call)]
    connection.selector = SimpleNamespace(select=lambda _seconds: [])
    assert service.next_event(0.0) is None


def test_more_seconds_than_the_kernel_can_count_are_waited_for_in_parts() -> None:
    connection = Connection()
    service = Service(cast("DBusConnection", connection), None)
    call, waited = ping(), list[float]()
    serial = service.send(call)

    def select(seconds: float) -> list[object]:
        waited.append(seconds)
        if len(waited) == 2:
            connection.incoming = [new_method_return(call)]
        return []

    connection.selector = SimpleNamespace(select=select)
    assert service.next_event(time.monotonic() + 1e15) == serial
    assert [seconds < 2**31 / 1000 for seconds in waited] == [True, True]


LASTS: list[Signal | str] = [
    stepped(1, 2, "stop x", "running"),
    changed(Switch=switch(index=1, count=2, title="stop x", deadline=90.0, finished=0.0, result="")),
    A_WHILE,
    stepped(1, 2, "stop x", "done", 2.5),
    stepped(2, 2, "bind it", "running"),
    stepped(2, 2, "bind it", "failed", 0.005),
    stepped(1, 2, "stop x", "reverting"),
    A_WHILE,
    stepped(1, 2, "stop x", "reverted", 2.5),
]
TOLD_TO_LAST = [
    "[1/2] stop x (within 90 s): running (1.00 s)",
    "[1/2] stop x: done (2.50 s)",
    "[2/2] bind it: failed (5.0 ms)",
    "the way back:",
    "[1/2] stop x (within 90 s): reverting (1.00 s)",
    "[1/2] stop x: reverted (2.50 s)",
]


def as_on_the_bus(event: Signal | str) -> Signal | str:
    """Following takes a change of properties as it comes."""
    if isinstance(event, str) or event.member != "PropertiesChanged":
        return event
    values = {key: ("v", value) for key, value in event.body[1]["Switch"][1].items()}
    return Signal(*event[:3], (INTERFACE, {"Switch": ("a{sv}", values)}, []))


def test_a_step_that_takes_its_time_is_told_once_with_its_limit(capsys: pytest.CaptureFixture[str]) -> None:
    """In a pipe too: what is silent for minutes looks dead. What is over at once is told by its end alone."""
    move.move(fixed(gpu(), events=map(as_on_the_bus, LASTS), outcomes={CARD: switch()}), parse(["to-vfio"]))
    assert capsys.readouterr().out.splitlines()[:-1] == TOLD_TO_LAST


def test_who_waits_until_a_time_was_told_so(capsys: pytest.CaptureFixture[str]) -> None:
    begun = stepped(4, 9, "wait", "running")
    events = [begun, WAITS, A_WHILE, stepped(4, 9, "wait", "done", 2.5)]
    move.move(fixed(gpu(), events=events, outcomes={CARD: switch()}), parse(["to-vfio"]))
    first, second = capsys.readouterr().out.splitlines()[:-1]
    assert (first, second) == (f"waiting until {WAITS_UNTIL}: blender", "[4/9] wait: done (2.50 s)")


def test_the_time_that_a_user_gave_is_over_whatever_lasts(capsys: pytest.CaptureFixture[str]) -> None:
    service = fixed(gpu(), events=[stepped(1, 2, "x", "running"), A_WHILE], outcomes={CARD: switch()})
    service.deadline = time.monotonic()
    with pytest.raises(CtlError, match="has not finished within 5 s"):
        move.move(service, parse(["to-vfio", "--timeout", "5"]))
    assert capsys.readouterr().out == ""


# watch and wait


class EventsAreOverError(Exception):
    """There is nothing more to watch."""


def watched(capsys: pytest.CaptureFixture[str], *events: Signal, named: str = "", **knows: Any) -> list[dict[str, Any]]:
    """What `watch --json` tells."""
    return [json.loads(line) for line in lines_watched(capsys, *events, words=["--json", *named.split()], **knows)]


def lines_watched(
    capsys: pytest.CaptureFixture[str],
    *events: Signal | str,
    words: Iterable[str] = (),
    card: dict[str, Any] | None = None,
    **knows: Any,
) -> list[str]:
    """The lines that `watch` prints."""
    service = fixed(card or gpu(), gpu(Address=OTHER), events=events, **knows)
    double = cast("Any", service)
    given = double.next_event

    def next_event(deadline: float | None = None) -> Signal | int | None:
        if not double._events:
            raise EventsAreOverError
        return cast("Signal | int | None", given(deadline))

    double.next_event = next_event
    with pytest.raises(EventsAreOverError):
        watch.watch(service, parse(["watch", *words]))
    return capsys.readouterr().out.splitlines()


def test_whoever_watches_is_told_of_a_step_that_takes_its_time(capsys: pytest.CaptureFixture[str]) -> None:
    told = [line.partition("  ")[2] for line in lines_watched(capsys, *LASTS)]
    assert told[2:] == [f"{CARD}: {each}" for each in TOLD_TO_LAST]


def test_of_what_is_over_or_known_nobody_is_told_that_it_lasts(capsys: pytest.CaptureFixture[str]) -> None:
    begun = stepped(4, 9, "wait", "running")
    for news in (
        stepped(4, 9, "wait", "done", 0.5),
        changed(Switch=UNDER_WAY),
        objects("InterfacesRemoved", CARD, [INTERFACE]),
        owner(":1.1", ""),
        # The kernel did not return from it.
        finished("5f", "wedged"),
    ):
        assert "running" not in "".join(lines_watched(capsys, begun, news, A_WHILE))
    # It was met half-way, and told at once.
    card = gpu(State="detaching", Switch={**UNDER_WAY, "waiting_for": ""})
    assert "".join(lines_watched(capsys, A_WHILE, card=card, kept=[begun])).count("running") == 1


def test_a_kernel_that_has_returned_is_told_to_whoever_watches(capsys: pytest.CaptureFixture[str]) -> None:
    """When it happens, and to who comes later: it is where it is since then, and not since it was wedged."""
    wedged = switch(result="wedged", reason="it took longer than 20 s", finished=90.0)
    returned = {**wedged, "returned": {"at": 100.0, "state": "host", "reason": ""}}
    said = f"the kernel returned at {moment(100.0)} by itself; the state of the GPU after that: host"
    card = gpu(State="wedged", Reason=wedged["reason"], Switch=wedged)
    live = lines_watched(capsys, changed(State="host", Reason="", Switch=returned), card=card)
    assert live[-1].strip() == said
    later = lines_watched(capsys, card=gpu(Reason=wedged["reason"], Switch=returned))
    assert f"{CARD}: host-nvidia, switch 5f to vfio was wedged: it took longer than 20 s" in later[0]
    assert later[1].strip() == said


def owner(before: str, now: str) -> Signal:
    return Signal("/org/freedesktop/DBus", "org.freedesktop.DBus", "NameOwnerChanged", (NAME, before, now))


def objects(member: str, address: str, interfaces: Any) -> Signal:
    path = f"{ROOT}/gpu/" + address.replace(":", "_").replace(".", "_")
    return Signal(ROOT, OBJECTS, member, (path, interfaces))


def kinds(told: Iterable[dict[str, Any]]) -> list[str]:
    return [each["event"] for each in told]


def test_a_service_that_our_own_call_started_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert kinds(watched(capsys, owner("", ":1.1"))) == ["state", "state"]


def test_news_of_a_process_that_was_not_watched_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert kinds(watched(capsys, owner(":1.0", ""))) == ["state", "state"]


def test_a_service_that_takes_over_is_told_as_an_end_and_a_beginning(capsys: pytest.CaptureFixture[str]) -> None:
    told = watched(capsys, owner(":1.1", ":1.9"))
    assert kinds(told) == ["state", "state", "service", "service", "state", "state"]
    assert [each["running"] for each in told if each["event"] == "service"] == [False, True]


def finished(identity: str, result: str) -> Signal:
    return Signal(f"{ROOT}/gpu/0000_01_00_0", INTERFACE, "SwitchFinished", (identity, result, ""))


def test_what_happened_before_it_was_known_how_a_gpu_is_is_told_in_its_order(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The step that it is at was told of later than those before it. What had changed by then is in how it is."""
    kept = [
        changed(State="reattaching"),
        stepped(2, 2, "bind", "done"),
        finished("5e", "reverted"),
        changed(State="host"),
        stepped(3, 9, "load", "done"),
        stepped(4, 9, "wait", "running"),
    ]
    card = gpu(State="detaching", Switch={**UNDER_WAY, "waiting_for": ""})
    assert [line.partition("  ")[2].partition(" (")[0] for line in lines_watched(capsys, card=card, kept=kept)] == [
        f"{CARD}: [2/2] bind: done",
        f"{CARD}: switch 5e is reverted",
        f"{CARD}: detaching",
        f"{CARD}: [3/9] load: done",
        f"{CARD}: [4/9] wait: running",
        f"{OTHER}: host-nvidia",
    ]


def test_a_switch_that_the_service_ended_in_is_told_with_its_end_once(capsys: pytest.CaptureFixture[str]) -> None:
    """The next service may have brought it to that before anybody heard of it, and be at another one."""
    ended = switch(result="reverted", reason="the service ended at step 4 of 9; it is on the host now")
    again = owner(":1.1", ":1.9"), finished("5f", "reverted")
    told = watched(capsys, *again, card=gpu(Switch=UNDER_WAY), history=[ended])
    assert kinds(told) == ["state", "state", "service", "service", "finished", "state", "state"]
    assert (told[4]["id"], told[4]["result"], told[4]["reason"]) == ("5f", "reverted", ended["reason"])
    # One that it is at still will be told of.
    told = watched(capsys, *again, card=gpu(Switch=UNDER_WAY))
    assert kinds(told) == ["state", "state", "service", "service", "state", "state", "finished"]


def test_a_gpu_that_leaves_the_host_is_told_and_followed_no_more(capsys: pytest.CaptureFixture[str]) -> None:
    told = watched(capsys, objects("InterfacesRemoved", OTHER, [INTERFACE]), stepped(1, 1, "x", "done", gpu=OTHER))
    assert kinds(told) == ["state", "state", "gone"]
    assert told[-1]["gpu"] == OTHER


def test_a_gpu_that_is_not_watched_may_leave(capsys: pytest.CaptureFixture[str]) -> None:
    gone = objects("InterfacesRemoved", "0000:09:00.0", [INTERFACE])
    assert kinds(watched(capsys, gone)) == ["state", "state"]


def test_a_gpu_that_comes_is_followed_from_then_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpuswitch.cli.client.Gpu.look", lambda _self: gpu(Address="0000:09:00.0"))
    come = objects("InterfacesAdded", "0000:09:00.0", {INTERFACE: {}})
    step = stepped(1, 1, "x", "done", gpu="0000:09:00.0")
    told = watched(capsys, come, come, step)
    assert [(each["event"], each["gpu"]) for each in told[2:]] == [
        ("state", "0000:09:00.0"),
        ("step", "0000:09:00.0"),
    ]
    assert kinds(watched(capsys, come, step, named="a")) == ["state"]


def test_all_have_to_be_there_at_the_same_time(capsys: pytest.CaptureFixture[str]) -> None:
    """One that arrives and leaves again is waited for once more."""
    gpus = gpu(State="vfio"), gpu(Address=OTHER)
    events = [changed(State="reattaching"), changed(gpu=OTHER, State="vfio"), changed(State="vfio")]
    assert watch.wait(fixed(*gpus, events=events), parse(["wait", "--for", "vfio"])) == 0
    assert capsys.readouterr().out.splitlines() == [f"{CARD} is vfio", f"{OTHER} is vfio"]


@pytest.mark.parametrize(("state", "status"), [("failed", 0), ("vfio", 7), ("wedged", 0)])
def test_a_state_that_was_waited_for_is_no_failure(state: str, status: int) -> None:
    events = [changed(State="failed"), changed(State="wedged")]
    assert watch.wait(fixed(gpu(), events=events), parse(["wait", "--for", state])) == status


def test_one_that_leaves_the_host_is_absent_and_else_an_error() -> None:
    gone = Signal(ROOT, OBJECTS, "InterfacesRemoved", (f"{ROOT}/gpu/0000_01_00_0", [INTERFACE]))
    assert watch.wait(fixed(gpu(), events=[gone]), parse(["wait", "--for", "absent"])) == 0
    with pytest.raises(CtlError, match="it is not on this host any more"):
        watch.wait(fixed(gpu(), events=[gone]), parse(["wait", "--for", "vfio"]))


def test_the_end_of_another_process_is_no_end_of_the_service() -> None:
    events = [owner(":1.0", ":1.1"), changed(State="vfio")]
    assert watch.wait(fixed(gpu(), events=events), parse(["wait", "--for", "vfio"])) == 0
    with pytest.raises(CtlError, match=r"^the service went away") as gone:
        watch.wait(fixed(gpu(), events=[owner(":1.1", "")]), parse(["wait", "--for", "vfio"]))
    assert gone.value.exit_code == 5


def watched_lines(capsys: pytest.CaptureFixture[str], now: dict[str, Any], *events: Signal) -> list[str]:
    """What `watch` tells of a GPU with this switch, without the times."""

    class Ended(Watching):
        def for_ever(self) -> None:
            self._begin()
            for event in events:
                self._take(event)

    ended = Ended(fixed(gpu(State="detaching", Switch=now)), [], watch._Lines())
    ended.for_ever()
    return [line.split("  ", 1)[1] for line in capsys.readouterr().out.splitlines()]


WAITS_UNTIL = time.strftime("%H:%M:%S", time.localtime(2.0))


def test_who_joins_sees_the_step_and_whom_it_waits_for(capsys: pytest.CaptureFixture[str]) -> None:
    at = f"{CARD}: [4/9] wait: waiting until {WAITS_UNTIL}: blender"
    same = changed(State="detaching", Switch=UNDER_WAY)
    assert watched_lines(capsys, UNDER_WAY, same) == [f"{CARD}: detaching", at]
    busy = {**UNDER_WAY, "waiting_for": "", "waiting_until": 0.0}
    begun, step = watched_lines(capsys, busy)
    assert begun == f"{CARD}: detaching"
    assert step.startswith(f"{CARD}: [4/9] wait: running (")
    for over in ({}, {**UNDER_WAY, "result": "done"}, {**UNDER_WAY, "index": 0}):
        assert watched_lines(capsys, over) == [f"{CARD}: detaching"]


def test_programs_that_join_have_the_step_with_the_state(capsys: pytest.CaptureFixture[str]) -> None:
    card = changed(State="detaching", Switch=UNDER_WAY)
    told = watched(capsys, card)
    assert kinds(told) == ["state", "state", "state", "waiting"]


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("options", ["", "--json"])
def test_somebody_who_waits_at_a_terminal_is_told_for_whom(
    options: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", seen := _Terminal())
    busy = {**UNDER_WAY, "waiting_for": "", "waiting_until": 0.0, "step_started": time.time()}
    later = {**UNDER_WAY, "index": 5, "title": "wait again"}
    events = [
        changed(Switch=UNDER_WAY),
        changed(Switch=UNDER_WAY, State="detaching"),
        changed(Switch={**later, "waiting_for": "", "waiting_until": 0.0}),
        changed(Switch=later),
        changed(State="vfio"),
    ]
    card = gpu(State="detaching", Switch=busy)
    assert watch.wait(fixed(card, events=events), parse(["wait", "--for", "vfio", *options.split()])) == 0
    first, *more = seen.getvalue().splitlines() or [""]
    if options:
        assert (first, more) == ("", [])
        return
    assert first.startswith(f"gpuswitchctl: {CARD}: [4/9] wait: running (")
    assert more == [
        f"gpuswitchctl: {CARD}: [4/9] wait: waiting until {WAITS_UNTIL}: blender",
        f"gpuswitchctl: {CARD}: [5/9] wait again: waiting until {WAITS_UNTIL}: blender",
    ]
    assert capsys.readouterr().out == f"{CARD} is vfio\n"


def test_in_a_pipe_a_wait_tells_its_end_alone(capsys: pytest.CaptureFixture[str]) -> None:
    events = [changed(State="vfio")]
    assert watch.wait(fixed(gpu(Switch=UNDER_WAY), events=events), parse(["wait", "--for", "vfio"])) == 0
    assert capsys.readouterr() == (f"{CARD} is vfio\n", "")


def test_the_call_for_properties_is_the_one_of_d_bus() -> None:
    [card] = fixed(gpu()).gpus()
    fields = card.properties_now().header.fields
    assert (fields[HeaderFields.interface], fields[HeaderFields.member]) == (PROPERTIES, "GetAll")


def test_a_terminal_that_has_hung_up_has_no_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a pipe without one. What a disk does not take is another matter."""
    ours, theirs = os.openpty()
    os.close(ours)
    full = os.open("/dev/full", os.O_WRONLY)
    for descriptor, kind in ((theirs, BrokenPipeError), (full, OutputError)):
        # Unbuffered: what could not be written would be tried once more when it is closed.
        with os.fdopen(descriptor, "wb", 0) as raw, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream := io.TextIOWrapper(raw, write_through=True))
            with pytest.raises(kind):
                write("state")
            stream.detach()
