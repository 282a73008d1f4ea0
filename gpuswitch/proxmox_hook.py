"""Asks gpuswitchd for the GPUs of a virtual machine of Proxmox VE, and gives them back: run by contrib/proxmox.

    /usr/bin/python3 -BISE proxmox_hook.py VMID pre-start|post-start|pre-stop|post-stop

Uses the standard library and gpuswitch/hook.py, and runs nothing but dbus-send: `qm` would wait for the lock of the
machine's configuration, which whoever runs a hookscript holds. Only `pre-start` ends with another status than 0: with 1
where the machine must not start, and the reason in one line on stderr, which is in the log of the task. When a
hookscript is run: vm_start_nolock and vm_stop_cleanup in qemu-server's PVE/QemuServer.pm; what its status does:
exec_hookscript in pve-guest-common's PVE/GuestHelpers.pm.

qemu-server takes a function from its driver by force, unless it is on vfio-pci already (PVE/SysFSTools.pm,
pci_dev_bind_to_vfio). So what counts is to know before that what it will take, by its own rules.
"""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path

if __name__ == "__main__":  # with -I, Python finds nothing but its own library
    sys.path.append(str(Path(__file__).resolve().parents[1]))
from gpuswitch import hook

PVE = "/etc/pve"
RUN = "/run/qemu-server"
MOST_DEVICES = 16
"""hostpci0 to hostpci15: $MAX_HOSTPCI_DEVICES in PVE/QemuServer/PCI.pm."""
LIMIT = 1 << 20
"""Bytes of a file that are read: pmxcfs has none that is longer (CFS_MAX_FILESIZE in its cfs-utils.h)."""

_PLACE = r"(?:[a-f0-9]{4,}:)?[a-f0-9]{2}:[a-f0-9]{2}(?:\.[a-f0-9])?"
"""A function, or all of a slot: $PCIRE in PVE/QemuServer/PCI.pm."""
_FUNCTION = r"([a-f0-9]{4,8}):([a-f0-9]{2}):([01][a-f0-9])\.([0-7])"

Device = tuple[str, str, list[tuple[str, list[str]]], bool]
"""A hostpciN: its key; its mapping ("" none); the alternatives; whether it is mediated.

An alternative is the `VENDOR:DEVICE` that a mapping expects there ("" anything), and its places.
"""


def main(arguments: list[str]) -> int:
    """Do what qemu-server's two arguments ask for; the exit status."""
    if len(arguments) != 2:
        _say("cannot tell what to do: it is run by Proxmox VE, with the number of a virtual machine and a phase")
        return 2
    vmid, phase = arguments
    try:
        serve(vmid, phase)
    except (hook.BadDomainError, hook.RefusedError, hook.UnansweredError) as error:
        said = str(error)
    except Exception as error:  # noqa: BLE001 - nobody who starts a virtual machine can use a traceback
        said = f"cannot look after the GPUs of {vmid[:40]}: {error!r}"
    else:
        return 0
    _say(said)
    return 1 if phase == "pre-start" else 0


def serve(vmid: str, phase: str) -> None:
    """Do what a phase asks for.

    Raises:
        BadDomainError, RefusedError, UnansweredError: it could not be done; at `pre-start`, the machine must not start.
    """
    if not re.fullmatch("[1-9][0-9]{2,8}", vmid):
        raise hook.RefusedError(f"cannot look after {vmid[:40]!r}: it is not the number of a virtual machine")
    if phase not in {"pre-start", "post-start", "pre-stop", "post-stop"}:
        raise hook.RefusedError(f"nothing is done for {vmid} at {phase[:40]!r}: no phase of that name is known")
    if phase == "pre-stop":
        return  # it has its GPUs until QEMU is gone
    if not _place_of(vmid).exists() and Path(PVE, f"lxc/{vmid}.conf").exists():
        _say(f"{vmid} is a container, and gpuswitch moves no devices for those: pct set {vmid} --delete hookscript")
        return
    if phase == "pre-start":
        before_start(vmid)
    elif phase == "post-start":
        conf = configuration(vmid)
        hook.adopt(name_of(vmid, conf), uuid_of(vmid), functions_of_running(vmid, conf))
    else:
        after_stop(vmid)


