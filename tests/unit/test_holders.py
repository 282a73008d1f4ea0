"""Where a process belongs, by the text of /proc/PID/cgroup."""

from __future__ import annotations

import pytest

from gpuswitch.model.holders import Unit, unit_and_session

HYBRID = "12:devices:/user.slice\n1:name=systemd:/user.slice/user-1000.slice/session-7.scope\n0::/user.slice\n"
LEGACY = "9:cpu,cpuacct:/\n1:name=systemd:/system.slice/gdm.service\n"
CONTAINED = "9:name=systemd:/\n4:memory:/lent\n0::/system.slice/gdm.service\n"
DOCKER = "docker-0123456789ab.scope"
QEMU = r"machine-qemu\x2d1\x2ddebian.scope"
APP = "user.slice/user-1000.slice/user@1000.service"


@pytest.mark.parametrize(
    ("cgroup", "unit", "session"),
    [
        ("0::/system.slice/gdm.service\n", Unit("gdm.service"), ""),
        ("0::/system.slice/system-getty.slice/getty@tty1.service\n", Unit("getty@tty1.service"), ""),
        ("0::/user.slice/user-1000.slice/session-3.scope\n", Unit("session-3.scope"), "3"),
        ("0::/user.slice/user-42.slice/session-c1.scope\n", Unit("session-c1.scope"), "c1"),
        (f"0::/{APP}/session.slice/pipewire.service\n", Unit("pipewire.service", 1000), ""),
        (f"0::/{APP}/app.slice/app-gnome-firefox.slice/app-7.scope\n", Unit("app-7.scope", 1000), ""),
        (f"0::/{APP}/init.scope\n", Unit("init.scope", 1000), ""),
        (f"0::/{APP}\n", Unit("user@1000.service"), ""),
        ("0::/init.scope\n", Unit("init.scope"), ""),
        (f"0::/system.slice/{DOCKER}\n", Unit(DOCKER), ""),
        (f"0::/machine.slice/{QEMU}/libvirt/emulator\n", Unit(QEMU), ""),
        ("0::/machine.slice/machine-deb.scope/payload/system.slice/gdm.service\n", Unit("machine-deb.scope"), ""),
        ("0::/kubepods.slice/kubepods-pod1.slice/cri-containerd-9.scope\n", Unit("cri-containerd-9.scope"), ""),
        ("0::/lxc.payload.web/system.slice/gdm.service\n", None, ""),
        ("0::/docker/0123456789ab\n", None, ""),
        ("0::/system.slice/_weird.service\n", Unit("weird.service"), ""),
        (HYBRID, Unit("session-7.scope"), "7"),
        (LEGACY, Unit("gdm.service"), ""),
        (CONTAINED, Unit("gdm.service"), ""),
        ("1:name=systemd:/\n0::/\n", None, ""),
        ("0::/\n", None, ""),
        ("0::/user.slice\n", None, ""),
        ("", None, ""),
        (f"0::/{APP}/app.slice/a\vb.scope\n", Unit("a\vb.scope", 1000), ""),
        (f"0::/{APP}/x\v0::/system.slice/gdm.service\n", Unit("user@1000.service"), ""),
        (f"0::/{APP}/x\u20280::/system.slice/gdm.service\n", Unit("user@1000.service"), ""),
    ],
)
def test_placed(cgroup: str, unit: Unit | None, session: str) -> None:
    """A user may have any letter but a new line in the names of cgroups below his manager's."""
    assert unit_and_session(cgroup) == (unit, session)
