"""`at_boot`: where the configuration wants a GPU when the machine has started. Done once in each boot, before READY.

Such a switch is as any other, but that nobody is there to be waited for, and no unit is stopped: systemd may be waiting
for us with its jobs. What cannot be moved stays where it is, and says why; nobody waits for it longer than
`LONGEST_SECONDS`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress

from gpuswitch.config.shown import called
from gpuswitch.errors import Failed, GpuswitchError, KernelError
from gpuswitch.gpu.actor import Actor
from gpuswitch.gpu.observe import whereabouts
from gpuswitch.host.looking import seen
from gpuswitch.host.port import Host
from gpuswitch.log.fields import told
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import HostFacts, PciFunction
from gpuswitch.model.policy import AtBoot, Busy, Options
from gpuswitch.model.states import State
from gpuswitch.sentence import Sentence
from gpuswitch.switch.journal.boot import BootNote, BootNotes
from gpuswitch.switch.record import AT_BOOT, Result

LONGEST_SECONDS = 120.0
"""For all GPUs together. The unit has 300 seconds to start, of which a recovery may take some."""
_TARGETS = {AtBoot.HOST: State.HOST, AtBoot.VFIO: State.VFIO}
_OPTIONS = Options(busy=Busy.REFUSE)
_log = logging.getLogger(__name__)


class AtBootSwitches:
    """Those of one start of the service."""

    def __init__(self, host: Host, notes: BootNotes) -> None:
        self._host = host
        self._notes = notes
        self._task: asyncio.Task[None] | None = None
        self._late = False

    async def done(self, actors: Iterable[Actor]) -> None:
        """Bring each to where it is wanted, if the machine is starting; returns after `LONGEST_SECONDS` at most."""
        wanted = [actor for actor in actors if _target(actor) is not None]
        if not wanted:
            return
        self._task = asyncio.create_task(self._work(wanted))
        await asyncio.wait([self._task], timeout=LONGEST_SECONDS)
        if self._task.done():
            if (fault := self._task.exception()) is not None:
                _log.critical("a fault of gpuswitch itself: not every GPU is where it is wanted", exc_info=fault)
            return
        self._late = True
        why = Sentence("it was not there within {seconds} s of the start", seconds=f"{LONGEST_SECONDS:g}")
        for actor in filter(_is_missing, wanted):
            _stays(actor, why)
            _take_back(actor)

    def stop(self) -> None:
        """The service stops."""
        if self._task is not None:
            self._task.cancel()

    async def _work(self, wanted: Sequence[Actor]) -> None:
        try:
            note = self._notes.load()
        except Failed as error:
            _stay(wanted, Sentence.of(error))
            return
        if note.over:
            return
        if (why := await self._no_boot(wanted)) is None:
            await asyncio.gather(*(self._until_host_drivers(actor) for actor in wanted if _is_to_leave(actor)))
            for actor in wanted:
                # Side by side, they would stand in each other's way at the driver that they share.
                note = await self._one(actor, note)
        else:
            _stay(wanted, why)
        with suppress(Failed):
            # Else the next start finds that the machine has started.
            self._notes.save(BootNote(note.begun, over=True))

    async def _no_boot(self, wanted: Sequence[Actor]) -> Sentence | None:
        """Why this is no start of the machine; None: it is.

        Hours later, whoever works with a GPU does not expect it to be taken away by a service that is started by hand.
        """
        try:
            async with asyncio.timeout(wanted[0].record.config.deadlines.inhibit):
                booting = await self._host.systemd.booting()
        except (KernelError, TimeoutError) as error:
            return Sentence("nobody can tell whether the machine is starting: {why}", why=str(error) or "no answer")
        return None if booting else Sentence("the machine has started already")

    async def _one(self, actor: Actor, note: BootNote) -> BootNote:
        """Move it, or say why not; the note as it is from then on."""
        target, gpu = _target(actor), actor.gpu.address
        if self._late or target is None or not _is_ours(actor):
            return note
        if gpu in note.begun:
            if _is_missing(actor):
                _stays(actor, Sentence("the service ended in the middle of that switch, and it is not tried again"))
            return note
        try:
            self._notes.save(note.with_begun(gpu))
            note = note.with_begun(gpu)
            switch = await actor.request(target, _OPTIONS, AT_BOOT)
            if self._late:
                # It was still being planned when the others were taken back.
                _take_back(actor)
            await switch.wait()
        except GpuswitchError as error:
            _stays(actor, Sentence.of(error))
        except Exception as fault:  # noqa: BLE001 -- whatever it was, it takes nothing from the others, and is told
            _log.critical("%s: a fault of gpuswitch itself", gpu, exc_info=fault, extra=told(GPU=gpu))
            _stays(actor, Sentence("a fault of gpuswitch itself: {fault}", fault=repr(fault)))
        else:
            if switch.result is Result.WEDGED:
                # Its reason says more.
                actor.record.missed_at_boot = True
                actor.record.tell()
            elif switch.result is not Result.DONE:
                _stays(actor, Sentence("the switch was not done: {result}", result=switch.result))
        return note

    async def _until_host_drivers(self, actor: Actor) -> None:
        """Until its host drivers have it, which udev loads while we start: what they are is the way home.

        Not longer than a probe may take; then it goes without, and comes home to what it had.
        """
        record, gpu = actor.record, actor.gpu.address
        changed = asyncio.Event()
        stop = self._host.watch(changed.set)
        try:
            async with asyncio.timeout(record.config.deadlines.probe):
                present = actor.gpu.present(await seen(self._host, actor.gpu.functions))
                expected = {f.address for f in present if f.driver is not None or await self._has_candidate(actor, f)}
                while not _bound(actor, await seen(self._host, expected), expected):
                    await changed.wait()
                    changed.clear()
        except TimeoutError:
            _log.warning(
                "%s: after %g s, host drivers do not have all of it; it is moved as it is, and comes home to that",
                gpu,
                record.config.deadlines.probe,
                extra=told(GPU=gpu),
            )
        finally:
            stop()

    async def _has_candidate(self, actor: Actor, function: PciFunction) -> bool:
        """Whether some driver is for it, that is not blacklisted. Nobody waits for what nobody can tell."""
        if function.makes_gpu and actor.record.own_config.host_driver:
            return True
        try:
            return bool(await self._host.reader(str(actor.gpu.address)).candidates(function.address))
        except KernelError as error:
            _log.warning("%s", error, extra=told(GPU=actor.gpu.address))
            return False


def _take_back(actor: Actor) -> None:
    """What is still under way is undone, as long as that is safe; nobody waits for it."""
    switch = actor.switch
    if switch is not None and switch.requester == AT_BOOT and switch.result is None:
        try:
            actor.cancel(switch.id, AT_BOOT)
        except GpuswitchError as error:
            _log.warning("%s", error, extra=told(GPU=actor.gpu.address))


def _target(actor: Actor) -> State | None:
    """Where it is wanted at boot; None: nobody says."""
    return _TARGETS.get(actor.record.own_config.at_boot)


def _is_ours(actor: Actor) -> bool:
    """Whether it is to be moved at all: it is there, and belongs to no virtual machine."""
    return bool(actor.gpu.present(actor.record.facts)) and not actor.record.owned


def _is_missing(actor: Actor) -> bool:
    """Whether it should be elsewhere by now."""
    return _is_ours(actor) and actor.state is not _target(actor)


def _bound(actor: Actor, facts: HostFacts, expected: Collection[PciAddress]) -> bool:
    """Whether a driver has each of these that is there, and has made its nodes."""
    present = [function for function in actor.gpu.present(facts) if function.address in expected]
    return all(function.driver is not None and not function.nodes_pending for function in present)


def _is_to_leave(actor: Actor) -> bool:
    return _target(actor) is State.VFIO and actor.state is not State.VFIO


def _stay(wanted: Iterable[Actor], why: Sentence) -> None:
    """None of these that should be elsewhere by now is moved."""
    for actor in filter(_is_missing, wanted):
        _stays(actor, why)


def _stays(actor: Actor, why: Sentence) -> None:
    """It is not where it is wanted: whoever looks at it is told, until it moves."""
    record = actor.record
    address, target = record.gpu.address, _target(actor)
    gpu = called(record.own_config.name, address)
    if record.state.stable:
        text = Sentence(
            "at_boot is {target}, and {gpu} stays {place}: {why}", target=target, gpu=gpu, place=record.place(), why=why
        )
    else:
        text = Sentence(
            "at_boot is {target}, and {gpu} is {state} ({where}): {why}",
            target=target,
            gpu=gpu,
            state=record.state,
            where=whereabouts(record.gpu, record.fresh_facts_if_possible()),
            why=why,
        )
    _log.warning("%s", text, extra=told(GPU=address))
    record.missed_at_boot = True
    record.note(text)
