"""Questions to a person at the terminal."""

from __future__ import annotations

import sys

from gpuswitch.cli.failures import CtlError
from gpuswitch.cli.output import on_terminal
from gpuswitch.cli.translate import _
from gpuswitch.errors import Failed


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


def go_on() -> None:
    """Ask whether to go on, when it has been said what then happens.

    Raises:
        CtlError: they say no, or nothing.
    """
    said = answer(_("Go on? [y/N] "))
    if said is None:
        raise CtlError.of(Failed, _("cannot go on: the input ended without an answer; nothing was changed"))
    if not agrees(said):
        raise CtlError.of(Failed, _("cannot go on: you said no; nothing was changed"))
