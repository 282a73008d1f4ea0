"""Holders in words, and who of them goes how."""

from __future__ import annotations

from dataclasses import replace
from typing import TypedDict, Unpack

import pytest

from gpuswitch.model.desktop import DISPLAY_MANAGERS
from gpuswitch.model.holders import Holder, Process, Unit
from gpuswitch.switch.holder_policy import (
    Leaving,
    in_the_way,
    is_logind,
    never_ended,
    remedy,
    sentences,
    stoppable_unit,
)
from tests.harness.facts import at

GPU = at("0000:01:00.0")
SDDM, OLLAMA = Unit("sddm.service"), Unit("ollama.service")


class Who(TypedDict, total=False):
    uid: int
    user: str
    unit: Unit | None
    session: str
    nodes: tuple[str, ...]
    doubt: str
    machine: bool


def holder(command: str = "blender", pid: int = 1234, **who: Unpack[Who]) -> Holder:
    alice = Holder(Process(pid, 5), command, 1000, "alice", nodes=("/dev/dri/card0",))
    return replace(alice, **who)


PIPEWIRE = holder("wireplumber", unit=Unit("wireplumber.service", 1000), nodes=("/dev/snd/controlC1",))
KWIN = holder("kwin_wayland", unit=Unit("session-2.scope"), session="2")
PLASMA = holder("plasmashell", unit=Unit("plasma-plasmashell.service", 1000))
LOGIND = holder("systemd-logind", uid=0, user="root", unit=Unit("systemd-logind.service"))
DAEMON = holder("ollama", uid=0, user="root", unit=OLLAMA)
UDEVS = holder("switcheroo-control-check-discrete-amdgpu", uid=0, user="root", unit=Unit("systemd-udevd.service"))
KERNEL = Holder(None, "nvidia", doubt="module nvidia has 1 user that no process explains")


@pytest.mark.parametrize(
    ("leaving", "taken"),
    [
        (Leaving(), ()),
        (Leaving((OLLAMA,)), ("ollama",)),
        (Leaving((Unit("ollama.service", 1000),)), ()),
        (Leaving(sound=True), ("wireplumber",)),
        # a buffer that a program of the session shares is a reference of the kernel's
        # who has no session of his own lives as long as one: services of users, and logind for them
        (Leaving(sessions=("2",)), ("wireplumber", "kwin_wayland", "plasmashell", "systemd-logind", "nvidia")),
        (Leaving(sessions=("3",)), ("wireplumber", "plasmashell", "systemd-logind", "nvidia")),
        # whoever draws for a person goes with the display manager; so does what logind has open for him
        *(
            (Leaving((Unit(name),)), ("wireplumber", "kwin_wayland", "plasmashell", "systemd-logind", "nvidia"))
            for name in DISPLAY_MANAGERS
        ),
        (
            Leaving((Unit("display-manager.service"),), sound=True),
            ("wireplumber", "kwin_wayland", "plasmashell", "systemd-logind", "nvidia"),
        ),
        # as a service of the system, it is no display manager
        (Leaving((Unit("nvidia-persistenced.service"),)), ()),
    ],
)
def test_who_goes_with_what_the_switch_does_anyway(leaving: Leaving, taken: tuple[str, ...]) -> None:
    all_of_them = (PIPEWIRE, KWIN, PLASMA, LOGIND, DAEMON, KERNEL, holder())
    assert tuple(h.command for h in all_of_them if leaving.takes(h)) == taken


def test_what_udev_runs_goes_by_itself() -> None:
    assert Leaving().takes(UDEVS)
    assert not Leaving().takes(holder(UDEVS.command))


def test_an_announced_sound_card_frees_no_display() -> None:
    both = replace(PIPEWIRE, nodes=("/dev/snd/controlC1", "/dev/dri/card0"))
    assert not Leaving(sound=True).takes(both)
    assert not Leaving(sound=True).takes(replace(PIPEWIRE, nodes=(), doubt="its descriptors cannot be read"))


MACHINE = "it is a virtual machine: shut it down (libvirt: virsh list, then virsh shutdown NAME)"
END_SESSION = "loginctl list-sessions, then loginctl terminate-session ID"


@pytest.mark.parametrize(
    ("who", "why"),
    [
        (KERNEL, "nobody can end the kernel's own use of it"),
        (
            holder("systemd", 1),
            (
                "it is the init process, which cannot be ended, and keeps them for logind: end the session that draws "
                f"on it: {END_SESSION}"
            ),
        ),
        (holder("qemu-system-x86"), MACHINE),
        (holder("kvm"), MACHINE),
        (holder(".qemu-system-x8"), MACHINE),
        (holder("cloud-hypervisor", machine=True), MACHINE),
        (holder("VirtualBoxVM", unit=Unit("session-2.scope"), machine=True), MACHINE),
        # a container that was registered as a machine
        (holder("Xwayland", unit=Unit("machine-lab.scope")), ""),
        (LOGIND, f"it has them for a session: end the one that draws on it: {END_SESSION}"),
        (UDEVS, "udev runs it to see what that is: try again in a moment"),
        (holder("dbus-daemon", unit=Unit("dbus.service")), "the system lives by it, and it is not to be ended"),
        (replace(holder("vault"), nodes=(), doubt="unreadable"), "nobody can tell whether it has it open"),
        (holder("python3", unit=Unit("gpuswitchd.service")), "the system lives by it, and it is not to be ended"),
        (DAEMON, ""),
        (KWIN, ""),
        (holder(), ""),
        (holder("my-qemu-helper"), ""),
    ],
)
def test_who_is_never_ended(who: Holder, why: str) -> None:
    assert never_ended(who) == why


