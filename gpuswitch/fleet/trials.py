"""Trials: what is on vfio for a while goes home by itself when that is over.

As soon as nobody has it open: until then, its reason says who. Whoever keeps it there, or a virtual machine that gets
it, ends the trial before.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from gpuswitch.errors import Failed, GpuswitchError, InvalidArgument, KernelError, NotViable
from gpuswitch.gpu.actor import Actor
from gpuswitch.host.port import Host
from gpuswitch.log.fields import told
from gpuswitch.model.address import PciAddress
from gpuswitch.model.states import State
from gpuswitch.runtime.pause import Pause, whatever_happens
from gpuswitch.switch.record import TRIAL_IS_OVER

_log = logging.getLogger(__name__)


class Trials:
    """Of all GPUs, while the service runs. What was promised stands in the journal: the next one goes on with it."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._watches: dict[PciAddress, _Watch] = {}
        self._stopping = False

    def follow(self, actors: Mapping[PciAddress, Actor]) -> None:
        """Wait for the end of every trial that there is now, and for no other."""
        for address, watch in list(self._watches.items()):
            if actors.get(address) is not watch.actor or not watch.is_needed:
                watch.stop()
                del self._watches[address]
        for address, actor in actors.items():
            trial = actor.record.trial
            counted = trial is not None and trial.ends is not None and not actor.record.owned
            if counted and not self._stopping and address not in self._watches:
                self._watches[address] = _Watch(actor, self._host)

    def stop(self) -> None:
        """The service stops."""
        self._stopping = True
        for watch in self._watches.values():
            watch.stop()


class _Watch:
    """Of one trial of one GPU: over when that is home, or is not to go there by itself."""

    def __init__(self, actor: Actor, host: Host) -> None:
        self.actor = actor
        self._host = host
        self._trial = actor.record.trial
        self._asking = False
        """It has asked for the way home: from then on, that is a switch like any other."""
        self._told = ""
        self._about = told(GPU=actor.gpu.address)
        self._task = asyncio.create_task(whatever_happens(self._end, actor.gpu))

    @property
    def is_needed(self) -> bool:
        """Whether nothing has changed but the time. What a machine has asked for goes where that lets it go."""
        record = self.actor.record
        return record.trial == self._trial and not record.owned and not record.retired

    def stop(self) -> None:
        if not self._asking:
            self._task.cancel()
        if self._told and self.actor.record.noted == self._told:
            self.actor.record.note("")

    async def _end(self) -> None:
        await self._until_over()
        pause = Pause()
        while self.is_needed:
            await self.actor.runner.unwedged()
            await self.actor.runner.rest()
            if not self.is_needed:
                break
            error = await self._refused()
            if self.is_needed:
                if error is not None:
                    self._tell(error)
                await self._until_it_may_work(pause)

    async def _until_over(self) -> None:
        pause = Pause()
        while self._trial is not None and self._trial.ends is not None:
            try:
                await self._host.until(self._trial.ends)
                return
            except KernelError as error:
                _log.warning("%s: %s", self.actor.gpu.address, error, extra=self._about)
                await pause.wait()

    async def _refused(self) -> GpuswitchError | None:
        """Ask for the way home, and wait for its end; what refuses that now, and may not do so later."""
        self._asking = True
        try:
            switch = await self.actor.request(State.HOST, requester=TRIAL_IS_OVER)
            await switch.wait()
        except (NotViable, InvalidArgument) as error:
            self.actor.give_up_trial(f"the trial is over, and {self._stays}: {error}")
        except GpuswitchError as error:
            return error
        finally:
            self._asking = False
        return None

    @property
    def _stays(self) -> str:
        return f"{self.actor.gpu.address} stays where it is"

    def _tell(self, error: GpuswitchError) -> None:
        text = f"the trial is over, and {self._stays} for now: {error}"
        if self.actor.record.noted != text:
            self._told = text
            self.actor.record.note(text)
            _log.warning("%s", text, extra=self._about)

    async def _until_it_may_work(self, pause: Pause) -> None:
        """Until somebody has let go of it; where no event would tell of that, for a while."""
        try:
            holders = await self.actor.holders()
            if holders and all(holder.process for holder in holders):
                await self._host.processes.wait_for_change(holders)
                pause.over()
                return
        except (Failed, KernelError) as error:
            _log.warning("%s: %s", self.actor.gpu.address, error, extra=self._about)
        await pause.wait()
