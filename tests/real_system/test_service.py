"""gpuswitchd as a service of a real systemd, on a real system bus, on a simulated host."""

from __future__ import annotations

import pytest

from tests.harness.containers.container import Container
from tests.harness.containers.system import System
from tests.harness.containers.words import (
    AS_NOBODY,
    DROP_INS,
    GPU,
    JOURNAL,
    NAME,
    ROOT,
    add_drop_in,
    ctl,
    history,
    prop,
    show,
    simulated,
    start_switch,
    until,
    until_all_is_given_back,
    until_restarted,
    until_state,
)
from tests.real_system.conftest import Boot

NAMED = f'[[gpu]]\naddress = "{GPU}"\nname = "spare"\n'


@pytest.fixture
def machine(boot: Boot, system: System) -> Container:
    """A machine whose service runs on a simulated laptop."""
    return boot(system.installed, simulated())


@pytest.fixture
def slow(boot: Boot, system: System) -> Container:
    """The same, where each unbind takes three seconds."""
    return boot(system.installed, simulated("unbind=3s"))


def owner(machine: Container) -> str:
    """The pid of who has the name on the bus; empty where nobody has."""
    asked = machine.sh(f"busctl status --no-pager {NAME} 2>/dev/null | grep ^PID=", check=False).stdout
    return asked.strip().removeprefix("PID=")


# Start


def test_it_runs_under_systemd_with_a_watchdog(machine: Container) -> None:
    assert show(machine, "Type") == "notify"
    assert show(machine, "ActiveState") == "active"
    assert show(machine, "WatchdogUSec") == "30s"
    assert int(show(machine, "WatchdogTimestampMonotonic")) > 0
    assert show(machine, "StatusText") == "2 GPUs"


def test_who_starts_after_it_finds_it_ready(boot: Boot, system: System) -> None:
    """The display manager is one of those. Nobody has started the service by asking for it."""
    ask = f"busctl --auto-start=no --json=short call {NAME} {ROOT} org.freedesktop.DBus.ObjectManager GetManagedObjects"
    unit = f"[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart={ask}\nStandardOutput=file:/run/seen\n"
    wanted = {
        "/run/systemd/system/display-manager.service": unit,
        "/run/systemd/system/multi-user.target.d/desktop.conf": "[Unit]\nWants=display-manager.service\n",
    }
    machine = boot(system.installed, {**simulated(), **wanted})
    assert '"State":{"type":"s","data":"host"}' in machine.sh("cat /run/seen").stdout


def test_the_bus_starts_it_when_somebody_asks(machine: Container) -> None:
    """As its unit, whoever that is; and once, however many ask."""
    machine.sh("systemctl stop gpuswitchd")
    assert owner(machine) == ""
    asked = machine.sh(f"{AS_NOBODY} gpuswitchctl list & gpuswitchctl list & gpuswitchctl list; wait").stdout
    assert asked.count(GPU) == 3
    assert show(machine, "ActiveState") == "active"
    assert owner(machine) == show(machine, "MainPID")
    assert machine.sh("pgrep -fc '[/]gpuswitchd '").stdout == "1\n"


def test_the_bus_says_why_it_cannot_start_it(machine: Container) -> None:
    machine.sh("systemctl mask --runtime --now gpuswitchd")
    refused = ctl(machine, "list", check=False)
    assert refused.status == 5
    assert "is masked" in refused.stderr
    assert refused.stderr.endswith("systemctl unmask gpuswitchd && systemctl start gpuswitchd\n")
    assert refused.stderr.count("\n") == 1


def test_a_second_daemon_is_turned_away(machine: Container) -> None:
    second = machine.sh("gpuswitchd", check=False)
    assert second.status == 1
    assert "another gpuswitchd" in second.stderr
    assert prop(machine, "State") == "host"


