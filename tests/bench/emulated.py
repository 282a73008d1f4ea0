"""Switches on a real kernel in the virtual machine, beside the bare writes that nobody can do without."""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.bench import guest
from tests.bench.table import Row, median
from tests.debian.cache import Cache, default_folder
from tests.debian.tools import require_tools
from tests.vm.rig import template as rig
from tests.vm.rig.hardware import GPU, GPU_AUDIO

ROUNDS = 10
PYTHON = "/usr/local/lib/gpuswitch/current/bin/python"
FLOOR = Path(rig.__file__).with_name("floor.sh")


def measure() -> Iterator[Row]:
    """Raises RigError where there is no machine to be had."""
    require_tools("vm")
    template = rig.find_template(Cache(default_folder(), _say), os.environ.get("RELEASE", "bookworm"))
    with template.clone() as machine:
        machine.push(FLOOR.read_text(), "/tmp/floor.sh")  # noqa: S108 -- in the guest, which is ours alone
        machine.push(Path(guest.__file__).read_text(), "/tmp/guest.py")  # noqa: S108 -- as above
        said = machine.sh(f"{PYTHON} /tmp/guest.py /tmp/floor.sh {ROUNDS} {GPU} {GPU_AUDIO}", timeout=600).stdout
    measured: dict[str, list[float]] = json.loads(said)
    for target in ("vfio", "host"):
        floor = statistics.median(measured[f"floor to {target}"])
        yield Row(f"to {target}, bare writes (median of {ROUNDS})", median(measured[f"floor to {target}"]))
        for who, what, goal in (("client", "as a client sees it", "≤ 2.0 x"), ("service", "in the service", "")):
            seconds = measured[f"{who} to {target}"]
            ratio = statistics.median(seconds) / floor
            yield Row(f"to {target}, {what} (median of {ROUNDS})", f"{median(seconds)}, {ratio:.2f} x", goal)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
