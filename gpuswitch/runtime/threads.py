"""Work that may block, beside the event loop, in threads that nobody waits for when the process ends.

`asyncio.to_thread` would not do: the end of the loop joins its threads, and a disk or a kernel that does not answer
would keep the service from stopping.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from threading import Thread
from typing import TypeVar

T = TypeVar("T")


async def run_in_thread(work: Callable[[], T]) -> T:
    """The result of `work`, done in a thread of its own. Who is cancelled waits no longer; the thread goes on."""
    promise: Future[T] = Future()
    Thread(target=partial(resolve, promise, work), daemon=True).start()
    return await asyncio.wrap_future(promise)


def resolve(promise: Future[T], work: Callable[[], T]) -> None:
    """Do it and keep the promise, unless nobody waits for it any more."""
    if not promise.set_running_or_notify_cancel():
        return
    try:
        promise.set_result(work())
    except Exception as error:  # noqa: BLE001 -- whatever it was: whoever asked is told
        promise.set_exception(error)
