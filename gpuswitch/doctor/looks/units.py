"""What systemd says of units. One question for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gpuswitch.doctor.machine import Files
from gpuswitch.doctor.seen import Unit

OURS = "gpuswitchd.service"
BUS = "dbus.service"
POLKIT = "polkit.service"
PROMETHEUS = "prometheus.service"
PERSISTENCED = "nvidia-persistenced.service"
LIBVIRT = ("virtqemud.service", "libvirtd.service")
OTHERS = ("supergfxd.service", "cardwired.service", "optimus-manager.service", "bumblebeed.service")
"""Of tools that load, unload, bind or hide GPUs by themselves."""
ASKED = (OURS, BUS, POLKIT, PROMETHEUS, PERSISTENCED, *LIBVIRT, *OTHERS)
_PROPERTIES = "Id,LoadState,ActiveState,UnitFileState,StateChangeTimestamp"


def look(files: Files, names: Sequence[str] = ASKED) -> Mapping[str, Unit] | None:
    """By the names that were asked for; None where systemd does not answer."""
    # Seconds since the epoch, as systemctl can say them since version 251.
    said = files.asked("systemctl", "show", "--timestamp=unix", f"--property={_PROPERTIES}", "--", *names)
    if said is None:
        return None
    blocks = [dict(line.partition("=")[::2] for line in block.split("\n")) for block in said.strip().split("\n\n")]
    if len(blocks) != len(names):
        return None
    return {name: _unit(name, block) for name, block in zip(names, blocks, strict=True)}


def _unit(name: str, block: Mapping[str, str]) -> Unit:
    changed = block.get("StateChangeTimestamp", "").removeprefix("@")
    return Unit(
        id=block.get("Id", name),
        found=block.get("LoadState") == "loaded",
        active=block.get("ActiveState") in {"active", "reloading"},
        enabled=block.get("UnitFileState", "").startswith("enabled"),
        changed=float(changed) if changed.isdecimal() else 0.0,
    )
