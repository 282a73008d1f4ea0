"""What others do to a real host: processes that open things, and a device that is removed and found again."""

from __future__ import annotations

import asyncio
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence
from pathlib import Path

from gpuswitch.errors import KernelError
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import Kind
from gpuswitch.switch.host import Host
from tests.contract.bench import Outside

PCI = Path("/sys/bus/pci")
OTHER = Path(__file__).with_name("other.py")


class RealOutside(Outside):
    def __init__(self, host: Host) -> None:
        self._host = host
        self._others: dict[str, Process] = {}

    async def open(self, function: PciAddress) -> None:
        await self._start(str(function), "open", self._node(function))

    async def close(self, function: PciAddress) -> None:
        await self._end(str(function))

    async def open_group(self, group: int) -> None:
        await self._start(f"group {group}", "open", f"/dev/vfio/{group}")

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

    async def end(self) -> None:
        """End every process that is left."""
        for name in list(self._others):
            await self._end(name)

    def _node(self, function: PciAddress) -> str:
        """The node by which a process holds the function's driver."""
        seen = self._host.look().functions[function]
        if seen.kind is Kind.DISPLAY:
            return seen.nodes[0]
        control = next((PCI / "devices" / str(function)).glob("sound/card*/controlC*"))
        return f"/dev/snd/{control.name}"

    async def _start(self, name: str, *arguments: str) -> None:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-IS", OTHER, *arguments, stdin=PIPE, stdout=PIPE
        )
        assert process.stdout is not None
        said = (await process.stdout.readline()).decode().strip()
        if said == "ok":
            self._others[name] = process
            return
        await process.wait()
        number = int(said)
        raise KernelError(arguments[0], " ".join(arguments[1:]), number, os.strerror(number))

    async def _end(self, name: str) -> None:
        process = self._others.pop(name)
        assert process.stdin is not None
        process.stdin.close()
        await process.wait()
