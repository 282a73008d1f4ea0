"""A program for the machine: does calls of a GPU's kernel operations, as the service would.

Its main() is run with the argument GPU and a list of calls as JSON on its standard input, each
`[METHOD, ARGUMENT...]`; a last argument that is an object has keywords. Beside the methods there are `pending`, `look`
(the facts of modules and boot frame buffers), `begin` (the call that follows, without waiting for it) and `adopt` (a
worker's pid and start time). Prints a line of JSON for each: its value, or the KernelError's errno and text.
"""

from __future__ import annotations

import asyncio
import errno
import json
import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from gpuswitch.errors import KernelError
from gpuswitch.host.linux.kernel import LinuxKernel
from gpuswitch.host.linux.sysfs import Roots, Sysfs
from gpuswitch.host.port import Pending
from gpuswitch.model.address import PciAddress
from gpuswitch.model.holders import Process


class Program:
    def __init__(self, gpu: str) -> None:
        self._kernel = LinuxKernel(gpu, Roots())
        self._begun: list[asyncio.Task[Any]] = []

    async def run(self, calls: list[list[Any]]) -> None:
        for call in calls:
            try:
                outcome = await self._outcome(*call)
            except KernelError as error:
                outcome = [errno.errorcode[error.errno], str(error)]
            sys.stdout.write(json.dumps(jsonable(outcome)) + "\n")
            sys.stdout.flush()
        await self._kernel.close()

    async def _outcome(self, method: str, *arguments: Any) -> Any:
        if method == "look":
            facts = Sysfs(Roots()).look()
            return {"modules": facts.modules, "boot_framebuffers": facts.boot_framebuffers}
        if method == "pending":
            return self._kernel.pending
        if method == "adopt":
            pid, started = arguments
            return self._kernel.adopt(Pending("what it was", worker=Process(pid, started)))
        if method == "begin":
            self._begun.append(asyncio.create_task(self._outcome(*arguments)))
            return await asyncio.sleep(0)
        keywords = arguments[-1] if arguments and isinstance(arguments[-1], dict) else {}
        positional = map(address, arguments[:-1] if keywords else arguments)
        return await getattr(self._kernel, method)(*positional, **keywords)


def address(argument: Any) -> Any:
    """Texts that are addresses, as such."""
    if isinstance(argument, list):
        return [address(one) for one in argument]
    return PciAddress.parse(argument) if isinstance(argument, str) and argument.count(":") == 2 else argument


def jsonable(value: Any) -> Any:
    """Dataclasses as objects, addresses as texts."""
    if isinstance(value, PciAddress):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return jsonable({field.name: getattr(value, field.name) for field in fields(value)})
    if isinstance(value, Mapping):
        return {str(key): jsonable(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(part) for part in value]
    return value


def main() -> None:
    asyncio.run(Program(sys.argv[1]).run(json.load(sys.stdin)))
