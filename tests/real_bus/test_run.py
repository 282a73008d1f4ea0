"""`gpuswitchctl run`: the real command and processes, against the real service on a simulated host."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness.service.peers import PeerError
from tests.harness.service.services import ANY_PORT, ROOT, Service
from tests.harness.service.terminal import Terminal
from tests.real_bus.conftest import CTL, Ctl, Start

CARD = "0000:01:00.0"
DISCRETE = f"{ROOT}/gpu/0000_01_00_0"
FUNCTIONS = [f"0000:01:00.{n}" for n in range(4)]
CONFIG = f'{ANY_PORT}[[gpu]]\naddress = "{CARD}"\nname = "rtx"\n'
UUID = "5b0f6c9a-1c43-4d8c-9d4e-1d2f3a4b5c6d"
SAYS_WHAT_IT_HAS = 'echo "$@"; echo $GPUSWITCH_ADDRESSES'

Begin = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def begin(environ: dict[str, str]) -> Iterator[Begin]:
    """Start gpuswitchctl run with this command, which is to say a line when it runs."""
    begun: list[subprocess.Popen[str]] = []

    def begin(*command: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [CTL, "run", "--", *command],
            env=environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        begun.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "it runs\n"
        return process

    yield begin
    for process in begun:
        process.kill()
        process.wait()
        for stream in filter(None, (process.stdin, process.stdout, process.stderr)):
            stream.close()


async def owner(service: Service) -> str:
    return str((await service.properties(DISCRETE))["Owner"][0])


async def state(service: Service) -> str:
    return str((await service.properties(DISCRETE))["State"])


async def test_the_command_has_it_and_it_is_home_when_that_has_ended(start: Start, ctl: Ctl) -> None:
    service = await start("laptop", config=CONFIG)
    ran = ctl("run", "--gpu", "rtx", "--", "sh", "-c", f"{SAYS_WHAT_IT_HAS}; exit 7", "sh", "-d", "host={}", "{1}")
    assert (ran.returncode, ran.stderr) == (7, "")
    repeated = " ".join(f"-d host={function}" for function in FUNCTIONS)
    assert ran.stdout == f"{repeated} {FUNCTIONS[1]}\n{' '.join(FUNCTIONS)}\n"
    assert (await state(service), await owner(service)) == ("host", "")
    away, home = reversed(json.loads(ctl("history", "--json").stdout)["switches"])
    assert (away["target"], away["requester"]["command"]) == ("vfio", "gpuswitchctl")
    assert away["requester"]["vm"].startswith("sh (pid ")
    assert (home["target"], home["requester"]["service"]) == ("host", True)


@pytest.mark.parametrize(("rule", "place"), [("", "on the host"), ('on_release = "stay"\n', "on vfio-pci")])
async def test_whoever_sits_there_sees_it_come_home(
    rule: str, place: str, start: Start, environ: dict[str, str]
) -> None:
    await start("laptop", config=CONFIG + rule)
    with Terminal([CTL, "run", "--yes", "--", "echo", "it runs"], environ) as terminal:
        terminal.until("it runs")
        terminal.until(f"gpuswitchctl: rtx ({CARD}) is {place} now")
        assert terminal.ended() == 0


async def test_that_it_goes_back_is_told_on_a_terminal(start: Start, environ: dict[str, str]) -> None:
    await start("plain", f"probe@{CARD}#1=EINVAL", config=CONFIG)
    with Terminal([CTL, "run", "--yes", "--", "echo", "it runs"], environ) as terminal:
        terminal.until(f"bind {CARD} to vfio-pci: failed (")
        terminal.until(f"gpuswitchctl: rtx ({CARD}): the way back:")
        terminal.until(f"bind {CARD} to vfio-pci: reverted (")
        assert terminal.ended() != 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGABRT])
async def test_it_ends_as_the_command_did(number: signal.Signals, start: Start, ctl: Ctl) -> None:
    service = await start("laptop", config=CONFIG)
    assert ctl("run", "--", "sh", "-c", f"kill -{number.value} $$").returncode == -number
    assert await state(service) == "host"


async def test_signals_are_passed_on(start: Start, begin: Begin) -> None:
    service = await start("laptop", config=CONFIG)
    process = begin("sh", "-c", "trap 'echo heard; exit 5' TERM; echo it runs; while :; do sleep 0.05; done")
    assert (await state(service), (await owner(service)).partition(" ")[0]) == ("vfio", "sh")
    process.terminate()
    said, told = process.communicate()
    assert (process.returncode, said, told) == (5, "heard\n", "")
    assert await state(service) == "host"


async def test_gpuswitchctl_is_killed_and_the_command_goes_on(start: Start, begin: Begin) -> None:
    service = await start("laptop", config=CONFIG)
    process = begin("sh", "-c", "echo it runs; read line")
    process.kill()
    process.wait()
    assert (await state(service), (await owner(service)).partition(" ")[0]) == ("vfio", "sh")
    assert process.stdin is not None
    process.stdin.close()
    await service.until_state(DISCRETE, "host")
    assert process.stdout is not None
    assert process.stdout.read() == ""


async def test_both_are_killed_at_once(start: Start, begin: Begin) -> None:
    service = await start("laptop", config=CONFIG)
    process = begin("sh", "-c", "echo it runs; read line")
    os.killpg(process.pid, signal.SIGKILL)
    await service.until_state(DISCRETE, "host")


async def test_the_service_is_killed_meanwhile(start: Start, begin: Begin) -> None:
    first = await start("laptop", config=CONFIG)
    process = begin("sh", "-c", "echo it runs; read line")
    first.process.kill()
    await first.process.wait()
    _said, told = process.communicate("\n")
    assert process.returncode == 0
    assert "the service brings home what it had as soon as it can" in told


async def test_one_gpu_has_one_owner(start: Start, begin: Begin, ctl: Ctl) -> None:
    service = await start("laptop", config=CONFIG)
    process = begin("sh", "-c", "echo it runs; read line")
    has_it = await owner(service)
    second = ctl("run", "--", "true")
    assert second.returncode == 3
    assert (
        second.stderr
        == f"gpuswitchctl: cannot run a command with rtx ({CARD}): {CARD} belongs to process {has_it}: end that first\n"
    )
    taken = ctl("to-host")
    assert taken.returncode == 3
    assert f"belongs to process {has_it}, with whose end it comes home: end that first: kill " in taken.stderr
    process.communicate("\n")
    assert await state(service) == "host"


REFUSED = {
    "no such command": (["--", "no-such-command"], 127, "cannot run no-such-command: No such file or directory"),
    "no program": (["--", "/etc/passwd"], 126, "cannot run /etc/passwd: Permission denied"),
    "no such GPU": (["--gpu", "radeon", "--", "true"], 2, "no GPU is named 'radeon'"),
    "a name twice": (["--gpu", "rtx", "--gpu", "01:00.1", "--", "true"], 2, "rtx (0000:01:00.0) is named twice"),
    "no such function": (["--", "echo", "{9}"], 2, "'{9}' names function 9, and there are 4"),
    "no command": ([], 2, "run needs -- and a command after it"),
    "a name that is none": (["--name", "x" * 300, "--", "true"], 2, "is not the name of a process"),
    "no unit": (["--stop-unit", "x y", "--", "true"], 2, "'x y' is not the name of a unit"),
    "a unit that stays": (["--stop-unit", "dbus", "--", "true"], 2, "--stop-unit: dbus.service must stay"),
    "JSON": (["--json", "--", "true"], 2, "run prints what its command prints: leave --json out"),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_what_cannot_be_done_changes_nothing(case: str, start: Start, ctl: Ctl) -> None:
    service = await start("laptop", config=CONFIG)
    arguments, status, words = REFUSED[case]
    refused = ctl("run", *arguments)
    assert (refused.returncode, words in refused.stderr) == (status, True), refused.stderr
    assert "Traceback" not in refused.stderr
    assert (await state(service), await owner(service)) == ("host", "")
    assert json.loads(ctl("history", "--json").stdout)["switches"] == []


async def test_what_is_in_the_way_keeps_the_command_from_running(start: Start, ctl: Ctl, tmp_path: Path) -> None:
    await start("shared", config=ANY_PORT)
    refused = ctl("run", "--gpu", "01:00.0", "--", "touch", str(tmp_path / "ran"))
    assert refused.returncode == 3
    assert "0000:02:00.0" in refused.stderr
    assert not (tmp_path / "ran").exists()


async def test_a_name_is_one_line_of_what_can_be_read(start: Start, ctl: Ctl) -> None:
    await start("laptop", config=CONFIG)
    assert ctl("run", "--name", "qemu\nto bring it home, run: x\x1b[2J", "--", "true").returncode == 0
    [_home, away] = json.loads(ctl("history", "--json").stdout)["switches"]
    assert away["requester"]["vm"].startswith("qemu?to bring it home, run: x?[2J (pid ")


@pytest.mark.parametrize(("pid", "started"), [(0, 0), (-1, 5), (1 << 40, 7), (1, 4711)])
async def test_a_process_that_there_is_not(pid: int, started: int, start: Start) -> None:
    service = await start("laptop", config=CONFIG)
    with pytest.raises(PeerError, match=rf"InvalidArgument.*there is no process {pid} that was started at {started}"):
        await service.ask("AcquireForProcess", "xxsasa{sv}", pid, started, "qemu", [CARD], {})
    assert await state(service) == "host"


async def test_hooks_of_others(start: Start, ctl: Ctl) -> None:
    service = await start("laptop", config=CONFIG)
    machine = ["--name", "win11", "--uuid", UUID]
    got = ctl("acquire", *machine, "01:00.0", "01:00.1", "02:00.0")
    assert (got.returncode, got.stdout, got.stderr) == (0, f"{CARD} is ready for win11\n", "")
    assert (await state(service), await owner(service)) == ("vfio", "win11")
    assert ctl("adopt", *machine, "01:00.0").returncode == 0
    assert ctl("release", *machine, "--reason", "destroyed").returncode == 0
    await service.until_state(DISCRETE, "host")
    none = ctl("acquire", *machine, "02:00.0")
    assert (none.returncode, none.stdout) == (0, "none of these belongs to a managed GPU: nothing to do\n")
    wrong = ctl("acquire", "--name", "win11", "--uuid", "win11", "01:00.0")
    assert (wrong.returncode, "'win11' is not the UUID of a virtual machine" in wrong.stderr) == (2, True)


async def test_an_interrupt_before_it_runs_takes_all_back(start: Start, environ: dict[str, str]) -> None:
    service = await start("laptop", "unbind=1s", config=CONFIG)
    command = (CTL, "run", "--gpu", "rtx", "--", "echo", "it runs")
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, env=environ, stdout=pipe, stderr=pipe)
    await service.until_state(DISCRETE, "detaching")
    process.send_signal(signal.SIGINT)
    said, told = await process.communicate()
    assert (process.returncode, said) == (130, b"")
    assert b"nothing is run, and what was begun is taken back: gpuswitchctl status rtx shows it" in told
    await service.until_state(DISCRETE, "host")


async def test_a_word_that_is_not_utf_8_is_the_name_of_nothing(start: Start, ctl: Ctl) -> None:
    await start("laptop", config=CONFIG)
    word = "caf\udce9"
    for arguments in (["status", word], ["to-vfio", word], ["show", word], ["run", "--name", word, "--", "true"]):
        refused = ctl(*arguments)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert "'caf\\xe9' is not UTF-8, and so the name of nothing here" in refused.stderr
        assert "Traceback" not in refused.stderr


LITTLE = "65536"
SIZE = "it may lock 64 KiB of memory, and vfio locks all that a virtual machine has"
GIVE_ALL = "for this shell: sudo prlimit --pid $$ --memlock=unlimited; for good: the line '"
IN_FILE = " - memlock unlimited' in /etc/security/limits.d/50-vfio.conf, and log in anew"


def may_lock(size: str, *arguments: str, environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run `gpuswitchctl run` as one who may lock so much memory: also root, who may lock all of it."""
    without = ["setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock", "--"] if not os.geteuid() else []
    command = ["prlimit", f"--memlock={size}", *without, CTL, "run", *arguments]
    return subprocess.run(command, env=environ, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)


