"""A value of the configuration, and the GPU that it is about, as a person is told of them."""

from __future__ import annotations

import reprlib

from gpuswitch.sentence import Sentence


def shown(value: object) -> str:
    """A value to a person, cut short."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return Sentence("a table")
    try:
        return reprlib.repr(value)
    except ValueError:  # Python does not write a number of more than 4300 digits, but reads it in hex
        return Sentence("a number that is too long")


def called(name: str, what: object) -> str:
    """What a GPU is called in sentences: `rtx3070 (0000:01:00.0)`; by what it is alone where it has no name."""
    return f"{name} ({what})" if name else str(what)
