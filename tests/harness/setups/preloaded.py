"""Programs of the tests in a machine without the service, imported before the machine was saved.

Emulated, it takes seconds to import what they use of the service; a test that is there when that is done saves them.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from tests.harness.debian.cache import Cache
from tests.harness.machines.errors import CommandFailedError, Result
from tests.harness.machines.inside import words
from tests.harness.setups import units
from tests.harness.setups.programs import GUEST, install
from tests.harness.virtual_machines.machine import Machine
from tests.harness.virtual_machines.prepared import find_prepared
from tests.harness.virtual_machines.template import Template

TESTS = Path(__file__).parents[2]
PYTHON = "/usr/local/lib/gpuswitch/current/bin/python"
FOLDER = "/run/preloaded"
SUITE = "/srv/suite"

MODULES = ("tests.host_contract.__main__", "tests.harness.kernel_program")
FILES = (
    TESTS / "__init__.py",
    TESTS / "harness/__init__.py",
    TESTS / "harness/kernel_program.py",
    TESTS / "host_contract",
)


def find_suite(cache: Cache, template: Template, release: str) -> Template:
    """A machine in which these programs are ready, and the service is not running."""
    parts: list[Path | str] = [*FILES, GUEST / "preloaded.py", Path(__file__)]
    return find_prepared(cache, template, f"suite-{release}", parts, prepare)


def prepare(machine: Machine) -> None:
    for part in FILES:
        for path in sorted(part.glob("*.py")) if part.is_dir() else [part]:
            machine.push(path.read_bytes(), f"{SUITE}/tests/{path.relative_to(TESTS)}")
    units.stop(machine, "gpuswitchd")
    program = install(machine, "preloaded.py")
    machine.sh(
        f"""mkdir {FOLDER} && mkfifo {FOLDER}/ask && cd {SUITE}
        PYTHONPATH=. setsid {PYTHON} {program} {FOLDER} {" ".join(MODULES)} </dev/null >{FOLDER}/log 2>&1 &"""
    )
    machine.do(words.await_there, f"{FOLDER}/ready")


class Run:
    """A program that runs in a machine of the suite."""

    def __init__(self, machine: Machine, number: int, what: str) -> None:
        self._machine = machine
        self._what = what
        self.output = f"{FOLDER}/{number}.out"
        self._errors = f"{FOLDER}/{number}.err"
        self._status = f"{FOLDER}/{number}.status"

    def wait(self, *, check: bool = True) -> Result:
        """Wait until it ends. With check, another status than 0 is a CommandFailedError."""
        status = int(self._machine.do(words.await_text, self._status, "\n"))
        result = Result(self._what, status, self._machine.read(self.output), self._machine.read(self._errors))
        if check and status != 0:
            raise CommandFailedError(f"ended with status {status}", result, self._machine.console_tail())
        return result


class Suite:
    """The programs in a machine of the suite."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._numbers = itertools.count()

    def start(self, module: str, *arguments: str, stdin: str = "") -> Run:
        number = next(self._numbers)
        self.machine.push(json.dumps([number, module, arguments, stdin]) + "\n", f"{FOLDER}/ask")
        return Run(self.machine, number, " ".join([module, *arguments]))

    def run(self, module: str, *arguments: str, stdin: str = "", check: bool = True) -> Result:
        return self.start(module, *arguments, stdin=stdin).wait(check=check)