def before_start(vmid: str) -> None:
    """Wait until the managed GPUs of a machine are on vfio, so that qemu-server finds them where it wants them.

    Raises:
        RefusedError: the machine must not start.
    """
    if not _place_of(vmid).exists():
        raise hook.RefusedError(f"cannot start {vmid}: this node has no virtual machine of that number")
    conf: dict[str, str] = {}
    fault: hook.BadDomainError | None = None
    try:
        conf = configuration(vmid)
    except hook.BadDomainError as error:
        fault = error

    def read() -> tuple[str, list[hook.Address]]:
        if fault is not None:
            raise fault
        return uuid_of(vmid), functions_of(vmid, conf)

    hook.acquire(name_of(vmid, conf), read)


def after_stop(vmid: str) -> None:
    """Say that QEMU is gone. Whatever the configuration says by now: changes that waited for the stop are in it.

    Raises:
        RefusedError, UnansweredError: gpuswitchd does not know; it sees by itself that the process is gone.
    """
    try:
        conf = configuration(vmid)
    except hook.BadDomainError:
        conf = {}
    # `qm suspend --todisk`: the lock stays until the machine is resumed (PVE/QemuServer/RunState.pm, vm_suspend).
    reason = "saved" if conf.get("lock") == "suspended" else "shutdown"
    hook.release(name_of(vmid, conf), uuid_of(vmid), reason)


def uuid_of(vmid: str) -> str:
    """What the service knows it by: one machine's smbios1 may have the UUID of another, a VMID is one machine's alone.

    As generate_mdev_uuid has it in PVE/QemuServer/PCI/Mdev.pm.
    """
    return f"00000000-0000-0000-0000-{int(vmid):012d}"


def name_of(vmid: str, conf: dict[str, str]) -> str:
    """What people know it by: `win11 (101)`, `VM 101`."""
    name = "".join(filter(str.isprintable, conf.get("name", "")))[:200]
    return f"{name} ({vmid})" if name else f"VM {vmid}"


# What is written about a machine -------------------------------------------------------------------------------------


def configuration(vmid: str) -> dict[str, str]:
    """What a machine is made of now, by key.

    Raises:
        BadDomainError: it cannot be read.
    """
    return main_section(_read(_place_of(vmid)))


def _place_of(vmid: str) -> Path:
    """On its way here, a machine still has its configuration where it comes from (PVE/QemuServer.pm, vm_start)."""
    here = Path(PVE, f"qemu-server/{vmid}.conf")
    source = os.environ.get("PVE_MIGRATED_FROM", "")
    if re.fullmatch("[A-Za-z0-9-]+", source) and not here.exists():
        return Path(PVE, f"nodes/{source}/qemu-server/{vmid}.conf")
    return here


def _read(place: Path) -> str:
    try:
        with place.open("rb") as file:
            said = file.read(LIMIT + 1)
    except OSError as error:
        raise hook.BadDomainError(f"its configuration cannot be read: {place}: {error.strerror}") from None
    if len(said) > LIMIT:
        raise hook.BadDomainError(f"its configuration is longer than {LIMIT >> 20} MiB: {place}")
    return said.decode(errors="replace")


def main_section(text: str) -> dict[str, str]:
    """The values above all sections: those hold changes that wait, and snapshots (PVE/QemuServer.pm, parse_vm_config).

    Changes that wait have been taken over when a hookscript is run.

    Raises:
        BadDomainError: there is nothing in it, or a line about a device is none.
    """
    conf: dict[str, str] = {}
    for line in text.split("\n"):
        if re.fullmatch(r"\[[^\]]*\]\s*", line):
            break
        if match := re.fullmatch(r"([a-z][a-z_-]*[0-9]*):\s*(.*\S)\s*", line):
            conf[match[1]] = match[2]
        elif re.match("hostpci|args", line):
            raise hook.BadDomainError(f"its configuration has the line {line[:80]!r}, which says nothing")
    if not conf:
        raise hook.BadDomainError("its configuration says nothing")
    return conf


