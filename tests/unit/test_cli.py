"""The command line without a service: what it understands, how it says things, what it shows."""

from __future__ import annotations

import io
import json
from argparse import Namespace
from collections.abc import Sequence
from typing import Any, cast

import pytest

from gpuswitch.cli import query as look
from gpuswitch.cli.client import Service, StepChange, plain_values
from gpuswitch.cli.main import main, parser, sentence
from gpuswitch.cli.output import aligned, clean, duration, numbered, problem, table
from gpuswitch.cli.steps import JsonLines, Lines
from gpuswitch.cli.terminal import StepsInPlace

EVIL = "GeForce\x1b[2J\r\n\x9b31m\u202e\x07"
HARMLESS = "GeForce\\x1b[2J\\r\\n\\x9b31m\\u202e\\x07"


def gpu(**changes: object) -> dict[str, Any]:
    """The properties of a GPU as the bus has them."""
    return {
        "Address": "0000:01:00.0",
        "Name": "",
        "Model": "NVIDIA Corporation GA104",
        "Vendor": "nvidia",
        "Managed": False,
        "State": "host",
        "Driver": "nvidia",
        "HostDriver": "nvidia",
        "Functions": [("0000:01:00.0", "display", "nvidia"), ("0000:01:00.1", "audio", "")],
        "IommuGroups": [13],
        "Adds": [],
        "Owner": ("", ""),
        "Switch": {},
        "Reason": "",
        "StaysOut": False,
        "StateSince": 1_700_000_000.0,
        "TrialEnds": 0.0,
        **changes,
    }


def function(address: str, group: int, kind: str, gpu: str = "", driver: str = "") -> dict[str, Any]:
    """A function as `Groups` tells it."""
    return {
        "group": group,
        "address": address,
        "kind": kind,
        "class": 0x030000,
        "vendor": 0x10DE,
        "device": 0x2484,
        "maker": "NVIDIA Corporation",
        "model": "",
        "driver": driver,
        "gpu": gpu,
        "adds": [],
    }


class FixedService:
    """A service with answers that no hardware gives."""

    def __init__(
        self, *gpus: dict[str, Any], functions: list[dict[str, Any]] | None = None, warnings: Sequence[str] = ()
    ) -> None:
        self._gpus = gpus
        self._functions = functions or []
        self._warnings = list(warnings)

    def gpus(self) -> list[dict[str, Any]]:
        return list(self._gpus)

    def gpu(self, _selector: str) -> FixedService:
        return self

    def properties(self) -> dict[str, Any]:
        return self._gpus[0]

    def warnings(self) -> list[str]:
        return self._warnings

    def groups(self) -> list[dict[str, Any]]:
        return self._functions


def service(
    *gpus: dict[str, Any], functions: list[dict[str, Any]] | None = None, warnings: Sequence[str] = ()
) -> Service:
    return cast("Service", FixedService(*gpus, functions=functions, warnings=warnings))


