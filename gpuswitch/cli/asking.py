"""Questions to a person at the terminal."""

from __future__ import annotations

import sys
from argparse import Namespace
from contextlib import suppress

from gpuswitch.cli.failures import CtlError
from gpuswitch.cli.output import problem
from gpuswitch.cli.translate import _
from gpuswitch.errors import Failed, InvalidArgument


def can_ask() -> bool:
    """Whether somebody is there who would see a question, and can answer it, wherever the output goes."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def is_to_ask(args: Namespace) -> bool:
    """Whether somebody is to be asked before what was asked for ends a desktop."""
    return not (args.yes or args.json) and can_ask()


def agrees(said: str | None) -> bool:
    """Whether an answer is a yes, in English or in this language."""
    return said in {"y", "yes", *_("y yes").split()}


def answer(question: str) -> str | None:
    """What they say, in lower case; None: there is no answer, and never will be: ^D, or the terminal is not ours to
    read (EIO: of a background process group that nobody could bring to the foreground, or it has hung up).

    Not by input(), which writes to where it may.

    Raises:
        KeyboardInterrupt: ^C, which may be an answer, too.
    """
    print(question, end="", file=sys.stderr, flush=True)
    said = ""
    try:
        with suppress(OSError):
            said = sys.stdin.readline()
    finally:
        if not said.endswith("\n"):
            print(file=sys.stderr, flush=True)
    return said.strip().casefold() if said else None


def tell_answers(*known: str) -> None:
    """Say what there is to answer, to whoever said something else and is asked once more."""
    problem(_("type one of these, then Enter: {answers}", answers=", ".join(known)))


def agree(question: str) -> None:
    """Ask whether to do what was shown.

    Raises:
        CtlError: they say no, or nothing, or ^C.
    """
    try:
        said = answer(question)
    except KeyboardInterrupt:
        raise CtlError.interrupted(_("interrupted; nothing is changed")) from None
    if not agrees(said):
        raise CtlError.of(Failed, _("cannot go on: you said no; nothing was changed"))


def refuse_unasked(args: Namespace, command: str) -> None:
    """Of what is asked about before it is done. `command` explains it.

    Raises:
        CtlError: nobody is there to be asked.
    """
    if not (args.yes or args.dry_run) and (args.json or not can_ask()):
        text = _(
            "cannot ask: this is no terminal; say --yes, or --dry-run to see what would be done: {command}",
            command=command,
        )
        raise CtlError.of(InvalidArgument, text)


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
