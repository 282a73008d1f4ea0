"""What a file would say, shown as what changes in it."""

from __future__ import annotations

import difflib
import sys

from gpuswitch.cli.output import clean, in_colour, write


def show_change(file: str, before: str | None, after: str | None) -> None:
    """All of the file, with what is new and what goes. None: there is no file then."""
    was, becomes = (file if text is not None else "/dev/null" for text in (before, after))
    old, new = ((text or "").splitlines() for text in (before, after))
    for each in difflib.unified_diff(old, new, was, becomes, lineterm="", n=1000):
        colour = {"+": "32", "-": "31"}.get(each[:1], "") if in_colour(sys.stdout) else ""
        write(f"\x1b[{colour}m{clean(each)}\x1b[0m" if colour else clean(each))
