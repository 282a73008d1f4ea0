"""`python -m tests.bench [--vm]`: prints speed and size beside their targets. Nothing is asserted."""

from __future__ import annotations

import argparse
import os
import sys

from tests.bench import emulated, here, holders, hook
from tests.bench.table import show
from tests.debian.errors import RigError


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="Speed and size, printed.")
    parser.add_argument("--vm", action="store_true", help="also switches on a real kernel in the virtual machine")
    options = parser.parse_args()
    try:
        measure(vm=options.vm)
    except RigError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def measure(*, vm: bool) -> None:
    show(f"The service on this machine ({os.cpu_count()} processors, load {os.getloadavg()[0]:.1f})", here.measure())
    crowd = f"{holders.PROCESSES} processes with {holders.PROCESSES * holders.DESCRIPTORS} descriptors"
    show(f"Who has a node open, among {crowd}", holders.measure())
    show("The libvirt hook", hook.measure())
    if vm:
        show("Switching two functions in the virtual machine", emulated.measure())


sys.exit(main())
