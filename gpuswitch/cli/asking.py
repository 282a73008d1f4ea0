"""Questions to a person at the terminal."""

from __future__ import annotations

import sys

from gpuswitch.cli.output import on_terminal
from gpuswitch.cli.translate import _


def can_ask() -> bool:
    """Whether somebody is there who would see a question, and can answer it."""
    return sys.stdin.isatty() and sys.stderr.isatty() and on_terminal(sys.stdout)


def agrees(said: str | None) -> bool:
    """Whether an answer is a yes, in English or in this language."""
    return said in {"y", "yes", *_("y yes").split()}


def answer(question: str) -> str | None:
    """What they say, in lower case; None: there is no answer, and never will be (^D).

    Not by input(), which writes to where it may.

    Raises:
        KeyboardInterrupt: ^C, which may be an answer, too.
    """
    print(question, end="", file=sys.stderr, flush=True)
    said = ""
    try:
        said = sys.stdin.readline()
    finally:
        if not said.endswith("\n"):
            print(file=sys.stderr, flush=True)
    return said.strip().casefold() if said else None
