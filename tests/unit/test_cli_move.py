"""What the command line says of a switch that is over."""

from __future__ import annotations

import errno
import io
import json
import os
from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import pytest

from gpuswitch.cli import query
from gpuswitch.cli import switch as move
from gpuswitch.cli.client import Service, Signal
from gpuswitch.cli.failures import CtlError
from gpuswitch.cli.main import main
from gpuswitch.cli.output import OutputError
from gpuswitch.cli.parser import UsageError, parse
from gpuswitch.cli.ways_out import ways_out
from gpuswitch.errors import Busy, Timeout
from tests.harness.service.fixed import CARD, fixed, gpu, remedy, stepped, switch

OTHER = "0000:02:00.0"

PLAN = [{"kind": "bind", "title": "bind it", "deadline": 5.0, "stops": [], "ends_programs": False, "drivers": {}}]
AS_BEFORE = "the GPU is as it was before; gpuswitchctl show 5f has each step"
LEFT = "it is left with 0000:01:00.0 display on nvidia, 0000:01:00.1 audio on no driver"


def moved(*arguments: str, ends: dict[str, Any], state: str = "vfio", events: Sequence[Signal] = ()) -> int:
    """What `to-vfio` ends with where the switch ended so, the GPU being in this state."""
    here = gpu(State=state, Driver="xe-vfio-pci")
    return run(["to-vfio", "01:00.0", *arguments], here, outcomes={CARD: ends}, events=events)


def run(arguments: Sequence[str], *gpus: dict[str, Any], **knows: Any) -> int:
    args = parse(arguments)
    return {"cancel": move.cancel, "recover": move.recover}.get(args.verb, move.move)(fixed(*gpus, **knows), args)


@pytest.mark.parametrize("result", ["reverted", "failed"])
def test_what_is_left_to_do_about_a_failed_gpu_is_said(result: str) -> None:
    with pytest.raises(CtlError) as error:
        moved(ends=switch(result=result, reason="because"), state="failed")
    assert str(error.value).splitlines()[1:] == [
        LEFT,
        "put right what is named here, then: gpuswitchctl recover 0000:01:00.0",
    ]


@pytest.mark.parametrize(("state", "again"), [("vfio", "to-vfio"), ("failed", "recover")])
def test_of_what_did_not_work_it_is_said_how_the_cause_is_found(state: str, again: str) -> None:
    reason = "cannot bind 0000:01:00.1 to vfio-pci: Invalid argument"
    here = gpu(State=state, Reason=reason)
    with pytest.raises(CtlError) as error:
        run(["to-vfio"], here, outcomes={CARD: switch(result="reverted", reason=reason)})
    assert [each for each in str(error.value).splitlines()[1:] if each not in {AS_BEFORE, LEFT}] == [
        "find out why 'bind 0000:01:00.1 to vfio-pci' did not work:",
        "what the kernel said meanwhile: gpuswitchctl show 5f",
        "what may be wrong with this machine: gpuswitchctl doctor 0000:01:00.0",
        "for a report of a fault, as root: gpuswitchctl report",
        f"then: gpuswitchctl {again} 0000:01:00.0",
    ]


def test_what_did_not_work_is_called_the_same_by_the_switch_and_by_status(capsys: pytest.CaptureFixture[str]) -> None:
    reason = "cannot bind 0000:01:00.1 to vfio-pci: Invalid argument"
    here = gpu(State="failed", Reason=reason, Remedies=[remedy("recover", "bring it home")])
    bound = stepped(3, 9, "bind 0000:01:00.1 to vfio-pci, by force", "failed", 0.1)
    with pytest.raises(CtlError) as error:
        run(["to-vfio"], here, outcomes={CARD: switch(result="failed", reason=reason)}, events=[bound])
    query.status(fixed(here), parse(["status"]))
    named = "find out why 'bind 0000:01:00.1 to vfio-pci' did not work:"
    assert named in str(error.value)
    assert named in capsys.readouterr().out


def test_of_one_that_is_failed_since_an_earlier_switch_this_one_is_not_named() -> None:
    here = gpu(State="failed", Reason="cannot bind 0000:01:00.1: Invalid argument")
    with pytest.raises(CtlError) as error:
        run(["to-vfio"], here, outcomes={CARD: switch(result="failed", reason="Xorg has it open")})
    assert "find out why 'bind 0000:01:00.1' did not work:" in str(error.value)
    assert "gpuswitchctl show" not in str(error.value)


