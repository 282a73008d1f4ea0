"""The command line without a service: what it understands, how it says things, what it shows."""

from __future__ import annotations

import io
import json
import sys
from argparse import Namespace
from typing import Any

import pytest
from rich.console import Console

from gpuswitch.cli import groups, records, topics
from gpuswitch.cli import query as look
from gpuswitch.cli.client import Service, plain_values
from gpuswitch.cli.follow import StepChange, Waiting
from gpuswitch.cli.layout import aligned, table
from gpuswitch.cli.main import main
from gpuswitch.cli.output import clean, clock, duration, numbered, problem, sentence
from gpuswitch.cli.parser import EXIT_STATUSES, STATES, TOPICS, UsageError, parse, parser
from gpuswitch.cli.steps import JsonLines, Lines
from gpuswitch.cli.terminal import StepsInPlace
from gpuswitch.cli.translate import state_word
from gpuswitch.config.settings import Config
from gpuswitch.model.gpu import Gpu
from gpuswitch.model.states import State
from gpuswitch.switch.planning.remedies import to_set
from tests.harness.facts import at
from tests.harness.service.fixed import fixed, function, gpu, switch

EVIL = "GeForce\x1b[2J\r\n\x9b31m\u202e\x07"
HARMLESS = "GeForce\\x1b[2J\\r\\n\\x9b31m\\u202e\\x07"