VERBS = (
    *("list", "status", "to-vfio", "to-host", "recover", "cancel", "holders", "plan"),
    *("history", "show", "groups", "config"),
)
PLAIN = Namespace(json=False, gpu="")
JSON = Namespace(json=True, gpu="")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "COMMAND"),
        (["frobnicate"], "invalid choice: 'frobnicate'"),
        (["plan", "01:00.0", "nvidia"], "invalid choice: 'nvidia'"),
        (["to-vfio", "--timeout", "0"], "'0' is not a number of seconds above 0"),
        (["to-vfio", "--timeout", "inf"], "'inf' is not a number of seconds above 0"),
        (["to-vfio", "--timeout", "soon"], "'soon' is not a number of seconds above 0"),
        (["to-vfio", "--no-wait", "--dry-run"], "not allowed with argument"),
        (["to-vfio", "--time", "5"], "unrecognized arguments"),
        (["history", "--limit", "-1"], "'-1' is not a number of switches"),
        (["history", "--limit", "4294967296"], "'4294967296' is not a number of switches"),
        (["show"], "required: ID"),
    ],
)
def test_wrong_usage_ends_with_2(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert complaint in capsys.readouterr().err


def test_a_gpu_may_be_left_out_and_a_target_is_taken_in_any_case() -> None:
    assert vars(parser().parse_args(["plan", "VFIO"]))["gpu"] == ""
    planned = parser().parse_args(["plan", "01:00.0", "Host"])
    assert (planned.gpu, planned.target) == ("01:00.0", "host")


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_each_verb_has_an_example_that_it_understands(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    assert ended.value.code == 0
    example = capsys.readouterr().out.rpartition("example: gpuswitchctl ")[2].split()
    assert example[0] == verb
    parser().parse_args(example)


def test_the_bus_comes_from_the_option_then_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUSWITCH_BUS", "unix:path=/a")
    assert parser().parse_args(["list"]).bus == "unix:path=/a"
    assert parser().parse_args(["list", "--bus", "unix:path=/b"]).bus == "unix:path=/b"
    monkeypatch.setenv("GPUSWITCH_BUS", "")
    assert parser().parse_args(["list"]).bus is None


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


def test_nothing_that_a_terminal_would_obey_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    evil = gpu(Name=EVIL, Model=EVIL, Reason=EVIL, Driver=EVIL, Functions=[(EVIL, EVIL, EVIL)])
    change = StepChange(1, 1, EVIL, EVIL, EVIL, 5)
    look.list_gpus(service(evil), PLAIN)
    look.list_gpus(service(evil), JSON)
    look.status(service(evil), PLAIN)
    look.groups(service(functions=[function(EVIL, 1, EVIL, EVIL)]), PLAIN)
    Lines().step(change)
    JsonLines("1").step(change)
    problem(EVIL)
    with StepsInPlace() as shown:
        shown.step(change)
    out, err = capsys.readouterr()
    assert HARMLESS in out
    assert all(c.isprintable() or c == "\n" for c in out + err)


def test_a_line_that_is_redrawn_is_clean_too() -> None:
    shown = StepsInPlace()
    shown.step(StepChange(1, 1, EVIL, EVIL, "running", 0))
    assert HARMLESS in shown.__rich__().plain
    assert shown.__rich__().plain.isprintable()


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
    assert numbered(StepChange(3, 12, "module", "load vfio-pci", "done", 1)) == "[ 3/12] load vfio-pci"


def test_values_from_the_bus_lose_their_signatures() -> None:
    """A pair of strings looks like a value with its signature, and must not be taken for one."""
    switch = {"id": ("s", "1f"), "index": ("u", 3)}
    assert plain_values({"Owner": ("(ss)", ("s", "uuid")), "Switch": ("a{sv}", switch)}) == {
        "Owner": ("s", "uuid"),
        "Switch": {"id": "1f", "index": 3},
    }


def test_a_gpu_as_json_has_names_for_everything() -> None:
    record = look.gpu_record(gpu(Owner=("win11", "c0ffee"), Switch={"id": "1f"}))
    assert record["functions"][1] == {"address": "0000:01:00.1", "kind": "audio", "driver": ""}
    assert record["owner"] == {"name": "win11", "uuid": "c0ffee"}
    assert (record["host_driver"], record["iommu_groups"], record["switch"]) == ("nvidia", [13], {"id": "1f"})
    assert look.gpu_record(gpu())["owner"] is None
    assert look.gpu_record(gpu())["switch"] is None


def test_the_virtual_machine_that_has_a_gpu_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    owned = gpu(State="vfio", Driver="vfio-pci", Owner=("win11", "c0ffee"))
    look.status(service(owned), PLAIN)
    assert "owner: win11 (c0ffee)\n" in capsys.readouterr().out
    look.list_gpus(service(owned, gpu()), PLAIN)
    heading, first, second = capsys.readouterr().out.splitlines()
    assert heading.split()[3:6] == ["DRIVER", "OWNER", "IOMMU"]
    assert first.split()[3:6] == ["vfio-pci", "win11", "13"]
    assert second.split()[3:6] == ["nvidia", "-", "13"]
    look.list_gpus(service(gpu()), PLAIN)
    assert "OWNER" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "words"),
    [({}, "host-nvidia"), ({"Driver": ""}, "host-none"), ({"State": "vfio", "Driver": "vfio-pci"}, "vfio")],
)
def test_people_see_the_driver_with_the_host(changes: dict[str, str], words: str) -> None:
    assert look.state_words(gpu(**changes)) == words


