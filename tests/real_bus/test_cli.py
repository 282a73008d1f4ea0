"""gpuswitchctl as people run it: a process of its own, against the real daemon with a simulated host."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness.buses.private import BusProgram, PrivateBus
from tests.harness.buses.private import running as running_bus
from tests.harness.service.services import running
from tests.real_bus.conftest import CTL, Ctl, Start

INTEGRATED, DISCRETE, SOUND = "0000:00:02.0", "0000:01:00.0", "0000:01:00.1"
CALLED = f"geforce ({DISCRETE})"
"""In sentences."""
UNBIND_SOUND = f"unbind {SOUND} from snd_hda_intel"

CONFIG = f"""
[metrics]
enabled = false
[deadlines]
unbind = 600
probe = 30
[[gpu]]
address = "{DISCRETE}"
name = "geforce"
"""


def field(ctl: Ctl, name: str, gpu: str = DISCRETE) -> Any:
    """One field of `status --json`."""
    [record] = json.loads(ctl("status", gpu, "--json").stdout)["gpus"]
    return record[name]


def steps(output: str, status: str) -> list[str]:
    """The titles of the steps that ended so."""
    return re.findall(rf"^\[ *\d+/\d+\] (.*): {status} \(.* m?s\)$", output, flags=re.MULTILINE)


async def test_list_shows_every_gpu(start: Start, ctl: Ctl) -> None:
    await start("laptop", config=CONFIG)
    heading, *rows = ctl("list").stdout.splitlines()
    assert heading.split()[:6] == ["GPU", "NAME", "STATE", "OWNER", "MANAGED", "DRIVER"]
    assert [row.split()[:6] for row in rows] == [
        [INTEGRATED, "-", "host-i915", "-", "no", "i915"],
        [DISCRETE, "geforce", "host-nvidia", "-", "yes", "nvidia"],
    ]
    told = json.loads(ctl("list", "--json").stdout)
    assert [gpu["address"] for gpu in told["gpus"]] == [INTEGRATED, DISCRETE]
    assert [(gpu["state"], gpu["state_label"]) for gpu in told["gpus"]] == [
        ("host", "host-i915"),
        ("host", "host-nvidia"),
    ]


async def test_a_gpu_is_found_by_every_spelling(start: Start, ctl: Ctl) -> None:
    await start("laptop", config=CONFIG)
    for spelling in (DISCRETE, "01:00.0", "pci_0000_01_00_0", "geforce", "GeForce"):
        assert field(ctl, "address", spelling) == DISCRETE
    assert "state: host-nvidia since" in ctl("status", "geforce").stdout


async def test_a_gpu_that_cannot_be_told_is_refused_with_the_candidates(start: Start, ctl: Ctl) -> None:
    await start("laptop")
    for arguments in (("to-vfio",), ("cancel",), ("status", "radeon"), ("plan", "host")):
        refused = ctl(*arguments)
        assert refused.returncode == 2
        assert refused.stderr.startswith("gpuswitchctl: cannot ")
        assert INTEGRATED in refused.stderr
        assert DISCRETE in refused.stderr
        assert refused.stdout == ""
    assert ctl("status", "01:00").returncode == 2


async def test_the_only_one_of_the_configuration_need_not_be_named_either(start: Start, ctl: Ctl) -> None:
    await start("laptop", config=CONFIG)
    assert ctl("to-vfio").returncode == 0
    assert field(ctl, "state") == "vfio"


async def test_the_only_gpu_need_not_be_named(start: Start, ctl: Ctl) -> None:
    rules = 'allow_boot_display = true\nstop_units = ["display-manager.service"]\n'
    await start("single", config=f"{CONFIG}[defaults]\n{rules}")
    assert ctl("status").returncode == 0
    assert ctl("to-vfio").returncode == 0


async def test_to_vfio_and_back_tells_each_step_once(start: Start, ctl: Ctl) -> None:
    await start("laptop", config=CONFIG)
    [planned] = json.loads(ctl("plan", "geforce", "vfio", "--json").stdout)["plans"]
    there = ctl("to-vfio", "geforce")
    assert (there.returncode, there.stderr) == (0, "")
    assert steps(there.stdout, "done") == [step["title"] for step in planned["steps"]]
    done, stopped = there.stdout.splitlines()[-2:]
    assert re.fullmatch(rf"{re.escape(CALLED)} is on vfio-pci now, after .* m?s", done)
    assert stopped == "  stopped until it is home: nvidia-persistenced.service"
    assert "stopped units: nvidia-persistenced.service, until it is home" in ctl("status", "geforce").stdout
    assert {each["driver"] for each in field(ctl, "functions")} == {"vfio-pci"}
    again = ctl("to-vfio", "geforce")
    assert (again.returncode, again.stdout) == (0, f"{CALLED} is on vfio-pci already\n")
    back = ctl("to-host", "geforce")
    assert (back.returncode, back.stdout.splitlines()[-1]) == (0, "  started again: nvidia-persistenced.service")
    assert field(ctl, "state") == "host"


async def test_a_switch_as_json_is_one_object_a_line(start: Start, ctl: Ctl) -> None:
    await start("laptop", config=CONFIG)
    *events, result = map(json.loads, ctl("to-vfio", "geforce", "--json").stdout.splitlines())
    changes = [each for each in events if each["event"] == "step"]
    count = changes[0]["count"]
    assert [(each["index"], each["status"]) for each in changes] == [
        (index, status) for index in range(1, count + 1) for status in ("running", "done")
    ]
    # A look for programs may take longer than a moment.
    assert {each["event"] for each in events} <= {"step", "waiting"}
    assert (result["event"], result["result"], result["changed"]) == ("result", "done", True)
    assert {each["id"] for each in [*events, result]} == {field(ctl, "switch")["id"]}
    assert {(each["gpu"], each["version"]) for each in [*events, result]} == {(DISCRETE, 1)}


async def test_no_wait_prints_the_id(start: Start, ctl: Ctl) -> None:
    await start("laptop", f"unbind@{SOUND}=hang", config=CONFIG)
    begun = ctl("to-vfio", "geforce", "--no-wait")
    assert begun.returncode == 0
    assert begun.stdout.strip() == field(ctl, "switch")["id"]
    joined = json.loads(ctl("to-vfio", "geforce", "--no-wait", "--json").stdout)
    assert joined.pop("at").endswith("Z")
    named = {"gpu": DISCRETE, "name": "geforce"}
    assert [joined.pop(each) is not None for each in ("joined", "started", "requester")] == [True, True, True]
    assert joined == {"version": 1, "event": "begun", "id": begun.stdout.strip(), **named, "target": "vfio"}


async def test_a_plan_changes_nothing(start: Start, ctl: Ctl) -> None:
    await start("laptop", config=CONFIG)
    plan = ctl("plan", "geforce", "vfio")
    assert UNBIND_SOUND in plan.stdout
    assert ctl("to-vfio", "geforce", "--dry-run").stdout == plan.stdout
    assert (field(ctl, "state"), field(ctl, "switch")) == ("host", None)


async def test_a_refusal_names_every_blocker(start: Start, ctl: Ctl) -> None:
    await start("shared", config=CONFIG)
    for arguments in (("to-vfio", DISCRETE), ("plan", DISCRETE, "vfio")):
        refused = ctl(*arguments)
        assert (refused.returncode, refused.stdout) == (3, "")
        assert "0000:02:00.0" in refused.stderr
    assert field(ctl, "state") == "host"


async def test_a_step_that_fails_is_reverted_before_the_users_eyes(start: Start, ctl: Ctl) -> None:
    await start("laptop", f"probe@{SOUND}#1=EINVAL", config=CONFIG)
    failed = ctl("to-vfio", "geforce")
    assert failed.returncode == 1
    assert steps(failed.stdout, "failed") == [f"bind {SOUND} to vfio-pci"]
    assert UNBIND_SOUND in steps(failed.stdout, "reverted")
    assert failed.stderr.startswith(f"gpuswitchctl: cannot move {CALLED} to vfio (reverted): ")
    assert field(ctl, "state") == "host"


async def test_a_kernel_that_does_not_return_ends_with_7(start: Start, ctl: Ctl) -> None:
    await start("laptop", f"probe@{SOUND}=hang", config=CONFIG.replace("probe = 30", "probe = 0.5"))
    wedged = ctl("to-vfio", "geforce")
    assert wedged.returncode == 7
    assert wedged.stderr.startswith(f"gpuswitchctl: cannot move {CALLED} to vfio (wedged): ")
    assert field(ctl, "state") == "wedged"
    assert ctl("to-host", "geforce").returncode == 7


async def test_a_switch_goes_on_when_the_time_is_up(start: Start, ctl: Ctl) -> None:
    await start("laptop", f"unbind@{SOUND}=hang", config=CONFIG)
    late = ctl("to-vfio", "geforce", "--timeout", "2")
    assert late.returncode == 6
    assert "has not finished within 2 s, and goes on" in late.stderr
    assert field(ctl, "state") == "detaching"


JOINED = (
    rf"joined switch [0-9a-f]{{8}} of {re.escape(CALLED)} to vfio, which runs since \d\d:\d\d:\d\d; "
    r"asked for by gpuswitchctl \(pid \d+\) of \S+( in \S+)?\n"
)


async def test_who_joins_a_switch_is_told_whose_it_is(start: Start, ctl: Ctl) -> None:
    await start("laptop", f"unbind@{SOUND}=hang", config=CONFIG)
    begun = json.loads(ctl("to-vfio", "geforce", "--no-wait", "--json").stdout)
    joined = json.loads(ctl("to-vfio", "geforce", "--no-wait", "--json").stdout)
    assert (begun["joined"], joined["joined"], joined["requester"]) == (False, True, begun["requester"])
    assert begun["requester"]["command"] == "gpuswitchctl"
    plain = ctl("to-vfio", "geforce", "--no-wait")
    assert plain.stdout == f"{begun['id']}\n"
    assert re.fullmatch(f"gpuswitchctl: {JOINED}", plain.stderr)
    followed = ctl("to-vfio", "geforce", "--timeout", "2")
    assert re.match(JOINED, followed.stdout)


async def test_a_switch_is_waited_for_and_looked_for_by_its_id(start: Start, ctl: Ctl) -> None:
    await start("laptop", f"unbind@{SOUND}=hang", config=CONFIG)
    switch = ctl("to-vfio", "geforce", "--no-wait").stdout.strip()
    shown = ctl("show", switch[:5])
    assert shown.returncode == 2
    assert shown.stderr.endswith(
        f": switch {switch} of {CALLED} is under way: gpuswitchctl status geforce shows how far it is, "
        f"gpuswitchctl wait {switch} waits for its end\n"
    )
    late = ctl("wait", switch, "--timeout", "2")
    assert late.stderr == f"gpuswitchctl: the time is over: not at rest within 2 s: {CALLED} is detaching\n"
    assert ctl("wait", "ffffffff").returncode == 2


def follow(environ: dict[str, str]) -> subprocess.Popen[str]:
    """Start to follow a switch that stands at the sound function; it is past the steps before."""
    command = [CTL, "to-vfio", "geforce", "--json"]
    following = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert following.stdout is not None
    for line in following.stdout:
        if json.loads(line).get("kind") == "unbind":
            return following
    raise AssertionError(following.communicate())


async def test_an_interrupt_ends_the_watching_and_not_the_switch(
    start: Start, ctl: Ctl, environ: dict[str, str]
) -> None:
    await start("laptop", f"unbind@{SOUND}=hang", config=CONFIG)
    with follow(environ) as following:
        following.send_signal(signal.SIGINT)
        _, err = following.communicate()
    assert following.returncode == 130
    assert "gpuswitchctl: interrupted; the switch, once begun, goes on: gpuswitchctl status geforce " in err
    assert field(ctl, "state") == "detaching"


async def test_a_service_that_dies_while_it_is_followed_is_told(start: Start, environ: dict[str, str]) -> None:
    service = await start("laptop", f"unbind@{SOUND}=hang", config=CONFIG)
    with follow(environ) as following:
        service.process.kill()
        _, err = following.communicate()
    assert following.returncode == 5
    assert "the service went away before it answered" in err
    assert re.search(
        r"\n  what it had begun is brought to a known-good state as soon as it runs again: gpuswitchctl status geforce "
        r"starts it and shows where the GPU is, gpuswitchctl show [0-9a-f]{8} each step\n$",
        err,
    )


async def test_a_bus_that_dies_while_a_switch_is_followed_is_told(
    start: Start, environ: dict[str, str], private_bus: PrivateBus
) -> None:
    await start("laptop", f"unbind@{SOUND}=hang", config=CONFIG)
    with follow(environ) as following:
        private_bus.stop()
        _, err = following.communicate()
    assert following.returncode == 5
    assert "the connection to the bus is lost" in err


async def test_whoever_does_not_read_on_gets_no_traceback(start: Start, environ: dict[str, str]) -> None:
    await start("laptop", f"unbind@{SOUND}=1s", config=CONFIG)
    with follow(environ) as following:
        assert following.stdout is not None
        assert following.stderr is not None
        following.stdout.close()
        assert following.stderr.read() == ""
    assert following.returncode == -signal.SIGPIPE


def test_a_service_that_is_not_there_is_one_sentence(ctl: Ctl, private_bus: PrivateBus) -> None:
    absent = ctl("list")
    assert absent.returncode == 5
    assert absent.stderr == (
        "gpuswitchctl: cannot list the GPUs: the gpuswitch service is not on the bus at "
        f"{private_bus.address}; start it there: gpuswitchd --bus {private_bus.address}, with the other options that "
        "it had, such as --simulate\n"
    )


def test_of_a_bus_that_is_not_there_it_is_said_what_to_do(ctl: Ctl, tmp_path: Path) -> None:
    (tmp_path / "left").touch()
    for name, lacking in (("none", "there is no socket"), ("left", "nobody listens at")):
        absent = ctl("status", "--bus", f"unix:path={tmp_path}/{name}")
        assert absent.returncode == 5
        assert absent.stderr == (
            f"gpuswitchctl: cannot connect to the bus at unix:path={tmp_path}/{name}: {lacking} {tmp_path}/{name}\n"
            "  start a bus there; or, for the system bus, leave --bus out and unset GPUSWITCH_BUS\n"
        )
    for nonsense in ("nonsense", "unix:", "tcp:host=localhost,port=1", ";"):
        refused = ctl("status", "--bus", nonsense)
        assert refused.returncode == 2
        assert f"cannot use the bus address '{nonsense}'" in refused.stderr


@pytest.fixture
def guarded_bus(bus_program: BusProgram, tmp_path: Path) -> Iterator[str]:
    """A bus whose policy lets everybody look and nobody switch, as the system's does for most."""
    rule = '<deny send_interface="org.gpuswitch1.Gpu" send_member="ToVfio"/>'
    with running_bus(bus_program, tmp_path / "guarded", rules=rule) as bus:
        yield bus.address


