"""`python -m tests.harness.buses`: have the bus ready that BUS chooses, before a test is timed."""

from __future__ import annotations

import sys

from tests.harness.buses.private import PROGRAMS, chosen
from tests.harness.debian.errors import HarnessError
from tests.harness.debian.progress import on_stderr

if __name__ == "__main__":
    try:
        PROGRAMS[chosen()](on_stderr)
    except HarnessError as error:
        sys.exit(str(error))
