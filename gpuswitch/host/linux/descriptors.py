"""Descriptors that become readable when something has happened: a process has ended, inotify has something to tell."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import ExitStack


def when_readable(stack: ExitStack, descriptor: int, readable: Callable[[], None]) -> None:
    """Call it on the event loop, once: it stays readable, and nobody reads it. The stack's end is that of the wait."""
    loop = asyncio.get_running_loop()

    def told() -> None:
        loop.remove_reader(descriptor)
        readable()

    loop.add_reader(descriptor, told)
    stack.callback(loop.remove_reader, descriptor)