async def test_who_may_not_switch_is_told_so(ctl: Ctl, guarded_bus: str, tmp_path: Path) -> None:
    async with running(guarded_bus, tmp_path / "service", "laptop"):
        assert ctl("status", DISCRETE, "--bus", guarded_bus).returncode == 0
        denied = ctl("to-vfio", DISCRETE, "--bus", guarded_bus)
    assert denied.returncode == 4
    assert denied.stderr.startswith(f"gpuswitchctl: cannot move {DISCRETE} to vfio: ")
    assert len(denied.stderr.splitlines()) == 1


async def test_groups_say_which_gpu_stands_alone(start: Start, ctl: Ctl) -> None:
    await start("shared", config=CONFIG)
    shown = ctl("groups").stdout
    assert re.search(rf"^IOMMU group \d+: GPU {DISCRETE}, shared with 0000:02:00.0$", shown, flags=re.MULTILINE)
    assert re.search(
        rf"^  {DISCRETE}  display \[0300\] +\[10de:2484\]  nvidia +GPU  NVIDIA ", shown, flags=re.MULTILINE
    )
    records = json.loads(ctl("groups", "--json").stdout)["groups"]
    assert [each["alone"] for each in records if each["gpus"] == [DISCRETE]] == [False]


async def test_an_nvswitch_shares_the_group_and_is_told_as_what_is_in_the_way(start: Start, ctl: Ctl) -> None:
    await start("hgx", config="[metrics]\nenabled = false\n")
    assert "IOMMU group 50: GPU 0000:2a:00.0, shared with 0000:2b:00.0\n" in ctl("groups").stdout
    planned = ctl("plan", "2a:00.0", "vfio")
    assert (planned.returncode, "the NVSwitch 0000:2b:00.0 (NVIDIA " in planned.stderr) == (3, True)
    assert ctl("plan", "3a:00.0", "vfio").returncode == 0


