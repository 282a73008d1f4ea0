"""The virtual machines of Proxmox VE on this node, and which of them have our hookscript."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from gpuswitch.doctor.machine import Files
from gpuswitch.doctor.seen import ProxmoxMachine
from gpuswitch.hook import BadDomainError, RefusedError
from gpuswitch.proxmox_hook import devices, main_section, name_of

CONFIGURATION = "/etc/pve/qemu-server"
SCRIPT = "gpuswitch-hookscript"
_TEMPLATE = f"share/gpuswitch/proxmox/{SCRIPT}"


def machines(files: Files) -> Iterator[ProxmoxMachine]:
    """/etc/pve is for root, and a file system of its own, whose reads have been known to wait."""
    pci_cfg = files.text("/etc/pve/mapping/pci.cfg")
    node = os.uname().nodename.partition(".")[0]
    ours = files.text(template(files))
    for place in files.below([CONFIGURATION], ".conf"):
        vmid, text = place.rpartition("/")[2].removesuffix(".conf"), files.text(place)
        fault, places, conf = "", set[str](), dict[str, str]()
        try:
            conf = main_section(text)
            found = devices(conf, pci_cfg, node)
        except (BadDomainError, RefusedError) as error:
            fault = str(error)
        else:
            for _, _, alternatives, mediated in found:
                if not mediated:
                    places.update(each for _, alternative in alternatives for each in alternative)
        volume = conf.get("hookscript", "")
        script = _kind(files, volume, ours) if volume else ""
        yield ProxmoxMachine(vmid, name_of(vmid, conf), tuple(sorted(places)), volume, script, fault)


def template(files: Files) -> str:
    """Where the script of this installation lies (contrib/install.sh); "" nowhere."""
    prefix = Path(sys.prefix)
    folders = (prefix, *prefix.parents, Path("/usr/local"), Path("/usr"))
    return next((str(each / _TEMPLATE) for each in folders if files.there(str(each / _TEMPLATE))), "")


def place_of(files: Files, volume: str) -> str:
    """Where a volume lies, "" where nobody says."""
    return (files.asked("pvesm", "path", volume) or "").strip()


def _kind(files: Files, volume: str, ours: str) -> str:
    text = files.text(place) if (place := place_of(files, volume)) else ""
    if volume.endswith(f"/{SCRIPT}"):
        return "ours" if text == ours and files.executable(place) else "outdated"
    return "ours" if SCRIPT in text else "foreign"
