"""Looks at the host: one that could not see everything is none, and is taken again.

What follows from a look is done to the host: an empty one would mean that every GPU has left, and that none of them has
anything to restore.
"""

from __future__ import annotations

import logging
from collections.abc import Collection

from gpuswitch.errors import Failed, KernelError
from gpuswitch.host.port import Host
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import HostFacts
from gpuswitch.runtime.pause import LateError, Pause, answered
from gpuswitch.sentence import Sentence

_log = logging.getLogger(__name__)


async def seen(host: Host, only: Collection[PciAddress] | None = None) -> HostFacts:
    """What a look shows, as soon as one has seen everything; `only`: as in `gpuswitch.host.port.Host.look`."""
    pause = Pause()
    while True:
        try:
            return host.look(only)
        except KernelError as error:
            _log.warning("%s: it is looked again", error)
        await pause.wait()


async def seen_within(seconds: float, host: Host, only: Collection[PciAddress] | None = None) -> HostFacts:
    """The same, for whoever waits for an answer.

    Raises:
        Failed: no look has seen everything in that time.
    """
    try:
        async with answered(seconds):
            return await seen(host, only)
    except LateError:
        try:
            return host.look(only)
        except KernelError as error:
            raise Failed(Sentence("{error}; nothing was changed", error=error)) from error