async def test_an_accelerator_goes_and_comes_back_as_a_gpu_does(start: Start, ctl: Ctl) -> None:
    await start("instinct", config=CONFIG.replace(DISCRETE, "0000:05:00.0").replace("geforce", "mi300x"))
    assert ctl("to-vfio", "mi300x").returncode == 0
    assert field(ctl, "functions", "mi300x") == [
        {"address": "0000:05:00.0", "kind": "accelerator", "driver": "vfio-pci"}
    ]
    assert ctl("to-host", "mi300x").returncode == 0
    assert field(ctl, "driver", "mi300x") == "amdgpu"


@pytest.mark.parametrize(
    ("scenario", "address", "word"),
    [("rmrr", DISCRETE, "GPU, reserved region"), ("hgx", "0000:2b:00.0", "NVSwitch")],
)
async def test_groups_and_list_say_what_is_special_in_a_word(
    scenario: str, address: str, word: str, start: Start, ctl: Ctl
) -> None:
    await start(scenario, config="[metrics]\nenabled = false\n")
    [line] = [line for line in ctl("groups").stdout.splitlines() if line.startswith(f"  {address} ")]
    assert f"  {word}  " in line
    assert ("reserved region" in ctl("list").stdout) == (scenario == "rmrr")


async def test_memory_that_the_firmware_claims_is_told_before_anything_is_touched(start: Start, ctl: Ctl) -> None:
    await start("rmrr", config=CONFIG)
    moved = ctl("to-vfio", DISCRETE)
    assert (moved.returncode, moved.stdout) == (3, "")
    assert "IOMMU group 13 has memory that the firmware claims for itself (0xbdf6e000-0xbdf6efff, RMRR)" in moved.stderr


