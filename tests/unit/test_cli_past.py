"""What the command line tells of finished switches."""

from __future__ import annotations

import json
import os
import pwd
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpuswitch.cli import history as past
from gpuswitch.cli import query
from gpuswitch.cli.client import plain_values
from gpuswitch.cli.failures import CtlError
from gpuswitch.cli.requesters import requester_words
from gpuswitch.cli.terminal import print_timeline
from gpuswitch.cli.translate import recognized, step_title
from tests.harness.json_schemas import check
from tests.harness.service.fixed import fixed, gpu, switch
from tests.unit.test_cli import EVIL, HARMLESS

ME = pwd.getpwuid(os.geteuid()).pw_name
OWN: dict[str, Any] = {"service": True, "unit": "", "command": "", "vm": ""}
MINE = {"service": False, "uid": os.geteuid(), "pid": 42, "unit": "session-2.scope", "command": "bash", "vm": ""}


def step(
    index: int, status: str, started: float, seconds: float, title: str = "load vfio-pci", plan: int = 1
) -> dict[str, Any]:
    return {
        "plan": plan,
        "index": index,
        "kind": "module",
        "title": title,
        "status": status,
        "started": started,
        "seconds": seconds,
    }


def entry(**changes: object) -> dict[str, Any]:
    """A switch as the bus has it."""
    return {
        "id": "5f0c3a1b",
        "gpu": "0000:01:00.0",
        "target": "vfio",
        "count": 2,
        "started": 0,
        "finished": 2.0,
        "result": "done",
        "reason": "",
        "options": {},
        "asker": MINE,
        **changes,
    }


def told(capsys: pytest.CaptureFixture[str], *entries: dict[str, Any], **arguments: Any) -> list[str]:
    """The lines of `history`."""
    args = Namespace(**{"json": False, "gpu": "", "limit": 0, "since": None, "until": None, "result": []} | arguments)
    assert past.history(fixed(gpu(), history=entries), args) == 0
    return capsys.readouterr().out.splitlines()


def shown(capsys: pytest.CaptureFixture[str], one: dict[str, Any], *, as_json: bool = False) -> str:
    """What `show` says."""
    assert past.show(fixed(gpu(), history=[one]), Namespace(json=as_json, id=one["id"])) == 0
    return capsys.readouterr().out


def test_a_line_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    heading, first, second = told(
        capsys,
        entry(reason="one\ntwo"),
        entry(id="1", asker=OWN, target="host", count=0, result="failed", reason="long " * 50),
    )
    assert heading.split() == ["WHEN", "ID", "GPU", "NAME", "TARGET", "RESULT", "TOOK", "ASKED", "BY", "REASON"]
    assert f"  5f0c3a1b  0000:01:00.0  -     vfio    done    2.00 s  bash of {ME}  " in first
    assert first.endswith("  one; two")
    assert "  host    failed  -       the service itself  " in second
    assert second.endswith("  " + ("long " * 50).rstrip())


def test_of_one_gpu_only_and_so_many(capsys: pytest.CaptureFixture[str]) -> None:
    entries = [entry(id="1"), entry(id="2", gpu="0000:02:00.0"), entry(id="3"), entry(id="4")]

    def ids(**arguments: object) -> list[str]:
        said = json.loads("".join(told(capsys, *entries, json=True, **arguments)))
        return [each["id"] for each in said["switches"]]

    assert ids() == ["1", "2", "3", "4"]
    assert ids(limit=2) == ["1", "2"]
    assert ids(gpu="geforce") == ["1", "3", "4"]
    assert ids(gpu="geforce", limit=2) == ["1", "3"]


def test_of_some_time_and_some_result_only(capsys: pytest.CaptureFixture[str]) -> None:
    results = ("done", "failed", "done", "drifted")
    entries = [entry(id=str(at), started=at, result=result) for at, result in enumerate(results)]
    entries += [entry(id="9", started=9)] * 30

    def ids(**arguments: object) -> list[str]:
        said = json.loads("".join(told(capsys, *entries, json=True, limit=None, **arguments)))
        return [each["id"] for each in said["switches"]]

    assert len(ids()) == 20
    assert len(ids(since=9.0)) == 30
    assert ids(since=1.0, until=2.0) == ["1", "2"]
    assert ids(result=["drifted"]) == ["3"]
    assert ids(result=["failed", "drifted"]) == ["1", "3"]
    assert ids(result=["done"], until=8.0, gpu="geforce") == ["0", "2"]
    assert told(capsys, *entries, until=0.0, result=["failed", "wedged"]) == [
        "no finished switch is failed or wedged; what there is: 1 done (--result done)"
    ]
    assert told(capsys, *entries, until=-1.0, result=["failed"]) == ["no finished switch is like that"]