@pytest.mark.parametrize(
    ("result", "exit_code", "next_line"),
    [
        ("reverted", 1, [AS_BEFORE, "put right what is named here, then: gpuswitchctl to-vfio 0000:01:00.0"]),
        ("failed", 1, ["put right what is named here, then: gpuswitchctl to-host 0000:01:00.0"]),
        ("cancelled", 1, [AS_BEFORE]),
        ("wedged", 7, ["gpuswitchctl status 0000:01:00.0 tells when the kernel has returned"]),
    ],
)
def test_a_switch_that_was_not_done_is_an_error_and_says_what_to_type_next(
    result: str, exit_code: int, next_line: list[str]
) -> None:
    with pytest.raises(CtlError) as error:
        moved(ends=switch(result=result, reason="because"))
    first, *more = str(error.value).splitlines()
    assert first == f"cannot move 0000:01:00.0 to vfio ({result}): because"
    assert (error.value.exit_code, more) == (exit_code, next_line)


@pytest.mark.parametrize(("error", "exit_code"), [("Busy", 3), ("Failed", 1), ("", 1), ("SomethingNew", 1)])
def test_reverted_for_what_would_be_refused_has_the_status_of_a_refusal(error: str, exit_code: int) -> None:
    with pytest.raises(CtlError) as raised:
        moved(ends=switch(result="reverted", reason="because", error=error))
    assert raised.value.exit_code == exit_code


