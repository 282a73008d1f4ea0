"""Uevents through the real kernel's netlink, in a namespace where any user may send them (see uevents_program.py)."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CASES = [
    "each_subsystem_tells",
    "others_do_not",
    "a_burst_is_one_call",
    "an_overflow_tells_and_is_survived",
    "a_stopped_one_is_silent",
]


@pytest.mark.parametrize("case", CASES)
def test_uevents(case: str) -> None:
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.fail("unshare is missing; install it: apt-get install util-linux")
    own = [unshare, "--user", "--map-root-user", "--net"]
    if subprocess.run([*own, "true"], check=False, capture_output=True).returncode:
        pytest.fail("this user may not make namespaces; run as root, or: sysctl -w user.max_user_namespaces=10000")
    command = [*own, sys.executable, "-m", "tests.harness.service.uevents_program", case]
    run = subprocess.run(command, check=False, capture_output=True, text=True, timeout=30, cwd=ROOT)
    assert (run.stdout, run.returncode) == ("kept\n", 0), run.stderr
