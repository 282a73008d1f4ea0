"""Peers that mean ill, in a machine, and somebody who is on the bus meanwhile."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping

from tests.harness.containers.people import as_user
from tests.harness.containers.words import INSIDE, PYTHON, show, until
from tests.harness.machines.machine import Machine

_numbers = itertools.count(1)


class Running:
    """A program of `inside` that runs until `end`."""

    def __init__(self, machine: Machine, runs: str, program: str, *words: object) -> None:
        self._machine = machine
        self._files = f"/run/harness/{program}-{next(_numbers)}"
        machine.push((INSIDE / program).read_text(), f"/run/harness/{program}")
        command = " ".join(map(str, (PYTHON, f"/run/harness/{program}", *words, f"{self._files}.stop")))
        self._job = machine.start(f"{runs} {command} >{self._files}.out", timeout=500)

    def until_there(self) -> None:
        """Wait until it has its connections."""
        until(self._machine, f"[ -s {self._files}.out ]")

    def begin(self) -> None:
        self._machine.sh(f"touch {self._files}.go")

    def end(self) -> Mapping[str, float]:
        """Have it end, or wait for its end; what it has done."""
        self._machine.sh(f"touch {self._files}.stop")
        self._job.wait()
        return dict(json.loads(self._machine.sh(f"tail -n1 {self._files}.out").stdout))


def attack(machine: Machine, user: str, what: str, count: int, seed: int) -> Running:
    """One of those that `inside/attack.py` lists.

    It has the processors when nobody else wants them: where they are few, to take them is an attack of another kind.

    """
    return Running(machine, f"nice -n 19 {as_user(user)}", "attack.py", what, count, seed)


def bystander(machine: Machine) -> Running:
    """Root, who is on the bus already."""
    one = Running(machine, "", "bystander.py")
    one.until_there()
    return one


def memory(machine: Machine) -> int:
    """Bytes that the service has in memory."""
    pid = show(machine, "MainPID")
    return int(machine.sh(f"awk '/^VmRSS/ {{print $2}}' /proc/{pid}/status").stdout) << 10