@pytest.mark.parametrize("unit", [Unit("init.scope"), None])
def test_nobody_is_told_to_kill_the_init_process(unit: Unit | None) -> None:
    """Its descriptors cannot be read by a service in a container, or without the right to."""
    init = replace(holder("systemd", 1), unit=unit, nodes=(), doubt="its descriptors cannot be read")
    assert remedy([init]) == (
        "it is the init process, which cannot be ended; have the service see what it has open: run gpuswitchd as its "
        "unit does, as root, with CAP_SYS_PTRACE and outside of any container"
    )
    assert "kill" not in remedy([replace(init, nodes=("/dev/dri/card0",), doubt="")])


def test_nobody_is_told_to_end_what_the_system_lives_by() -> None:
    """Also where nobody can tell whether it has the GPU open."""
    bus = replace(holder("dbus-daemon", unit=Unit("dbus.service")), nodes=(), doubt="its descriptors cannot be read")
    assert remedy([bus]) == "the system lives by it, and it is not to be ended"


def test_logind_is_known_by_its_unit() -> None:
    assert is_logind(LOGIND)
    assert not is_logind(holder("systemd-logind"))


@pytest.mark.parametrize(
    ("unit", "stoppable"),
    [
        (OLLAMA, OLLAMA),
        (Unit("wireplumber.service", 1000), Unit("wireplumber.service", 1000)),
        (None, None),
        (Unit("session-2.scope"), None),
        (Unit("docker-0123.scope"), None),
        (Unit("user@1000.service"), None),
        (Unit("init.scope", 1000), None),
        (Unit("systemd-logind.service"), None),
        (Unit("libvirtd.service"), None),
    ],
)
def test_which_unit_is_stopped_to_end_somebody(unit: Unit | None, stoppable: Unit | None) -> None:
    assert stoppable_unit(holder(unit=unit)) == stoppable


@pytest.mark.parametrize(
    ("who", "sentence"),
    [
        (holder(), "blender (pid 1234, user alice) has /dev/dri/card0 open; close it, or: kill 1234"),
        (holder(user=""), "blender (pid 1234) has /dev/dri/card0 open; close it, or: kill 1234"),
        (DAEMON, "ollama (pid 1234, ollama.service) has /dev/dri/card0 open; stop it: systemctl stop ollama.service"),
        (
            PIPEWIRE,
            (
                "wireplumber (pid 1234, wireplumber.service of alice) has /dev/snd/controlC1 open; "
                "stop it: systemctl --user --machine=alice@ stop wireplumber.service"
            ),
        ),
        (KWIN, "kwin_wayland (pid 1234, session 2 of alice) has /dev/dri/card0 open; close it, or: kill 1234"),
        (
            holder("qemu-system-x86", nodes=("/dev/vfio/13",)),
            f"qemu-system-x86 (pid 1234, user alice) has /dev/vfio/13 open; {MACHINE}",
        ),
        (
            holder(nodes=tuple(f"/dev/dri/card{n}" for n in range(5))),
            (
                "blender (pid 1234, user alice) has /dev/dri/card0, /dev/dri/card1, /dev/dri/card2 and 2 more open; "
                "close it, or: kill 1234"
            ),
        ),
        (
            holder(nodes=(), doubt="its descriptors cannot be read"),
            (
                "blender (pid 1234, user alice) may have 0000:01:00.0 open: its descriptors cannot be read; "
                "close it, or: kill 1234"
            ),
        ),
        (KERNEL, "0000:01:00.0 is in use by the kernel: module nvidia has 1 user that no process explains"),
    ],
)
def test_a_holder_in_a_sentence(who: Holder, sentence: str) -> None:
    assert list(sentences(GPU, [who])) == [sentence]


def test_processes_of_one_program_are_told_together() -> None:
    workers = [holder("chrome", pid, nodes=(f"/dev/dri/renderD{128 + pid % 2}",)) for pid in (7, 8, 9)]
    assert list(sentences(GPU, workers)) == [
        "chrome (pids 7, 8, 9, user alice) has /dev/dri/renderD129, /dev/dri/renderD128 open; close it, or: kill 7 8 9"
    ]


def test_but_not_those_of_different_people_or_units() -> None:
    bob = holder(pid=8, uid=1001, user="bob")
    assert len(list(sentences(GPU, [holder(), bob, holder(pid=9, unit=OLLAMA)]))) == 3


def test_a_program_and_the_kernels_use_of_a_module_of_that_name_are_two() -> None:
    told = list(sentences(GPU, [KERNEL, holder("nvidia", user="")]))
    assert len(told) == 2


def test_all_of_them_a_line_each() -> None:
    assert in_the_way(GPU, [holder(), DAEMON]).splitlines() == list(sentences(GPU, [holder(), DAEMON]))
    assert in_the_way(GPU, []) == ""