def devices(conf: dict[str, str], pci_cfg: str, node: str) -> list[Device]:
    """The PCI devices of the host that a machine is given, in the order in which qemu-server chooses them.

    `pci_cfg` is the text of /etc/pve/mapping/pci.cfg, `node` the name of this one. A place begins with its domain.

    Raises:
        BadDomainError: qemu-server would pass the device over, or not understand it.
        RefusedError: no machine with this could start here.
    """
    found: list[Device] = []
    if conf.get("template", "").lower() in {"1", "yes", "on", "true"}:
        return found  # QEMU is given none then (load_config_for_template)
    for key in (f"hostpci{index}" for index in range(MOST_DEVICES)):
        if key not in conf:
            continue
        said = _options(conf[key], key)
        mapping, places = said.get("mapping", ""), said.get("host", "")
        if bool(mapping) == bool(places):
            raise hook.BadDomainError(f"its configuration has {key}: {conf[key][:80]!r}, which names no device")
        chosen = mapped(mapping, pci_cfg, node, key) if mapping else [{"path": places}]
        alternatives = [(each.get("id", "").lower(), _places(each["path"], key)) for each in chosen]
        found.append((key, mapping, alternatives, "mdev" in said))
    return found


def mapped(mapping: str, pci_cfg: str, node: str, key: str) -> list[dict[str, str]]:
    """The entries of a mapping for this node, in order: `path`, `id`, ... (pve-guest-common's PVE/Mapping/PCI.pm).

    Raises:
        RefusedError: there are none.
        BadDomainError: one has no path.
    """
    entries, section = [], ""
    for line in pci_cfg.split("\n"):
        if re.match(r"\s*#", line):
            continue
        if not line.strip():
            section = ""
        elif match := re.fullmatch(r"(\S+)\s*", line):
            section = match[1]
        elif section == mapping and (match := re.fullmatch(r"\s+map\s+(.*\S)\s*", line)):
            entries.append(_options(match[1], key))
    ours = [entry for entry in entries if entry.get("node") == node]
    if not ours:
        raise hook.RefusedError(
            f"no machine starts with {key}: mapping={mapping[:80]}: that mapping has no device of the node {node}; "
            "map one under Datacenter, Resource Mappings"
        )
    if any("path" not in entry for entry in ours):
        raise hook.BadDomainError(f"the mapping {mapping[:80]} has no path for the node {node}")
    return ours


def _options(value: str, key: str) -> dict[str, str]:
    """`01:00,pcie=1`: what has no name is `host` (pve-common's PVE/JSONSchema.pm, parse_property_string)."""
    said: dict[str, str] = {}
    for part in filter(None, map(str.strip, value.split(","))):
        name, equals, rest = part.partition("=")
        if not equals:
            name, rest = "host", part
        if name in said:
            raise hook.BadDomainError(f"its configuration has {key}: {value[:80]!r}, with two of {name[:40]!r}")
        said[name] = rest
    return said


def _places(value: str, key: str) -> list[str]:
    places = value.split(";")
    for each in places:
        if not re.fullmatch(_PLACE, each):
            raise hook.BadDomainError(f"its configuration has {key} with {each[:40]!r}, which is not a PCI address")
    return [each if re.match("[a-f0-9]{4,}:", each) else f"0000:{each}" for each in places]


# What is there -------------------------------------------------------------------------------------------------------


def functions_at(place: str, names: list[str]) -> list[hook.Address]:
    """Which of the names in /sys/bus/pci/devices are at a place (PVE/SysFSTools.pm, lspci), in order."""
    found = []
    for name in sorted(names):
        if name.startswith(place) and (match := re.fullmatch(_FUNCTION, name)):
            domain, bus, slot, function = match.groups()
            found.append((int(domain, 16), int(bus, 16), int(slot, 16), int(function, 16)))
    return found


def functions_of(vmid: str, conf: dict[str, str]) -> list[hook.Address]:
    """Which functions qemu-server will take when it starts the machine now: choose_hostpci_devices in its PCI.pm.

    Not those of mediated devices, which stay on the host's driver. With those that `args` hands to QEMU past it.

    Raises:
        BadDomainError: nobody can tell.
        RefusedError: the machine cannot start.
    """
    names, held = _names(), reservations()
    found: list[hook.Address] = []
    for key, mapping, alternatives, mediated in _devices_here(conf):
        there = []
        for identity, places in alternatives:
            there.append([each for place in places for each in _present(place, names, name_of(vmid, conf), key)])
            if mapping:
                _refuse_another_device(there[-1][0], identity, mapping, key)
        if mediated:
            continue
        if len(there) > 1:
            there = [each for each in there if not any(a in found or _is_taken(a, vmid, held) for a in each)]
        if not there:
            raise hook.RefusedError(
                f"cannot start {name_of(vmid, conf)}: {key}: other machines have all devices of the mapping {mapping}"
            )
        found += there[0]
    return found + _past_qemu_server(conf)


