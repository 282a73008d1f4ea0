"""Where a task waits, from its own coroutine down to what it awaits at last.

`asyncio.Task.get_stack` has of a task that waits the outermost frame alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import FrameType

MOST = 40
"""Frames: nothing of ours is deeper."""
_FRAMES = ("cr_frame", "gi_frame", "ag_frame")
_AWAITED = ("cr_await", "gi_yieldfrom", "ag_await")


def where(task: asyncio.Task[object]) -> str:
    """`gpu/actor.py:141 request > gpu/turns.py:36 take > Future`; what runs at this moment ends with its last line."""
    return " > ".join(islice(_links(task.get_coro()), MOST)) or repr(task)


def _links(waiting: object) -> Iterator[str]:
    while waiting is not None:
        frame = _first(waiting, _FRAMES)
        if isinstance(frame, FrameType):
            path = Path(frame.f_code.co_filename)
            yield f"{path.parent.name}/{path.name}:{frame.f_lineno} {frame.f_code.co_name}"
        else:
            yield type(waiting).__name__
        waiting = _first(waiting, _AWAITED)


def _first(of: object, names: tuple[str, ...]) -> object:
    return next((value for name in names if (value := getattr(of, name, None)) is not None), None)