class Full(io.StringIO):
    """Like /dev/full."""

    def write(self, _text: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_what_is_not_told_since_it_cannot_be_written_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    events = [stepped(1, 3, "load vfio-pci", "done", 0.005)]
    monkeypatch.setattr("sys.stdout", Full())
    with pytest.raises(OutputError) as error:
        moved(ends=switch(), events=events)
    assert str(error.value) == (
        "No space left on device; the switch goes on: gpuswitchctl status 0000:01:00.0 shows it"
    )


@pytest.mark.parametrize(
    ("typed", "unit"),
    [
        ("display-manager", "display-manager.service"),
        ("docker.socket", "docker.socket"),
        ("a@b.c", "a@b.c.service"),
        ("service", "service.service"),
    ],
)
def test_a_unit_without_a_type_is_a_service(typed: str, unit: str) -> None:
    assert move.options_of(parse(["to-vfio", "--stop-unit", typed])) == {"stop_units": ("as", [unit])}


def test_what_is_no_unit_is_refused_by_the_option_that_was_typed() -> None:
    with pytest.raises(UsageError, match="'a b' is not the name of a unit, such as "):
        parse(["to-vfio", "--stop-unit", "a b"])


def test_cancelled_is_what_was_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    under_way = gpu(Switch=switch(result="", finished=0.0))
    events = [stepped(2, 3, "load vfio-pci", "reverting"), stepped(2, 3, "load vfio-pci", "reverted", 0.005)]
    cancelled = {CARD: switch(result="cancelled")}
    assert run(["cancel"], under_way, events=events, outcomes=cancelled) == 0
    assert capsys.readouterr().out.splitlines() == [
        "the way back:",
        "[2/3] load vfio-pci: reverted (5.0 ms)",
        "switch 5f of 0000:01:00.0 to vfio is cancelled: the GPU is as it was before",
    ]


def test_without_a_name_the_only_switch_under_way_is_cancelled(capsys: pytest.CaptureFixture[str]) -> None:
    under_way = {"Switch": switch(result="", finished=0.0)}
    other = gpu(Address=OTHER, **under_way)
    assert run(["cancel"], gpu(), other, outcomes={OTHER: switch(result="cancelled")}) == 0
    assert f"switch 5f of {OTHER} to vfio is cancelled" in capsys.readouterr().out
    with pytest.raises(CtlError) as error:
        run(["cancel"], gpu(**under_way), other)
    assert str(error.value) == f"several GPUs are being switched: name one of {CARD}, {OTHER}"
    with pytest.raises(CtlError, match="nobody has switched"):
        run(["cancel"], gpu(), gpu(Address=OTHER))


@pytest.mark.parametrize(("result", "exit_code"), [("done", 1), ("reverted", 1), ("failed", 1), ("wedged", 7)])
def test_a_switch_that_was_to_be_cancelled_and_was_not_is_an_error(
    result: str, exit_code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    under_way = gpu(Switch=switch(result="", finished=0.0))
    with pytest.raises(CtlError) as error:
        run(["cancel", "--json"], under_way, outcomes={CARD: switch(result=result, reason="because")})
    assert str(error.value) == f"cannot cancel switch 5f: it is {result}: because"
    assert error.value.exit_code == exit_code
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["event"], told["result"], told["changed"]) == ("result", result, False)


def test_a_switch_that_was_done_says_how_long_it_took(capsys: pytest.CaptureFixture[str]) -> None:
    assert moved(ends=switch(reason="because", forgone=["because"])) == 0
    out, err = capsys.readouterr()
    assert out == "0000:01:00.0 is on xe-vfio-pci now, after 5.0 ms\n"
    assert err == "gpuswitchctl: not all went well: because\n"


def test_a_service_that_is_older_does_not_say_what_is_not_as_it_should_be(capsys: pytest.CaptureFixture[str]) -> None:
    """It runs on after an update of the package, until it is restarted."""
    ended = switch(reason="because")
    del ended["forgone"], ended["plan"]
    assert moved(ends=ended) == 0
    out, err = capsys.readouterr()
    assert out == "0000:01:00.0 is on xe-vfio-pci now, after 5.0 ms\n"
    assert err == "gpuswitchctl: not all went well: because\n"


def test_of_one_that_worked_at_the_second_try_it_is_not_said_that_not_all_went_well(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert moved(ends=switch(reason="no luck\nthe way back failed too: none")) == 0
    said = "gpuswitchctl: it has recovered from this: no luck\n  the way back failed too: none\n"
    assert capsys.readouterr().err == said
    assert moved(ends=switch(reason="no luck\nno login screen", forgone=["no login screen"])) == 0
    assert capsys.readouterr().err == (
        "gpuswitchctl: it has recovered from this: no luck\ngpuswitchctl: not all went well: no login screen\n"
    )


@pytest.mark.parametrize(
    ("ends", "changed"),
    [
        ({"result": "done"}, True),
        ({"result": "done", "count": 0}, False),
        ({"result": "reverted"}, False),
        ({"result": "cancelled"}, False),
        ({"result": "failed"}, True),
        ({"result": "wedged"}, True),
    ],
)
def test_programs_are_told_whether_anything_is_different_now(
    ends: dict[str, Any], changed: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    status = moved("--json", ends=switch(**ends))
    assert (status == 0) == (ends["result"] == "done")
    [told] = map(json.loads, capsys.readouterr().out.splitlines())
    assert told["changed"] is changed


def test_of_several_the_worst_counts_and_each_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    gpus = [gpu(), gpu(Address=OTHER), gpu(Address="0000:03:00.0", State="failed")]
    outcomes = {
        CARD: switch(target="host"),
        OTHER: switch(target="host", result="reverted", reason="blender has it open", error="Busy"),
        "0000:03:00.0": switch(target="host", result="failed", reason="no luck"),
    }
    events = [stepped(2, 3, "load nvidia", "done", 0.005, gpu=OTHER)]
    args = parse(["to-host", "--all"])
    managed = [{**each, "Managed": True} for each in gpus]
    assert move.move(fixed(*managed, outcomes=outcomes, events=events), args) == 1
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        f"{OTHER}: [2/3] load nvidia: done (5.0 ms)",
        f"{CARD} is on the host now, after 5.0 ms",
        f"{OTHER}: reverted: blender has it open",
        f"  or have it wait for them: gpuswitchctl to-host {OTHER} --wait 60",
        f"  or have them ended, and lose what they have not saved: gpuswitchctl to-host {OTHER} --busy terminate",
        "0000:03:00.0: failed: no luck",
        "  what there is to do about that: gpuswitchctl status 0000:03:00.0",
    ]
    assert err.splitlines() == [
        f"gpuswitchctl: cannot move {OTHER} to host (reverted): blender has it open",
        f"  {AS_BEFORE}",
        f"  put right what is named here, then: gpuswitchctl to-host {OTHER}",
        f"  or have it wait for them: gpuswitchctl to-host {OTHER} --wait 60",
        f"  or have them ended, and lose what they have not saved: gpuswitchctl to-host {OTHER} --busy terminate",
        "gpuswitchctl: cannot move 0000:03:00.0 to host (failed): no luck",
        f"  {LEFT}",
        "  put right what is named here, then: gpuswitchctl recover 0000:03:00.0",
    ]
    assert move.move(fixed(*managed, outcomes=outcomes), parse(["to-host", "--all", "--json"])) == 1
    assert [json.loads(each)["event"] for each in capsys.readouterr().out.splitlines()] == ["result"] * 3
    only_busy = {**outcomes, "0000:03:00.0": switch(target="host")}
    assert move.move(fixed(*managed, outcomes=only_busy), args) == 3


def test_all_are_those_that_are_managed() -> None:
    told = (
        r"^no GPU is managed, and --all means those that are\n"
        r"to have 0000:01:00\.0 managed, add to /etc/gpuswitch/config\.toml, by gpuswitchctl config edit: "
        r"`\[\[gpu\]\]`, `address = \"0000:01:00\.0\"`\n"
        r"or be asked, and have it written: gpuswitchctl setup$"
    )
    with pytest.raises(CtlError, match=told) as none:
        run(["to-vfio", "--all"], gpu())
    assert none.value.exit_code == 2
    with pytest.raises(CtlError, match="--all and names of GPUs together") as both:
        run(["to-vfio", "--all", "01:00.0"], gpu(Managed=True))
    assert both.value.exit_code == 2


def recovered(*arguments: str, **ends: object) -> int:
    """What `recover` ends with."""
    events = [stepped(1, 3, "reset 0000:01:00.0", "done", 0.005)]
    outcomes = {CARD: switch(**{"target": "host", "reason": "because", **ends})}
    return run(["recover", *arguments], gpu(Driver="vfio-pci"), events=events, outcomes=outcomes)


def test_recovered_is_home_and_what_was_wrong_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert recovered() == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "[1/3] reset 0000:01:00.0: done (5.0 ms)",
        "0000:01:00.0 is on the host now, after 5.0 ms",
    ]
    assert err == "gpuswitchctl: it has recovered from this: because\n"
    assert recovered("--no-wait") == 0
    assert capsys.readouterr().out == "5f\n"


def test_one_that_needs_no_recovery_stays_where_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert recovered(target="vfio", count=0, reason="") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "0000:01:00.0 is on vfio-pci already"


@pytest.mark.parametrize(("result", "exit_code"), [("reverted", 1), ("failed", 1), ("cancelled", 1), ("wedged", 7)])
def test_a_recovery_that_ends_anywhere_but_home_is_an_error(result: str, exit_code: int) -> None:
    with pytest.raises(CtlError) as error:
        recovered(result=result)
    assert str(error.value).splitlines()[0] == f"cannot recover 0000:01:00.0 ({result}): because"
    assert error.value.exit_code == exit_code


def test_who_cannot_wait_for_the_begin_of_a_switch_is_told_where_to_look() -> None:
    with pytest.raises(CtlError) as error:
        run(["to-vfio"], gpu(Name="geforce"), begins=CtlError.of(Timeout, "the time is over"))
    told = "the time is over\ngpuswitchctl status geforce shows whether the switch has begun"
    assert (str(error.value), error.value.exit_code, error.value.is_whole) == (told, 6, True)


def test_a_switch_that_others_had_begun_is_told_as_that(capsys: pytest.CaptureFixture[str]) -> None:
    """By when it was begun, and by whom: of two who ask in the same moment, one joins the other."""
    asker = switch()["asker"]
    for began, by, joined in [
        (1.0, asker, True),
        (4e9, asker, False),
        (4e9, {**asker, "pid": 1}, True),
        (4e9, {**asker, "service": True}, True),
        (4e9, {"service": False, "unit": "", "command": "", "vm": ""}, False),
    ]:
        now = switch(started=began, asker=by, result="", finished=0.0)
        ends = switch(started=began, asker=by, finished=began + 1)
        knows: dict[str, Any] = {"events": ["GetAll"], "outcomes": {CARD: ends}}
        assert run(["to-vfio"], gpu(Switch=now), **knows) == 0
        assert ("joined switch 5f of 0000:01:00.0 to vfio, which runs since " in capsys.readouterr().out) is joined
        assert run(["to-vfio", "--json"], gpu(Switch=now), **knows) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["joined"] is joined


def test_how_a_switch_is_followed_that_is_not_is_said_on_a_terminal_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = gpu(Name="geforce", Switch=switch(started=4e9))
    assert run(["to-vfio", "--no-wait"], now) == 0
    assert capsys.readouterr() == ("5f\n", "")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert run(["to-vfio", "--no-wait"], now) == 0
    out, err = capsys.readouterr()
    assert (out, "gpuswitchctl wait 5f waits for its end" in err) == ("5f\n", True)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (["to-vfio", "rtx", "vfio"], "vfio is where a GPU goes, and no GPU: gpuswitchctl to-vfio rtx"),
        (["to-vfio", "my card", "HOST"], "HOST is where a GPU goes, and no GPU: gpuswitchctl to-host 'my card'"),
    ],
)
def test_a_target_among_the_gpus_is_told_how_it_is_typed(typed: list[str], meant: str) -> None:
    with pytest.raises(CtlError) as error:
        run(typed, gpu(), unknown=["vfio", "HOST"])
    assert (str(error.value).splitlines()[1:], error.value.exit_code) == ([meant], 2)


