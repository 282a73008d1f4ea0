"""The unit of the service, read by a real systemd: what the service can do in there, and what it cannot."""

from __future__ import annotations

import json
import re

import pytest

from tests.harness.containers.container import Container
from tests.harness.containers.sandbox import ask, ask_shell
from tests.harness.containers.system import System
from tests.harness.containers.words import AS_NOBODY, GPU, INSIDE, PYTHON, UNIT_FILE, ctl, show, simulated
from tests.real_system.conftest import Boot
from tests.unit.test_unit_file import CAPABILITIES

READ = "python3 -c 'import sys, urllib.request as u; print(u.urlopen(sys.argv[1]).read().decode())' "
NUMBERS = {
    "CAP_DAC_OVERRIDE": 1,
    "CAP_DAC_READ_SEARCH": 2,
    "CAP_FOWNER": 3,
    "CAP_KILL": 5,
    "CAP_SETGID": 6,
    "CAP_SETUID": 7,
    "CAP_SYS_MODULE": 16,
    "CAP_SYS_PTRACE": 19,
    "CAP_SYS_ADMIN": 21,
}
"""linux/capability.h"""


@pytest.fixture
def machine(boot: Boot, system: System) -> Container:
    return boot(system.installed, simulated())


def status(machine: Container, pid: str) -> dict[str, str]:
    """/proc/PID/status"""
    lines = machine.sh(f"cat /proc/{pid}/status").stdout.splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


# The unit


def test_systemd_has_nothing_to_say_about_it(machine: Container) -> None:
    # a small system has no man(1), so the page itself is looked for
    machine.sh("test -e /usr/local/share/man/man8/gpuswitchd.8")
    verified = machine.sh(f"systemd-analyze verify --man=no {UNIT_FILE} 2>&1")
    assert verified.stdout == ""
    said = machine.sh("journalctl -b _PID=1 -o cat").stdout
    assert [line for line in said.splitlines() if re.search(r"gpuswitchd\.service:\d", line)] == []


def test_the_bus_has_nothing_to_say_about_its_policy(machine: Container) -> None:
    machine.sh("systemctl reload dbus")
    said = machine.sh("journalctl -b -u dbus -u dbus-broker -o cat").stdout
    assert [line for line in said.splitlines() if ".conf" in line or "policy" in line.lower()] == []


def test_its_exposure_is_what_is_left_where_all_of_it_works(machine: Container) -> None:
    """Systemd counts from 0 to 10; what keeps it above 0 is left out for a reason that the unit file gives."""
    said = machine.sh("systemd-analyze security --no-pager --threshold=40 gpuswitchd.service", check=False)
    assert said.status == 0, said.stdout


# What it takes away


def test_of_roots_rights_it_has_what_it_needs(machine: Container) -> None:
    """Of those, a container has no right to load modules, whoever asks."""
    service = status(machine, show(machine, "MainPID"))
    everybody = int(status(machine, "1")["CapBnd"], 16)
    wanted = sum(1 << NUMBERS[name] for name in CAPABILITIES)
    assert int(service["CapBnd"], 16) == int(service["CapEff"], 16) == wanted & everybody
    assert wanted & ~everybody == 1 << NUMBERS["CAP_SYS_MODULE"]
    assert (service["NoNewPrivs"], service["Seccomp"]) == ("1", "2")


@pytest.mark.parametrize("place", ["/etc", "/usr", "/usr/local/lib/gpuswitch", "/var/lib", "/var/log", "/boot"])
def test_it_writes_to_no_file_of_others(machine: Container, place: str) -> None:
    refused = ask_shell(machine, f"touch {place}/there 2>&1", check=False)
    assert refused.status != 0
    assert "Read-only file system" in refused.stdout
    assert machine.sh(f"ls {place}/there", check=False).status != 0


def test_people_keep_their_homes_to_themselves(machine: Container) -> None:
    homes = "cd /; for home in home root; do"
    machine.sh(f"{homes} mkdir -p $home/kim; echo secret >$home/kim/diary; done; echo here >/tmp/note")
    seen = ask_shell(machine, f"({homes} cat $home/kim/diary; done; cat /tmp/note) 2>&1 || :").stdout
    assert "secret" not in seen
    assert "here" not in seen
    assert len(seen.splitlines()) == 3


def test_what_disks_hold_is_not_to_be_had(machine: Container) -> None:
    """The right to make nodes and to pass by their modes would be enough."""
    machine.sh("mknod -m 666 /dev/disk-of-somebody b 7 0; mknod -m 666 /dev/character c 1 5")
    seen = ask_shell(machine, "head -c 1 /dev/character | wc -c; head -c 1 /dev/disk-of-somebody 2>&1", check=False)
    assert seen.stdout.splitlines()[0] == "1"
    assert "Operation not permitted" in seen.stdout


@pytest.mark.parametrize(
    "command",
    [
        *("unshare --net true", "unshare --user true", "mount -t tmpfs none /tmp", "hostname other"),
        *("chrt -f 1 true", "mkdir -m 4755 /tmp/s", "dmesg", "echo 1 >/sys/fs/cgroup/system.slice/cgroup.freeze"),
        "python3 -c 'import mmap; mmap.mmap(-1, 4096, prot=7)'",
    ],
)
def test_what_it_has_no_use_for_fails(machine: Container, command: str) -> None:
    """Outside of the sandbox, root can do all of it but what the container itself forbids."""
    assert ask_shell(machine, f"{command} 2>&1", check=False).status != 0


