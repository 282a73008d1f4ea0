"""The harness keeps its promises: pristine containers, independent of each other, of which nothing is left."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from subprocess import DEVNULL

import pytest

from tests.harness.containers.container import Container
from tests.harness.containers.system import System
from tests.harness.debian.cache import KEPT, Cache
from tests.harness.debian.errors import HarnessError
from tests.harness.debian.tools import PROJECT
from tests.harness.machines.errors import CommandFailedError, CommandTimeoutError, MachineGoneError
from tests.harness.machines.inside import words
from tests.harness.machines.reports import MACHINES, show_machines
from tests.real_system.conftest import Boot

PLACE = "gpuswitch-container-"
BUILDER = """\
import sys
from pathlib import Path
from tests.harness.debian.cache import Cache

cache = Cache(Path(sys.argv[1]), print)
with cache.lock():
    cache.make("kind", sys.argv[2], lambda folder: None)
"""
"""Another run of the tests, which is over when this returns."""
FOREVER = """\
import signal, sys
from pathlib import Path
# who starts the tests in the background has them ignore it
signal.signal(signal.SIGINT, signal.default_int_handler)
from tests.harness.containers.container import Container
container = Container([Path(layer) for layer in sys.argv[1:]])
container.sh("sleep infinity </dev/null >/dev/null 2>&1 & mount -t tmpfs none /mnt")
print(container.keeper.pid, flush=True)
signal.pause()
"""


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def name_of(keeper: int) -> str:
    """The name of its folder and of its control group."""
    [outer] = children(keeper)
    [init] = children(outer)
    [line] = [line for line in Path(f"/proc/{init}/cgroup").read_text().splitlines() if line.startswith("0::")]
    return next(part for part in line.split("/") if part.startswith(PLACE))


def traces(name: str) -> list[str]:
    """What there is of a container out here: processes, mounts, control groups, files."""
    places = [Path(tempfile.gettempdir()) / name]
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    groups = [fields[4] for fields in map(str.split, mounts) if fields[fields.index("-") + 1] == "cgroup2"]
    processes = []
    for each in Path("/proc").glob("[0-9]*/cgroup"):
        try:
            processes += [str(each)] if name in each.read_text() else []
        except OSError:  # it ended meanwhile
            continue
    return [
        *processes,
        *(line for line in mounts if name in line),
        *(str(found) for group in groups for found in Path(group).rglob(name)),
        *(str(place) for place in places if place.exists()),
    ]


def await_end(pid: int) -> None:
    pidfd = os.pidfd_open(pid)
    try:
        select.select([pidfd], [], [])
    finally:
        os.close(pidfd)


# A system of its own


def test_a_container_is_a_running_debian_with_nothing_failed(machine: Container) -> None:
    assert machine.sh("systemctl is-system-running").stdout == "running\n"
    assert machine.sh("systemctl list-units --failed --plain --no-legend").stdout == ""
    assert machine.sh("systemd-detect-virt --container").stdout == "container-other\n"
    assert machine.sh("ps -o comm= 1").stdout == "systemd\n"
    for name, path in (("login1", "/org/freedesktop/login1"), ("PolicyKit1", "/org/freedesktop/PolicyKit1/Authority")):
        machine.sh(f"busctl call org.freedesktop.{name} {path} org.freedesktop.DBus.Peer Ping")


def test_the_service_is_installed_and_runs(machine: Container) -> None:
    assert machine.sh("systemctl is-enabled gpuswitchd; systemctl is-active gpuswitchd").stdout == "enabled\nactive\n"
    assert machine.sh("busctl --list --no-pager | grep -c org.gpuswitch1").stdout == "1\n"


def test_two_containers_are_independent(boot: Boot, system: System) -> None:
    one, other = boot(system.installed), boot(system.installed)
    one.push("only here", "/etc/note")
    one.sh("rm /usr/local/sbin/gpuswitchd; systemctl stop gpuswitchd")
    assert other.sh("ls /etc/note", check=False).status != 0
    assert other.sh("systemctl is-active gpuswitchd; ls /usr/local/sbin/gpuswitchd").status == 0
    assert not any((layer / "etc/note").exists() for layer in system.installed)
    assert (system.project / "usr/local/sbin/gpuswitchd").is_symlink()
    assert len({each.sh("cat /etc/machine-id").stdout for each in (one, other)}) == 2


@pytest.mark.parametrize(
    "command",
    [
        *("echo 0 >/proc/sys/kernel/randomize_va_space", "date -s 2001-01-01", "touch /sys/there", "dmesg -C"),
        'python3 -c \'import ctypes; l = ctypes.CDLL(None, use_errno=True); exit(l.syscall(175, b"", 0, b"") != 0)\'',
    ],
    ids=["sysctl", "clock", "sysfs", "kernel log", "module"],
)
def test_a_container_leaves_the_kernel_as_it_is(machine: Container, command: str) -> None:
    assert machine.sh(command, check=False).status != 0


def test_a_machine_is_not_up_while_a_service_crashes_over_and_over(boot: Boot, system: System) -> None:
    unit = "[Unit]\nStartLimitIntervalSec=0\n[Service]\nType=oneshot\nExecStart=/bin/false\nRestart=on-failure\n"
    wanted = "[Unit]\nWants=crashing.service\n"
    units = "/run/systemd/system"
    with pytest.raises(Exception, match=r"units have failed while the machine came up: crashing\.service"):
        boot(system.installed, {f"{units}/crashing.service": unit, f"{units}/multi-user.target.d/x.conf": wanted})


# Commands


def test_commands_give_status_and_both_outputs(machine: Container) -> None:
    result = machine.sh("cat; echo careful >&2; exit 3", stdin="as given\n", check=False)
    assert (result.status, result.stdout, result.stderr) == (3, "as given\n", "careful\n")
    assert machine.sh("kill -TERM $$", check=False).status == 128 + 15


def test_a_failing_command_is_an_error_that_tells_all(machine: Container) -> None:
    machine.sh("echo the console says so >/dev/console")
    with pytest.raises(CommandFailedError, match="ended with status 1: echo out") as caught:
        machine.sh("echo out; echo err >&2; false")
    assert (caught.value.result.stdout, caught.value.result.stderr) == ("out\n", "err\n")
    assert "the console says so" in caught.value.console


def test_a_command_that_runs_out_of_time_is_killed_with_all_it_started(machine: Container) -> None:
    with pytest.raises(CommandTimeoutError) as caught:
        machine.sh("echo begun; sleep 1000 & sleep 1001", timeout=2)
    assert caught.value.result.stdout == "begun\n"
    assert machine.sh("pgrep -x sleep", check=False).stdout == ""


def test_what_a_command_leaves_in_the_background_runs_on(machine: Container) -> None:
    machine.sh("setsid sleep 1000 & echo $! >/run/left.pid")
    machine.sh("until grep -qx sleep /proc/$(cat /run/left.pid)/comm; do :; done")


def test_commands_run_side_by_side(machine: Container) -> None:
    first = machine.start("mkfifo /run/gate; cat /run/gate")
    assert not first.ended()
    # both ends of a fifo open together: neither command could end alone
    machine.sh("until test -p /run/gate; do :; done; echo through >/run/gate")
    assert first.wait().stdout == "through\n"


def test_words_are_done_without_a_command(machine: Container) -> None:
    machine.push(b"\xff\0one\n", "/run/folder/file", mode=0o750)
    machine.do(words.link, "file", "/run/folder/link")
    assert machine.sh("stat -c %a /run/folder/file; od -An -tx1 /run/folder/file").stdout == "750\n ff 00 6f 6e 65 0a\n"
    paths = [f"/run/folder{name}" for name in ("", "/file", "/link", "/nothing")]
    assert machine.do(words.look, paths) == ["file\nlink", "\ufffd\0one\n", "file", None]
    assert machine.do(words.find, ["/run/folder/f*"]) == {"/run/folder/file": "\ufffd\0one\n"}
    with pytest.raises(CommandFailedError, match=r"read\('/run/nothing',\)[^0]*FileNotFoundError"):
        machine.read("/run/nothing")


def test_words_wait_for_what_happens_meanwhile(machine: Container) -> None:
    pid = int(machine.sh("sleep 1000 >/dev/null 2>&1 & echo $!").stdout)
    machine.do(words.await_program, "sleep")
    machine.do(words.await_process_state, pid, "S")
    stopped = machine.start(f"kill -STOP {pid}")
    machine.do(words.await_process_state, pid, "T")
    ended = machine.start(f"kill -KILL {pid}")
    machine.do(words.await_end, pid)
    assert machine.sh(f"test -e /proc/{pid}", check=False).status == 1
    written = machine.start("mkfifo /run/gate; echo one >>/run/text; echo two >>/run/text; rm /run/gate")
    assert machine.do(words.await_text, "/run/text", "^two$") == "one\ntwo\n"
    machine.do(words.await_gone, "/run/gate")
    for job in (stopped, ended, written):
        job.wait()


# The end


def test_nothing_is_left_of_a_container(boot: Boot, system: System) -> None:
    machine = boot(system.installed)
    machine.sh("sleep infinity </dev/null >/dev/null 2>&1 & mount -t tmpfs none /mnt")
    name = name_of(machine.keeper.pid)
    assert len(traces(name)) > 2
    machine.kill()
    assert traces(name) == []
    assert machine.keeper.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_when_whoever_wanted_it_dies(system: System, number: signal.Signals) -> None:
    program = [sys.executable, "-c", FOREVER, *map(str, system.installed)]
    with subprocess.Popen(program, cwd=PROJECT, stdout=subprocess.PIPE, text=True, stderr=DEVNULL) as process:
        assert process.stdout is not None
        keeper = int(process.stdout.readline())
        name = name_of(keeper)
        # as a terminal would: whoever has the process in front
        process.send_signal(number)
        await_end(keeper)
    assert traces(name) == []


def test_a_container_can_switch_itself_off(machine: Container) -> None:
    name = name_of(machine.keeper.pid)
    machine.start("systemctl poweroff")
    machine.wait_off()
    assert traces(name) == []
    with pytest.raises(MachineGoneError, match="the container has ended"):
        machine.sh("true")


def test_one_that_does_not_boot_says_why(tmp_path: Path) -> None:
    with pytest.raises(MachineGoneError) as caught:
        Container([tmp_path])
    assert "cannot go on: the container has ended" in str(caught.value)
    assert "proc" in str(caught.value)


# What is kept, and what is reported


def test_the_cache_keeps_what_is_whole_what_is_in_use_and_what_was_used_last(tmp_path: Path) -> None:
    cache = Cache(tmp_path, lambda _line: None)
    (tmp_path / "kind" / "unfinished").mkdir(parents=True)

    def build(folder: Path) -> None:
        assert list(folder.iterdir()) == []
        (folder / "file").write_text("whole")

    def fail(folder: Path) -> None:
        (folder / "file").write_text("half")
        raise HarnessError("cannot go on")

    with cache.lock():
        first = cache.make("kind", "1", build)
        assert (first / "file").read_text() == "whole"
        with pytest.raises(HarnessError):
            cache.make("kind", "2", fail)
        assert cache.find("kind", "2") is None
    for key in ("3", "4", "5"):
        subprocess.run([sys.executable, "-c", BUILDER, tmp_path, key], check=True)
    assert sorted(entry.name for entry in (tmp_path / "kind").iterdir()) == ["1", "4", "5"]
    assert KEPT == 2
    assert cache.find("kind", "3") is None
    assert cache.find("kind", "1") == first


def test_a_failed_test_shows_the_journal(machine: Container, request: pytest.FixtureRequest) -> None:
    assert request.node.stash[MACHINES] == [machine]

    def fail() -> None:
        raise AssertionError

    call = pytest.CallInfo.from_call(fail, "call")
    report = pytest.TestReport.from_item_and_call(request.node, call)
    show_machines(request.node, call, report)
    sections = dict(report.sections)
    assert "Started gpuswitchd.service" in sections["journal of machine 1"]
    assert "Multi-User System" in sections["console of machine 1"]


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ({"RELEASE": "woody"}, "cannot make a system of the release 'woody': it is one of bookworm, trixie, forky"),
        ({"BUS": "kdbus"}, "cannot make a system with the bus 'kdbus': it is one of dbus-daemon, dbus-broker"),
    ],
)
def test_a_choice_that_there_is_not_is_one_sentence(choice: dict[str, str], said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/real_system"],
        check=False,
        cwd=PROJECT,
        env={**os.environ, **choice},
        capture_output=True,
        text=True,
    )
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert (done.stdout + done.stderr).split("\n")[0] == f"ERROR: {said}"
