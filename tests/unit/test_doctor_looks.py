"""How the doctor looks: each look by a process of its own, which may be late, fail, or never return."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

from gpuswitch.doctor.looks import libvirt, system, tools, units
from gpuswitch.doctor.machine import Files, Machine
from gpuswitch.doctor.seen import System
from gpuswitch.sentence import Sentence
from tests.harness.made_machine import MadeMachine

PROGRAM = """
import os, signal, subprocess, sys
from gpuswitch.doctor.gathering import LookError, gathered
from gpuswitch.sentence import Sentence

def hang():
    sleeping = subprocess.Popen(["sleep", "600"])
    print(sleeping.pid, file=open(sys.argv[1], "w"), flush=True)
    signal.pause()

def fail():
    raise ValueError("not a number")

def die():
    os._exit(1)

looks = {"a": lambda: Sentence("{x} is", x="{1}"), "hang": hang, "fail": fail, "die": die,
         "much": lambda: "x" * 1_000_000}
found = gathered(looks, 2.0)
print(type(found["a"]).__name__, found["a"], found["a"].data)
print(found["hang"], found["fail"], found["die"], len(found["much"]), sep="; ")
print(all(isinstance(found[name], LookError) for name in ("hang", "fail", "die")))
try:
    print(os.waitpid(-1, os.WNOHANG))
except ChildProcessError:
    print("none is left")
"""
INTERRUPTED = """
import os, signal, subprocess, sys
from gpuswitch.doctor.gathering import gathered

def interrupt():
    sleeping = subprocess.Popen(["sleep", "600"])
    print(sleeping.pid, file=open(sys.argv[1], "w"), flush=True)
    os.kill(os.getppid(), signal.SIGINT)
    signal.pause()

