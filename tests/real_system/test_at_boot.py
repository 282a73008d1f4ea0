"""`at_boot` on a machine that starts: before the display manager, and never again until it starts anew."""

from __future__ import annotations

import pytest

from tests.harness.containers.container import Container
from tests.harness.containers.system import System
from tests.harness.containers.words import GPU, JOURNAL, NAME, ctl, history, hybrid, path_of, prop, show
from tests.real_system.conftest import Boot

CONFIG = f'[[gpu]]\naddress = "{GPU}"\nname = "card"\nat_boot = "vfio"\nstop_units = ["display-manager.service"]\n'
ASK = f"busctl --auto-start=no get-property {NAME} {path_of()} {NAME}.Gpu State"
DESKTOP = f"[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart={ASK}\nStandardOutput=file:/run/seen\n"


@pytest.fixture
def machine(boot: Boot, system: System) -> Container:
    """A machine that starts with a GPU nobody uses, and a display manager."""
    wanted = {
        "/etc/gpuswitch/config.toml": CONFIG,
        "/run/systemd/system/display-manager.service": DESKTOP,
        "/run/systemd/system/multi-user.target.d/desktop.conf": "[Unit]\nWants=display-manager.service\n",
    }
    return boot(system.installed, {**hybrid(), **wanted})


def restart(machine: Container) -> None:
    """The simulated GPU is at home with each start of the service: whatever moves it there does so anew."""
    ctl(machine, f"to-host {GPU}")
    assert machine.sh(f"ls {JOURNAL}").stdout == "at_boot.json\n"
    machine.sh("systemctl restart gpuswitchd")


def test_once_in_each_boot_before_the_display_manager(machine: Container) -> None:
    assert machine.sh("cat /run/seen").stdout == 's "vfio"\n'
    assert (prop(machine, "State"), prop(machine, "Reason"), prop(machine, "AtBoot")) == ("vfio", "", "vfio")
    assert show(machine, "ActiveState", "display-manager.service") == "active"
    assert "the service itself, at boot" in ctl(machine, "history").stdout
    assert "at boot: vfio" in ctl(machine, "status card").stdout

    # Which ends the desktop, and no more: it had nothing open.
    restart(machine)
    assert (prop(machine, "State"), prop(machine, "Reason")) == ("host", "")
    assert history(machine) == [("host", "done"), ("vfio", "done")]
    # Without the note, systemd itself says that the machine has started.
    machine.sh(f"rm {JOURNAL}/at_boot.json; systemctl restart gpuswitchd")
    assert prop(machine, "State") == "host"
    assert "the machine has started already" in str(prop(machine, "Reason"))
    assert len(history(machine)) == 2
