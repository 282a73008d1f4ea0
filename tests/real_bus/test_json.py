"""All that `--json` prints is as docs/json/ says: by the real command, against the real service on a simulated host."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator, ValidationError

from gpuswitch import __version__
from gpuswitch.cli.parser import arguments_of, parser
from gpuswitch.cli.records import entry_record
from tests.harness.buses.private import PrivateBus
from tests.harness.json_schemas import DOCS, SCHEMAS, check
from tests.harness.service.services import BIN, environment
from tests.real_bus.conftest import Start

FOR_PEOPLE = {"help", "demo", "notify", "run", "hold"}
"""Verbs that print nothing that programs read, or what their command prints."""
WITHOUT_VERB = {"common", "version"}
"""Schemas that are of no verb."""
WITHOUT_SERVICE = "doctor"
"""The verb to which it is a finding that there is no service, and no error."""

INTEGRATED, DISCRETE, SOUND = "0000:00:02.0", "0000:01:00.0", "0000:01:00.1"
CONFIG = f"""
[metrics]
enabled = false
[deadlines]
unbind = 600
[[gpu]]
address = "{DISCRETE}"
name = "geforce"
allow_boot_display = true
"""


class Told(list[dict[str, Any]]):
    """The objects that a command printed, and its exit status."""

    status: int

    def events(self, name: str) -> list[dict[str, Any]]:
        return [each for each in self if each["event"] == name]


Json = Callable[..., Told]


@pytest.fixture
def environ(private_bus: PrivateBus) -> dict[str, str]:
    return environment(GPUSWITCH_BUS=private_bus.address)


@pytest.fixture
def told(environ: dict[str, str]) -> Json:
    """Run a verb with --json to its end; what it prints is of the form that its schema has."""

    def run(verb: str, *arguments: str) -> Told:
        command = [str(BIN / "gpuswitchctl"), verb, *arguments, "--json"]
        ended = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
        printed = Told(objects(ended.stdout))
        printed.status = ended.returncode
        for each in printed:
            check(verb, each)
        return printed

    return run


@contextmanager
def going_on(
    environ: dict[str, str], *arguments: str
) -> Iterator[tuple[subprocess.Popen[str], Iterator[dict[str, Any]]]]:
    """A command with --json that runs, and its objects as they come, of the form that its schema has."""
    command = [str(BIN / "gpuswitchctl"), *arguments, "--json"]
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process, told_by(arguments[0], process.stdout)


def told_by(verb: str, lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        check(verb, json.loads(line))
        yield json.loads(line)


def until(event: str, coming: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """What comes, up to the first of these."""
    seen = [next(coming)]
    while seen[-1]["event"] != event:
        seen.append(next(coming))
    return seen


def objects(text: str) -> Iterator[dict[str, Any]]:
    """One over several lines, or one a line."""
    if text.startswith("{\n"):
        yield json.loads(text)
    else:
        yield from map(json.loads, text.splitlines())


async def test_what_only_looks_prints_one_object(start: Start, told: Json) -> None:
    await start("laptop", config=CONFIG.replace(INTEGRATED, "0000:09:00.0"))
    for verb in ("list", "status", "groups", "config", "holders", "history"):
        assert (len(told(verb)), told(verb).status) == (1, 0)
    [gpu] = told("status", "geforce")[0]["gpus"]
    assert (gpu["state"], gpu["state_label"], gpu["owner"], gpu["switch"]) == ("host", "host-nvidia", None, None)
    assert {each["command"] for each in told("holders", "geforce")[0]["holders"]} >= {"wireplumber"}
    [function] = [
        each for group in told("groups")[0]["groups"] for each in group["functions"] if each["address"] == DISCRETE
    ]
    assert (function["vendor_id"], function["device_id"], function["class"]) == ("10de", "2484", "030000")


async def test_the_doctor_asks_the_service_where_there_is_one(start: Start, told: Json) -> None:
    """What it says of the machine that runs this is what that is."""
    without = told("doctor")
    await start("laptop", config=CONFIG)
    with_one = told("doctor")
    for examined, severity in ((without, "warning"), (with_one, "ok")):
        [found] = examined
        assert examined.status == ["ok", "warning", "problem"].index(found["severity"])
        [service] = [each for each in found["findings"] if each["kind"] == "service"]
        # Where gpuswitch is not installed, that is what is wrong without one.
        assert service["severity"] == severity or (examined is without and "not installed" in service["reason"])


async def test_the_configuration_is_shown_and_checked_as_json(start: Start, told: Json, tmp_path: Path) -> None:
    await start("laptop", config=CONFIG)
    assert {each["origin"] for each in told("config", "--changed")[0]["settings"]} == {
        f"{tmp_path}/service/etc/config.toml"
    }
    (tmp_path / "broken.toml").write_text("[deadlines]\nunbnd = 3\n")
    broken = told("config", "check", f"{tmp_path}/broken.toml")
    assert (broken.status, len(broken[0]["faults"])) == (2, 1)
    assert [each["line"] for each in broken[0]["places"]] == [2]
    told("config", "check", f"{tmp_path}/gone")
    assert told("config", "edit")[0]["error"]["kind"] == "invalid_argument"


async def test_a_plan_has_the_same_form_whoever_asks(start: Start, told: Json) -> None:
    await start("laptop", config=CONFIG)
    [planned] = told("plan", "geforce", "vfio")
    [dry] = told("to-vfio", "geforce", "--dry-run")
    assert planned == dry
    assert {step["deadline_seconds"] for step in planned["plans"][0]["steps"] if step["kind"] == "unbind"} == {600.0}
    assert told("plan", "geforce", "host") == [
        {
            "version": 1,
            "plans": [
                {"gpu": DISCRETE, "name": "geforce", "target": "host", "state": "host", "steps": [], "in_the_way": []}
            ],
        }
    ]


async def test_a_switch_is_events_and_its_result_and_then_a_part_of_the_history(start: Start, told: Json) -> None:
    await start("laptop", config=CONFIG)
    there = told("to-vfio", "geforce", "--busy=terminate", "--wait=5", "--stop-unit=nvidia-persistenced.service")
    assert there.status == 0
    [result] = there.events("result")
    assert (result["result"], result["changed"], there[-1]) == ("done", True, result)
    assert len(there.events("step")) == 2 * result["count"]
    [again] = told("to-vfio", "geforce")
    assert (again["result"], again["changed"]) == ("done", False)
    assert told("to-host", "--all")[-1]["changed"] is True
    assert told("recover", "geforce")[-1]["changed"] is False

    assert [each["target"] for each in told("history")[0]["switches"]] == ["host", "vfio"]
    of_today = told("history", "--since", "1h", "--until", "now", "--result", "done", "--limit", "1")
    assert [each["target"] for each in of_today[0]["switches"]] == ["host"]
    assert told("history", "--since", there[0]["at"], "--until", there[0]["at"])[0]["switches"] == []
    [shown] = told("show", result["id"])
    assert shown["switch"]["seconds"] == result["seconds"]
    assert [step["index"] for step in shown["switch"]["steps"]] == list(range(1, result["count"] + 1))
    assert told("status", "geforce")[0]["gpus"][0]["switch"]["result"] == "done"


async def test_what_was_moved_at_boot_is_in_the_history_as_that(start: Start, told: Json) -> None:
    await start("plain", config=f'{CONFIG}at_boot = "vfio"\n')
    [shown] = told("status", "geforce")
    assert [(gpu["state"], gpu["at_boot"]) for gpu in shown["gpus"]] == [("vfio", "vfio")]
    [past] = told("history")
    [entry] = past["switches"]
    assert (entry["target"], entry["result"], entry["requester"]["at_boot"]) == ("vfio", "done", True)


async def test_a_switch_that_is_not_followed_is_begun_and_seen_under_way(start: Start, told: Json) -> None:
    await start("laptop", f"unbind@{SOUND}=hang", config=CONFIG)
    [begun] = told("to-vfio", "geforce", "--no-wait")
    assert begun["event"] == "begun"
    [gpu] = told("status", "geforce")[0]["gpus"]
    assert (gpu["switch"]["id"], gpu["switch"]["result"], gpu["switch"]["finished"]) == (begun["id"], None, None)
    late = told("to-vfio", "geforce", "--timeout", "2")
    assert (late.status, late[-1]["error"]["kind"], late[-1]["changed"]) == (6, "timeout", None)
    still = told("wait", "geforce", "--timeout", "0.05")
    assert (still.status, still[-1]["error"]["kind"]) == (6, "timeout")


async def test_a_step_that_fails_is_told_in_the_result(start: Start, told: Json) -> None:
    await start("laptop", f"probe@{SOUND}#1=EINVAL", config=CONFIG)
    failed = told("to-vfio", "geforce")
    [result] = failed.events("result")
    assert (failed.status, result["result"], result["changed"]) == (1, "reverted", False)
    assert {each["status"] for each in failed.events("step")} >= {"failed", "reverting", "reverted"}
    [shown] = told("show", result["id"])
    assert {step["status"] for step in shown["switch"]["steps"]} >= {"done", "failed", "reverted"}


async def test_a_kernel_that_does_not_return_is_told_so(start: Start, told: Json) -> None:
    await start("laptop", f"probe@{SOUND}=hang", config=CONFIG.replace("unbind = 600", "probe = 0.5"))
    wedged = told("to-vfio", "geforce")
    assert (wedged.status, wedged[-1]["result"], wedged[-1]["changed"]) == (7, "wedged", True)
    assert told("status", "geforce")[0]["gpus"][0]["state"] == "wedged"
    refused = told("to-host", "geforce")
    assert (refused.status, refused[-1]["error"]["kind"]) == (7, "wedged")
    assert told("wait", "geforce").status == 7
    assert told("recover", "geforce")[-1]["error"]["kind"] == "wedged"


async def test_a_refusal_has_all_that_is_in_the_way(start: Start, told: Json) -> None:
    await start("shared", config=CONFIG)
    for arguments in (("to-vfio", DISCRETE), ("plan", DISCRETE, "vfio"), ("to-vfio", DISCRETE, "--dry-run")):
        refused = told(*arguments)
        [error] = refused
        assert (refused.status, error["event"], error["gpu"], error["changed"]) == (3, "error", DISCRETE, False)
        assert (error["error"]["kind"], error["error"]["exit_status"]) == ("not_viable", 3)
        assert {blocker["error_kind"] for blocker in error["blockers"]} == {"not_viable"}
        assert all(blocker["text"] in error["error"]["text"] for blocker in error["blockers"])


async def test_of_several_each_has_its_lines(start: Start, told: Json) -> None:
    await start("laptop", config=CONFIG)
    both = told("to-vfio", "geforce", INTEGRATED)
    assert both.status == 3
    assert [each["gpu"] for each in both.events("error")] == [INTEGRATED]
    assert [(each["gpu"], each["result"]) for each in both.events("result")] == [(DISCRETE, "done")]


async def test_what_waits_for_people_says_for_whom_and_can_be_cancelled(
    start: Start, told: Json, environ: dict[str, str]
) -> None:
    await start("single", config=CONFIG)
    with going_on(environ, "to-vfio", "--wait=600") as (process, coming):
        assert until("waiting", coming)[-1]["for"] != ""
        cancelled = told("cancel")
        *_, last = coming
    assert (cancelled.status, cancelled[-1]["result"], cancelled[-1]["changed"]) == (0, "cancelled", True)
    assert (last["result"], last["changed"], process.returncode) == ("cancelled", False, 1)
    too_late = told("cancel")
    assert (too_late.status, too_late[-1]["error"]["kind"]) == (1, "failed")


async def test_an_interrupt_is_told_after_what_was_seen(start: Start, environ: dict[str, str]) -> None:
    await start("laptop", f"unbind@{SOUND}=hang", config=CONFIG)
    with going_on(environ, "to-vfio", "geforce") as (process, coming):
        while next(coming).get("kind") != "unbind":
            """It is at the steps before."""
        process.send_signal(signal.SIGINT)
        *_, last = coming
    assert (process.returncode, last["error"]["kind"], last["changed"]) == (130, "interrupted", None)


async def test_whoever_watches_sees_all_that_happens(start: Start, told: Json, environ: dict[str, str]) -> None:
    service = await start("single", config=CONFIG)
    with going_on(environ, "watch") as (process, coming):
        seen = until("state", coming)
        told("to-vfio", "--no-wait", "--wait=600")
        seen += until("waiting", coming)
        told("cancel")
        seen += until("finished", coming)
        service.process.kill()
        seen += until("service", coming)
        process.kill()
    assert {each["event"] for each in seen} == {"state", "step", "waiting", "finished", "service"}


async def test_whoever_waited_is_told_the_state(start: Start, told: Json) -> None:
    await start("laptop", config=CONFIG)
    rested = told("wait")
    assert (rested.status, [each["gpu"] for each in rested]) == (0, [INTEGRATED, DISCRETE])
    [there] = told("wait", "geforce", "--for", "host")
    assert (there["event"], there["now"]["state"]) == ("state", "host")


WRONG = {
    "a GPU that there is not": (["status", "radeon"], "no_such_gpu"),
    "no such switch": (["show", "zz"], "invalid_argument"),
    "no such option": (["list", "--nonsense"], "invalid_argument"),
    "a number that is none": (["history", "--limit=x"], "invalid_argument"),
    "a time that is none": (["history", "--since=x"], "invalid_argument"),
    "no time at all": (["history", "--since=1h", "--until=2h"], "invalid_argument"),
    "a target that is none": (["plan", "geforce", "moon"], "invalid_argument"),
    "nothing to cancel": (["cancel", "geforce"], "failed"),
}


@pytest.mark.parametrize("case", WRONG)
async def test_what_cannot_be_done_is_one_error(case: str, start: Start, told: Json) -> None:
    await start("laptop", config=CONFIG)
    arguments, kind = WRONG[case]
    said = told(*arguments)
    [error] = said
    assert (error["event"], error["error"]["kind"], error["error"]["exit_status"]) == ("error", kind, said.status)
    assert error["changed"] is (False if said.status == 2 else None)


MACHINE = ["--name", "win11", "--uuid", "5b0f6c9a-1c43-4d8c-9d4e-1d2f3a4b5c6d"]
WITH = {
    "show": ["x"],
    "plan": ["host"],
    "setup": ["--dry-run"],
    "acquire": [*MACHINE, DISCRETE],
    "adopt": [*MACHINE, DISCRETE],
    "release": MACHINE,
}
"""What verbs cannot do without."""


async def test_hooks_of_others_hear_what_is_ready(start: Start, told: Json) -> None:
    await start("laptop", config=CONFIG)
    [acquired] = told("acquire", *MACHINE, DISCRETE, SOUND)
    assert (acquired["gpus"], acquired["changed"]) == ([DISCRETE], True)
    assert told("adopt", *MACHINE, DISCRETE)[0]["changed"] is True
    assert told("release", *MACHINE)[0]["changed"] is True
    [nothing] = told("acquire", *MACHINE, INTEGRATED)
    assert (nothing["gpus"], nothing["changed"]) == ([], False)


@pytest.mark.parametrize("verb", sorted(SCHEMAS.keys() - WITHOUT_VERB - {"report", WITHOUT_SERVICE}))
def test_a_service_that_is_not_there_is_an_error_of_every_verb(verb: str, told: Json) -> None:
    """But of a report, which does without (tests/real_bus/test_report.py)."""
    said = told(verb, *WITH.get(verb, []))
    assert (said.status, [each["error"]["kind"] for each in said]) == (5, ["unreachable"])


def test_what_somebody_else_moved_is_in_the_history_too() -> None:
    times = {"started": 1_700_000_000.0, "finished": 1_700_000_000.0}
    entry = {"id": "5f0c3a1b", "gpu": DISCRETE, "target": "vfio", "count": 0, **times, "result": "drifted"}
    entry |= {"reason": "found on vfio-pci", "options": {}, "asker": {"somebody_else": True}}
    check("common.schema.json#/$defs/finished_switch", entry_record(entry))


def test_every_verb_has_a_schema_and_a_row_in_the_page() -> None:
    [verbs] = [each.choices for each in arguments_of(parser()) if each.dest == "verb"]
    assert isinstance(verbs, dict)
    assert SCHEMAS.keys() - WITHOUT_VERB == verbs.keys() - FOR_PEOPLE
    rows = re.findall(r"^\| .* \| \[.*\.schema\.json\) \|$", (DOCS / "json.md").read_text(), re.MULTILINE)
    linked = re.findall(r"\(json/([\w-]+)\.schema\.json\)", "\n".join(rows))
    assert sorted(set(linked)) == sorted(SCHEMAS.keys() - {"common"})


@pytest.mark.parametrize("arguments", [["--json", "--version"], ["--version", "--json"]], ids=" ".join)
def test_the_version_is_one_object(arguments: list[str], environ: dict[str, str]) -> None:
    ended = subprocess.run([BIN / "gpuswitchctl", *arguments], env=environ, capture_output=True, text=True, check=False)
    [printed] = objects(ended.stdout)
    check("version", printed)
    assert (ended.returncode, printed["release"]) == (0, __version__)


@pytest.mark.parametrize("verb", ["help", "demo", "plan --help", "--help"])
def test_what_is_text_for_people_is_an_error(verb: str, environ: dict[str, str]) -> None:
    command = [str(BIN / "gpuswitchctl"), *verb.split(), "--json"]
    ended = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    [error] = objects(ended.stdout)
    check("common.schema.json#/$defs/error", error)
    assert (ended.returncode, error["error"]["kind"]) == (2, "invalid_argument")
    assert "text for people; leave --json out" in error["error"]["text"]


def test_the_example_of_an_error_is_one() -> None:
    [example] = re.findall(r"^```json\n(.*?)^```", (DOCS / "json.md").read_text(), re.MULTILINE | re.DOTALL)
    check("list", json.loads(example))


@pytest.mark.parametrize("at", [[], ["gpus", 0], ["gpus", 0, "functions", 0]], ids=str)
async def test_a_key_that_no_schema_describes_is_a_fault(at: list[Any], start: Start, told: Json) -> None:
    await start("laptop", config=CONFIG)
    [listed] = told("list")
    place: Any = listed
    for step in at:
        place = place[step]
    place["surprise"] = 1
    with pytest.raises(ValidationError):
        check("list", listed)


@pytest.mark.parametrize("schema", SCHEMAS)
def test_the_schemas_are_such_and_allow_nothing_else(schema: str) -> None:
    Draft202012Validator.check_schema(SCHEMAS[schema])
    for form in forms(SCHEMAS[schema]):
        if form.get("type") == "object":
            assert form["additionalProperties"] is False


def forms(schema: object) -> Iterator[dict[str, Any]]:
    if isinstance(schema, dict):
        yield schema
        for value in schema.values():
            yield from forms(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from forms(value)
