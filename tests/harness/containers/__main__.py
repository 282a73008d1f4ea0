"""`python -m tests.harness.containers`: build the system that RELEASE and BUS choose, and say so."""

from __future__ import annotations

import os
import sys

from tests.harness.containers.system import find_bus, find_system
from tests.harness.debian.cache import Cache, default_folder
from tests.harness.debian.errors import HarnessError
from tests.harness.debian.progress import on_stderr
from tests.harness.debian.releases import find_release
from tests.harness.debian.tools import require_tools

if __name__ == "__main__":
    release, bus = os.environ.get("RELEASE", "bookworm"), os.environ.get("BUS", "dbus-daemon")
    try:
        find_bus(bus)
        require_tools("system")
        find_system(Cache(default_folder(), on_stderr), find_release(release), bus)
    except HarnessError as error:
        sys.exit(str(error))