VERBS = (
    *("list", "status", "to-vfio", "to-host", "recover", "cancel", "holders", "plan"),
    *("history", "show", "groups", "doctor", "config", "watch", "wait", "hold", "help", "demo"),
)
PLAIN = Namespace(json=False, gpus=[])
JSON = Namespace(json=True, gpus=[])


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "say what to do: gpuswitchctl help lists the commands"),
        (["frobnicate"], "there is no command 'frobnicate'; gpuswitchctl help lists what there is"),
        (["plan", "01:00.0", "nvidia"], "'nvidia' is no target: gpuswitchctl plan 01:00.0 host or"),
        (["to-vfio", "--timeout", "0"], "'0' is not a number of seconds above 0"),
        (["to-vfio", "--timeout", "inf"], "'inf' is not a number of seconds above 0"),
        (["to-vfio", "--timeout", "soon"], "'soon' is not a number of seconds above 0"),
        (
            ["to-vfio", "--no-wait", "--dry-run"],
            "--no-wait and --dry-run cannot be used together: leave one of them out",
        ),
        (["to-vfio", "--time", "5"], "to-vfio does not know --time; did you mean --timeout?"),
        (["history", "--limit", "-1"], "'-1' is not a number of switches"),
        (["history", "--limit", "4294967296"], "'4294967296' is not a number of switches"),
    ],
)
def test_wrong_usage_ends_with_2(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert complaint in err
    assert out == ""


def test_a_gpu_may_be_left_out_and_a_target_is_taken_in_any_case() -> None:
    assert parse(["plan", "VFIO"]).gpu == ""
    planned = parse(["plan", "01:00.0", "Host"])
    assert (planned.gpu, planned.target) == ("01:00.0", "host")


@pytest.mark.parametrize(
    "line",
    [
        "to-vfio a b --wait 5 --json",
        "to-vfio a --wait 5 b --json",
        "to-vfio a --json --wait=5 b",
        "--json to-vfio a --wait 5 b",
        "to-vfio --json a --wait 5 -- b",
    ],
)
def test_options_stand_before_between_and_behind_arguments(line: str) -> None:
    args = parse(line.split())
    assert (args.gpus, args.wait, args.json) == (["a", "b"], 5, True)


@pytest.mark.parametrize(
    ("line", "gpu", "target"),
    [
        ("plan", "", None),
        ("plan a", "a", None),
        ("plan vfio", "", "vfio"),
        ("plan vfio vfio", "vfio", "vfio"),
        ("plan a --wait 5 vfio", "a", "vfio"),
        ("plan --wait 5 a", "a", None),
    ],
)
def test_a_plan_names_a_gpu_a_target_both_or_none(line: str, gpu: str, target: str | None) -> None:
    args = parse(line.split())
    assert (args.gpu, args.target) == (gpu, target)


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_each_verb_has_an_example_that_it_understands(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([verb, "--help"]) == 0
    example = capsys.readouterr().out.rpartition("example: gpuswitchctl ")[2].split()
    assert example[0] == verb
    assert parse(example).run.startswith("gpuswitch.cli.")


def test_the_bus_comes_from_the_option_then_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUSWITCH_BUS", "unix:path=/a")
    assert parse(["list"]).bus == "unix:path=/a"
    assert parse(["list", "--bus", "unix:path=/b"]).bus == "unix:path=/b"
    assert parse(["--bus", "unix:path=/b", "list"]).bus == "unix:path=/b"
    monkeypatch.setenv("GPUSWITCH_BUS", "")
    assert parse(["list"]).bus is None


def test_one_reason_stands_in_the_sentence_and_several_below_it(capsys: pytest.CaptureFixture[str]) -> None:
    problem(sentence("move a to vfio", "the IOMMU is off"))
    problem(sentence("move a to vfio", "the IOMMU is off\nb is in its group"))
    problem(sentence("move a to vfio", "cannot connect to the system bus: no"))
    assert capsys.readouterr().err == (
        "gpuswitchctl: cannot move a to vfio: the IOMMU is off\n"
        "gpuswitchctl: cannot move a to vfio:\n"
        "  the IOMMU is off\n"
        "  b is in its group\n"
        "gpuswitchctl: cannot connect to the system bus: no\n"
    )


def test_a_table_that_is_to_be_added_is_a_block_to_be_pasted(capsys: pytest.CaptureFixture[str]) -> None:
    gpu_of = Gpu(at("0000:01:00.0"), (at("0000:01:00.0"),))
    problem(f"cannot move it:\nits screen would go dark: {to_set(Config(), gpu_of, 'allow_boot_display', 'true')}")
    assert capsys.readouterr().err == (
        "gpuswitchctl: cannot move it:\n"
        "  its screen would go dark: add to /etc/gpuswitch/config.toml, by gpuswitchctl config edit:\n"
        "      [[gpu]]\n"
        '      address = "0000:01:00.0"\n'
        "      allow_boot_display = true\n"
    )


def test_nothing_that_a_terminal_would_obey_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    evil = gpu(Name=EVIL, Model=EVIL, Reason=EVIL, Driver=EVIL, Functions=[(EVIL, EVIL, EVIL)])
    change = StepChange(1, 1, EVIL, EVIL, EVIL, 5)
    [of] = fixed(evil).gpus()
    look.list_gpus(fixed(evil), PLAIN)
    look.list_gpus(fixed(evil), JSON)
    look.status(fixed(evil), PLAIN)
    groups.groups(fixed(functions=[function(EVIL, 1, EVIL, EVIL)]), PLAIN)
    for shown in (Lines(), Lines(several=True), JsonLines()):
        shown.step(of, EVIL, change)
        shown.waits(of, EVIL, Waiting(EVIL, 1.0, 2.0))
    problem(EVIL)
    with StepsInPlace(several=True) as in_place:
        in_place.step(of, EVIL, change)
    out, err = capsys.readouterr()
    assert HARMLESS in out
    assert all(c.isprintable() or c == "\n" for c in out + err)


def test_a_line_that_is_redrawn_is_clean_too() -> None:
    shown = StepsInPlace(several=True)
    [of] = fixed(gpu(Address=EVIL)).gpus()
    shown.step(of, "5f", StepChange(1, 1, EVIL, EVIL, "running", 0))
    shown.waits(of, "5f", Waiting(EVIL, 1.0, 2.0))
    written = io.StringIO()
    Console(file=written, width=200).print(shown)
    assert written.getvalue().count(HARMLESS) == 2
    assert [line.strip().rpartition(": ")[2] for line in written.getvalue().splitlines()[1:3]] == HARMLESS.split(
        "\\r\\n"
    )
    assert all(c.isprintable() or c == "\n" for c in written.getvalue())


def test_what_is_drawn_in_place_is_indented_where_it_is_too_long_and_leaves_room_for_an_interrupt() -> None:
    shown = StepsInPlace()
    [of] = fixed(gpu()).gpus()
    shown.step(of, "5f", StepChange(3, 16, "holders", "wait until nobody has it open", "running", 0))
    shown.waits(of, "5f", Waiting("Xorg (pid 1001) has /dev/dri/card0 open; close it, or: kill 1001", 1.0, 2.0))
    written = io.StringIO()
    Console(file=written, width=40).print(shown)
    *lines, bar = written.getvalue().splitlines()
    assert [line.startswith("  ") for line in lines] == [False] + [True] * (len(lines) - 1)
    assert len(lines) > 3
    # ^C stands there on the same line.
    assert len(bar.rstrip()) <= 40 - len("^C")


def test_a_step_that_ended_is_indented_where_it_is_too_long(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    [of] = fixed(gpu()).gpus()
    with StepsInPlace() as shown:
        shown.step(of, "5f", StepChange(5, 22, "override", "aim the driver override of all 4 at vfio", "done", 1))
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines() if "aim" in line or "done" in line] == [
        "[ 5/22] aim the driver override of all",
        "  4 at vfio  done  1.00 s",
    ]


def test_a_step_that_has_ended_is_not_drawn_as_running() -> None:
    """Not until the next one begins either; the bar over the whole stays meanwhile."""
    shown = StepsInPlace()
    [of] = fixed(gpu()).gpus()

    def after(index: int, status: str) -> str:
        shown.step(of, "5f", StepChange(index, 2, "module", "load vfio-pci", status, 0))
        written = io.StringIO()
        Console(file=written, width=80).print(shown)
        return written.getvalue()

    with shown:
        assert "[1/2] load vfio-pci  running" in after(1, "running")
        ended = after(1, "done")
        assert ("running" in ended, "━" in ended) == (False, True)
        assert "[2/2] load vfio-pci  running" in after(2, "running")
        assert after(2, "done").strip() == ""
        assert "running" in after(2, "running")
        assert after(2, "failed").strip() == ""


@pytest.mark.parametrize(
    ("now", "past", "known"),
    [
        ("", "no luck", {"Reason": "no luck"}),
        ("it is noted", "no luck", {"Reason": "no luck; it is noted"}),
        ("another", "", {"Reason": "another"}),
        ("no luck", "", {"Reason": "no luck", "StaysOut": True}),
        ("no luck", "", {"Reason": "no luck", "State": "failed"}),
        ("no luck", "", {"Reason": "no luck", "Switch": {}}),
        ("no luck", "", {"Reason": "no luck", "Switch": switch(result="", reason="")}),
    ],
)
def test_what_an_earlier_switch_met_is_not_so_now(
    now: str, past: str, known: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    here = gpu(**{"Switch": switch(result="reverted", reason="no luck"), **known})
    assert records.reasons(here) == (now, past)
    look.status(fixed(here), PLAIN)
    out = capsys.readouterr().out
    assert (f"reason: {now}\n" in out) is bool(now)
    assert not past or out.rstrip().endswith(f": {past}")


def test_clean_keeps_what_people_write() -> None:
    assert clean("Grafikkarte für Läufer 显卡 → vfio") == "Grafikkarte für Läufer 显卡 → vfio"


def test_columns_are_aligned_and_an_empty_cell_shows_a_dash(capsys: pytest.CaptureFixture[str]) -> None:
    table(("A", "B"), [("one", ""), ("", "two")])
    assert capsys.readouterr().out == "A    B\none  -\n-    two\n"
    assert aligned([["a", "b"]]) == ["a  b"]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0.0 ms"), (4.3e-4, "0.4 ms"), (9.9e-3, "9.9 ms"), (0.012345, "12 ms"), (0.999, "999 ms"), (1.24, "1.24 s")],
)
def test_durations_have_three_digits_at_most(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_steps_are_numbered_in_one_column() -> None:
    assert numbered(3, 12, "load vfio-pci") == "[ 3/12] load vfio-pci"


def test_values_from_the_bus_lose_their_signatures() -> None:
    """A pair of strings looks like a value with its signature, and must not be taken for one."""
    switch = {"id": ("s", "1f"), "index": ("u", 3)}
    assert plain_values({"Owner": ("(ss)", ("s", "uuid")), "Switch": ("a{sv}", switch)}) == {
        "Owner": ("s", "uuid"),
        "Switch": {"id": "1f", "index": 3},
    }


def test_a_gpu_as_json_has_names_for_everything() -> None:
    record = records.gpu_record(gpu(Owner=("win11", "c0ffee"), Switch=switch()))
    assert record["functions"][1] == {"address": "0000:01:00.1", "kind": "audio", "driver": ""}
    assert record["owner"] == {"name": "win11", "uuid": "c0ffee"}
    assert (record["host_driver"], record["iommu_groups"], record["switch"]["id"]) == ("nvidia", [13], "5f")
    assert (record["state"], record["state_label"]) == ("host", "host-nvidia")
    assert record["state_since"] == "2023-11-14T22:13:20.000000Z"
    assert records.gpu_record(gpu())["owner"] is None
    assert records.gpu_record(gpu())["switch"] is None


def test_a_switch_as_json_has_times_that_anybody_reads_and_none_that_never_was() -> None:
    over = records.switch_record(switch(started=1.5, finished=4.0, waiting_until=0.0))
    assert (over["started"], over["finished"]) == ("1970-01-01T00:00:01.500000Z", "1970-01-01T00:00:04.000000Z")
    assert (over["seconds"], over["waiting_until"], over["result"]) == (2.5, None, "done")
    under_way = records.switch_record(switch(finished=0.0, result=""))
    assert (under_way["finished"], under_way["seconds"], under_way["result"]) == (None, None, None)


def test_the_virtual_machine_that_has_a_gpu_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    owned = gpu(State="vfio", Driver="vfio-pci", Owner=("win11", "c0ffee"))
    look.status(fixed(owned), PLAIN)
    assert "owner: win11 (c0ffee)\n" in capsys.readouterr().out
    look.list_gpus(fixed(owned, gpu()), PLAIN)
    heading, first, second = capsys.readouterr().out.splitlines()
    assert heading.split()[2:6] == ["STATE", "OWNER", "MANAGED", "DRIVER"]
    assert first.split()[2:6] == ["vfio", "win11", "no", "vfio-pci"]
    assert second.split()[2:6] == ["host-nvidia", "-", "no", "nvidia"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [({}, "host-nvidia"), ({"Driver": ""}, "host-none"), ({"State": "vfio", "Driver": "vfio-pci"}, "vfio")],
)
def test_people_see_the_driver_with_the_host(changes: dict[str, str], words: str) -> None:
    assert records.state_label(gpu(**changes)) == words


def test_status_tells_of_a_switch_under_way_and_of_the_last(capsys: pytest.CaptureFixture[str]) -> None:
    under_way = switch(id="1f", index=1, count=9, finished=0.0, result="")
    look.status(fixed(gpu(Switch=under_way)), PLAIN)
    assert "switch: 1f to vfio: at step 1 of 9, load vfio-pci\n" in capsys.readouterr().out
    look.status(fixed(gpu(Switch={**under_way, "waiting_for": "blender has it open\ngimp, too"})), PLAIN)
    assert "at step 1 of 9, load vfio-pci; it waits: blender has it open; gimp, too\n" in capsys.readouterr().out
    waits = {**under_way, "waiting_for": "blender has it open", "waiting_until": 1_700_000_000.0}
    look.status(fixed(gpu(Switch=waits)), PLAIN)
    assert f"; it waits until {clock(1_700_000_000.0)}: blender has it open\n" in capsys.readouterr().out
    look.status(fixed(gpu(Switch=switch(finished=1.012, result="failed", reason="no luck"))), PLAIN)
    assert "after 12 ms: no luck\n" in capsys.readouterr().out


def test_a_group_stands_alone_when_it_has_one_gpu_and_bridges(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = "0000:01:00.0", "0000:02:00.0"
    functions = [
        function(first, 1, "display", first),
        function("0000:01:00.1", 1, "audio", first),
        function("0000:00:01.0", 1, "bridge"),
        function(second, 2, "display", second),
        function("0000:03:00.0", 2, "network"),
        function("0000:04:00.0", 3, "display", "0000:04:00.0"),
        function("0000:05:00.0", 3, "display", "0000:05:00.0"),
        function("0000:06:00.0", 10, "network"),
    ]
    records = groups.grouped(reversed(functions))
    assert [(each["group"], each["alone"]) for each in records] == [(1, True), (2, False), (3, False), (10, False)]
    assert [each["address"] for each in records[0]["functions"]] == ["0000:00:01.0", first, "0000:01:00.1"]
    assert records[0]["functions"][0]["vendor_id"] == "10de"
    groups.groups(fixed(functions=functions), PLAIN)
    headings = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    assert headings == [
        f"IOMMU group 1: GPU {first} alone",
        f"IOMMU group 2: GPU {second}, shared with 0000:03:00.0",
        "IOMMU group 3: GPU 0000:04:00.0 and GPU 0000:05:00.0",
        "IOMMU group 10",
    ]


@pytest.mark.parametrize(
    ("kind", "driver", "alone"),
    [
        ("bridge", "pcieport", True),
        ("chipset", "", True),
        ("chipset", "ie31200_edac", False),
        ("other", "nvidia-nvswitch", False),
        ("other", "", False),
    ],
)
def test_pieces_of_the_board_leave_a_gpu_alone(kind: str, driver: str, alone: bool) -> None:
    card = "0000:01:00.0"
    [record] = groups.grouped([function(card, 1, "display", card), function("0000:02:00.0", 1, kind, driver=driver)])
    assert record["alone"] is alone


def test_what_a_function_brings_with_it_is_said_in_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    card = "0000:01:00.0"
    groups.groups(fixed(functions=[{**function(card, 1, "display", card), "adds": ["8 virtual functions"]}]), PLAIN)
    assert "GPU, 8 virtual functions" in capsys.readouterr().out
    look.list_gpus(fixed(gpu(Adds=["NVSwitch", "reserved region"]), gpu()), PLAIN)
    heading, first, _ = capsys.readouterr().out.splitlines()
    assert heading.split()[-2:] == ["WITH", "MODEL"]
    assert "13     NVSwitch, reserved region  NVIDIA" in first
    look.status(fixed(gpu(Adds=["firmware frame buffer"], StaysOut=True)), PLAIN)
    assert "with: firmware frame buffer\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("managed", "terminal", "told"), [(False, True, True), (True, True, False), (False, False, False)]
)
def test_a_list_of_what_nobody_manages_says_how_to(
    managed: bool, terminal: bool, told: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To people alone: who reads a pipe counts lines."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    monkeypatch.setenv("COLUMNS", "500")
    monkeypatch.setenv("TERM", "xterm")
    look.list_gpus(fixed(gpu(Managed=managed), gpu(Address="0000:00:02.0")), PLAIN)
    out = capsys.readouterr().out
    how = "to have 0000:01:00.0 managed, add to /etc/gpuswitch/config.toml, by gpuswitchctl config edit: `[[gpu]]`, "
    assert (f'{how}`address = "0000:01:00.0"`\n' in out, "no GPU is managed" in out) == (told, told)


def test_a_step_that_was_not_taken_back_is_called_that() -> None:
    assert state_word("revert-failed") == "not taken back"


def test_status_tells_where_it_is_wanted_at_boot_and_what_it_is_told_by(capsys: pytest.CaptureFixture[str]) -> None:
    look.status(fixed(gpu(AtBoot="vfio", Match={"vendor": "10de", "slot": "2"})), PLAIN)
    said = capsys.readouterr().out
    assert 'match: { vendor = "10de", slot = "2" }\n' in said
    assert "for a [[gpu]] table, instead of address\n" in said
    assert "at boot: vfio\n" in said
    look.status(fixed(gpu(Match={})), PLAIN)
    said = capsys.readouterr().out
    assert "match" not in said
    assert "at boot" not in said
    look.list_gpus(fixed(gpu()), PLAIN)
    assert "WITH" not in capsys.readouterr().out


def test_what_fits_no_gpu_stands_beside_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    warning = "the table of 0000:09:00.0 is about no GPU"
    look.list_gpus(fixed(gpu()), PLAIN)
    alone = capsys.readouterr()
    look.list_gpus(fixed(gpu(), warnings=[warning]), PLAIN)
    said = capsys.readouterr()
    assert (said.out, alone.err) == (alone.out, "")
    assert said.err == f"gpuswitchctl: warning: {warning}\n"
    look.list_gpus(fixed(gpu(), warnings=[warning]), JSON)
    said = capsys.readouterr()
    assert (json.loads(said.out)["warnings"], said.err) == ([warning], "")


def test_nothing_to_show_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    look.list_gpus(fixed(), PLAIN)
    groups.groups(fixed(), PLAIN)
    assert capsys.readouterr().out == "there is no GPU on this host\nthere are no IOMMU groups: the IOMMU is off\n"
    look.list_gpus(fixed(), JSON)
    assert json.loads(capsys.readouterr().out) == {"version": 1, "gpus": [], "warnings": []}
    look.status(fixed(), PLAIN)
    look.holders(fixed(), PLAIN)
    look.holders(fixed(gpu()), PLAIN)
    assert capsys.readouterr().out == (
        "there is no GPU on this host\nnobody has any of them open\nnobody has it open\n"
    )


def test_what_the_locale_cannot_write_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setattr(Service, "connect", lambda _address, _seconds: fixed(gpu(Model="Müller")))
    assert main(["list"]) == 0
    assert b"M\\xfcller" in written.getvalue()


@pytest.mark.parametrize("arguments", [["--json", "status", "a"], ["status", "a", "--json"], ["status", "--json", "a"]])
def test_what_goes_for_all_verbs_stands_before_them_or_behind(arguments: list[str]) -> None:
    args = parse(arguments)
    assert (args.json, args.gpus) == (True, ["a"])
    assert parse(["status"]).json is False


def test_wrong_usage_is_json_for_whoever_reads_that(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["to-vfio", "--timeout", "0", "--json"]) == 2
    out, err = capsys.readouterr()
    error = json.loads(out)
    assert error["error"]["kind"] == "invalid_argument"
    assert error["error"]["exit_status"] == 2
    assert error["error"]["text"] in err
    assert (error["blockers"], error["version"]) == ([], 1)


def test_every_exit_status_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    short = capsys.readouterr().out
    assert main(["help", "exit-status"]) == 0
    whole = capsys.readouterr().out
    for status, words in EXIT_STATUSES:
        assert f"{status}: {words}\n" in whole
    # Whoever read the output has gone: nobody reads this either.
    assert [status for status, _ in EXIT_STATUSES if f" {status} " not in short] == [141]


@pytest.mark.parametrize("topic", TOPICS)
def test_each_topic_is_explained(topic: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help", topic.upper()]) == 0
    assert len(capsys.readouterr().out.splitlines()) > 5


def test_help_of_a_command_is_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help", "to-vfio"]) == 0
    asked = capsys.readouterr().out
    assert main(["to-vfio", "--help"]) == 0
    assert asked == capsys.readouterr().out
    assert main(["help"]) == 0
    assert "COMMAND" in capsys.readouterr().out
    assert main(["help", "everything"]) == 2
    assert "'everything' is neither a command nor one of states, " in capsys.readouterr().err


def test_the_states_that_can_be_waited_for_are_those_that_there_are() -> None:
    assert set(STATES) == {state.value for state in State} == {state for state, _ in topics.STATES}


def test_the_usage_of_a_command_comes_with_what_is_wrong_with_it() -> None:
    with pytest.raises(UsageError) as wrong:
        parse(["wait", "--for", "nvidia"])
    assert wrong.value.usage.startswith("usage: gpuswitchctl wait ")
    assert parser().prog == "gpuswitchctl"
