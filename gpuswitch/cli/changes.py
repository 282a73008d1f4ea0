"""What a file would say, shown as what changes in it."""

from __future__ import annotations

import difflib
import sys

from gpuswitch.cli.output import clean, in_colour, write


def show_change(file: str, before: str | None, after: str) -> None:
    """All of the file, with what is new and what goes. `before`: None where there is none."""
    name = file if before is not None else "/dev/null"
    for each in difflib.unified_diff((before or "").splitlines(), after.splitlines(), name, file, lineterm="", n=1000):
        colour = {"+": "32", "-": "31"}.get(each[:1], "") if in_colour(sys.stdout) else ""
        write(f"\x1b[{colour}m{clean(each)}\x1b[0m" if colour else clean(each))
