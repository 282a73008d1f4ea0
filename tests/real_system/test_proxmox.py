"""The hookscript for Proxmox VE as it is installed, on a real system bus that starts the service for it.

/etc/pve is made of files, `qm` and `pvesm` are stand-ins, the GPU is a simulated one: a folder stands for it in /sys.
"""

from __future__ import annotations

import json

from tests.harness.containers.system import System
from tests.harness.containers.words import ctl, simulated, until, until_state
from tests.harness.domains import table
from tests.harness.json_schemas import check
from tests.harness.made_machine import PVESM, QM
from tests.real_system.conftest import Boot

WIN11 = "name: win11\nhostpci0: 0000:01:00,pcie=1,x-vga=1\n\n[snap]\nhostpci0: 0000:09:00\n"
SCRIPT = "/var/lib/vz/snippets/gpuswitch-hookscript"
FUNCTIONS = "0000:01:00.0 0000:01:00.1 0000:01:00.2 0000:01:00.3"
FILES = {
    "/etc/gpuswitch/config.toml": table("0000:01:00.0"),
    "/etc/pve/qemu-server/101.conf": WIN11,
    **{
        f"/usr/bin/{name}": f"#!/bin/sh\n{program}\n"
        for name, program in (("qm", QM), ("pvesm", PVESM), ("pveversion", "echo pve-manager/9.2.1"))
    },
}


def test_from_setup_to_a_machine_with_the_gpu_and_back(boot: Boot, system: System) -> None:
    machine = boot(system.installed, simulated() | FILES)
    machine.sh("chmod 755 /usr/bin/qm /usr/bin/pvesm /usr/bin/pveversion")
    machine.sh(f"mkdir /srv/devices; cd /srv/devices; mkdir {FUNCTIONS}; mount --bind . /sys/bus/pci/devices")
    until(machine, "systemctl --quiet is-active gpuswitchd")

    told = json.loads(ctl(machine, "setup proxmox --yes --json").stdout)
    check("setup", told)
    assert (told["path"], told["commands"]) == (SCRIPT, ["qm set 101 --hookscript local:snippets/gpuswitch-hookscript"])
    assert "hook='/usr/local/lib/gpuswitch/current/proxmox_hook.py'" in machine.sh(f"cat {SCRIPT}").stdout

    # It is down, and its unit is started for this.
    machine.sh("systemctl stop gpuswitchd")
    assert machine.sh(f"{SCRIPT} 101 pre-start").stderr == ""
    until_state(machine, "vfio")
    assert "win11 (101)" in ctl(machine, "list").stdout
    assert machine.sh(f"{SCRIPT} 101 post-start; {SCRIPT} 101 pre-stop; {SCRIPT} 101 post-stop").stderr == ""
    until_state(machine, "host")

    # It is down for good: this machine does not start, with a sentence; one without a managed GPU does.
    machine.sh("systemctl mask --now --runtime gpuswitchd")
    refused = machine.sh(f"{SCRIPT} 101 pre-start", check=False)
    assert refused.status == 1
    assert refused.stderr.startswith(
        "gpuswitch: cannot give 0000:01:00.0, 0000:01:00.1, 0000:01:00.2, 0000:01:00.3 to win11 (101)"
    )
    machine.push("name: other\n", "/etc/pve/qemu-server/102.conf")
    assert machine.sh(f"{SCRIPT} 102 pre-start").stderr == ""
    machine.sh("systemctl unmask --runtime gpuswitchd")

    assert f"{SCRIPT} is removed, as it was not there before" in ctl(machine, "setup undo").stdout
    assert machine.sh("cat /etc/pve/qemu-server/101.conf").stdout == WIN11
