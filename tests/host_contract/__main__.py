"""Ask one thing of the real kernel that this runs on: `python -m tests.host_contract CASE --gpu ADDRESS ...`.

As root, on a machine that one can do without: it moves the GPU. Says `CASE: kept`, or what the case found instead, and
ends with 1 then.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import traceback

from gpuswitch.host.linux.host import LinuxHost
from gpuswitch.model.address import PciAddress
from tests.host_contract.cases import CASES
from tests.host_contract.harness import DEADLINE, ContractHarness
from tests.host_contract.real import RealExternalActivity


async def run(name: str, gpu: PciAddress, crowded: PciAddress, lone: PciAddress) -> None:
    host = LinuxHost()
    external = RealExternalActivity(host)
    try:
        async with asyncio.timeout(DEADLINE):
            await CASES[name](ContractHarness.of(host, external, gpu, crowded, lone))
    finally:
        # Processes first: an operation that waits for one of them returns then.
        await external.end()
        await host.close()


def broken(error: Exception) -> str:
    """One line: where, what the case says there, and why if it says that."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.filename}:{frame.lineno}: {frame.line}: {type(error).__name__} {error}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.host_contract")
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--gpu", type=PciAddress.parse, required=True, help="a GPU of two functions, as in harness.py")
    parser.add_argument("--crowded", type=PciAddress.parse, required=True, help="a GPU in a group with something else")
    parser.add_argument("--lone", type=PciAddress.parse, required=True, help="a GPU of one function")
    asked = parser.parse_args()
    try:
        asyncio.run(run(asked.case, asked.gpu, asked.crowded, asked.lone))
    except Exception as error:  # noqa: BLE001 - whatever a case ends with, the test outside is told
        sys.stdout.write(f"{asked.case}: {broken(error)}\n")
        return 1
    sys.stdout.write(f"{asked.case}: kept\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
