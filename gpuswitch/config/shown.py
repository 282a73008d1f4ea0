"""A value of the configuration, as a person is told of it."""

from __future__ import annotations

import reprlib


def shown(value: object) -> str:
    """A value to a person, cut short."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "a table"
    try:
        return reprlib.repr(value)
    except ValueError:  # Python does not write a number of more than 4300 digits, but reads it in hex
        return "a number that is too long"
