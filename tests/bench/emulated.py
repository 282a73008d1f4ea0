"""Switches on a real kernel in the virtual machine, beside the bare writes that nobody can do without."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.bench import guest
from tests.bench.builds import DEVELOPED, Build, open_cache
from tests.bench.rounds import Experiment, Quantity, ratios
from tests.bench.table import Compared, Row, median, megabytes
from tests.harness.debian.tools import require_tools
from tests.harness.setups.programs import PLACE, install
from tests.harness.virtual_machines.hardware import GPU, GPU_AUDIO
from tests.harness.virtual_machines.machine import Machine
from tests.harness.virtual_machines.template import Template, find_template

ROUNDS = 10
PYTHON = "/usr/local/lib/gpuswitch/current/bin/python"
TARGETS = ("vfio", "host")
BARE_WRITES = "bare_writes.sh"
VIEWS = {"floor": "bare writes", "client": "as a client sees it", "service": "in the service"}
START = """\
set -e
systemctl restart gpuswitchd
systemctl show -p InactiveExitTimestampMonotonic -p ActiveEnterTimestampMonotonic gpuswitchd
awk '$1 == "VmRSS:" { print "VmRSS=" $2 }' "/proc/$(systemctl show -P MainPID gpuswitchd)/status"
"""


def measure() -> Iterator[Row]:
    """Raises HarnessError where there is no machine to be had."""
    [template] = _templates(DEVELOPED)
    with _machine(template) as machine:
        measured = _rounds(machine, ROUNDS)
    for target in TARGETS:
        floor = statistics.median(measured[f"floor to {target}"])
        yield Row(f"to {target}, {VIEWS['floor']} (median of {ROUNDS})", median(measured[f"floor to {target}"]))
        for who, goal in (("client", "≤ 2.0 x"), ("service", "")):
            seconds = measured[f"{who} to {target}"]
            ratio = statistics.median(seconds) / floor
            yield Row(f"to {target}, {VIEWS[who]} (median of {ROUNDS})", f"{median(seconds)}, {ratio:.2f} x", goal)


def compare(this: Build, base: Build) -> Iterator[Compared]:
    """The bare writes, which are no build's, show how alike the machines were. Raises HarnessError as measure()."""
    templates = _templates(this, base)
    with _machine(templates[0]) as ours, _machine(templates[1]) as theirs:
        yield from ratios(EXPERIMENTS, ours, theirs)


def _templates(*builds: Build) -> list[Template]:
    require_tools("vm")
    release = os.environ.get("RELEASE", "bookworm")
    return [find_template(open_cache(), release, project=build.tree) for build in builds]


@contextmanager
def _machine(template: Template) -> Iterator[Machine]:
    """A machine with what is run in it."""
    with template.clone() as machine:
        install(machine, BARE_WRITES)
        machine.push(Path(guest.__file__).read_text(), "/tmp/guest.py")  # noqa: S108 -- in the guest, which is ours alone
        yield machine


def _rounds(machine: Machine, rounds: int) -> dict[str, list[float]]:
    """Seconds by name: those of guest.py."""
    said = machine.sh(f"{PYTHON} /tmp/guest.py {PLACE}/{BARE_WRITES} {rounds} {GPU} {GPU_AUDIO}", timeout=600).stdout
    measured: dict[str, list[float]] = json.loads(said)
    return measured


def _switches(machine: Machine) -> Iterable[float]:
    measured = _rounds(machine, 1)
    return (measured[f"{who} to {target}"][0] for target in TARGETS for who in VIEWS)


def _start(machine: Machine) -> Iterable[float]:
    shown = dict(line.split("=", 1) for line in machine.sh(START).stdout.splitlines())
    yield (int(shown["ActiveEnterTimestampMonotonic"]) - int(shown["InactiveExitTimestampMonotonic"])) / 1e6
    yield int(shown["VmRSS"])


EXPERIMENTS = (
    Experiment((Quantity("start of the unit"), Quantity("resident memory", megabytes)), _start, times=1, pairs=6),
    Experiment(
        [Quantity(f"to {target}, {view}") for target in TARGETS for view in VIEWS.values()],
        _switches,
        times=ROUNDS,
        pairs=20,
    ),
)
