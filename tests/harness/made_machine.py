"""A machine of files that the doctor can look at: by default one where all is well, with two graphics cards."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from gpuswitch import __version__
from gpuswitch.doctor.examination import Examination, examine
from gpuswitch.doctor.findings import Finding
from gpuswitch.doctor.gathering import LookError
from gpuswitch.doctor.looks.units import ASKED
from gpuswitch.doctor.machine import Machine
from gpuswitch.doctor.seen import Service, Told
from gpuswitch.model.holders import Holder
from tests.harness import incus
from tests.harness.sysfs_tree import Tree

INTEGRATED = "0000:00:02.0"
CARD, SOUND = "0000:01:00.0", "0000:01:00.1"
PORT = "0000:00:01.0"
HOOK = "etc/libvirt/hooks/qemu.d/50-gpuswitch"
_CONFIG = f'[[gpu]]\naddress = "{CARD}"\nname = "geforce"\n'
_CPUS = {"intel": "vendor_id\t: GenuineIntel\n", "amd": "vendor_id\t: AuthenticAMD\n"}
_TABLES = {"intel": "DMAR", "amd": "IVRS"}
TEMPLATE = "share/gpuswitch/proxmox/gpuswitch-hookscript"
HOOKSCRIPT = "#!/bin/sh\n# of this version\n"
SNIPPET = "var/lib/vz/snippets/gpuswitch-hookscript"
QM = """
root=${0%/usr/bin/qm} conf=${0%/usr/bin/qm}/etc/pve/qemu-server/$2.conf
echo "$*" >>"$root/qm.log"
[ -f "$conf" ] || { echo "Configuration file 'nodes/pve/qemu-server/$2.conf' does not exist" >&2; exit 2; }
! grep -q '^lock:' "$conf" || { echo "VM is locked (backup)" >&2; exit 255; }
sed -i /^hookscript:/d "$conf"
case $3 in
--hookscript)
    { printf 'hookscript: %s\\n' "$4"; cat "$conf"; } >"$root/conf.new"
    mv "$root/conf.new" "$conf" ;;
esac
echo "update VM $2: $3 $4"
"""
"""As `qm set` answers; what it has to say of a machine that is locked or not there is in PVE/AbstractConfig.pm."""
PVESM = """
case "$*" in
'status --content snippets')
    echo 'Name         Type     Status           Total            Used       Available        %'
    cat "${0%/usr/bin/pvesm}/snippets" 2>/dev/null ||
        echo 'local         dir     active        98497780        12345678        81103052   12.53%' ;;
