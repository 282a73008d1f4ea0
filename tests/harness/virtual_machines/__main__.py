"""For developers: `python -m tests.harness.virtual_machines build`, or `shell`; RELEASE chooses."""

from __future__ import annotations

import argparse
import os
import sys

from tests.harness.debian.cache import Cache, default_folder
from tests.harness.debian.errors import HarnessError
from tests.harness.debian.progress import on_stderr
from tests.harness.debian.tools import PROJECT, require_tools
from tests.harness.virtual_machines.shell import interact
from tests.harness.virtual_machines.template import find_template


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.harness.virtual_machines", description="Emulated machines for the tests."
    )
    parser.add_argument("what", choices=("build", "shell"), help="build the template; or get a shell in a clone of it")
    parser.add_argument("--release", default=os.environ.get("RELEASE", "bookworm"), help="of Debian (%(default)s)")
    parser.add_argument("--bare", action="store_true", help="without the project: a plain Debian")
    choice = parser.parse_args()
    try:
        require_tools("vm")
        template = find_template(
            Cache(default_folder(), on_stderr), choice.release, project=None if choice.bare else PROJECT
        )
        if choice.what == "build":
            on_stderr(f"machines of {choice.release}: {template.versions}, in {template.folder}")
            return 0
        with template.clone() as machine:
            interact(machine)
    except HarnessError as error:
        on_stderr(str(error))
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
