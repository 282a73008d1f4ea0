"""A node of Proxmox VE made of files, and what qemu-server does on it when a machine is started, stopped, or dies.

Proxmox VE itself is not to be had in a test. What stands here follows its source (qemu-server 9.2.6: vm_start_nolock,
_do_vm_stop, vm_stop_cleanup in PVE/QemuServer.pm, reserve_pci_usage and prepare_pci_device in PVE/QemuServer/PCI.pm;
pve-common: PVE/SysFSTools.pm) in the order of its phases; the files are as its own tests and reports have them.
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
VOLUME = "local:snippets/gpuswitch-hookscript"
NODE = os.uname().nodename.partition(".")[0]
"""What PVE::INotify::nodename would say."""

WIN11 = f"""\
#GPU 0000%3A01%3A00 goes to this one
agent: 1
bios: ovmf
boot: order=scsi0;net0
cores: 8
cpu: host,hidden=1
efidisk0: local-lvm:vm-101-disk-0,efitype=4m,pre-enrolled-keys=1,size=4M
hookscript: {VOLUME}
hostpci0: 0000:01:00,pcie=1,x-vga=1
machine: pc-q35-9.0
memory: 16384
meta: creation-qemu=9.0.2,ctime=1730712345
name: win11
net0: virtio=BC:24:11:2E:C5:4A,bridge=vmbr0,firewall=1
numa: 0
ostype: win11
scsi0: local-lvm:vm-101-disk-1,iothread=1,size=100G
scsihw: virtio-scsi-single
smbios1: uuid=3dd750ce-d910-44d0-9493-525c0be4e687
vga: none
vmgenid: 54d1c06c-8f5b-440f-b5b2-6eab1380e13d

[PENDING]
hostpci1: 0000:09:00

[before_update]
#before the update
hostpci0: 0000:05:00.0
name: old
snaptime: 1730712345
"""
MAPPING = f"""\
gpu
\tdescription two of one kind
\tmap id=10de:2484,iommugroup=12,node=other,path=0000:41:00,subsystem-id=1043:87c1
\tmap id=10de:2484,iommugroup=15,node={NODE},path=0000:01:00,subsystem-id=1043:87c1
\tmap id=10de:2484,iommugroup=16,node={NODE},path=0000:02:00.0;0000:02:00.1

