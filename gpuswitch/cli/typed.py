"""What was typed, as messages repeat it: on one line, without what a terminal would obey, and not at any length."""

from __future__ import annotations

from collections.abc import Iterable

from gpuswitch.cli.layout import shortened
from gpuswitch.cli.output import clean

_LONG = 300
"""Letters: no name is as long, and few paths, which are repeated whole, to be copied."""
_SHOWN = 60
"""Columns of a longer word that is repeated."""
_ENDS = 100
"""Letters of each end that it is shortened from."""


def as_shown(text: str, words: Iterable[str]) -> str:
    """The text with these words in it, as they were typed or in quotes, as they are shown."""
    # A word may be a part of another.
    for word in sorted(set(words), key=len, reverse=True):
        if word.isprintable() and len(word) <= _LONG:
            continue
        shown = clean(word) if len(word) <= _LONG else shortened(clean(word[:_ENDS] + word[-_ENDS:]), _SHOWN)
        for written in (word, clean(word), repr(word)[1:-1]):
            text = text.replace(written, shown)
    return text
