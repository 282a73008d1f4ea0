"""`gpuswitchctl help`: a command, or something that several commands have in common."""

from __future__ import annotations

import argparse
from argparse import Namespace

from gpuswitch.cli.failures import CtlError
from gpuswitch.cli.layout import pairs
from gpuswitch.cli.output import line, write
from gpuswitch.cli.parser import EXIT_STATUS_OF_DOCTOR, EXIT_STATUSES, HELP_IS_TEXT, TOPICS, commands_of, parser
from gpuswitch.cli.translate import _, mark, state_word
from gpuswitch.errors import InvalidArgument

STATES = (
    ("host", mark("on its host drivers; people read host-nvidia, after the driver of its display function")),
    ("detaching", mark("on its way to vfio")),
    ("vfio", mark("all its functions are on a vfio driver: a virtual machine can have it")),
    ("reattaching", mark("on its way to the host")),
    ("recovering", mark("on its way to a known-good state, after a failure or a crash")),
    ("failed", mark("no known-good state could be reached; gpuswitchctl recover tries again")),
    ("wedged", mark("the kernel has not returned from an operation on it; nothing more is written to it")),
    ("unknown", mark("half-way, and nobody asked for that: somebody else moved a part of it")),
    ("absent", mark("its functions are not on the PCI bus")),
)


def show_help(args: Namespace) -> int:
    """Explain a command, an action of one (`setup undo`), or a topic.

    Raises:
        CtlError: there is no such topic.
    """
    if args.json:
        raise CtlError.of(InvalidArgument, _(HELP_IS_TEXT))
    topic = " ".join(args.topic).casefold()
    if topic == "states":
        pairs([(_both(state), _(meaning)) for state, meaning in STATES])
        write(f"\n{_('Edges between them: docs/states.md.')}")
    elif topic == "exit-status":
        pairs([(str(status), _(meaning)) for status, meaning in EXIT_STATUSES])
        write("")
        line(_("With several GPUs, the worst of theirs."))
        line(_(EXIT_STATUS_OF_DOCTOR))
    elif topic == "configuration":
        from gpuswitch.cli.configuration_topic import explain  # noqa: PLC0415 -- it reads every key, for this topic alone

        explain()
    else:
        _show_command(topic)
    return 0


def _both(state: str) -> str:
    """As it is told in this language, beside the word itself, which programs read."""
    return state if (word := state_word(state)) == state else f"{word} ({state})"


def _show_command(topic: str) -> None:
    explained: argparse.ArgumentParser = parser()
    for word in topic.split():
        below = commands_of(explained)
        if word not in below:
            text = _(
                "{topic} is neither a command nor one of {topics}; gpuswitchctl help lists the commands",
                topic=repr(topic),
                topics=", ".join(TOPICS),
            )
            raise CtlError.of(InvalidArgument, text)
        explained = below[word]
    write(explained.format_help().removesuffix("\n"))
