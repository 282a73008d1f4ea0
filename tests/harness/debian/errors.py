"""What goes wrong while a system is made."""

from __future__ import annotations


class HarnessError(Exception):
    """The harness cannot do what it was asked to; the text is one sentence, at times with a log below it."""
