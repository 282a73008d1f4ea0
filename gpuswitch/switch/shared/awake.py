"""Who keeps the machine awake: logind's inhibitor lock of a GPU, held while a switch or a virtual machine has the GPU.

This alone takes the locks and lets them go, one word at a time for each GPU: what is asked for while logind has not
answered yet comes after that, and what did not work is tried again for as long as it is so wished. A lock that somebody
else ends is taken again.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections import defaultdict
from contextlib import suppress
from enum import StrEnum

from gpuswitch.errors import KernelError
from gpuswitch.host.port import Systemd
from gpuswitch.log.fields import told
from gpuswitch.model.address import PciAddress
from gpuswitch.runtime.pause import Pause, within

_log = logging.getLogger(__name__)


class Why(StrEnum):
    """What a GPU needs the machine awake for."""

    SWITCH = "it is under way"
    OWNER = "a virtual machine or a process has it, or waits for it"


class Awake:
    """One for all GPUs; `seconds` is how long logind may take to answer."""

    def __init__(self, systemd: Systemd) -> None:
        self.seconds = 10.0
        self._systemd = systemd
        self._needs: defaultdict[PciAddress, set[Why]] = defaultdict(set)
        self._held: dict[PciAddress, bool] = {}
        """Whether a GPU has its lock; left out where nobody knows: an earlier run of the service may have taken it."""
        self._tasks: dict[PciAddress, asyncio.Task[None]] = {}
        self._tries: defaultdict[PciAddress, asyncio.Future[KernelError | None]] = defaultdict(_future)
        self._hurry: defaultdict[PciAddress, asyncio.Event] = defaultdict(asyncio.Event)
        self._watches: dict[PciAddress, asyncio.Task[None]] = {}
        """Of the locks that are held."""
        self._stopped = False

    def need(self, gpu: PciAddress, why: Why, *, needed: bool) -> None:
        """From now on, or not any more. What follows from it is done by and by; `settled` waits for it."""
        needs = self._needs[gpu]
        before = bool(needs)
        (needs.add if needed else needs.discard)(why)
        if bool(needs) != before:
            self._see_to(gpu)

    async def settled(self, gpu: PciAddress) -> None:
        """Until the machine is kept awake for this GPU, where it needs that, and else not for this one.

        Raises:
            KernelError: what logind said; it is tried again.
        """
        while self._held.get(gpu) is not bool(self._needs[gpu]):
            self._see_to(gpu)
            tried = self._tries[gpu]
            await asyncio.wait([tried])
            if (error := tried.result()) is not None:
                raise error

    async def settled_if_possible(self, gpu: PciAddress) -> None:
        """As `settled`; what does not work is logged, and tried again."""
        with suppress(KernelError):
            await self.settled(gpu)

    async def let_go(self, gpu: PciAddress, why: Why) -> None:
        """It is not needed for that any more; until that has been seen to, where it was. As `settled_if_possible`."""
        if why in self._needs[gpu]:
            self.need(gpu, why, needed=False)
            await self.settled_if_possible(gpu)

    def stop(self) -> None:
        """The service stops. The locks that are held stay, for the next run of it to find."""
        self._stopped = True
        for task in (*self._tasks.values(), *self._watches.values()):
            task.cancel()

    def _see_to(self, gpu: PciAddress) -> None:
        if self._stopped:
            return
        if gpu in self._tasks:
            self._hurry[gpu].set()
            return
        self._tasks[gpu] = asyncio.create_task(self._seen_to(gpu))

    async def _seen_to(self, gpu: PciAddress) -> None:
        try:
            await self._until_done(gpu)
        finally:
            # At once, and not when the loop gets to it: what is wished in between would be nobody's.
            del self._tasks[gpu]

    async def _until_done(self, gpu: PciAddress) -> None:
        """Until logind has done what is wished, whatever is wished meanwhile."""
        pause, hurry = Pause(), self._hurry[gpu]
        while self._held.get(gpu) is not (wanted := bool(self._needs[gpu])):
            hurry.clear()
            error = await self._tried(gpu, wanted=wanted)
            tried, self._tries[gpu] = self._tries[gpu], _future()
            tried.set_result(error)
            if error is not None:
                _log.warning("%s", error, extra=told(GPU=gpu))
                await within(pause.seconds(), hurry)

    async def _tried(self, gpu: PciAddress, *, wanted: bool) -> KernelError | None:
        """Whatever becomes of it, until it is known nobody knows."""
        self._held.pop(gpu, None)
        if (watch := self._watches.pop(gpu, None)) is not None:
            watch.cancel()
        try:
            async with asyncio.timeout(self.seconds):
                await (self._systemd.inhibit(str(gpu)) if wanted else self._systemd.release(str(gpu)))
        except KernelError as error:
            return error
        except TimeoutError:
            what = "keep the machine awake for" if wanted else "let the machine sleep for"
            return KernelError(what, f"GPU {gpu}", errno.ETIMEDOUT, f"logind has not done it within {self.seconds:g} s")
        self._held[gpu] = wanted
        if wanted and not self._stopped:
            self._watches[gpu] = asyncio.create_task(self._watched(gpu))
        return None

    async def _watched(self, gpu: PciAddress) -> None:
        """Whatever holds a lock can be ended by anybody."""
        pause = Pause()
        while True:
            try:
                await self._systemd.uninhibited(str(gpu))
            except KernelError as error:
                _log.warning("%s", error, extra=told(GPU=gpu))
                await pause.wait()
            else:
                break
        text = "somebody has ended what keeps the machine awake for GPU %s: it is done anew"
        _log.warning(text, gpu, extra=told(GPU=gpu))
        del self._watches[gpu], self._held[gpu]
        self._see_to(gpu)


def _future() -> asyncio.Future[KernelError | None]:
    return asyncio.get_running_loop().create_future()