def test_options_are_only_what_was_said() -> None:
    said = Namespace(busy=None, wait=None, stop_unit=[])
    assert move.options_of(said) == {}
    said = Namespace(busy="kill", wait=7, stop_unit=["a.service"])
    assert move.options_of(said) == {
        "busy": ("s", "kill"),
        "wait_seconds": ("u", 7),
        "stop_units": ("as", ["a.service"]),
    }


class TestWaysOut:
    """What is offered where somebody has the GPU open."""

    @staticmethod
    def offered(*refused: str, holders: Sequence[dict[str, Any]] = (), **options: tuple[str, Any]) -> list[str]:
        """The flags, of a service that refuses options with one of these words."""
        [there] = fixed(gpu(Name="geforce"), holders=holders, refused=refused).gpus()
        command = "gpuswitchctl to-vfio geforce"
        return [way.rpartition(": ")[2].removeprefix(command) for way in ways_out([there], "vfio", options, command)]

    @staticmethod
    def holder(**of: object) -> dict[str, Any]:
        return {"unit": "", "user_unit": False, "session": "", **of}

    def test_what_was_asked_for_stays(self) -> None:
        assert self.offered(stop_units=("as", ["a.service", "b.service"])) == [
            " --stop-unit a.service --stop-unit b.service --wait 60",
            " --stop-unit a.service --stop-unit b.service --busy terminate",
        ]

    def test_another_policy_takes_the_place_of_the_one_that_was_refused(self) -> None:
        assert self.offered(busy=("s", "terminate")) == [" --wait 60"]
        assert self.offered(wait_seconds=("u", 60)) == [" --busy terminate"]

    def test_what_is_refused_too_is_not_offered(self) -> None:
        assert self.offered("wait_seconds") == [" --busy terminate"]
        assert self.offered("wait_seconds", "terminate") == []

    def test_units_are_named_and_a_desktop_only_where_nothing_less_will_do(self) -> None:
        ollama, shell = self.holder(unit="ollama.service"), self.holder(session="2")
        app = self.holder(unit="app.service", user_unit=True)
        [_, stop, _] = self.offered(holders=[ollama, shell, app])
        assert stop == " --stop-unit ollama.service"
        assert self.offered("terminate", "['ollama.service']", holders=[ollama, shell]) == [
            " --wait 60",
            " --stop-unit ollama.service --stop-unit display-manager.service",
        ]