def test_status_tells_of_a_switch_under_way_and_of_the_last(capsys: pytest.CaptureFixture[str]) -> None:
    switch = {
        "id": "1f",
        "target": "vfio",
        "title": "load vfio-pci",
        "index": 1,
        "count": 9,
        "started": 0,
        "reason": "",
    }
    look.status(service(gpu(Switch={**switch, "finished": 0, "result": ""})), PLAIN)
    assert "1f to vfio: at step 1 of 9, load vfio-pci\n" in capsys.readouterr().out
    look.status(service(gpu(Switch={**switch, "finished": 0.012, "result": "failed", "reason": "no luck"})), PLAIN)
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
    records = look.grouped(reversed(functions))
    assert [(each["group"], each["alone"]) for each in records] == [(1, True), (2, False), (3, False), (10, False)]
    assert [each["address"] for each in records[0]["functions"]] == ["0000:00:01.0", first, "0000:01:00.1"]
    assert records[0]["functions"][0]["vendor"] == "10de"
    look.groups(service(functions=functions), PLAIN)
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
    [record] = look.grouped([function(card, 1, "display", card), function("0000:02:00.0", 1, kind, driver=driver)])
    assert record["alone"] is alone


def test_what_a_function_brings_with_it_is_said_in_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    card = "0000:01:00.0"
    look.groups(service(functions=[{**function(card, 1, "display", card), "adds": ["8 virtual functions"]}]), PLAIN)
    assert "GPU, 8 virtual functions" in capsys.readouterr().out
    look.list_gpus(service(gpu(Adds=["NVSwitch", "reserved region"]), gpu()), PLAIN)
    heading, first, _ = capsys.readouterr().out.splitlines()
    assert heading.split()[-2:] == ["WITH", "MODEL"]
    assert "13           NVSwitch, reserved region  NVIDIA" in first
    look.status(service(gpu(Adds=["firmware frame buffer"], StaysOut=True)), PLAIN)
    assert "with: firmware frame buffer\n" in capsys.readouterr().out
    look.list_gpus(service(gpu()), PLAIN)
    assert "WITH" not in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [PLAIN, JSON])
def test_what_fits_no_gpu_stands_beside_the_answer(arguments: Namespace, capsys: pytest.CaptureFixture[str]) -> None:
    look.list_gpus(service(gpu()), arguments)
    alone = capsys.readouterr()
    look.list_gpus(service(gpu(), warnings=["the table of 0000:09:00.0 is about no GPU"]), arguments)
    said = capsys.readouterr()
    assert (said.out, alone.err) == (alone.out, "")
    assert said.err == "gpuswitchctl: warning: the table of 0000:09:00.0 is about no GPU\n"


def test_nothing_to_show_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    look.list_gpus(service(), PLAIN)
    look.groups(service(), PLAIN)
    assert capsys.readouterr().out == "there is no GPU on this host\nthere are no IOMMU groups: the IOMMU is off\n"
    look.list_gpus(service(), JSON)
    assert json.loads(capsys.readouterr().out) == []


def test_what_the_locale_cannot_write_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setattr(Service, "connect", lambda _address: service(gpu(Model="Müller")))
    monkeypatch.setattr(FixedService, "close", lambda _self: None, raising=False)
    assert main(["list"]) == 0
    assert b"M\\xfcller" in written.getvalue()
