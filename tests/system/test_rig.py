"""The rig keeps its promises: pristine containers, independent of each other, of which nothing is left."""

from __future__ import annotations

from tests.system.rig.container import Container


def test_a_container_is_a_running_debian_with_nothing_failed(machine: Container) -> None:
    assert machine.sh("systemctl is-system-running").stdout == "running\n"
    assert machine.sh("systemctl list-units --failed --plain --no-legend").stdout == ""


def test_the_service_is_installed_and_runs(machine: Container) -> None:
    assert machine.sh("systemctl is-enabled gpuswitchd; systemctl is-active gpuswitchd").stdout == "enabled\nactive\n"
    assert machine.sh("busctl --list --no-pager | grep -c org.gpuswitch1").stdout == "1\n"