@pytest.mark.parametrize(
    ("why", "said"),
    [
        ("blender has it open", f" {CARD} cannot go to vfio now: blender has it open"),
        (
            "blender has it open\nXorg has it open",
            f" {CARD} cannot go to vfio now:\n  blender has it open\n  Xorg has it open",
        ),
    ],
    ids=["one reason", "two"],
)
@pytest.mark.parametrize("line", ["plan vfio", "to-vfio --dry-run"])
def test_a_plan_that_is_refused_answers_whether_it_can_be_done(
    line: str, why: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    service = fixed(gpu(), plan=CtlError.of(Busy, why), refused=[""])
    monkeypatch.setattr(Service, "connect", lambda *_: service)
    assert main(line.split()) == 3
    assert capsys.readouterr().err == f"gpuswitchctl:{said}\n"


@pytest.mark.parametrize(
    ("state", "target"), [("host", "vfio"), ("vfio", "host"), ("failed", "host"), ("detaching", "host")]
)
def test_a_plan_without_a_target_is_of_the_way_that_is_open(
    state: str, target: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    service = fixed(gpu(State=state), plan=CtlError.of(Busy, "blender has it open"), refused=[""])
    monkeypatch.setattr(Service, "connect", lambda *_: service)
    assert main(["plan", "01:00.0"]) == 3
    assert f" {CARD} cannot go to {target} now: blender has it open" in capsys.readouterr().err


def test_a_plan_that_could_not_be_asked_for_is_no_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    service = fixed(gpu(), plan=CtlError("the service went away", 5))
    monkeypatch.setattr(Service, "connect", lambda *_: service)
    assert main(["plan", "vfio"]) == 5
    assert capsys.readouterr().err.startswith(f"gpuswitchctl: cannot show the steps of a switch of {CARD}: ")


@pytest.mark.parametrize("arguments", [["plan", "01:00.0"], ["to-host", "01:00.0", "--dry-run"]])
@pytest.mark.parametrize("refused", [False, True], ids=["steps", "refused"])
def test_a_plan_of_one_that_is_failed_says_so_and_what_to_type(
    arguments: list[str], refused: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """What status offers, and nothing else."""
    reason = "cannot bind 0000:01:00.1 to vfio-pci: Invalid argument\nthe way back failed too: no luck"
    offered = [
        remedy("recover", "to bring it to a known-good state: {command}", command="gpuswitchctl recover geforce"),
        remedy("reboot", "the last way: {command}", command="systemctl reboot"),
    ]
    here = gpu(Name="geforce", State="failed", Reason=reason, Remedies=offered)
    steps = [{"kind": "bind", "title": "bind it", "deadline": 5.0, "stops": [], "ends_programs": False, "drivers": {}}]
    args = parse(arguments)
    verb = move.plan if args.verb == "plan" else move.move
    with suppress(CtlError):
        verb(fixed(here, plan=CtlError("Xorg has it open", 3, name="Busy") if refused else steps), args)
    planned = [
        "from there, geforce (0000:01:00.0) would go to host by these steps, which may fail again",
        "1. bind it (within 5 s)",
    ]
    assert capsys.readouterr().out.splitlines() == [
        "geforce (0000:01:00.0) is failed: cannot bind 0000:01:00.1 to vfio-pci: Invalid argument",
        "    the way back failed too: no luck",
        "  what there is to do about that: gpuswitchctl status geforce",
        *([] if refused else planned),
        "to bring it to a known-good state: gpuswitchctl recover geforce",
        "the last way: systemctl reboot",
    ]


@pytest.mark.parametrize("state", ["host", "vfio", "failed", "unknown", "wedged"])
@pytest.mark.parametrize("more", [(), ("--json",)], ids=["for people", "json"])
def test_a_service_that_is_older_knows_of_no_remedies(
    state: str, more: Sequence[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """It runs on after an upgrade until it is started anew."""
    ended = {key: value for key, value in switch(result="failed").items() if key not in {"deadline", "returned"}}
    now = gpu(State=state, Reason="why", Switch=ended)
    older = fixed({key: value for key, value in now.items() if key not in {"Remedies", "StoppedUnits"}}, plan=PLAN)
    for words in (["status"], ["list"], ["plan", "01:00.0", "vfio" if state == "host" else "host"]):
        args = parse([*words, *more])
        assert {"status": query.status, "list": query.list_gpus, "plan": move.plan}[words[0]](older, args) == 0
        told = capsys.readouterr().out
        if not more and words[0] != "list":
            offers = {"status": state == "failed", "plan": False}[words[0]]
            assert ("gpuswitchctl recover 0000:01:00.0" in told) is offers
    with pytest.raises(CtlError, match="because"):
        move.move(
            fixed(older.gpus()[0].properties, outcomes={CARD: switch(result="failed", reason="because")}),
            parse(["to-vfio"]),
        )


@pytest.mark.parametrize(
    ("kind", "last"),
    [
        ("to_host", "to do it: gpuswitchctl to-host 0000:01:00.0 --busy kill"),
        ("reboot", "do what the service says"),
    ],
)
def test_a_way_home_that_has_failed_alike_is_not_offered_by_its_plan(
    kind: str, last: str, capsys: pytest.CaptureFixture[str]
) -> None:
    here = gpu(State="vfio", Driver="vfio-pci", StaysOut=True, Remedies=[remedy(kind, "do what the service says")])
    move.plan(fixed(here, plan=PLAN), parse(["plan", "01:00.0", "--busy", "kill"]))
    assert capsys.readouterr().out.splitlines()[-1] == last