async def test_config_shows_what_is_in_force_and_who_set_it(start: Start, ctl: Ctl, tmp_path: Path) -> None:
    await start("laptop", config=CONFIG)
    rows = [row.split() for row in ctl("config").stdout.splitlines()]
    assert ["deadlines.unbind", "600.0", f"{tmp_path}/service/etc/config.toml"] in rows
    assert ["deadlines.power", "10.0", "default"] in rows


async def test_configuration_that_fits_no_gpu_is_told_where_people_look(start: Start, ctl: Ctl, tmp_path: Path) -> None:
    service = await start("laptop", config=CONFIG.replace(DISCRETE, "0000:02:00.0"))
    words = "the [[gpu]] table of geforce (0000:02:00.0) is about no GPU: that is the storage controller"
    for arguments in (["list"], ["config"], ["status", "geforce"], ["status", "02:00.0"]):
        assert words in ctl(*arguments).stderr
    for verb in ("list", "config"):
        [told] = json.loads(ctl(verb, "--json").stdout)["warnings"]
        assert told.startswith(words)
    (tmp_path / "service/etc/config.toml").write_text(CONFIG.replace(DISCRETE, SOUND))
    await service.ask("Reload")
    shown = ctl("list")
    assert (shown.stderr, field(ctl, "managed", "geforce")) == ("", True)


