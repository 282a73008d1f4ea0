"""The doctor in a system with systemd and a bus: the service down and up, for root and for a stranger.

The host beneath is the machine that runs the tests, whatever that is: what is said of it is not looked at here.
"""

from __future__ import annotations

import json
from typing import Any

from gpuswitch import __version__
from tests.harness.containers.container import Container
from tests.harness.containers.system import System
from tests.harness.containers.words import AS_NOBODY, ctl, simulated, until
from tests.harness.json_schemas import check
from tests.real_system.conftest import BUS, Boot

ABOUT_THE_SYSTEM = {"service", "broker", "polkit", "configuration"}


def said(machine: Container, before: str = "") -> tuple[int, dict[str, Any], dict[str, tuple[str, str]]]:
    """Its exit status, what it prints, and of that severity and reason by kind."""
    ended = machine.sh(f"{before} gpuswitchctl doctor --json", check=False)
    told = json.loads(ended.stdout)
    check("doctor", told)
    found = {each["kind"]: (each["severity"], each["reason"]) for each in told["findings"]}
    assert ended.status == {"ok": 0, "warning": 1, "problem": 2}[told["severity"]]
    return ended.status, told, {kind: found[kind] for kind in ABOUT_THE_SYSTEM & found.keys()}


def test_with_and_without_the_service_as_root_and_as_a_stranger(boot: Boot, system: System) -> None:
    machine = boot(system.installed, simulated())
    until(machine, "systemctl --quiet is-active gpuswitchd")
    well = {
        "service": ("ok", f"the service runs, version {__version__}"),
        "broker": ("ok", f"the system bus is {BUS}"),
        "polkit": ("ok", "polkit says who may switch"),
        "configuration": ("ok", "the configuration names no GPU: virtual machines get none by themselves"),
    }
    _, told, found = said(machine)
    assert (told["as_root"], found) == (True, well)
    assert not [each for each in told["unseen"] if not each["for_root"]]
    _, told, found = said(machine, AS_NOBODY)
    assert (told["as_root"], found) == (False, well)

    machine.sh("systemctl stop gpuswitchd; touch /run/before")
    down = ("warning", "the service does not run: no virtual machine gets a GPU by itself")
    for before in ("", AS_NOBODY):
        _, told, found = said(machine, before)
        assert found == well | {"service": down}
        [service] = [each for each in told["findings"] if each["kind"] == "service"]
        assert service["commands"] == ["systemctl enable --now gpuswitchd.service"]
    shown = ctl(machine, "doctor --short", check=False).stdout
    assert f"warning  {down[1]}" in shown
    assert "\n             systemctl enable --now gpuswitchd.service\n" in shown

    # It asked the bus, and did not have the service started; nothing was written but a journal.
    assert machine.sh("systemctl is-active gpuswitchd", check=False).stdout == "inactive\n"
    assert machine.sh("find /etc /usr /var/lib /run/gpuswitch -xdev -newer /run/before").stdout == ""

    machine.sh(
        "echo '[[gpu]]' >/etc/gpuswitch/config.toml; echo 'address = \"0000:99:00.0\"' >>/etc/gpuswitch/config.toml"
    )
    _, told, found = said(machine, AS_NOBODY)
    assert found["configuration"][0] == "warning"
    assert "is about no GPU" in found["configuration"][1]
    assert ctl(machine, "doctor nonsense", check=False).status == 2