def test_a_time_that_is_none_is_refused() -> None:
    args = Namespace(json=False, gpu="", limit=None, since=2.0, until=1.0, result=[])
    with pytest.raises(CtlError, match=r"^nothing is both after --since and before --until: 1970-01-01") as refused:
        past.history(fixed(gpu()), args)
    assert refused.value.exit_code == 2


def test_what_somebody_else_moved_is_told_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    drift = entry(
        target="unknown",
        count=0,
        finished=0,
        result="drifted",
        reason="0000:01:00.1 is on vfio-pci",
        asker={"somebody_else": True},
        steps=[],
    )
    [_, said] = told(capsys, drift)
    assert said.endswith(
        "  5f0c3a1b  0000:01:00.0  -     unknown  drifted  -     somebody else  "
        "changed by somebody else: 0000:01:00.1 is on vfio-pci"
    )
    lines = shown(capsys, drift).splitlines()
    assert lines[:2] == [
        "change: 5f0c3a1b: 0000:01:00.0 is unknown now",
        "reason: changed by somebody else: 0000:01:00.1 is on vfio-pci",
    ]
    assert lines[2].startswith("  seen: 1970-01-0")
    record = json.loads(shown(capsys, drift, as_json=True))["switch"]
    assert (record["requester"], record["finished"], record["seconds"]) == ({"somebody_else": True}, None, None)


def test_nothing_to_tell_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert told(capsys) == ["there is no finished switch"]
    assert json.loads("".join(told(capsys, json=True))) == {"version": 1, "switches": []}


def test_where_no_switch_is_called_so_it_is_said_how_one_is_found() -> None:
    with pytest.raises(CtlError) as error:
        past.show(fixed(gpu(), history=[entry()], unknown=["last"]), Namespace(id="last", json=False))
    assert str(error.value) == (
        "the history knows of no switch 'last'; gpuswitchctl history lists them, and without an ID it is the last"
    )


def test_a_gpu_in_the_place_of_a_switch_is_told_as_one() -> None:
    with pytest.raises(CtlError) as error:
        past.show(fixed(gpu(Name="geforce"), history=[entry()]), Namespace(id="01:00.0", json=False))
    assert str(error.value) == (
        "01:00.0 is a GPU, and no switch: gpuswitchctl history geforce lists its switches, gpuswitchctl status geforce "
        "shows how it is"
    )
    assert error.value.exit_code == 2


def test_one_switch_with_its_steps(capsys: pytest.CaptureFixture[str]) -> None:
    one = entry(
        result="reverted",
        reason="no luck\nat all",
        options={"busy": "wait", "stop_units": ["a.service", "b.service"], "wait_seconds": 30.0},
        steps=[step(1, "done", 1e-3, 1), step(2, "failed", 1.001, 5e-3), step(1, "reverted", 1, 12e-6)],
    )
    lines = shown(capsys, one).splitlines()
    assert lines[:4] == [
        "  switch: 5f0c3a1b: 0000:01:00.0 to vfio",
        "  result: reverted, after 2.00 s",
        "  reason: no luck",
        "            at all",
    ]
    assert lines[5:] == [
        f"asked by: bash (pid 42) of {ME} in session-2.scope",
        " options: busy: wait",
        "          stop units: a.service b.service",
        "          wait seconds: 30.0",
        "",
        "the way to vfio:",
        "#  AFTER   TOOK    STATUS  STEP",
        "1  1.0 ms  1.00 s  done    load vfio-pci",
        "2  1.00 s  5.0 ms  failed  load vfio-pci",
        "",
        "the way back:",
        "#  AFTER   TOOK    STATUS    STEP",
        "1  1.00 s  0.0 ms  reverted  load vfio-pci",
        "",
        "the kernel said nothing of it meanwhile",
    ]
    record = json.loads(shown(capsys, one, as_json=True))["switch"]
    assert (record["requester"], record["options"], record["seconds"]) == (MINE, one["options"], 2.0)
    assert [(each["status"], each["started"]) for each in record["steps"]] == [
        ("done", "1970-01-01T00:00:00.001000Z"),
        ("failed", "1970-01-01T00:00:01.001000Z"),
        ("reverted", "1970-01-01T00:00:01.000000Z"),
    ]