gathered({"interrupt": interrupt}, 600.0)
"""


def gone(process: int) -> bool:
    """Whether a process that was killed ends; that it is reaped is a matter of whoever reaps orphans."""
    try:
        descriptor = os.pidfd_open(process)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], 30)[0])
    finally:
        os.close(descriptor)


def test_a_look_that_hangs_or_fails_costs_that_look_alone(tmp_path: Path) -> None:
    """In a process of its own, which forks, and has no thread but its first. Nothing that a look began is left."""
    begun = tmp_path / "begun"
    ended = subprocess.run([sys.executable, "-c", PROGRAM, begun], stdout=subprocess.PIPE, text=True, check=True)
    assert ended.stdout.splitlines() == [
        "Sentence {1} is {'x': '{1}'}",
        "late; ValueError: not a number; it ended without a word; 1000000",
        "True",
        "none is left",
    ]
    assert gone(int(begun.read_text()))


def test_whoever_interrupts_it_leaves_no_look_behind(tmp_path: Path) -> None:
    """As ^C does, which the looks do not get by themselves: they are in groups of their own."""
    begun = tmp_path / "begun"
    ended = subprocess.run([sys.executable, "-c", INTERRUPTED, begun], stderr=subprocess.PIPE, text=True, check=False)
    assert ended.stderr.splitlines()[-1] == "KeyboardInterrupt"
    assert gone(int(begun.read_text()))


@pytest.fixture
def made(tmp_path: Path) -> MadeMachine:
    return MadeMachine(tmp_path)


def seen(made: MadeMachine) -> System:
    return system.look(Files(made.machine))


@pytest.mark.parametrize(
    ("name", "like", "family"),
    [
        ("debian", "", "debian"),
        ("ubuntu", "debian", "ubuntu"),
        ("linuxmint", "ubuntu debian", "ubuntu"),
        ("rocky", "rhel centos fedora", "fedora"),
        ("opensuse-leap", "suse opensuse", "suse"),
        ("cachyos", "arch", "arch"),
        ("slackware", "", ""),
    ],
)
def test_a_distribution_is_known_by_its_own_name_or_by_whom_it_is_like(
    made: MadeMachine, name: str, like: str, family: str
) -> None:
    made.distribution(name, like)
    assert seen(made).family == family


def test_secure_boot_is_the_last_byte(made: MadeMachine) -> None:
    assert seen(made).secure_boot is False  # no EFI at all
    variable = "sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"
    made.write(variable, "\x06\0\0\0\x01")
    assert seen(made).secure_boot is True
    made.write(variable, "\x06\0\0\0\0")
    assert seen(made).secure_boot is False
    made.remove(variable)
    assert seen(made).secure_boot is None


def test_a_quoted_option_is_one(made: MadeMachine) -> None:
    made.command_line('dyndbg="file a +p" intel_iommu=off intel_iommu=on')
    found = seen(made)
    assert (found.option("dyndbg"), found.option("intel_iommu"), found.option("quiet")) == ("file a +p", "on", None)
    made.command_line('dyndbg="file a')
    assert seen(made).option("dyndbg") == '"file'


def test_of_two_files_of_one_name_modprobe_reads_the_first(made: MadeMachine) -> None:
    made.write("etc/modprobe.d/a.conf", "options x \\\n  y=1 # why\nalias a b\n")
    made.write("usr/lib/modprobe.d/a.conf", "blacklist x\n")
    made.write("usr/lib/modprobe.d/b.conf", "blacklist z\n")
    found = tools.look(Files(made.machine)).modprobe
    assert [(line.file, line.words) for line in found] == [
        ("/etc/modprobe.d/a.conf", ("options", "x", "y=1")),
        ("/usr/lib/modprobe.d/b.conf", ("blacklist", "z")),
    ]


def test_a_program_that_does_not_answer_is_said(made: MadeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpuswitch.doctor.machine.COMMAND_SECONDS", 0.2)
    made.program("systemctl", "exec sleep 600")
    files = Files(made.machine)
    assert units.look(files) is None
    assert [(each.what, str(each.why)) for each in files.unseen] == [("systemctl", "it does not answer")]


def test_without_a_program_nothing_is_said(made: MadeMachine) -> None:
    files = Files(made.machine)
    assert units.look(files) is None
    assert files.unseen == []


def test_what_only_root_may_read_is_said(made: MadeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what the kernel answers; who runs this may be root."""

    def refuse(path: str, *_: object, **__: object) -> int:
        raise PermissionError(13, "Permission denied", path)

    files = Files(made.machine)
    monkeypatch.setattr("gpuswitch.doctor.machine.os.open", refuse)
    assert files.text("/etc/os-release") == files.text("/etc/os-release") == ""
    assert [(each.what, each.for_root) for each in files.unseen] == [("/etc/os-release", True)]


def test_the_version_of_libvirt_is_in_the_name_of_its_library(made: MadeMachine) -> None:
    made.remove("usr/lib/x86_64-linux-gnu/libvirt.so.0.9000.0")
    assert libvirt.look(Files(made.machine)).version is None
    made.write("usr/lib64/libvirt.so.0.12008.0", "")
    made.write("usr/lib64/libvirt.so.0", "")
    assert libvirt.look(Files(made.machine)).version == (12, 8, 0)


def test_the_hook_is_ours_as_it_is_installed(made: MadeMachine) -> None:
    """What it wants is found in the hook that is shipped."""
    shipped = Path(__file__).parents[2] / "contrib/libvirt/qemu.d/50-gpuswitch"
    made.hook("etc/libvirt/hooks/qemu.d/50-gpuswitch", shipped.read_text().replace("@hook@", "/usr/lib/hook.py"))
    found = libvirt.look(Files(made.machine))
    assert found.own is not None
    assert (found.own.wants, found.own.wanted_there) == ("/usr/lib/hook.py", True)
    assert tools.look(Files(made.machine)).moving == ()


def test_this_machine_is_looked_at_by_default() -> None:
    files = Files(Machine())
    assert files.there("/proc/self/status")
    assert str(Sentence.of(system.look(files).kernel))