'path local:'*) echo "/var/lib/vz/${2#local:}" ;;
'path nfs:'*) echo "/mnt/pve/nfs/${2#nfs:}" ;;
*) exit 255 ;;
esac
"""
STARTED = 4_000_000_000
"""When the services of the machine were started, or reloaded: after all of its files were made."""


class MadeMachine:
    """Every method changes something; `examined` looks at it as it is then."""

    def __init__(self, root: Path, *, processor: str = "intel", iommu: bool = True) -> None:
        self.root = root
        self.tree = Tree(root)
        self.service = Service(running=True, version=__version__)
        self.as_root = True
        self.units = {
            name: {"Id": name, "LoadState": "loaded", "ActiveState": "active", "UnitFileState": "enabled"}
            for name in ("gpuswitchd.service", "polkit.service", "virtqemud.service")
        }
        self.units["dbus.service"] = {**self.units["polkit.service"], "Id": "dbus.service"}
        self.write("etc/os-release", 'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\nID=debian\n')
        self.write("etc/default/grub", 'GRUB_CMDLINE_LINUX=""\n')
        for program in ("update-grub", "update-initramfs"):
            self.program(program)
        self.write("proc/cpuinfo", _CPUS[processor])
        self.write("proc/cmdline", "BOOT_IMAGE=/vmlinuz root=/dev/sda1 intel_iommu=on quiet\n")
        self.write("proc/sys/kernel/osrelease", "6.1.0-30-amd64\n")
        self.write(f"sys/firmware/acpi/tables/{_TABLES[processor]}", "")
        self.write("sys/kernel/security/lockdown", "[none] integrity confidentiality\n")
        self.write("etc/gpuswitch/config.toml", _CONFIG)
        self.write("etc/dbus-1/system.d/org.gpuswitch1.conf", "")
        self.write("usr/share/polkit-1/actions/org.gpuswitch1.policy", "")
        self.write("usr/lib/x86_64-linux-gnu/libvirt.so.0.9000.0", "")
        self.write("usr/lib/hook.py", "")
        self.hook(HOOK, "hook='/usr/lib/hook.py'\n")
        self._cards(iommu=iommu)

    def _cards(self, *, iommu: bool) -> None:
        """A processor's graphics, on which the machine booted, and a card of NVIDIA's with its sound."""
        tree = self.tree
        tree.installed("modules.dep", "kernel/drivers/vfio/pci/vfio-pci.ko.xz:\nupdates/dkms/nvidia.ko:\n")
        for driver, module in (("nvidia", "nvidia"), ("snd_hda_intel", "snd_hda_intel"), ("i915", "i915")):
            tree.loaded(module, 0)
            tree.driver(driver, module)
        (tree.sys / "module/nvidia/version").write_text("580.142\n")
        # The kernel counts as one that loads no modules where the folder has none: these are loaded, with no users.
        tree.driver("pcieport", "pcieportdrv", built_in=True)
        groups = (0, 1, 15) if iommu else (None, None, None)
        tree.function(INTEGRATED, ids="8086:4680", driver="i915", group=groups[0])
        (tree.path(INTEGRATED) / "boot_vga").write_text("1\n")
        tree.function(PORT, ids="8086:460d", class_code="060400", driver="pcieport", group=groups[1])
        tree.function(CARD, driver="nvidia", group=groups[2], under=[PORT])
        tree.function(
            SOUND, ids="10de:228b", class_code="040300", driver="snd_hda_intel", group=groups[2], under=[PORT]
        )
        if iommu:
            for number in (0, 1, 15):
                self.write(f"sys/kernel/iommu_groups/{number}/reserved_regions", "0xfee00000 0xfeefffff msi\n")
                self.write(f"sys/kernel/iommu_groups/{number}/name", "")

    def write(self, place: str, text: str) -> Path:
        """A file, by its place below the root."""
        path = self.root / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def remove(self, place: str) -> Path:
        path = self.root / place
        path.unlink()
        return path

    def folder(self, place: str) -> Path:
        path = self.root / place
        path.mkdir(parents=True)
        return path

    def program(self, name: str, script: str = "exit 0") -> None:
        self.write(f"usr/bin/{name}", f"#!/bin/sh\n{script}\n").chmod(0o755)

    def hook(self, place: str, text: str, *, executable: bool = True) -> Path:
        path = self.write(place, text)
        path.chmod(0o755 if executable else 0o644)
        return path

    def proxmox(self, conf: str, script: str = HOOKSCRIPT, *, vmid: str = "100", path: str = SNIPPET) -> None:
        """A node of Proxmox VE that has this machine, and this text where snippets lie.

        `qm` and `pvesm` do what is asked of them here, to the files of this machine.
        """
        self.write(f"etc/pve/qemu-server/{vmid}.conf", conf)
        self.write(
            "etc/pve/mapping/pci.cfg",
            f"gpu\n\tmap id=10de:2484,node={os.uname().nodename.partition('.')[0]},path={CARD[:-2]}\n",
        )
        self.write(f"usr/{TEMPLATE}", HOOKSCRIPT)
        if script:
            self.write(path, script).chmod(0o755)
        for name, program in (("qm", QM), ("pvesm", PVESM), ("pveversion", "echo pve-manager/9.2.1")):
            self.program(name, program)

    def incus(self, *instances: object, profiles: Sequence[object] = (), looks: int = 1) -> None:
        """Its daemon runs, and has these."""
        self.unit("incus.service")
        incus.serve(self.root / "var/lib/incus/unix.socket", instances, profiles, looks)

    def unit(self, name: str, **properties: str) -> None:
        loaded = {"Id": name, "LoadState": "loaded", "ActiveState": "active", "UnitFileState": "enabled"}
        self.units[name] = {**loaded, **properties}

    def command_line(self, words: str) -> None:
        self.write("proc/cmdline", f"BOOT_IMAGE=/vmlinuz root=/dev/sda1 {words}\n")

    def distribution(self, name: str, like: str = "") -> None:
        self.write("etc/os-release", f'PRETTY_NAME="{name}"\nID={name}\nID_LIKE="{like}"\n')

    def says(self, state: str = "host", *, card: str = CARD, **more: object) -> None:
        """What the service says of a GPU."""
        told = replace(Told(state, holders=()), **more)  # type: ignore[arg-type]  # fields of it, by name
        self.service = replace(self.service, gpus={**self.service.gpus, card: told})

    def held_by(self, *holders: Holder) -> Service:
        self.says(holders=holders)
        return self.service

    def is_served(self, service: Service) -> Service:
        self.service = service
        return service

    def booted_on(self, card: str) -> str:
        for each in (CARD, INTEGRATED):
            (self.tree.path(each) / "boot_vga").write_text(f"{int(each == card)}\n")
        return card

    @property
    def machine(self) -> Machine:
        roots = replace(self.tree.roots, proc=str(self.root / "proc"))
        return Machine(str(self.root), roots, self.as_root)

    def examined(self, *gpus: str) -> Examination:
        """All looks taken here: no process of this one is begun but what stands in for systemctl."""
        for card in (CARD, INTEGRATED):
            if self.service.running and card not in self.service.gpus:
                self.says(card=card)
        self._write_units()
        return examine(self.machine, self.service, gpus, gather=here)

    def found(self, kind: str, *gpus: str) -> list[Finding]:
        """What is said of that kind."""
        return [finding for finding in self.examined(*gpus).findings if finding.kind == kind]

    def _write_units(self) -> None:
        """A block for each name that is asked for, in the order of the question."""
        missing = {"LoadState": "not-found", "ActiveState": "inactive", "UnitFileState": ""}
        known = {name: {"Id": name, **missing} for name in ASKED} | self.units
        cases = "".join(_case(name, block) for name, block in known.items())
        default = "*) printf 'Id=%s\\nLoadState=not-found\\nActiveState=inactive\\nUnitFileState=\\n\\n' \"$name\" ;;"
        after = 'while [ "$1" != -- ]; do shift; done; shift'
        self.program("systemctl", f"{after}\nfor name; do case $name in\n{cases}{default}\nesac; done")


def _case(name: str, block: Mapping[str, str]) -> str:
    lines = "\\n".join(f"{key}={value}" for key, value in {"StateChangeTimestamp": f"@{STARTED}", **block}.items())
    return f"{name}) printf '{lines}\\n\\n' ;;\n"


def here(looks: Mapping[str, Callable[[], object]]) -> dict[str, object]:
    """Takes looks in this process."""
    found: dict[str, object] = {}
    for name, look in looks.items():
        try:
            found[name] = look()
        except Exception as error:  # noqa: BLE001 -- as `gathered` has it
            found[name] = LookError(f"{type(error).__name__}: {error}")
    return found