def test_a_gpu_is_called_by_its_name_as_everywhere(capsys: pytest.CaptureFixture[str]) -> None:
    named, gone = entry(steps=[]), entry(id="2", gpu="0000:09:00.0", steps=[])
    here = gpu(Name="geforce")
    args = Namespace(json=False, gpu="", limit=0, since=None, until=None, result=None)
    assert past.history(fixed(here, history=[named, gone]), args) == 0
    [_, first, second] = capsys.readouterr().out.splitlines()
    assert ("0000:01:00.0  geforce  vfio" in first, "0000:09:00.0  -        vfio" in second) == (True, True)
    args.json = True
    assert past.history(fixed(here, history=[named, gone]), args) == 0
    assert [each["name"] for each in json.loads(capsys.readouterr().out)["switches"]] == ["geforce", ""]
    assert past.show(fixed(here, history=[named]), Namespace(json=False, id=named["id"])) == 0
    assert "  switch: 5f0c3a1b: geforce (0000:01:00.0) to vfio\n" in capsys.readouterr().out


def test_what_was_done_before_a_restart_stands_apart(capsys: pytest.CaptureFixture[str]) -> None:
    before = [step(1, "done", 10, 1), step(2, "interrupted", 11, 0)]
    since = [step(1, "done", 19, 1, "unbind")]
    steps = [
        *({**each, "before_restart": True} for each in before),
        *({**each, "before_restart": False} for each in since),
    ]
    one = entry(result="reverted", reason="because", started=10, finished=20, steps=steps)
    said = shown(capsys, one)
    assert said.endswith(
        "until the service ended in the midst of it:\n"
        "#  AFTER   TOOK    STATUS       STEP\n"
        "1  0.0 ms  1.00 s  done         load vfio-pci\n"
        "2  1.00 s  -       interrupted  load vfio-pci\n"
        "\n"
        "since it runs again:\n"
        "#  AFTER   TOOK    STATUS  STEP\n"
        "1  9.00 s  1.00 s  done    unbind\n"
        "\nthe kernel said nothing of it meanwhile\n"
    )
    record = json.loads(shown(capsys, one, as_json=True))
    check("show", record)
    assert [(each["before_restart"], each["seconds"]) for each in record["switch"]["steps"]] == [
        (True, 1.0),
        (True, None),
        (False, 1.0),
    ]


def test_each_plan_of_a_switch_says_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    steps = [
        step(1, "done", 0, 1, "stop x"),
        step(2, "failed", 1, 1, "bind it"),
        step(1, "revert-failed", 2, 1, "stop x"),
        {**step(1, "done", 3, 1, "reset it", plan=2), "kind": "reset"},
        step(1, "failed", 4, 1, "stop x", plan=3),
    ]
    said = shown(
        capsys, entry(result="failed", finished=5, steps=[{**each, "before_restart": False} for each in steps])
    )
    assert [each for each in said.splitlines() if each.endswith(":") or each[:1].isdigit()] == [
        "the way to vfio:",
        "1  0.0 ms  1.00 s  done    stop x",
        "2  1.00 s  1.00 s  failed  bind it",
        "the way back:",
        "1  2.00 s  1.00 s  not taken back  stop x",
        "recovery, by a reset:",
        "1  3.00 s  1.00 s  done    reset it",
        "recovery, on to a known-good state:",
        "1  4.00 s  1.00 s  failed  stop x",
    ]


def test_one_that_was_there_already(capsys: pytest.CaptureFixture[str]) -> None:
    said = shown(capsys, entry(count=0, steps=[]))
    assert "  result: it was there already\n" in said
    assert "STEP" not in said