def test_it_is_taken_for_the_real_one_by_nobody_outside(machine: Container) -> None:
    """The socket of the command channel stands for a bus that the machine outside has lent to the container."""
    lent = machine.sh(
        "DBUS_SYSTEM_BUS_ADDRESS=unix:path=/run/host/agent gpuswitchd --simulate laptop --runtime /run/other",
        check=False,
    )
    assert lent.status == 2
    assert lent.stderr == (
        "gpuswitchd: a simulated gpuswitchd does not go on the system bus of the machine that its container runs on: "
        "give it a --bus of its own, a socket like unix:path=/tmp/bus\n"
    )
    machine.sh("rm /run/systemd/container")
    plain = machine.sh("gpuswitchd --simulate laptop --runtime /run/other", check=False)
    assert plain.status == 2
    assert "does not go on the system bus, but in a container that has a systemd of its own" in plain.stderr


# Reload


def test_a_reload_through_systemd_takes_the_new_configuration(machine: Container) -> None:
    before = show(machine, "MainPID")
    machine.push(NAMED, "/etc/gpuswitch/config.toml")
    machine.sh("systemctl reload gpuswitchd")
    assert (prop(machine, "Name"), prop(machine, "Managed")) == ("spare", True)
    assert (show(machine, "MainPID"), show(machine, "ActiveState")) == (before, "active")
    assert "spare" in ctl(machine, "list").stdout


def test_a_faulty_configuration_is_refused_and_the_old_one_stays(machine: Container) -> None:
    machine.push(NAMED, "/etc/gpuswitch/config.toml")
    machine.sh("systemctl reload gpuswitchd")
    machine.push("[deadlines]\nunbnd = 3\n", "/etc/gpuswitch/conf.d/typo.toml")
    assert machine.sh("systemctl reload gpuswitchd", check=False).status != 0
    refused = machine.sh(f"busctl call {NAME} {ROOT} {NAME}.Manager Reload", check=False)
    assert refused.status != 0
    for part in ("typo.toml", "unbnd", "unbind"):
        assert part in refused.stderr
    assert prop(machine, "Name") == "spare"
    assert show(machine, "ActiveState") == "active"


def test_one_that_cannot_use_its_configuration_is_not_started_over_and_over(machine: Container) -> None:
    machine.push("[deadlines]\nunbnd = 3\n", "/etc/gpuswitch/conf.d/typo.toml")
    assert machine.sh("systemctl restart gpuswitchd", check=False).status != 0
    assert show(machine, "ExecMainStatus") == "2"
    assert (show(machine, "ActiveState"), show(machine, "NRestarts")) == ("failed", "0")
    assert "typo.toml" in machine.sh("journalctl -u gpuswitchd -o cat").stdout
    machine.sh("rm /etc/gpuswitch/conf.d/typo.toml; systemctl restart gpuswitchd")
    assert prop(machine, "State") == "host"


# Stop and restart


def test_it_stops_when_told_and_takes_back_what_it_was_at(slow: Container) -> None:
    start_switch(slow, "ToVfio")
    until_state(slow, "detaching")
    slow.sh("systemctl stop gpuswitchd")
    assert (show(slow, "Result"), show(slow, "ExecMainStatus")) == ("success", "0")
    assert owner(slow) == ""
    assert slow.sh(f"ls {JOURNAL}").stdout == ""
    said = slow.sh("journalctl -u gpuswitchd -o cat").stdout
    assert "to vfio: cancelled (the service is stopping)" in said
    assert "Traceback" not in said
    slow.sh("systemctl start gpuswitchd")
    assert history(slow) == [("vfio", "cancelled")]


def test_a_restart_forgets_no_finished_switch(machine: Container) -> None:
    ctl(machine, f"to-vfio {GPU}")
    ctl(machine, f"to-host {GPU}")
    before = history(machine)
    assert before == [("host", "done"), ("vfio", "done")]
    machine.sh("systemctl restart gpuswitchd")
    assert history(machine) == before
    machine.sh("systemctl kill --kill-whom=main -s KILL gpuswitchd")
    until_restarted(machine)
    assert history(machine) == before


def test_it_comes_back_when_the_bus_was_gone(machine: Container) -> None:
    """Systemd has the socket of the bus, and starts that again when somebody connects."""
    before = show(machine, "MainPID")
    machine.sh("systemctl kill --kill-whom=main -s KILL dbus.service")
    until(machine, f"[ $(systemctl show -P MainPID gpuswitchd) != {before} ]")
    until_restarted(machine, 1)
    assert prop(machine, "State") == "host"
    assert "gpuswitchd: the connection to the bus was lost" in machine.sh("journalctl -u gpuswitchd -o cat").stdout


