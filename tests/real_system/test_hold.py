"""gpuswitch-vfio@.service: units that need a GPU on vfio, with a real systemd, on a simulated host."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.harness.containers.container import Container
from tests.harness.containers.system import System
from tests.harness.containers.words import (
    GPU,
    NAME,
    call,
    ctl,
    history,
    hybrid,
    path_of,
    prop,
    show,
    until,
    until_state,
)
from tests.harness.domains import UUID
from tests.real_system.conftest import Boot
from tests.real_system.test_install import NEWER, make, version

UNIT = "gpuswitch-vfio@rtx3070.service"
TITLE = f"rtx3070 ({GPU})"
ON_VFIO = "/run/harness/on-vfio"
"""Where that is, a simulated machine has the GPU on vfio when the service is started anew, as a real one has."""
TEMPLATE = "/usr/local/lib/systemd/system/gpuswitch-vfio@.service"
DOCS = Path(__file__).parents[2] / "docs"
INCUS = f"""#!/bin/sh
case $1 in
start) busctl get-property {NAME} {path_of()} {NAME}.Gpu State >/run/incus ;;
wait) exec sleep infinity ;;
stop) echo "$@" >>/run/incus ;;
esac
"""
"""Stands in for Incus, whose machines want KVM."""
QEMU = '#!/bin/sh\necho "$@" >/run/qemu\nexec sleep infinity\n'
"""Stands in for QEMU, which would want a real GPU."""


def shown(place: str, page: str = "units.md") -> str:
    """The unit that the page shows for this place."""
    [text] = re.findall(rf"`{re.escape(place)}`[^`]*```ini\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    return str(text)


def files() -> dict[str, str]:
    return {
        "/etc/gpuswitch/config.toml": f'[[gpu]]\naddress = "{GPU}"\nname = "rtx3070"\n',
        "/etc/systemd/system/win11.service": shown("/etc/systemd/system/win11.service"),
        "/etc/systemd/system/other.service": (
            f"[Unit]\nRequires={UNIT}\nAfter={UNIT}\n[Service]\nExecStart=/bin/sleep infinity\n"
        ),
        "/usr/bin/qemu-system-x86_64": QEMU,
    }


@pytest.fixture
def machine(boot: Boot, system: System) -> Container:
    machine = boot(system.installed, {**hybrid(), **files()})
    machine.sh("chmod 755 /usr/bin/qemu-system-x86_64")
    return machine


def active(machine: Container, *units: str) -> list[str]:
    return machine.sh(f"systemctl is-active {' '.join(units)}", check=False).stdout.split()


def test_units_that_need_it_have_it_and_it_is_home_when_it_is_stopped(machine: Container) -> None:
    machine.sh("systemctl start win11 other")
    until(machine, "[ -s /run/qemu ]")
    assert "-device vfio-pci,host=0000:01:00.0" in machine.sh("cat /run/qemu").stdout
    assert active(machine, UNIT, "win11", "other") == ["active"] * 3
    assert (prop(machine, "State"), show(machine, "StatusText", UNIT)) == ("vfio", f"{TITLE} is on vfio")
    assert str(prop(machine, "Owner")[0]).startswith(f"{UNIT} (pid ")

    # Nobody else gets it.
    vm = call(machine, path_of(), "org.gpuswitch1.Gpu.Blockers", "sa{sv}", "host", "0")
    assert vm is not None
    assert "end that first" in ctl(machine, "to-host rtx3070", check=False).stderr
    second = f"gpuswitch-vfio@{GPU}.service"
    assert machine.sh(f"systemctl start {second}", check=False).status != 0
    assert f"{GPU} belongs to process {UNIT}" in show(machine, "StatusText", second)

    # The service is started anew, and ends by a signal: nobody loses anything.
    machine.push("", ON_VFIO)
    holder = show(machine, "MainPID", UNIT)
    machine.sh("systemctl restart gpuswitchd")
    before = show(machine, "MainPID")
    machine.sh("systemctl kill --kill-whom=main -s KILL gpuswitchd")
    until(machine, f"[ $(systemctl show -P MainPID gpuswitchd) != {before} ]")
    until(machine, "systemctl -q is-active gpuswitchd")
    until(machine, f"[ \"$(systemctl show -P StatusText {UNIT})\" = '{TITLE} is on vfio' ]")
    assert (show(machine, "MainPID", UNIT), active(machine, "win11", "other")) == (holder, ["active"] * 2)

    # Who needs it is stopped first; when that returns, it is home.
    machine.sh(f"systemctl stop {UNIT}")
    assert active(machine, UNIT, "win11", "other") == ["inactive"] * 3
    assert (prop(machine, "State"), prop(machine, "Owner")[0]) == ("host", "")
    ended = machine.sh("journalctl --sync; journalctl -b -o cat _PID=1 | grep '^Stopped'").stdout
    assert ended.index("win11") < ended.index("GPU rtx3070 on vfio")


def test_units_that_are_bound_to_it_end_when_it_is_lost(machine: Container) -> None:
    """A simulated machine that begins anew has its GPU on the host driver."""
    machine.sh("systemctl start win11")
    machine.sh("systemctl restart gpuswitchd")
    until(machine, f"systemctl -q is-failed {UNIT}")
    until(machine, "! systemctl -q is-active win11")
    status = machine.sh(f"systemctl status --no-pager {UNIT}", check=False).stdout
    assert f'Status: "lost {TITLE}: it is ' in status
    assert f"gpuswitchctl: lost {TITLE}: it is " in status
    until_state(machine, "host")


def test_it_comes_home_when_nobody_needs_it_any_more(machine: Container) -> None:
    place = f"/etc/systemd/system/{UNIT}.d/override.conf"
    machine.push(shown(place), place)
    machine.sh("systemctl daemon-reload; systemctl start win11")
    assert prop(machine, "State") == "vfio"
    until(machine, "[ -s /run/qemu ]")
    machine.sh("systemctl kill win11")
    until(machine, f"! systemctl -q is-active win11 && [ $(systemctl is-active {UNIT}) = inactive ]")
    assert (prop(machine, "State"), show(machine, "Result", UNIT)) == ("host", "success")


def test_a_machine_of_incus_has_it_before_it_starts(machine: Container) -> None:
    place = "/etc/systemd/system/incus-win11.service"
    machine.push(shown(place, "incus.md"), place)
    machine.push(INCUS, "/usr/bin/incus")
    machine.sh("chmod 755 /usr/bin/incus; systemctl daemon-reload; systemctl start incus-win11")
    until(machine, "[ -s /run/incus ]")
    assert machine.sh("cat /run/incus").stdout == 's "vfio"\n'
    machine.sh(f"systemctl stop {UNIT}")
    assert machine.sh("cat /run/incus").stdout == 's "vfio"\nstop win11 --timeout 60\n'
    assert (active(machine, "incus-win11"), prop(machine, "State")) == (["inactive"], "host")


def test_what_cannot_be_had_is_one_sentence_and_nothing_is_started(machine: Container) -> None:
    ctl(machine, f"acquire --name win10 --uuid {UUID} {GPU}")
    assert machine.sh("systemctl start win11", check=False).status != 0
    said = f"cannot keep {TITLE} on vfio: {GPU} belongs to the virtual machine win10: shut that down first"
    assert said in machine.sh(f"journalctl --sync; journalctl -b -o cat -u {UNIT}").stdout
    assert (active(machine, "win11"), show(machine, "Result", UNIT)) == (["inactive"], "exit-code")
    ctl(machine, f"release --name win10 --uuid {UUID}")
    until_state(machine, "host")
    before = history(machine)
    for name, words in (("radeon", "no GPU is named 'radeon'"), (r"a\x20b", "no GPU is named 'a b'")):
        unit = f"gpuswitch-vfio@{name}.service"
        assert machine.sh(f"systemctl start '{unit}'", check=False).status != 0
        status = machine.sh(f"systemctl status --no-pager '{unit}'", check=False).stdout
        assert words in status
        assert "Traceback" not in status
    assert history(machine) == before


def test_one_that_is_stopped_on_its_way_goes_back(boot: Boot, system: System) -> None:
    machine = boot(system.installed, {**hybrid("unbind@0000:01:00.1=2s"), **files()})
    machine.sh(f"systemctl start --no-block {UNIT}")
    until_state(machine, "detaching")
    machine.sh(f"systemctl stop {UNIT}")
    assert (active(machine, UNIT), show(machine, "Result", UNIT)) == (["inactive"], "success")
    until_state(machine, "host")


def test_the_bus_is_started_anew(machine: Container) -> None:
    machine.push("", ON_VFIO)
    machine.sh("systemctl start win11")
    before = show(machine, "MainPID")
    machine.sh("systemctl kill --kill-whom=main -s KILL dbus.service")
    until(machine, f"[ $(systemctl show -P MainPID gpuswitchd) != {before} ]")
    until(machine, "systemctl -q is-active gpuswitchd")
    assert active(machine, UNIT, "win11") == ["active"] * 2
    machine.sh(f"systemctl stop {UNIT}")
    assert prop(machine, "State") == "host"


def test_it_outlives_an_upgrade(boot: Boot, system: System) -> None:
    """What it was read from is gone then."""
    machine = boot(system.upgradable, {**hybrid(), **files(), ON_VFIO: ""})
    ctl(machine, "to-host rtx3070")
    machine.sh(f"systemctl start {UNIT}")
    holder = show(machine, "MainPID", UNIT)
    machine.sh(NEWER)
    make(machine, "install")
    assert version(machine) == "99.1"
    assert (show(machine, "MainPID", UNIT), active(machine, UNIT)) == (holder, ["active"])
    refused = make(machine, "uninstall", check=False)
    assert refused.status != 0
    assert f"belongs to process {UNIT}" in refused.stdout
    machine.sh(f"systemctl stop {UNIT}")
    assert (prop(machine, "State"), show(machine, "Result", UNIT)) == ("host", "success")


def test_the_machine_goes_down_meanwhile(machine: Container) -> None:
    """The service moves no GPU then, and nobody waits for it."""
    machine.sh("systemctl start win11")
    machine.start("systemctl poweroff")
    machine.wait_off()
    console = machine.console_tail(200)
    order = [console.index(f"Stopped {unit}") for unit in ("win11.service", UNIT, "gpuswitchd.service")]
    assert order == sorted(order)


def test_systemd_has_nothing_to_say_about_it_and_it_can_do_little(machine: Container) -> None:
    assert machine.sh(f"systemd-analyze verify --man=no {TEMPLATE} 2>&1").stdout == ""
    machine.sh(f"systemctl start {UNIT}")
    said = machine.sh(f"systemd-analyze security --no-pager --threshold=20 {UNIT}", check=False)
    assert said.status == 0, said.stdout