async def test_who_could_lock_no_memory_is_told_before_anything_moves(start: Start, environ: dict[str, str]) -> None:
    service = await start("laptop", config=CONFIG)
    refused = may_lock(LITTLE, "--user", "--", "echo", "it runs", environ=environ)
    assert (refused.returncode, refused.stdout) == (3, "")
    assert refused.stderr.startswith(f"gpuswitchctl: cannot run this as you: {SIZE}")
    assert GIVE_ALL in refused.stderr
    assert refused.stderr.endswith(f"{IN_FILE}; or, to run it all the same, add --yes\n")
    assert (await state(service), (await service.properties(DISCRETE))["Switch"]) == ("host", {})


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--user", "--yes"], f"gpuswitchctl: {SIZE}"),
        ([], f"gpuswitchctl: unless the command becomes root, {SIZE}"),
    ],
)
async def test_a_command_runs_with_the_limits_that_it_has(
    arguments: list[str], told: str, start: Start, environ: dict[str, str]
) -> None:
    service = await start("laptop", config=CONFIG)
    ran = may_lock(LITTLE, *arguments, "--", "sh", "-c", "ulimit -l", environ=environ)
    assert (ran.returncode, ran.stdout, ran.stderr.startswith(told)) == (0, "64\n", True), ran.stderr
    assert await state(service) == "host"


@pytest.mark.parametrize("access", [("s", "yes"), ("u", 1)])
async def test_access_is_a_yes_or_a_no(access: tuple[str, object], start: Start) -> None:
    service = await start("laptop", config=CONFIG)
    with pytest.raises(PeerError, match=r"InvalidArgument.*access must be true or false, not"):
        await service.ask("AcquireForProcess", "xxsasa{sv}", os.getpid(), 1, "qemu", [CARD], {"access": access})
