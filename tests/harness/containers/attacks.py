"""Peers that mean ill, in a machine (`inside/attack.py`)."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping

from tests.harness.containers.people import as_user
from tests.harness.containers.words import INSIDE, PYTHON, show, until
from tests.harness.machines.machine import Machine

_numbers = itertools.count(1)


class Attack:
    """One that runs, until `end`."""

    def __init__(self, machine: Machine, user: str, words: str) -> None:
        self._machine = machine
        self._files = f"/run/attack-{next(_numbers)}"
        machine.push((INSIDE / "attack.py").read_text(), "/run/harness/attack.py")
        program = f"{as_user(user)} {PYTHON} /run/harness/attack.py {words} {self._files}.stop"
        self._job = machine.start(f"{program} >{self._files}.out", timeout=500)

    def until_at_work(self) -> None:
        until(self._machine, f"[ -s {self._files}.out ]")

    def end(self) -> Mapping[str, int]:
        """Have it end, or wait for its end; how often it did what."""
        self._machine.sh(f"touch {self._files}.stop")
        self._job.wait()
        return dict(json.loads(self._machine.sh(f"tail -n1 {self._files}.out").stdout))


def attack(machine: Machine, user: str, what: str, count: int, seed: int) -> Attack:
    return Attack(machine, user, f"{what} {count} {seed}")


def memory(machine: Machine) -> int:
    """Bytes that the service has in memory."""
    pid = show(machine, "MainPID")
    return int(machine.sh(f"awk '/^VmRSS/ {{print $2}}' /proc/{pid}/status").stdout) << 10
