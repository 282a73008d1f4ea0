"""Virtual machines that ask for GPUs, have them, and are done with them.

Only managed GPUs are theirs to have; what else a machine names is none of our business. A machine gets all of its GPUs
or none.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Coroutine, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from gpuswitch.errors import Failed, GpuswitchError, Owned, Timeout
from gpuswitch.model.address import PciAddress
from gpuswitch.model.owner import Owner
from gpuswitch.model.states import State
from gpuswitch.switch.actor import Actor
from gpuswitch.switch.arbiter import Arbiter
from gpuswitch.switch.host import Processes
from gpuswitch.switch.ownership import Ownership
from gpuswitch.switch.record import Asker, Result

_log = logging.getLogger(__name__)


class Owners:
    """Who owns which of the GPUs that `actors` tells of at any time."""

    def __init__(self, actors: Callable[[], Iterable[Actor]], processes: Processes, arbiter: Arbiter) -> None:
        self._actors = actors
        self._processes = processes
        self._arbiter = arbiter
        self._ownerships: dict[PciAddress, Ownership] = {}
        self._asking: dict[str, asyncio.Task[None]] = {}
        self._taking_back: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Take up what an earlier run of the service handed over."""
        for actor in self._actors():
            if actor.owner is not None:
                ownership = self._begin(actor, actor.owner)
                ownership.opened()
                ownership.follow()
                self._aside(self._arbiter.keep_up(actor.gpu.address, actor.config.deadlines))

    def stop(self) -> None:
        """The service stops. Who owns what is in the journal."""
        for ownership in self._ownerships.values():
            ownership.over()
        for asking in self._asking.values():
            asking.cancel()

    # What libvirt says ----------------------------------------------------------------------------------------------

    async def acquire(self, owner: Owner, addresses: Collection[PciAddress], asker: Asker) -> tuple[Actor, ...]:
        """Hand over every managed GPU that one of these functions belongs to, once all of them are on vfio-pci.

        Cancelled, it takes all of it back.

        Raises:
            GpuswitchError: one of them cannot be had; all are as they were, or on their way there.
        """
        actors = tuple(self._managed(addresses))
        if not actors:
            return ()
        self._refuse(actors, owner)
        before = {actor: actor.state for actor in actors}
        self._claim(actors, owner)
        asking = asyncio.create_task(self._handed_over(actors, owner, replace(asker, vm=owner.name)))
        self._asking[owner.uuid] = asking
        try:
            await asyncio.shield(asking)
        except BaseException as error:
            asking.cancel()
            await asyncio.wait([asking])
            self._take_back(before, owner)
            if isinstance(error, asyncio.CancelledError) and asking.cancelled() and not _cancelling():
                raise Failed(f"{owner} was given up before it had its GPU") from None
            raise
        finally:
            if self._asking.get(owner.uuid) is asking:
                del self._asking[owner.uuid]
        for actor in actors:
            self._ownerships[actor.gpu.address].follow()
            self._mention_the_rest(actor, owner, addresses)
        return actors

    def adopt(self, owner: Owner, addresses: Collection[PciAddress]) -> None:
        """This machine runs, with these functions."""
        for actor in self._managed(addresses):
            ownership = self._ownerships.get(actor.gpu.address)
            if actor.owner == owner and ownership is not None:
                ownership.opened()
            elif actor.owner is None and actor.state is State.VFIO:
                self._adopt(actor, owner)
            else:
                _log.warning("%s runs with %s, which is %s%s", owner, actor.gpu.address, actor.state, _whose(actor))

    def release(self, owner: Owner, reason: str) -> None:
        """This machine is gone. What it does not own is left alone; what goes home does so by itself."""
        if asking := self._asking.get(owner.uuid):
            asking.cancel()
        for actor in self._actors():
            if actor.owner == owner and (ownership := self._ownerships.get(actor.gpu.address)):
                ownership.released(reason)

    # Handing over ---------------------------------------------------------------------------------------------------

    def _managed(self, addresses: Collection[PciAddress]) -> Iterable[Actor]:
        wanted = set(addresses)
        for actor in self._actors():
            if actor.config.gpu(actor.gpu.address).managed and wanted & set(actor.gpu.functions):
                yield actor

    def _refuse(self, actors: Sequence[Actor], owner: Owner) -> None:
        """Those that somebody else has."""
        taken = [a for a in actors if a.owner not in (None, owner) and not self._letting_go(a)]
        if taken:
            raise Owned("\n".join(f"{a.gpu.address} belongs to {a.owner}: shut that down first" for a in taken))

    def _letting_go(self, actor: Actor) -> bool:
        ownership = self._ownerships.get(actor.gpu.address)
        return ownership is not None and ownership.letting_go

    def _claim(self, actors: Sequence[Actor], owner: Owner) -> None:
        """From the first moment on they belong to it, so that nobody else takes them.

        Raises:
            Failed: that cannot be written; none of them does.
        """
        claimed: dict[Actor, Owner | None] = {}
        try:
            for actor in actors:
                before = actor.owner
                actor.own(owner)
                claimed[actor] = before
        except Failed:
            for actor, before in claimed.items():
                with suppress(Failed):
                    actor.own(before)
            raise
        for actor in actors:
            actor.awaited = True
            self._begin(actor, owner)

    async def _handed_over(self, actors: Sequence[Actor], owner: Owner, asker: Asker) -> None:
        seconds = min(actor.config.gpu(actor.gpu.address).rules.acquire_seconds for actor in actors)
        try:
            async with asyncio.timeout(seconds):
                if len(actors) > 1:
                    await self._refuse_all(actors)
                await _all_of(self._on_vfio(actor, asker) for actor in actors)
        except TimeoutError:
            names = " and ".join(str(actor.gpu.address) for actor in actors)
            raise Timeout(f"{names} could not be handed to {owner} within {seconds:g} s") from None

    async def _refuse_all(self, actors: Iterable[Actor]) -> None:
        """Before any of them moves: whatever keeps one of them keeps all."""
        refusals: list[GpuswitchError] = []
        for actor in actors:
            if not actor.state.moving:
                try:
                    await actor.plan(State.VFIO)
                except GpuswitchError as error:
                    refusals.append(error)
        if refusals:
            raise type(refusals[0])("\n".join(map(str, refusals)))

    async def _on_vfio(self, actor: Actor, asker: Asker) -> None:
        """Have it on vfio-pci, past whatever else is under way."""
        while actor.state in {State.REATTACHING, State.RECOVERING}:
            if actor.switch is not None:
                with suppress(GpuswitchError):
                    actor.cancel(actor.switch.id, asker)
            await actor.rest()
        switch = await actor.request(State.VFIO, asker=asker)
        await switch.wait()
        if switch.result is not Result.DONE:
            raise Failed(f"{actor.gpu.address} could not be handed to the virtual machine {asker.vm}: {switch.reason}")
        await actor.rest()
        if switch.asker != asker or not switch.count:
            # This switch has not done it, or not for us.
            await self._arbiter.keep_up(actor.gpu.address, actor.config.deadlines)

    def _begin(self, actor: Actor, owner: Owner) -> Ownership:
        if before := self._ownerships.get(actor.gpu.address):
            before.over()
        ownership = Ownership(actor, owner, self._processes, self._arbiter)
        self._ownerships[actor.gpu.address] = ownership
        return ownership

    def _adopt(self, actor: Actor, owner: Owner) -> None:
        try:
            actor.own(owner)
        except Failed as error:
            _log.warning("%s", error)
            return
        ownership = self._begin(actor, owner)
        ownership.opened()
        ownership.follow()
        self._aside(self._arbiter.keep_up(actor.gpu.address, actor.config.deadlines))

    def _mention_the_rest(self, actor: Actor, owner: Owner, addresses: Collection[PciAddress]) -> None:
        rest = [str(function) for function in actor.gpu.functions if function not in addresses]
        if rest:
            text = f"{owner} has {actor.gpu.address} without {' and '.join(rest)}: name them in its XML as well"
            _log.warning("%s", text)
            actor.note(text)

    # Taking back ----------------------------------------------------------------------------------------------------

    def _take_back(self, before: dict[Actor, State], owner: Owner) -> None:
        for actor, state in before.items():
            if ownership := self._ownerships.get(actor.gpu.address):
                ownership.over()
            actor.awaited = False
            if actor.owner == owner:
                self._aside(self._taken_back(actor, owner, state))

    async def _taken_back(self, actor: Actor, owner: Owner, before: State) -> None:
        """As it was before this machine asked for it, or where it was going then."""
        while actor.state.moving and actor.owner == owner:
            if actor.switch is not None and actor.switch.asker.vm == owner.name:
                with suppress(GpuswitchError):
                    actor.cancel(actor.switch.id, Asker(service=True, vm=owner.name))
            await actor.rest()
        if actor.owner not in {None, owner} or actor.awaited:
            return
        if actor.state is State.VFIO and before is not State.VFIO:
            try:
                await (await actor.request(State.HOST, asker=Asker(service=True, vm=owner.name))).wait()
                await actor.rest()
            except GpuswitchError as error:
                actor.note(f"{actor.gpu.address} is not for {owner} any more, and cannot come home: {error}")
                # Once more, when the grace is over.
                self._begin(actor, owner).follow()
                return
        if actor.owner == owner and not actor.awaited:
            actor.own(None)
        if actor.owner is None:
            await actor.pay()

    def _aside(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._taking_back.add(task)
        task.add_done_callback(self._taking_back.discard)


async def _all_of(works: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Side by side; where one fails, the others are left. Raises what the first one raised."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _cancelling() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _whose(actor: Actor) -> str:
    return f" and belongs to {actor.owner}" if actor.owner else ""
