"""What pytest shows of machines: what those of a failed test have to say."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tests.harness.debian.errors import HarnessError
from tests.harness.machines.machine import Machine

MACHINES = pytest.StashKey[Sequence[Machine]]()
"""Those of a test, in its stash."""


def show_machines(item: pytest.Item, call: pytest.CallInfo[None], report: pytest.TestReport) -> None:
    """Add to a failed test's report what its machines have to say."""
    machines = item.stash.get(MACHINES, None)
    if report.failed and call.when == "call" and machines:
        for number, machine in enumerate(machines, start=1):
            report.sections.append((f"console of machine {number}", machine.console_tail()))
            report.sections.append((f"journal of machine {number}", journal(machine)))


def journal(machine: Machine) -> str:
    try:
        return machine.sh(f"journalctl {machine.JOURNAL} -o short-monotonic --no-pager", check=False, timeout=20).stdout
    except (HarnessError, TimeoutError) as error:
        return f"cannot be read: {error}"