# What works in it


def test_it_sees_who_has_a_device_open(machine: Container) -> None:
    """Of any user, in any unit or session; by a program of its own, as is the worker for what may block."""
    machine.push((INSIDE / "look.py").read_text(), "/srv/look.py")
    hold = "/bin/sh -c 'exec 3</dev/held; echo >/run/holds; exec sleep infinity'"
    machine.sh(
        f"""set -e
        mknod -m 666 /dev/held c 1 7
        useradd -m -u 1234 kim
        mkfifo -m 666 /run/holds
        systemd-run --quiet --unit=game --uid=kim {hold}
        read -r line </run/holds
        systemctl start user@1234.service
        systemd-run --quiet --user --machine=kim@.host --unit=desk {hold}
        read -r line </run/holds"""
    )
    said = json.loads(ask(machine, f"{PYTHON} /srv/look.py held").stdout)
    seen = {(it["command"], it["uid"], it["user"], it["unit"]["name"], it["unit"]["user"]) for it in said["holders"]}
    assert seen == {("sleep", 1234, "kim", "game.service", None), ("sleep", 1234, "kim", "desk.service", 1234)}
    assert {tuple(it["nodes"]) for it in said["holders"]} == {("/dev/full",)}
    assert said["worker"].startswith("cannot read the settings of 00ff:ff:1f.7: ")


ACCESS = """\
import sys
from gpuswitch.host.linux.device_nodes import LinuxDeviceNodes
from gpuswitch.host.linux.sysfs import Roots
from gpuswitch.model.access import UserAccess
getattr(LinuxDeviceNodes(Roots()), sys.argv[1])(UserAccess(1234, sys.argv[2]))
"""


def test_it_lets_a_user_open_a_node_whose_ever_it_is(machine: Container) -> None:
    """A udev rule may have given it to somebody: then it takes CAP_FOWNER."""
    machine.push(ACCESS, "/srv/access.py")
    machine.sh(
        "mkdir /dev/vfio; mknod -m 600 /dev/vfio/12 c 1 3; mknod -m 600 /dev/vfio/13 c 1 3; chown 77 /dev/vfio/13"
    )
    for node in ("/dev/vfio/12", "/dev/vfio/13"):
        opens = f"setpriv --reuid=1234 --clear-groups sh -c ': <>{node}'"
        before = machine.sh(f"stat -c '%a %u' {node}").stdout
        assert machine.sh(opens, check=False).status != 0
        ask(machine, f"{PYTHON} /srv/access.py give {node}")
        machine.sh(opens)
        ask(machine, f"{PYTHON} /srv/access.py take {node}")
        assert machine.sh(opens, check=False).status != 0
        assert machine.sh(f"stat -c '%a %u' {node}").stdout == before


def test_it_reaches_the_managers_of_users_that_come_later(machine: Container) -> None:
    """Their folders are mounted when the service runs already."""
    machine.sh(
        """set -e
        mkfifo /run/asks /run/goes-on
        useradd -m -u 1234 kim
        (read -r line </run/asks; systemctl start user@1234.service; echo >/run/goes-on) >/dev/null 2>&1 &"""
    )
    as_kim = "setpriv --reuid=1234 --regid=1234 --clear-groups env XDG_RUNTIME_DIR=/run/user/1234"
    once_it_is_there = "echo >/run/asks; read -r line </run/goes-on"
    asked = ask_shell(machine, f"{once_it_is_there}; {as_kim} systemctl --user is-active default.target")
    assert asked.stdout.strip() == "active"


def test_metrics_are_where_the_configuration_says(machine: Container) -> None:
    ctl(machine, f"to-vfio {GPU}")
    for address, url in (("127.0.0.1", "127.0.0.1"), ("::", "[::1]")):
        machine.push(f'[metrics]\naddress = "{address}"\nport = 9999\n', "/etc/gpuswitch/config.toml")
        machine.sh("systemctl reload gpuswitchd")
        text = machine.sh(f"{AS_NOBODY} {READ} http://{url}:9999/metrics").stdout
        assert f'gpuswitch_gpu_state{{gpu="{GPU}",state="vfio"}} 1.0' in text
        assert f'gpuswitch_switches_total{{gpu="{GPU}",result="done",target="vfio"}} 1.0' in text


def test_it_has_folders_of_its_own(machine: Container) -> None:
    """The configuration's is an administrator's to write to."""
    ctl(machine, f"to-vfio {GPU}")
    folders = machine.sh("stat -c '%n %U %a' /run/gpuswitch /var/lib/gpuswitch /etc/gpuswitch").stdout.split("\n")
    assert folders[:3] == ["/run/gpuswitch root 755", "/var/lib/gpuswitch root 755", "/etc/gpuswitch root 755"]
    assert machine.sh("ls /var/lib/gpuswitch").stdout.split()[0] == "history.db"
    machine.push("[history]\nkeep = 7\n", "/etc/gpuswitch/conf.d/fewer.toml")
    machine.sh("systemctl reload gpuswitchd")
    assert re.search(r"history\.keep +7 +/etc/gpuswitch/conf\.d/fewer\.toml", ctl(machine, "config").stdout)
