"""Virtual machines and processes that ask for GPUs, have them, and are done with them.

Only managed GPUs are a machine's to have; what else it names is none of our business. Whoever asks gets all of its GPUs
or none.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Coroutine, Iterable, Sequence
from contextlib import suppress
from typing import Any

from gpuswitch.errors import BY_NAME, Failed, GpuswitchError, InProgress, Owned, Timeout
from gpuswitch.fleet.access import VfioAccess
from gpuswitch.fleet.aftermath import Aftermath
from gpuswitch.fleet.ownership import Ownership
from gpuswitch.gpu.actor import Actor
from gpuswitch.gpu.admission import belongs
from gpuswitch.host.port import Host
from gpuswitch.log.fields import about, told
from gpuswitch.model.address import PciAddress
from gpuswitch.model.owner import Owner
from gpuswitch.model.policy import AS_CONFIGURED, Options, Release
from gpuswitch.model.states import State
from gpuswitch.runtime.apart import apart
from gpuswitch.sentence import Sentence
from gpuswitch.switch.record import THE_SERVICE, Requester, Result
from gpuswitch.switch.shared.arbiter import Arbiter
from gpuswitch.switch.shared.clearing_up import ClearingUp

_log = logging.getLogger(__name__)


class Owners:
    """Who owns which of the GPUs that `actors` tells of at any time."""

    def __init__(self, actors: Callable[[], Iterable[Actor]], host: Host, arbiter: Arbiter) -> None:
        self._actors = actors
        self._host = host
        self._arbiter = arbiter
        self._access = VfioAccess(host, arbiter)
        self._ready = asyncio.Event()
        self._ownerships: dict[PciAddress, Ownership] = {}
        self._asking: dict[str, asyncio.Task[None]] = {}
        self._minded: set[asyncio.Task[None]] = set()
        self._stopping = False

    def start(self) -> None:
        """Take up what an earlier run of the service handed over."""
        for actor in self._actors():
            if actor.state is State.HOST:
                if actor.owner is not None:
                    actor.own(None)
                self._mind(actor)
            elif actor.owner is not None:
                actor.record.awaited = actor.state is State.VFIO
                self._take_up(actor, actor.owner)

    def ready(self) -> None:
        """The service has said that it is ready: whatever waits for that may be started."""
        self._ready.set()

    def stop(self) -> None:
        """The service stops. Who owns what is in the journal."""
        self._stopping = True
        for ownership in self._ownerships.values():
            ownership.over()
        for task in (*self._asking.values(), *self._minded):
            task.cancel()

    # What libvirt says ----------------------------------------------------------------------------------------------

    async def acquire(self, owner: Owner, addresses: Collection[PciAddress], requester: Requester) -> tuple[Actor, ...]:
        """Hand over every managed GPU that one of these functions belongs to, once all of them are on vfio-pci.

        Cancelled, it takes all of it back.

        Raises:
            GpuswitchError: one of them cannot be had; all are as they were, or on their way there.
        """
        return await self._acquired(owner, tuple(self._managed(addresses)), frozenset(addresses), requester)

    async def acquire_for_process(
        self, owner: Owner, actors: Sequence[Actor], requester: Requester, options: Options, user: int | None = None
    ) -> None:
        """Hand these over to a process that runs, as to a machine. They come home when it has ended.

        `user`: may open what they have on vfio as long as it runs. Cancelled, it takes all of it back.

        Raises:
            GpuswitchError: one of them cannot be had; all are as they were, or on their way there.
        """
        if user is not None:
            self._access.refuse(actors)
        await self._acquired(owner, tuple(actors), frozenset(), requester, options, user)

    async def _acquired(
        self,
        owner: Owner,
        actors: tuple[Actor, ...],
        addresses: frozenset[PciAddress],
        requester: Requester,
        options: Options = AS_CONFIGURED,
        user: int | None = None,
    ) -> tuple[Actor, ...]:
        """`addresses` are asked for, too, and are to move with them; they may be of others."""
        if not actors:
            return ()
        self._refuse(actors, owner)
        claims = self._claimed(actors, owner)
        # None of these is in the way of another: it moves too, or libvirt moves it.
        together = addresses.union(*(actor.gpu.functions for actor in actors))
        for actor in actors:
            actor.record.asked_with = together
        asking = asyncio.create_task(self._handed_over(claims, requester.on_behalf_of(owner), options))
        self._asking[owner.uuid] = asking
        try:
            await apart(asking)
            await self._access.clear(actors)
            if user is not None:
                await self._access.give(actors, user)
            if any(claim.is_released.is_set() for claim in claims):
                # At the moment when all were there: that was before anybody could hear of it.
                raise Failed(_given_up(owner))
        except BaseException as error:
            asking.cancel()
            await asyncio.wait([asking])
            for claim in claims:
                # Who asks for it next may do so at once.
                await self._access.take_back(claim.actor.record)
            self._take_back(claims)
            if isinstance(error, asyncio.CancelledError) and not _cancelling():
                raise Failed("the service is stopping" if self._stopping else _given_up(owner)) from None
            raise
        finally:
            if self._asking.get(owner.uuid) is asking:
                del self._asking[owner.uuid]
        for claim in claims:
            if self._ownerships.get(claim.actor.gpu.address) is claim:
                claim.actor.keep()
                claim.follow()
                if owner.process is None:
                    _mention_the_rest(claim.actor, owner, addresses)
        return actors

    def adopt(self, owner: Owner, addresses: Collection[PciAddress]) -> None:
        """This machine runs, with these functions."""
        for actor in self._managed(addresses):
            ownership = self._ownerships.get(actor.gpu.address)
            if actor.owner == owner and ownership is not None:
                ownership.opened()
            elif actor.owner is None and actor.state is State.VFIO:
                try:
                    actor.own(owner)
                except Failed as error:
                    # Nobody is there to be told.
                    _log.warning("%s", error, extra=told(GPU=actor.gpu.address, OWNER=owner.label))
                else:
                    self._take_up(actor, owner)
            else:
                gpu = actor.gpu.address
                extra = told(GPU=gpu, OWNER=owner.name)
                _log.warning("%s runs with %s, which is %s%s", owner, gpu, actor.state, _whose(actor), extra=extra)

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
            if actor.record.own_config.managed and wanted & set(actor.gpu.functions):
                yield actor

    def _refuse(self, actors: Sequence[Actor], owner: Owner) -> None:
        """Those that somebody else has, and is not about to be done with."""
        sentences = [
            belongs(actor.gpu.address, actor.owner)
            for actor in actors
            if actor.owner is not None and actor.owner != owner and not self._done_with(actor)
        ]
        if sentences:
            raise Owned(Sentence.joined("\n", sentences))

    def _done_with(self, actor: Actor) -> bool:
        ownership = self._ownerships.get(actor.gpu.address)
        return ownership is not None and (ownership.letting_go or ownership.is_released.is_set())

    def _claimed(self, actors: Sequence[Actor], owner: Owner) -> tuple[Ownership, ...]:
        """From the first moment on they belong to it, so that nobody else takes them.

        Raises:
            Failed: that cannot be written; none of them does.
        """
        claimed: dict[Actor, Owner | None] = {}
        back_to = [self._back_to(actor) for actor in actors]
        try:
            for actor in actors:
                before = actor.owner
                actor.own(owner)
                claimed[actor] = before
        except Failed:
            for actor, before in claimed.items():
                actor.own(before, again=True)
            raise
        for actor in actors:
            actor.record.awaited = True
        return tuple(self._begin(a, owner, back) for a, back in zip(actors, back_to, strict=True))

    def _back_to(self, actor: Actor) -> Release:
        """Where it is, or is going, now that somebody asks for it."""
        earlier = self._ownerships.get(actor.gpu.address)
        if earlier is not None and actor.record.owned:
            return earlier.back_to if actor.record.awaited else earlier.where_to
        return Release.STAY if actor.state in {State.DETACHING, State.VFIO} else Release.HOST

    async def _handed_over(self, claims: Sequence[Ownership], requester: Requester, options: Options) -> None:
        about(OWNER=requester.vm)
        actors = [claim.actor for claim in claims]
        seconds = min(actor.record.rules.acquire_seconds for actor in actors) + (options.wait_seconds or 0.0)
        try:
            async with asyncio.timeout(seconds):
                if len(actors) > 1:
                    await _refuse_all(actors, options)
                await _all_of(self._on_vfio(claim, requester, options) for claim in claims)
        except TimeoutError:
            names = " and ".join(str(actor.gpu.address) for actor in actors)
            raise Timeout(f"{names} could not be handed to {claims[0].owner} within {seconds:g} s") from None

    async def _on_vfio(self, claim: Ownership, requester: Requester, options: Options) -> None:
        """Have it on vfio-pci, past whatever else is under way, and free."""
        actor = claim.actor
        switch = None
        while switch is None:
            if actor.state is not State.DETACHING:
                if actor.switch is not None:
                    with suppress(GpuswitchError):
                        actor.cancel(actor.switch.id, requester)
                # Also where no switch of this run of the service is under way: what an earlier one left comes home.
                await actor.runner.rest()
            try:
                switch = await actor.request(State.VFIO, options, requester)
            except InProgress:
                # Somebody was faster, with other options, or has the turn at the driver: after that.
                await actor.runner.rest()
            await asyncio.sleep(0)
        await switch.wait()
        if switch.result is not Result.DONE:
            # As `to-vfio` has it, in kind and in words: whoever asked for a machine has the same in the way.
            kind = BY_NAME.get(switch.error, Failed)
            words = {"gpu": actor.gpu.address, "result": switch.result, "reason": switch.reason}
            raise kind(Sentence("cannot move {gpu} to vfio ({result}): {reason}", **words))
        await actor.runner.rest()
        if switch.requester != requester or not switch.count:
            # This switch has not done it, or not for us.
            await self._arbiter.awake.settled_if_possible(actor.gpu.address)
            await claim.until_free()

    def _begin(self, actor: Actor, owner: Owner, back_to: Release = Release.HOST) -> Ownership:
        earlier = self._ownerships.get(actor.gpu.address)
        if earlier is not None:
            earlier.over()
        clearing_up = ClearingUp(
            self._host, self._arbiter, lambda: actor.gpu.functions, owner=owner, may_start=self._ready
        )
        ownership = Ownership(
            actor,
            owner,
            processes=self._host.processes,
            clearing_up=clearing_up,
            access=self._access,
            back_to=back_to,
            ready=self._ready,
            ended=self._forget,
        )
        ownership.waits_for_another = earlier is not None and earlier.is_released.is_set()
        self._ownerships[actor.gpu.address] = ownership
        return ownership

    def _mind(self, actor: Actor) -> None:
        """It is home. Should libvirt have it in its books, whoever looks at it is told what libvirt does to it."""
        task = asyncio.create_task(Aftermath(actor, self._host).follow())
        self._minded.add(task)
        task.add_done_callback(self._minded.discard)

    def _forget(self, ownership: Ownership, *, cut_short: bool) -> None:
        if ownership.actor.state is State.HOST and not cut_short:
            self._mind(ownership.actor)
        if self._ownerships.get(ownership.actor.gpu.address) is ownership:
            del self._ownerships[ownership.actor.gpu.address]

    def _take_up(self, actor: Actor, owner: Owner) -> None:
        """It is on vfio-pci already, and maybe open: see who has it."""
        ownership = self._begin(actor, owner)
        ownership.opened()
        ownership.follow()

    def _take_back(self, claims: Iterable[Ownership]) -> None:
        """The machine does not get them. What it asked for once more meanwhile is left to that request."""
        for claim in claims:
            actor = claim.actor
            if self._ownerships.get(actor.gpu.address) is not claim:
                continue
            actor.record.awaited = False
            switch = actor.switch
            ours = switch is not None and switch.target is State.VFIO and switch.requester.vm == claim.owner.name
            if switch is not None and ours and claim.back_to is Release.HOST:
                with suppress(GpuswitchError):
                    actor.cancel(switch.id, THE_SERVICE.on_behalf_of(claim.owner))
            claim.given_up()


def _mention_the_rest(actor: Actor, owner: Owner, addresses: Collection[PciAddress]) -> None:
    rest = [str(function) for function in actor.gpu.functions if function not in addresses]
    if rest:
        text = f"{owner} has {actor.gpu.address} without {' and '.join(rest)}: name them in its XML as well"
        _log.warning("%s", text, extra=told(GPU=actor.gpu.address, OWNER=owner.name))
        actor.record.note(text)


async def _refuse_all(actors: Iterable[Actor], options: Options) -> None:
    """Before any of them moves: whatever keeps one of them keeps all."""
    refusals: list[GpuswitchError] = []
    for actor in actors:
        if not actor.state.moving:
            try:
                await actor.plan(State.VFIO, options)
            except InProgress:
                # It will be waited for.
                pass
            except GpuswitchError as error:
                refusals.append(error)
    if refusals:
        raise type(refusals[0])(Sentence.joined("\n", refusals))


async def _all_of(works: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Side by side; where one fails, the others are left. Raises what the first one raised."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in tasks:
            if task.done():
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _given_up(owner: Owner) -> str:
    return f"{owner} was given up before it had its GPU"


def _cancelling() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _whose(actor: Actor) -> str:
    return f" and belongs to {actor.owner}" if actor.owner else ""
