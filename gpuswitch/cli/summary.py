"""How those of several GPUs ended that are not where they were to go: a line each, below all that was told meanwhile.

Why was told whole when it happened, which may have scrolled away since.
"""

from __future__ import annotations

from collections.abc import Sequence

from gpuswitch.cli.client import Gpu
from gpuswitch.cli.layout import hung
from gpuswitch.cli.output import line
from gpuswitch.cli.translate import _, mark, recognized, state_word

REFUSED = mark("refused")
NOT_BEGUN = mark("not begun")


class Summary:
    """What is to be said at the end."""

    def __init__(self) -> None:
        self._lines: list[tuple[str, Sequence[str]]] = []

    def add(self, gpu: Gpu, how: str, reasons: str, todo: Sequence[str]) -> None:
        """`how` it ended, a result or one of ours; the `reasons`, a sentence a line, of which the first is said; and
        `todo`, what to type next, a sentence each.
        """
        first, *more = recognized(reasons).splitlines() or [""]
        why = _("{reason} (and {count} more)", reason=first, count=len(more)) if more else first
        ended = _("{gpu}: {result}: {reason}", gpu=gpu.title, result=state_word(how), reason=why)
        self._lines.append((ended, todo))

    def print(self) -> None:
        for ended, todo in self._lines:
            line(ended)
            for each in todo:
                hung("  ", each)