# a comment
nic
\tmdev 1
\tmap id=8086:1563,node={NODE},path=0000:03:00.0
"""


class Node:
    """`folder` has etc/pve, run/qemu-server, sys (/sys/bus/pci/devices) and etc/gpuswitch.

    `driver_of` says which driver a function has, as /sys would. What qemu-server would have taken from another driver
    by force stands in `forced` afterwards: of a managed GPU that must never be.
    """

    def __init__(self, folder: Path, bus: str, driver_of: Callable[[str], Awaitable[str]] | None = None) -> None:
        self.folder = folder
        self.bus = bus
        self.driver_of = driver_of
        self.forced: list[str] = []
        self.log: list[str] = []
        self._qemu: dict[str, asyncio.subprocess.Process] = {}
        for name in (
            "etc/pve/qemu-server",
            "etc/pve/lxc",
            "etc/pve/mapping",
            "run/qemu-server",
            "sys",
            "etc/gpuswitch",
        ):
            (folder / name).mkdir(parents=True, exist_ok=True)
        self._install()

    def _install(self) -> None:
        """The hookscript as it is installed, but for the places that it reads."""
        package = self.folder / "lib/gpuswitch"
        package.mkdir(parents=True, exist_ok=True)
        places = {
            '"/etc/gpuswitch"': f'"{self.folder}/etc/gpuswitch"',
            '"/sys/bus/pci/devices"': f'"{self.folder}/sys"',
            '"/etc/pve"': f'"{self.folder}/etc/pve"',
            '"/run/qemu-server"': f'"{self.folder}/run/qemu-server"',
        }
        for name in ("__init__", "hook", "proxmox_hook"):
            text = (ROOT / f"gpuswitch/{name}.py").read_text()
            for old, new in places.items():
                text = text.replace(old, new)
            (package / f"{name}.py").write_text(text)
        script = (ROOT / "contrib/proxmox/gpuswitch-hookscript").read_text()
        self.script = self.folder / "gpuswitch-hookscript"
        self.script.write_text(
            script.replace("@proxmox_hook@", f"{package}/proxmox_hook.py").replace(
                "/etc/gpuswitch", f"{self.folder}/etc/gpuswitch"
            )
        )
        self.script.chmod(0o755)

    # What there is ---------------------------------------------------------------------------------------------------

    def machine(self, vmid: str, text: str) -> None:
        (self.folder / f"etc/pve/qemu-server/{vmid}.conf").write_text(text)

    def container(self, vmid: str, text: str = "hostname: ct\n") -> None:
        (self.folder / f"etc/pve/lxc/{vmid}.conf").write_text(text)

    def mapping(self, text: str = MAPPING) -> None:
        (self.folder / "etc/pve/mapping/pci.cfg").write_text(text)

    def device(self, *functions: str, ids: str = "10de:2484") -> None:
        for function in functions:
            folder = self.folder / "sys" / function
            folder.mkdir(exist_ok=True)
            for name, number in zip(("vendor", "device"), ids.split(":"), strict=True):
                (folder / name).write_text(f"0x{number}\n")

    def manage(self, text: str) -> None:
        (self.folder / "etc/gpuswitch/config.toml").write_text(text)

    def reserve(self, text: str) -> None:
        self._reservations.write_text(text)

    @property
    def _reservations(self) -> Path:
        return self.folder / "run/qemu-server/pci-id-reservations"

    # What qemu-server does -------------------------------------------------------------------------------------------

    async def hook(self, vmid: str, phase: str) -> tuple[int, str]:
        """exec_hookscript: its status and what it says. It says nothing on stdout."""
        process = await self.starting_hook(vmid, phase)
        out, said = await process.communicate()
        assert out == b""
        assert process.returncode is not None
        self.log.append(phase)
        return process.returncode, said.decode()

    async def starting_hook(self, vmid: str, phase: str) -> asyncio.subprocess.Process:
        pipe = asyncio.subprocess.PIPE
        environ = {"LC_ALL": "C", "PATH": os.defpath, "DBUS_SYSTEM_BUS_ADDRESS": self.bus}
        return await asyncio.create_subprocess_exec(
            self.script, vmid, phase, env=environ, stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe
        )

    async def start(self, vmid: str, *, qemu_fails: bool = False) -> str:
        """`qm start`: what is in the log of the task; it ends in `TASK ERROR` where the machine does not run."""
        text = self._conf(vmid).read_text().partition("\n[")[0]
        conf = dict(re.findall(r"^([a-z]+\d*): (.*)$", text, re.MULTILINE))
        said = ""
        if "hookscript" in conf:
            status, said = await self.hook(vmid, "pre-start")
            if status:
                return f"{said}TASK ERROR: hookscript error for {vmid} on pre-start: exit code {status}\n"
        functions = self._chosen(vmid, conf)
        if isinstance(functions, str):
            return f"{said}TASK ERROR: {functions}\n"
        self._reserve(functions, vmid, f"time:{int(time.time()) + 35}")
        for function in functions:
            if self.driver_of is not None and await self.driver_of(function) != "vfio-pci":
                self.forced.append(function)
        if qemu_fails:
            self._unreserve(vmid)
            return f"{said}TASK ERROR: start failed: QEMU exited with code 1\n"
        qemu = await asyncio.create_subprocess_exec(sys.executable, "-c", "import signal; signal.pause()")
        self._qemu[vmid] = qemu
        (self.folder / f"run/qemu-server/{vmid}.pid").write_text(f"{qemu.pid}\n")
        self._reserve(functions, vmid, f"pid:{qemu.pid}")
        if "hookscript" in conf:
            status, more = await self.hook(vmid, "post-start")
            assert status == 0
            said += more
        return f"{said}TASK OK\n"

    async def stop(self, vmid: str) -> str:
        """`qm shutdown`, and the cleanup after it."""
        _status, said = await self.hook(vmid, "pre-stop")
        return said + await self.dies(vmid)

    async def dies(self, vmid: str) -> str:
        """QEMU is gone, by itself or killed: qmeventd runs `qm cleanup`."""
        qemu = self._qemu.pop(vmid)
        qemu.kill()
        await qemu.wait()
        (self.folder / f"run/qemu-server/{vmid}.pid").unlink()
        self._unreserve(vmid)
        # Changes that waited are taken over: vmconfig_apply_pending.
        status, said = await self.hook(vmid, "post-stop")
        assert status == 0
        return said

    async def suspend(self, vmid: str) -> str:
        """`qm suspend --todisk`."""
        conf = self._conf(vmid)
        before = conf.read_text()
        conf.write_text(f"lock: suspended\nvmstate: local-lvm:vm-{vmid}-state-suspend\n{before}")
        return await self.dies(vmid)

    async def crash(self) -> None:
        """The host itself: what ran is gone, and so is /run. Nobody runs a hookscript."""
        for qemu in self._qemu.values():
            qemu.kill()
            await qemu.wait()
        self._qemu.clear()
        for file in (self.folder / "run/qemu-server").iterdir():
            file.unlink()

    def _conf(self, vmid: str) -> Path:
        return self.folder / f"etc/pve/qemu-server/{vmid}.conf"

    def _chosen(self, vmid: str, conf: dict[str, str]) -> list[str] | str:
        """choose_hostpci_devices, in its own words where it fails."""
        found: list[str] = []
        names = [each.name for each in (self.folder / "sys").iterdir()]
        for index in range(16):
            if not (value := conf.get(f"hostpci{index}")):
                continue
            mapping = re.search("mapping=([^,]+)", value)
            places = [value.split(",")[0].removeprefix("host=")] if not mapping else self._mapped(mapping[1])
            if not places:
                return f"PCI device mapping not found for '{mapping and mapping[1]}'"
            groups = []
            for alternative in places:
                group = []
                for place in alternative.split(";"):
                    there = sorted(name for name in names if re.match(f"(0000:)?{re.escape(place)}", name))
                    if not there:
                        return f"no PCI device found for '{place}'"
                    group += there
                groups.append(group)
            if "mdev=" in value:
                continue
            free = [
                each
                for each in groups
                if len(groups) == 1 or not any(self._in_use(f, vmid) or f in found for f in each)
            ]
            if not free:
                return f"could not find a free device for 'hostpci{index}'"
            found += free[0]
        return found

    def _mapped(self, mapping: str) -> list[str]:
        text = (self.folder / "etc/pve/mapping/pci.cfg").read_text()
        section = re.split(r"\n(?=\S)", text.partition(f"{mapping}\n")[2])[0]
        return re.findall(rf"node={NODE},path=([^,\n]+)", section)

    def _in_use(self, function: str, vmid: str) -> bool:
        found = re.search(rf"^{re.escape(function)} (\d+) ", self._said(), re.MULTILINE)
        return bool(found) and found is not None and found[1] != vmid

    def _said(self) -> str:
        return self._reservations.read_text() if self._reservations.exists() else ""

    def _reserve(self, functions: list[str], vmid: str, what: str) -> None:
        self._unreserve(vmid)
        self._reservations.write_text(self._said() + "".join(f"{function} {vmid} {what}\n" for function in functions))

    def _unreserve(self, vmid: str) -> None:
        kept = [line for line in self._said().splitlines(keepends=True) if line.split()[1] != vmid]
        self._reservations.write_text("".join(kept))