@pytest.mark.parametrize(
    ("requester", "short", "whole"),
    [
        (OWN, "the service itself", "the service itself"),
        ({**OWN, "trial": True}, "the service itself, since a trial was over", None),
        ({**OWN, "at_boot": True}, "the service itself, at boot", None),
        (MINE, f"bash of {ME}", f"bash (pid 42) of {ME} in session-2.scope"),
        ({**MINE, "uid": 4_000_000_000, "vm": "win11"}, "bash of uid 4000000000 for win11", None),
        ({"service": False, "unit": "", "command": "", "vm": ""}, "somebody", "somebody"),
    ],
)
def test_who_asked_in_words(requester: dict[str, Any], short: str, whole: str | None) -> None:
    assert requester_words(requester) == short
    assert whole is None or requester_words(requester, whole=True) == whole


def test_nothing_that_a_terminal_would_obey_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    evil = entry(
        gpu=EVIL,
        target=EVIL,
        result=EVIL,
        reason=EVIL,
        options={EVIL: [EVIL], "busy": EVIL},
        asker={**MINE, "unit": EVIL, "command": EVIL, "vm": EVIL},
        steps=[step(1, EVIL, 0, 5e-6, EVIL)],
    )
    printed = "\n".join(told(capsys, evil)) + shown(capsys, evil)
    print_timeline(evil, evil["steps"])
    printed += capsys.readouterr().out
    assert "\x1b" not in printed
    assert "\x9b" not in printed
    assert "\u202e" not in printed
    assert HARMLESS in printed


