"""What others do to a real host: processes and units that open things, a device that is removed and found again."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence
from pathlib import Path

from gpuswitch.errors import KernelError
from gpuswitch.host.linux.host import LinuxHost
from gpuswitch.host.port import Host
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import Kind
from gpuswitch.model.holders import Unit
from tests.host_contract.harness import ExternalActivity

PCI = Path("/sys/bus/pci")
UNITS = Path("/run/systemd/system")
UNIT = "gpuswitch-contract"
OTHER = Path(__file__).with_name("other.py")


class RealExternalActivity(ExternalActivity):
    command = Path(sys.executable).name

    def __init__(self, host: Host) -> None:
        self._host = host
        self._others: dict[str, Process] = {}
        self._next: list[LinuxHost] = []

    async def open(self, function: PciAddress) -> int:
        return await self._start(str(function), "open", self._node(function))

    async def close(self, function: PciAddress) -> None:
        await self._end(str(function))

    async def let_go(self, function: PciAddress) -> None:
        process = self._others[str(function)]
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"close it\n")
        assert await process.stdout.readline() == b"ok\n"

    async def map(self, function: PciAddress) -> int:
        frame_buffer = next((PCI / "devices" / str(function)).glob("graphics/fb*"))
        return await self._start(str(function), "map", f"/dev/{frame_buffer.name}")

    async def hide(self, function: PciAddress) -> None:
        await self._start(str(function), "hide", self._node(function))

    async def open_group(self, group: int) -> int:
        return await self._start(f"group {group}", "open", f"/dev/vfio/{group}")

    async def close_group(self, group: int) -> None:
        await self._end(f"group {group}")

    async def start_vm(self, functions: Sequence[PciAddress]) -> None:
        group = self._host.look().functions[functions[0]].iommu_group
        await self._start("vm", "vm", str(group), *map(str, functions))

    async def stop_vm(self) -> None:
        await self._end("vm")

    async def unplug(self, functions: Sequence[PciAddress]) -> None:
        for function in reversed(functions):
            await asyncio.to_thread((PCI / "devices" / str(function) / "remove").write_text, "1")

    async def replug(self) -> None:
        await asyncio.to_thread((PCI / "rescan").write_text, "1")

    async def set_autoprobe(self, *, on: bool) -> None:
        await asyncio.to_thread((PCI / "drivers_autoprobe").write_text, str(int(on)))

    async def add_unit(self, function: PciAddress | None = None, *, fails: bool = False) -> Unit:
        # What it opens is open before the program starts, and the start is over once it has.
        opens = f"StandardInput=file:{self._node(function)}\n" if function is not None else ""
        runs = "Type=oneshot\nExecStart=false\n" if fails else "Type=exec\nExecStart=sleep infinity\n"
        return await self._install(Unit(f"{UNIT}.service"), f"[Service]\n{runs}{opens}")

    async def add_socket(self, unit: Unit) -> Unit:
        path = Path("/run") / unit.name
        added = await self._install(Unit(f"{UNIT}.socket"), f"[Socket]\nListenStream={path}\nService={unit.name}\n")
        await _said("systemctl", "start", added.name)
        return added

    async def inhibitors(self, gpu: str) -> int:
        return len(await _inhibitors(gpu))

    async def end_inhibitors(self, gpu: str) -> None:
        for pid in await _inhibitors(gpu):
            os.kill(pid, signal.SIGKILL)

    def next_run(self) -> Host:
        self._next.append(LinuxHost())
        return self._next[-1]

    async def end(self) -> None:
        """End every process that is left."""
        for name in list(self._others):
            await self._end(name)
        for host in self._next:
            await host.close()

    async def _install(self, unit: Unit, text: str) -> Unit:
        await asyncio.to_thread((UNITS / unit.name).write_text, text)
        await _said("systemctl", "daemon-reload")
        return unit

    def _node(self, function: PciAddress) -> str:
        """The node by which a process holds the function's driver."""
        seen = self._host.look().functions[function]
        if seen.kind is Kind.DISPLAY:
            return seen.nodes[0]
        control = next((PCI / "devices" / str(function)).glob("sound/card*/controlC*"))
        return f"/dev/snd/{control.name}"

    async def _start(self, name: str, *arguments: str) -> int:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-IS", OTHER, *arguments, stdin=PIPE, stdout=PIPE
        )
        assert process.stdout is not None
        said = (await process.stdout.readline()).decode().strip()
        if said == "ok":
            self._others[name] = process
            return process.pid
        await process.wait()
        number = int(said)
        raise KernelError(arguments[0], " ".join(arguments[1:]), number, os.strerror(number))

    async def _end(self, name: str) -> None:
        process = self._others.pop(name)
        assert process.stdin is not None
        process.stdin.close()
        await process.wait()


async def _inhibitors(gpu: str) -> list[int]:
    """The processes that keep the machine from sleeping for this GPU's sake."""
    logind = "org.freedesktop.login1", "/org/freedesktop/login1", "org.freedesktop.login1.Manager"
    answer = json.loads(await _said("busctl", "--json=short", "call", *logind, "ListInhibitors"))
    return [pid for _, _, why, *_, pid in answer["data"][0] if gpu in why]


async def _said(*command: str) -> str:
    process = await asyncio.create_subprocess_exec(*command, stdout=PIPE)
    said, _ = await process.communicate()
    assert process.returncode == 0, command
    return said.decode()
