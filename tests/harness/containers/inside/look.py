"""Do with this machine what the service does, by programs of its own: `look.py NODE`.

Says in JSON who has /dev/NODE open, and what a worker of the service answers about a PCI function that is not there.
"""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import asdict
from typing import Any

from gpuswitch.errors import KernelError
from gpuswitch.host.linux.kernel import LinuxKernel
from gpuswitch.host.linux.processes import LinuxProcesses
from gpuswitch.host.linux.sysfs import Roots
from gpuswitch.model.address import PciAddress
from gpuswitch.model.holders import HolderQuery

NOWHERE = PciAddress.parse("00ff:ff:1f.7")


async def holders(node: str) -> list[dict[str, Any]]:
    processes = LinuxProcesses(Roots())
    try:
        return [asdict(holder) for holder in (await processes.scan(HolderQuery((), (node,)))).holders]
    finally:
        await processes.close()


async def worker() -> str:
    kernel = LinuxKernel(str(NOWHERE), Roots())
    try:
        await kernel.capture([NOWHERE])
    except KernelError as error:
        return str(error)
    finally:
        await kernel.close()
    return ""


async def main() -> None:
    print(json.dumps({"holders": await holders(sys.argv[1]), "worker": await worker()}))  # noqa: T201 -- its output


if __name__ == "__main__":
    asyncio.run(main())