def test_bars_stand_where_the_steps_were(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    steps = [step(1, "done", 0, 1), step(2, "failed", 1, 3e-6), step(1, "reverted", 1, 1)]
    print_timeline(entry(), steps)
    rows = [line.partition("load vfio-pci")[2] for line in capsys.readouterr().out.splitlines()]
    first, failed, reverted = (len(row) - len(row.lstrip()) for row in rows)
    assert first < failed == reverted
    assert rows[0].count("█") == rows[2].count("█") > 5 > rows[1].count("█")
    assert not rows[1].lstrip().startswith("failed")
    assert [row.split()[-3:] for row in rows] == [
        ["done", "1.00", "s"],
        ["failed", "0.0", "ms"],
        ["reverted", "1.00", "s"],
    ]


def test_values_inside_lists_are_opened() -> None:
    steps = ("aa{sv}", [{"index": ("x", 1)}, {"index": ("x", 2)}])
    assert plain_values({"steps": steps, "none": ("aa{sv}", [])}) == {
        "steps": [{"index": 1}, {"index": 2}],
        "none": [],
    }


class TestKernel:
    """What the kernel said since the switch began, by a journalctl that is a script here."""

    @pytest.fixture
    def journalctl(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

        def write(*lines: dict[str, object], error: str = "") -> Path:
            (tmp_path / "lines").write_text("\n".join(map(json.dumps, lines)))
            script = tmp_path / "journalctl"
            script.write_text(f"#!/bin/sh\necho \"$@\" >{tmp_path}/asked\necho '{error}' >&2\ncat {tmp_path}/lines\n")
            script.chmod(0o755)
            return tmp_path / "asked"

        return write

    def test_of_the_gpu_and_its_driver_alone(
        self, journalctl: Callable[..., Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        line: dict[str, object] = {"_SOURCE_REALTIME_TIMESTAMP": "1500000", "_KERNEL_DEVICE": "+pci:0000:01:00.0"}
        asked = journalctl(
            {**line, "MESSAGE": "nvidia 0000:01:00.0: \x1b[31mno"},
            {"MESSAGE": "NVRM: GPU 0000:01:00.0: RmInitAdapter failed!", "__REALTIME_TIMESTAMP": "1600000"},
            {"MESSAGE": "NVRM: The NVIDIA probe routine failed for 1 device(s).", "__REALTIME_TIMESTAMP": "1"},
            {"MESSAGE": "usb 1-1: new device", "_KERNEL_DEVICE": "+usb:1-1"},
            {"MESSAGE": "nvidia 0000:0a:00.0: another one", "_KERNEL_DEVICE": "+pci:0000:0a:00.0"},
            {"MESSAGE": [1, 2], "_KERNEL_DEVICE": "+pci:0000:01:00.0"},
        )
        said = shown(capsys, entry(result="reverted", started=1.0, steps=[])).splitlines()
        told_of = said[said.index("what the kernel said meanwhile:") + 1 :]
        assert [each.split("  ", 2)[2] for each in told_of] == [
            r"nvidia 0000:01:00.0: \x1b[31mno",
            "NVRM: GPU 0000:01:00.0: RmInitAdapter failed!",
            "NVRM: The NVIDIA probe routine failed for 1 device(s).",
        ]
        assert {"--since=@1.000000", "--until=@3.000000", "_TRANSPORT=kernel"} <= set(asked.read_text().split())

    def test_as_json(self, journalctl: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
        journalctl({"MESSAGE": "0000:01:00.0: no", "__REALTIME_TIMESTAMP": "1500000"})
        record = json.loads(shown(capsys, entry(result="failed"), as_json=True))["switch"]
        assert record["kernel"] == [{"at": "1970-01-01T00:00:01.500000Z", "text": "0000:01:00.0: no"}]

    def test_who_may_not_read_it_is_told_so(
        self, journalctl: Callable[..., Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        journalctl(error="Hint: You are currently not seeing messages from other users and the system.")
        why = "only root and the groups adm and systemd-journal may read the journal"
        said = shown(capsys, entry(result="failed", steps=[]))
        assert f"what the kernel said meanwhile cannot be shown: {why}" in said
        assert json.loads(shown(capsys, entry(result="failed"), as_json=True))["switch"]["kernel"] is None

    def test_a_switch_that_was_done_asks_nobody(
        self, journalctl: Callable[..., Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        asked = journalctl()
        assert "kernel said" not in shown(capsys, entry(steps=[]))
        assert not asked.exists()

    def test_what_is_wedged_goes_on_after_its_end(
        self, journalctl: Callable[..., Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        asked = journalctl()
        shown(capsys, entry(result="wedged", steps=[]))
        assert "--until" not in asked.read_text()

    @pytest.mark.parametrize(("state", "so"), [("failed", True), ("wedged", True), ("host", False)])
    def test_status_says_where_it_can_be_read(self, state: str, so: bool, capsys: pytest.CaptureFixture[str]) -> None:
        found = gpu(State=state, Switch=switch(result="failed"))
        assert query.status(fixed(found), Namespace(json=False, gpus=[])) == 0
        assert ("what it said meanwhile: gpuswitchctl show 5f" in capsys.readouterr().out) is so


# Users in what the service says, which knows their numbers

BY_ME = f"cancelled by gpuswitchctl (pid 42, uid {os.geteuid()})"


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (BY_ME, f"cancelled by gpuswitchctl (pid 42) of {ME}"),
        (f"{BY_ME}; it is on vfio-pci now", f"cancelled by gpuswitchctl (pid 42) of {ME}; it is on vfio-pci now"),
        (f"cancelled by somebody (uid {os.geteuid()})", f"cancelled by somebody of {ME}"),
        ("cancelled by x (pid 42, uid 4000000000)", "cancelled by x (pid 42) of uid 4000000000"),
        (f"cancelled by x (uid {10**30})", f"cancelled by x of uid {10**30}"),
        ("cancelled by the service itself", "cancelled by the service itself"),
        ("it runs as uid 4000000000", "it runs as uid 4000000000"),
        (f"it runs as uid {os.geteuid()}", f"it runs as uid {os.geteuid()} ({ME})"),
        (f"a uuid {os.geteuid()}", f"a uuid {os.geteuid()}"),
    ],
)
def test_users_are_told_by_name(said: str, shown: str) -> None:
    assert recognized(said) == shown
    assert recognized(shown) == shown


def test_who_cancelled_a_switch_is_told_as_who_asked_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    one = entry(result="cancelled", reason=BY_ME, asker={**MINE, "command": "gpuswitchctl"}, steps=[])
    assert told(capsys, one)[1].endswith(f"  gpuswitchctl of {ME}  cancelled by gpuswitchctl (pid 42) of {ME}")
    assert f" reason: cancelled by gpuswitchctl (pid 42) of {ME}\n" in shown(capsys, one)
    # Programs have the number.
    assert json.loads(shown(capsys, one, as_json=True))["switch"]["reason"] == BY_ME


def test_a_step_about_a_user_has_their_name() -> None:
    words = f"take from uid {os.geteuid()} the access to /dev/vfio/13"
    assert step_title(words) == words.replace(" the", f" ({ME}) the")