def functions_of_running(vmid: str, conf: dict[str, str]) -> list[hook.Address]:
    """Which functions a machine has that was started just now: qemu-server has written them down.

    Raises:
        BadDomainError, RefusedError: nobody can tell.
    """
    names = _names()
    has = [function for function, (owner, _, _) in reservations().items() if owner == vmid]
    if not has:
        return functions_of(vmid, conf)
    mediated = {
        function
        for _, _, alternatives, is_mediated in _devices_here(conf)
        if is_mediated
        for _, places in alternatives
        for place in places
        for function in functions_at(place, names)
    }
    return [function for function in has if function not in mediated] + _past_qemu_server(conf)


def _devices_here(conf: dict[str, str]) -> list[Device]:
    """Raises as `devices` does."""
    with_mapping = any(key.startswith("hostpci") and "mapping=" in value for key, value in conf.items())
    place = Path(PVE, "mapping/pci.cfg")
    pci_cfg = _read(place) if with_mapping and place.exists() else ""
    return devices(conf, pci_cfg, os.uname().nodename.partition(".")[0])


def _names() -> list[str]:
    return [each.name for each in Path(hook.DEVICES).iterdir()]


def _present(place: str, names: list[str], machine: str, key: str) -> list[hook.Address]:
    found = functions_at(place, names)
    if not found:
        raise hook.RefusedError(
            f"cannot start {machine}: its {key} is {place}, and there is no such PCI device: look where it is now "
            "(lspci -D), or whether it has left the bus"
        )
    return found


def _refuse_another_device(function: hook.Address, identity: str, mapping: str, key: str) -> None:
    """Where the addresses have shifted, a mapping may be about another device by now, and qemu-server refuses it.

    It does so after `pre-start` (PVE/Mapping/PCI.pm, assert_valid): nobody's device is to move for that.
    """
    folder = Path(hook.DEVICES, hook.text(function))
    try:
        there = ":".join((folder / each).read_text("ascii").strip()[2:] for each in ("vendor", "device"))
    except OSError:
        return  # it has gone this moment, and qemu-server says so
    if there != identity:
        raise hook.RefusedError(
            f"no machine starts with {key}: mapping={mapping}: that says {identity or 'nothing'} of "
            f"{hook.text(function)}, and {there} is there; put it right under Datacenter, Resource Mappings"
        )


def _past_qemu_server(conf: dict[str, str]) -> list[hook.Address]:
    args = conf.get("args", "")
    return hook.of_qemu(args) if "vfio" in args else []


Reservation = tuple[str, str, int]
"""The VMID; `time` or `pid`; and that: seconds since 1970 when it ends, or the process that has it."""


def reservations() -> dict[hook.Address, Reservation]:
    """Which functions have been given to which machine (PVE/QemuServer/PCI.pm, reserve_pci_usage)."""
    try:
        return reserved(_read(Path(RUN, "pci-id-reservations")))
    except hook.BadDomainError:
        return {}  # none was ever given: /run is empty after a start


def reserved(text: str) -> dict[hook.Address, Reservation]:
    """The lines of that file that make sense; qemu-server passes over the others, too."""
    found = {}
    for line in text.split("\n"):
        if match := re.fullmatch(_FUNCTION + r"\s([0-9]{1,9})\s(time|pid):([0-9]{1,15})", line):
            domain, bus, slot, function, vmid, kind, number = match.groups()
            function_of = (int(domain, 16), int(bus, 16), int(slot, 16), int(function, 16))
            found[function_of] = (vmid, kind, int(number))
    return found


def _is_taken(function: hook.Address, vmid: str, held: dict[hook.Address, Reservation]) -> bool:
    """Whether another machine has it, or is about to."""
    owner, kind, number = held.get(function, (vmid, "", 0))
    if owner == vmid:
        return False
    if kind == "time":
        return number > time.time()
    try:
        runs_as = _read(Path(RUN, f"{owner}.pid")).strip()
    except hook.BadDomainError:
        return False
    return runs_as == str(number) and Path(f"/proc/{number}").exists()


def _say(text: str) -> None:
    print(f"gpuswitch: {text}", file=sys.stderr)  # noqa: T201 - this is how a hookscript speaks


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