def test_the_bus_is_still_there_when_it_stops_with_the_machine(boot: Boot, system: System) -> None:
    """What is told of it after that goes to the console."""
    tell = "/bin/sh -c 'journalctl -u gpuswitchd -o cat >/dev/console'"
    last = f"[Unit]\nBefore=gpuswitchd.service\n[Service]\nRemainAfterExit=yes\nExecStart=/bin/true\nExecStop={tell}\n"
    files = {
        "/run/systemd/system/last.service": last,
        "/run/systemd/system/multi-user.target.d/last.conf": "[Unit]\nWants=last.service\n",
    }
    machine = boot(system.installed, {**simulated("unbind=3s"), **files})
    start_switch(machine, "ToVfio")
    until_state(machine, "detaching")
    machine.start("systemctl poweroff")
    machine.wait_off()
    console = machine.console_tail(200)
    assert "to vfio: cancelled (the service is stopping)" in console
    assert "lost" not in console


# Killed


def test_killed_in_the_middle_of_a_switch_it_comes_home(slow: Container) -> None:
    """Systemd starts it anew, and what it wrote down is there: the GPU is on the host before it is ready."""
    start_switch(slow, "ToVfio")
    until_state(slow, "detaching")
    until(slow, f"[ -e {JOURNAL}/0000_01_00_0.json ]")
    killed = show(slow, "MainPID")
    slow.sh("systemctl kill --kill-whom=main -s KILL gpuswitchd")
    until_restarted(slow)
    assert show(slow, "MainPID") != killed
    assert prop(slow, "State") in {"host", "reattaching"}
    until_all_is_given_back(slow)
    assert prop(slow, "State") == "host"


def test_what_it_wrote_down_outlives_it(slow: Container) -> None:
    """Also where systemd does not start it anew, and calls it failed."""
    add_drop_in(slow, "once", "Restart=no")
    start_switch(slow, "ToVfio")
    until(slow, f"[ -e {JOURNAL}/0000_01_00_0.json ]")
    slow.sh("systemctl kill --kill-whom=main -s KILL gpuswitchd")
    until(slow, "systemctl --quiet is-failed gpuswitchd")
    slow.sh("systemctl reset-failed gpuswitchd")
    assert slow.sh(f"cd {JOURNAL} && ls *.json").stdout == "0000_01_00_0.json\n"
    slow.sh("systemctl start gpuswitchd")
    until_all_is_given_back(slow)
    assert prop(slow, "State") == "host"
    assert GPU in slow.sh("journalctl -u gpuswitchd -o cat").stdout


def test_one_that_stands_still_is_ended_by_the_watchdog(boot: Boot, system: System) -> None:
    machine = boot(system.installed, {**simulated(), f"{DROP_INS}/watchdog.conf": "[Service]\nWatchdogSec=5\n"})
    stopped = show(machine, "MainPID")
    machine.sh(f"kill -STOP {stopped}")
    until_restarted(machine)
    assert show(machine, "MainPID") != stopped
    assert prop(machine, "State") == "host"
    said = machine.sh("journalctl -u gpuswitchd -o cat").stdout
    assert "Watchdog timeout" in said
    assert "Failed with result 'watchdog'" in said


def test_what_the_watchdog_ends_says_where_it_stood(machine: Container) -> None:
    """By the signal that systemd sends it then (systemd.service(5), WatchdogSignal=)."""
    machine.sh(f"kill -ABRT {show(machine, 'MainPID')}")
    until_restarted(machine)
    said = machine.sh("journalctl -u gpuswitchd -o cat").stdout
    assert "Fatal Python error: Aborted" in said
    assert 'gpuswitch/daemon.py", line ' in said


# Beside the bus


def test_metrics_tell_where_a_gpu_is(machine: Container) -> None:
    ctl(machine, f"to-vfio {GPU}")
    read = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:9752/metrics').read().decode())"
    text = machine.sh(f'{AS_NOBODY} python3 -c "{read}"').stdout
    assert f'gpuswitch_gpu_state{{gpu="{GPU}",state="vfio"}} 1.0' in text
    assert f'gpuswitch_switches_total{{gpu="{GPU}",result="done",target="vfio"}} 1.0' in text
