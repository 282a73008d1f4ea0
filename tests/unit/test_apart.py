"""Work that goes on where whoever waits for it does not."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest

from gpuswitch.runtime.apart import apart


async def _fail(begun: asyncio.Event, go_on: asyncio.Event) -> None:
    begun.set()
    await go_on.wait()
    raise ValueError("in vain")


async def test_what_it_comes_to_is_told() -> None:
    assert await apart(asyncio.ensure_future(asyncio.sleep(0, "done"))) == "done"
    at_once = asyncio.Event()
    at_once.set()
    with pytest.raises(ValueError, match="in vain"):
        await apart(asyncio.ensure_future(_fail(asyncio.Event(), at_once)))
    cancelled = asyncio.ensure_future(asyncio.sleep(0))
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await apart(cancelled)


async def test_it_goes_on_and_its_error_is_nobodys_when_whoever_waited_has_left() -> None:
    told: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: told.append(context))
    begun, go_on = asyncio.Event(), asyncio.Event()
    work = asyncio.ensure_future(_fail(begun, go_on))
    waiting = asyncio.ensure_future(asyncio.wait_for(apart(work), None))
    await begun.wait()
    waiting.cancel()
    await asyncio.wait([waiting])
    assert not work.done()
    go_on.set()
    await asyncio.wait([work])
    assert work.done()
    del work, waiting
    gc.collect()
    assert told == []
