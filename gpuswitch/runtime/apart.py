"""Work that goes on where whoever waits for it does not."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TypeVar

T = TypeVar("T")


def apart(work: asyncio.Future[T]) -> asyncio.Future[T]:
    """What it comes to; to cancel that leaves the work alone.

    As asyncio.shield, which lets the event loop report what the work ends with when nobody waits for it any more, as
    an error that nobody has seen to (CPython gh-86802: since 3.13.4 at once, before that when the task is collected).
    """
    answer: asyncio.Future[T] = work.get_loop().create_future()
    work.add_done_callback(partial(_pass_on, answer))
    return answer


def _pass_on(answer: asyncio.Future[T], work: asyncio.Future[T]) -> None:
    error = None if work.cancelled() else work.exception()
    if answer.cancelled():
        return
    if work.cancelled():
        answer.cancel()
    elif error is not None:
        answer.set_exception(error)
    else:
        answer.set_result(work.result())
