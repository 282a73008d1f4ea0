"""`setup` in a system with systemd and logind: what it finds of the desktop, what it writes, and that it goes again.

The GPU is a simulated one, so the machine beneath cannot be asked about it; everything else is real.
"""

from __future__ import annotations

import json

from tests.harness.containers.container import Container
from tests.harness.containers.system import System
from tests.harness.containers.words import AS_NOBODY, call, ctl, simulated, until
from tests.harness.json_schemas import check
from tests.real_system.conftest import Boot

FILE = "/etc/gpuswitch/conf.d/50-setup.toml"
_UNIT = "[Service]\nExecStart=sleep infinity\n[Install]\nAlias=display-manager.service\n"
DISPLAY_MANAGER = {"/etc/systemd/system/lightdm.service": _UNIT}


def everything(machine: Container) -> str:
    """Each thing below /etc: what it is, whose, how large, where a link goes, and the sum of its bytes."""
    listed = "find /etc -xdev -printf '%y %m %U %G %s %p %l\\n' | sort -k 6"
    return machine.sh(f"{listed}; find /etc -xdev -type f -exec sha256sum {{}} + | sort").stdout


def test_setup_and_its_undo_leave_etc_as_it_was(boot: Boot, system: System) -> None:
    machine = boot(system.installed, simulated(scenario="single") | DISPLAY_MANAGER)
    machine.sh("systemctl enable --now --quiet lightdm")
    until(machine, "systemctl --quiet is-active gpuswitchd")
    before = everything(machine)
    assert (
        "it takes root: sudo gpuswitchctl setup"
        in machine.sh(f"{AS_NOBODY} gpuswitchctl setup --yes", check=False).stderr
    )

    # Where nothing can be written, nothing is: neither there nor in what is kept.
    machine.sh("mount --bind /etc/gpuswitch /etc/gpuswitch && mount -o remount,bind,ro /etc/gpuswitch")
    refused = ctl(machine, "setup --yes", check=False)
    assert (refused.status, refused.stderr.splitlines()[-1].endswith("Read-only file system; nothing is changed")) == (
        1,
        True,
    )
    machine.sh("umount /etc/gpuswitch; test ! -e /var/lib/gpuswitch/setup")
    machine.sh("mkdir /var/lib/gpuswitch/setup; mount -t tmpfs -o size=4k none /var/lib/gpuswitch/setup")
    machine.sh("head -c 4096 /dev/zero >/var/lib/gpuswitch/setup/full")
    refused = ctl(machine, "setup --yes", check=False)
    assert (
        refused.status,
        refused.stderr.splitlines()[-1].endswith("No space left on device; nothing is changed"),
    ) == (1, True)
    machine.sh("umount /var/lib/gpuswitch/setup")
    assert everything(machine) == before

    told = json.loads(ctl(machine, "setup --yes --json").stdout)
    check("setup", told)
    assert (told["changed"], told["gpus"][0]["display_manager"]) == (True, "lightdm.service")
    assert 'stop_units = ["display-manager.service"]  # lightdm.service' in machine.sh(f"cat {FILE}").stdout
    assert call(machine, "/org/gpuswitch1", "org.gpuswitch1.Manager.GetGpu", "s", "rtx3070")
    ctl(machine, "config check")
    assert json.loads(ctl(machine, "setup --yes --json").stdout)["changed"] is False

    assert f"{FILE} is removed, as it was not there before" in ctl(machine, "setup undo").stdout
    assert everything(machine) == before
    assert ctl(machine, "status rtx3070", check=False).status == 2