async def test_on_a_terminal_the_step_at_work_is_redrawn_in_place(start: Start, environ: dict[str, str]) -> None:
    await start("laptop", f"unbind@{SOUND}=hang", config=CONFIG)
    status, shown = on_terminal(environ, "to-vfio", "geforce", interrupt_at=f"{UNBIND_SOUND}  running")
    assert status == 130
    assert "\x1b[2K" in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h")


async def test_on_a_terminal_the_steps_that_ended_stay(start: Start, environ: dict[str, str]) -> None:
    await start("laptop", config=CONFIG)
    status, shown = on_terminal(environ, "to-vfio", "geforce")
    assert status == 0
    assert re.search(rf"\] {UNBIND_SOUND}  done  [\d.]+ m?s\r\n", words(shown))
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h")
    assert f"{CALLED} is on vfio-pci now" in words(shown)


async def test_on_a_terminal_a_table_has_colours_and_the_same_words(
    start: Start, ctl: Ctl, environ: dict[str, str]
) -> None:
    await start("laptop", config=CONFIG)
    ctl("to-vfio", "geforce")
    status, shown = on_terminal(environ, "list")
    assert status == 0
    assert "\x1b[35mvfio" in shown
    rows = [line.split() for line in words(shown).splitlines()]
    assert rows == [line.split() for line in ctl("list").stdout.splitlines()]


def on_terminal(environ: dict[str, str], *arguments: str, interrupt_at: str = "") -> tuple[int, str]:
    """Run gpuswitchctl on a terminal of its own: its exit status, and all that it wrote there.

    It is interrupted when these words are on the terminal.
    """
    ours, theirs = pty.openpty()
    shown = b""
    with subprocess.Popen([CTL, *arguments], env=environ, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        while data := read_terminal(ours):
            shown += data
            if interrupt_at and interrupt_at in words(shown.decode(errors="ignore")):
                process.send_signal(signal.SIGINT)
                interrupt_at = ""
        os.close(ours)
    return process.returncode, shown.decode()


def words(shown: str) -> str:
    """What a terminal shows, without what colours it and moves on it."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)


def read_terminal(descriptor: int) -> bytes:
    """What comes next; nothing once the other side is closed, which Linux tells as an error (EIO)."""
    try:
        return os.read(descriptor, 4096)
    except OSError:
        return b""
