"""Several GPUs in one command: looked at, switched at the same time, each told of, the worst in the exit status."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from typing import Any

import pytest

from tests.harness.service.services import ANY_PORT
from tests.real_bus.conftest import CTL, Ctl, Start

INTEGRATED, CARD, SOUND = "0000:00:02.0", "0000:01:00.0", "0000:01:00.1"
FIRST, SECOND = "0000:11:00.0", "0000:21:00.0"
MANAGED = "".join(f'[[gpu]]\naddress = "{address}"\n' for address in (FIRST, SECOND))
SERVER = f"{ANY_PORT}{MANAGED}[deadlines]\nunbind = 600\n"


def states(ctl: Ctl) -> dict[str, str]:
    """The state of each GPU, by address."""
    return {gpu["address"]: gpu["state"] for gpu in json.loads(ctl("list", "--json").stdout)["gpus"]}


def events(said: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in said.splitlines()]


async def test_all_gpus_are_shown_where_none_is_named(start: Start, ctl: Ctl) -> None:
    await start("laptop")
    shown = ctl("status")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert re.findall(r"^ *GPU: (.*)$", shown.stdout, flags=re.MULTILINE) == [INTEGRATED, CARD]
    assert re.findall(r"^ *state: (\S*) since", shown.stdout, flags=re.MULTILINE) == ["host-i915", "host-nvidia"]
    assert [gpu["address"] for gpu in json.loads(ctl("status", "--json").stdout)["gpus"]] == [INTEGRATED, CARD]
    assert [gpu["address"] for gpu in json.loads(ctl("status", CARD, "01:00.1", "--json").stdout)["gpus"]] == [CARD]


async def test_the_holders_of_all_gpus_are_shown_with_what_they_have(start: Start, ctl: Ctl) -> None:
    await start("workstation")
    heading, *rows = ctl("holders").stdout.splitlines()
    assert heading.split()[:3] == ["GPU", "PID", "COMMAND"]
    assert {row.split()[0] for row in rows} == {CARD, "0000:41:00.0"}
    told = json.loads(ctl("holders", "--json").stdout)["holders"]
    assert {(each["gpu"], each["command"]) for each in told} >= {
        (CARD, "nvidia-persistenced"),
        ("0000:41:00.0", "nvidia-persistenced"),
    }
    heading, *rows = ctl("holders", "41:00.0").stdout.splitlines()
    assert heading.split()[:2] == ["PID", "COMMAND"]
    assert CARD not in "".join(rows)


async def test_they_switch_and_each_is_told(start: Start, ctl: Ctl) -> None:
    await start("server", config=SERVER)
    moved = ctl("to-vfio", "11:00.0", "21:00.0")
    assert (moved.returncode, moved.stderr) == (0, "")
    lines = moved.stdout.splitlines()
    for address in (FIRST, SECOND):
        assert [line for line in lines if re.match(rf"{address}: \[ *\d+/\d+\] bind {address} to vfio-pci: done", line)]
        assert [line for line in lines if line.startswith(f"{address} is on vfio-pci now, after ")]
    assert {states(ctl)[address] for address in (FIRST, SECOND)} == {"vfio"}


async def test_all_are_those_that_the_configuration_has_a_table_for(start: Start, ctl: Ctl) -> None:
    await start("server", config=SERVER)
    assert ctl("to-vfio", "--all").returncode == 0
    assert [address for address, state in states(ctl).items() if state == "vfio"] == [FIRST, SECOND]
    assert ctl("to-host", "--all").returncode == 0
    assert set(states(ctl).values()) == {"host"}


def in_one_line(text: str) -> str:
    return " ".join(text.replace("`, `", " ").replace("`", "").split())


async def test_all_of_none_says_what_to_write(start: Start, ctl: Ctl) -> None:
    await start("server")
    none = ctl("to-vfio", "--all")
    assert none.returncode == 2
    assert "      [[gpu]]\n      address = " in none.stderr
    assert none.stderr.endswith("or be asked, and have it written: gpuswitchctl setup\n")


async def test_one_that_is_refused_keeps_no_other_back(start: Start, ctl: Ctl) -> None:
    await start("laptop")
    moved = ctl("to-vfio", INTEGRATED, CARD)
    assert moved.returncode == 3
    assert moved.stderr.startswith(f"gpuswitchctl: cannot move {INTEGRATED} to vfio:")
    assert CARD not in moved.stderr
    assert states(ctl) == {INTEGRATED: "host", CARD: "vfio"}
    # That it was refused has scrolled away by now: it is said once more, below how the other one ended.
    done, stopped, refused, todo = moved.stdout.splitlines()[-4:]
    assert done.startswith(f"{CARD} is on vfio-pci now")
    assert stopped == "  stopped until it is home: nvidia-persistenced.service"
    assert refused.startswith(f"{INTEGRATED}: refused: {INTEGRATED} is the display that this machine booted on")
    assert todo == f"  put right what is named here, then: gpuswitchctl to-vfio {INTEGRATED}"
    # With what to write, which the first word had as a table.
    assert refused.endswith(f'`[[gpu]]`, `address = "{INTEGRATED}"`, `allow_boot_display = true`')


async def test_programs_get_a_line_for_each_that_is_refused_or_over(start: Start, ctl: Ctl) -> None:
    await start("laptop")
    told = events(ctl("to-vfio", INTEGRATED, CARD, "--json").stdout)
    [refused] = [each for each in told if each["event"] == "error"]
    assert (refused["gpu"], refused["error"]["exit_status"]) == (INTEGRATED, 3)
    assert refused["blockers"][0].keys() == {"kind", "text", "error_kind"}
    [result] = [each for each in told if each["event"] == "result"]
    assert (result["gpu"], result["result"], result["changed"]) == (CARD, "done", True)


async def test_of_several_that_go_wrong_the_worst_counts(start: Start, ctl: Ctl) -> None:
    """Refused is 3, reverted 1, and wedged 7."""
    await start("laptop", f"probe@{SOUND}#1=EINVAL")
    assert ctl("to-vfio", INTEGRATED, CARD).returncode == 1


async def test_of_several_that_go_wrong_the_worst_is_the_one_that_hangs(start: Start, ctl: Ctl) -> None:
    await start("laptop", f"unbind@{SOUND}=hang", config=f"{ANY_PORT}[deadlines]\nunbind = 0.2\n")
    assert ctl("to-vfio", INTEGRATED, CARD).returncode == 7


async def test_those_that_are_over_are_told_when_another_takes_too_long(start: Start, ctl: Ctl) -> None:
    await start("server", f"unbind@{SECOND}=hang", config=SERVER)
    late = ctl("to-vfio", FIRST, SECOND, "--timeout", "3")
    assert late.returncode == 6
    assert f"{FIRST} is on vfio-pci now" in late.stdout
    assert "has not finished within 3 s, and goes on" in late.stderr
    assert states(ctl)[SECOND] == "detaching"


async def test_an_interrupt_names_those_that_go_on(start: Start, environ: dict[str, str]) -> None:
    await start("server", f"unbind@{SECOND}=hang", config=SERVER)
    with switching(environ, FIRST, SECOND) as process:
        assert process.stdout is not None
        said = process.stdout.readline()
        while not re.search(r"check IOMMU group \d+: done", said):
            assert said.startswith((FIRST, SECOND))
            said = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode == 130
    # That the first is over may be known by then, or not yet.
    assert re.search(rf"gpuswitchctl cancel ({FIRST} )?{SECOND} takes it back$", err)


def switching(environ: dict[str, str], *gpus: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [CTL, "to-vfio", *gpus], env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


async def test_ids_are_told_with_their_gpus(start: Start, ctl: Ctl) -> None:
    await start("server", config=SERVER)
    begun = ctl("to-vfio", "--all", "--no-wait")
    assert begun.returncode == 0
    assert [re.fullmatch(r"(\S+): [0-9a-f]{8}", line)[1] for line in begun.stdout.splitlines()] == [FIRST, SECOND]  # type: ignore[index]  # None fails the test as well
    assert ctl("wait", FIRST, SECOND, "--for", "vfio").returncode == 0


async def test_one_named_twice_is_one(start: Start, ctl: Ctl) -> None:
    await start("laptop")
    moved = ctl("to-vfio", CARD, "01:00.1", "pci_0000_01_00_0")
    assert moved.returncode == 0
    assert moved.stdout.count("is on vfio-pci now") == 1
    assert f"{CARD}: [" not in moved.stdout


async def test_plans_of_several_stand_below_their_names(start: Start, ctl: Ctl) -> None:
    await start("server", config=SERVER)
    planned = ctl("to-vfio", "--all", "--dry-run")
    assert planned.returncode == 0
    assert [line for line in planned.stdout.splitlines() if line.endswith(":")] == [f"{FIRST}:", f"{SECOND}:"]
    plans = json.loads(ctl("to-vfio", "--all", "--dry-run", "--json").stdout)["plans"]
    assert [(each["gpu"], each["target"]) for each in plans] == [(FIRST, "vfio"), (SECOND, "vfio")]
    assert plans[0]["steps"][0].keys() == {
        "kind",
        "title",
        "deadline_seconds",
        "stops",
        "starts",
        "ends_programs",
        "drivers",
    }


async def test_all_are_planned_each_from_where_it_is_whichever_are_refused(start: Start, ctl: Ctl) -> None:
    config = "".join(f'[[gpu]]\naddress = "{each}"\n' for each in (INTEGRATED, CARD))
    await start("laptop", config=ANY_PORT + config)
    for arguments in (("plan", "--all"), ("plan", "--all", "vfio"), ("to-vfio", "--all", "--dry-run")):
        planned = ctl(*arguments)
        assert planned.returncode == 3
        assert [line for line in planned.stdout.splitlines() if line.endswith(":")] == [f"{CARD}:"]
        assert planned.stdout.splitlines()[1].startswith(f"nothing keeps {CARD} from going to vfio")
        assert f"gpuswitchctl: {INTEGRATED} cannot go to vfio now:" in planned.stderr
        refused, told = map(json.loads, ctl(*arguments, "--json").stdout.splitlines())
        assert [(each["gpu"], each["target"]) for each in told["plans"]] == [(CARD, "vfio")]
        assert (refused["gpu"], refused["error"]["exit_status"], refused["event"]) == (INTEGRATED, 3, "error")
    assert ctl("to-vfio", CARD).returncode == 0
    planned = ctl("plan", "--all", "--json")
    _refused, told = map(json.loads, planned.stdout.splitlines())
    assert [(each["gpu"], each["target"]) for each in told["plans"]] == [(CARD, "host")]
    assert "nothing to do: it is on vfio-pci already" in ctl("plan", "--all", "vfio").stdout


async def test_all_means_those_with_a_table_and_that_there_is_none_is_said(start: Start, ctl: Ctl) -> None:
    service = await start("laptop")
    refused = ctl("plan", "--all")
    assert (refused.returncode, refused.stdout) == (2, "")
    *_purpose, first, manage, table, address, asked = refused.stderr.splitlines()
    assert first.endswith("no GPU is managed, and --all means those that are")
    # Not the one that is part of the processor, though it comes first.
    file = service.config / "config.toml"
    assert manage.strip() == f"to have {CARD} managed, add to {file}, by gpuswitchctl config edit:"
    assert (table.strip(), address.strip()) == ("[[gpu]]", f'address = "{CARD}"')
    assert asked.strip() == "or be asked, and have it written: gpuswitchctl setup"
    both = ctl("plan", "--all", CARD)
    assert (both.returncode, "cannot take --all and names of GPUs together" in both.stderr) == (2, True)
    assert "MANAGED says whether the configuration has a [[gpu]] table" in " ".join(ctl("help", "list").stdout.split())


# Refusals and errors as JSON


async def test_a_refusal_is_json_with_its_reasons(start: Start, ctl: Ctl) -> None:
    await start("shared")
    for arguments in (("to-vfio", CARD), ("plan", CARD, "vfio"), ("to-vfio", CARD, "--dry-run")):
        refused = ctl(*arguments, "--json")
        assert refused.returncode == 3
        [told] = events(refused.stdout)
        assert (told["version"], told["error"]["kind"], told["error"]["exit_status"]) == (1, "not_viable", 3)
        # A table to be written is a block there.
        assert told["error"]["text"].partition(" `[[gpu]]`")[0] in refused.stderr.replace("\n  ", "\n")
        assert "0000:02:00.0" in told["blockers"][0]["text"]
        assert told["blockers"][0].keys() == {"kind", "text", "error_kind"}


@pytest.mark.parametrize(
    ("arguments", "kind", "status"),
    [
        (["status", "nope"], "no_such_gpu", 2),
        (["show", "nope"], "invalid_argument", 2),
        (["to-vfio"], "invalid_argument", 2),
        (["to-vfio", "--all"], "no_such_gpu", 2),
        (["cancel", CARD], "failed", 1),
        (["history", "--limit", "x"], "invalid_argument", 2),
        (["list", "--bus", "nonsense"], "invalid_argument", 2),
        (["list", "--bus", "unix:path=/nowhere"], "unreachable", 5),
        (["wait", "--for", "vfio", "--timeout", "0.1"], "timeout", 6),
    ],
)
async def test_an_error_is_json_on_standard_output(
    arguments: list[str], kind: str, status: int, start: Start, ctl: Ctl
) -> None:
    await start("laptop")
    failed = ctl(*arguments, "--json")
    assert failed.returncode == status
    [told] = events(failed.stdout)
    assert (told["event"], told["gpu"], told["changed"] in {False, None}) == ("error", None, True)
    assert told["error"] == {"kind": kind, "text": told["error"]["text"], "exit_status": status}
    # What is to be written into a file stands in lines of its own for people.
    assert in_one_line(told["error"]["text"]) in in_one_line(failed.stderr)
    assert told["blockers"] == []
