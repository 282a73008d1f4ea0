"""The fleet: every GPU of the host, each with its actor; finds them, names them, follows them as they come and go."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Coroutine, Iterable, Iterator, Mapping
from typing import Any

from gpuswitch.config.settings import Config
from gpuswitch.config.shown import called
from gpuswitch.errors import Failed, InvalidArgument, KernelError, NoSuchGpu, NotViable
from gpuswitch.fleet.at_boot import AtBootSwitches
from gpuswitch.fleet.fitting import fitted
from gpuswitch.fleet.host_drivers import missing_host_drivers
from gpuswitch.fleet.matching import NOWHERE, found
from gpuswitch.fleet.misfit import Misfit
from gpuswitch.fleet.owners import Owners
from gpuswitch.fleet.trials import Trials
from gpuswitch.gpu.absent import restore_for_absent
from gpuswitch.gpu.actor import Actor
from gpuswitch.gpu.observer import Observer
from gpuswitch.gpu.retry import Pace, Retry
from gpuswitch.host.looking import seen
from gpuswitch.host.port import Host, Pending
from gpuswitch.log.fields import about_nothing, told
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import HostFacts
from gpuswitch.model.gpu import Gpu, discover
from gpuswitch.model.states import State
from gpuswitch.runtime.pause import Pause
from gpuswitch.sentence import Sentence
from gpuswitch.switch.journal.journal import Entry, Journal
from gpuswitch.switch.record import Drift
from gpuswitch.switch.restore_state import NOTHING_TO_RESTORE
from gpuswitch.switch.shared.arbiter import Arbiter

_log = logging.getLogger(__name__)

REST_SECONDS = 0.1
"""How long a look is good for: a driver that binds makes a dozen events in a moment."""
SWITCH_SECONDS = 1.0
"""How long a change may wait for a look while some GPU is being switched."""


class Fleet:
    """All actors by address; `facts` is the last look at the whole host.

    `config` has each table under the address of its GPU; `misfits` are what in it is about none, and `warnings` what
    else it makes sense to look after.
    """

    def __init__(self, host: Host, config: Config, journal: Journal, observer: Observer) -> None:
        self.config = config
        self.misfits: tuple[Misfit, ...] = ()
        self.warnings: tuple[str, ...] = ()
        self._written = self._found = config
        self._places = NOWHERE
        self.actors: dict[PciAddress, Actor] = {}
        self.facts = HostFacts({}, iommu=False, vfio_available=False)
        self._host = host
        self._journal = journal
        self._arbiter = Arbiter(host.systemd)
        self._arbiter.awake.seconds = config.deadlines.inhibit
        self._observer = observer
        self._unwatch: Callable[[], None] | None = None
        self._looked = float("-inf")
        self._open = self._stopping = False
        self._regrouped = False
        """Whether a GPU that is under way, or away from home, has other functions than it will have there."""
        self.owners = Owners(lambda: list(self.actors.values()), host, self._arbiter)
        self._trials = Trials(host)
        self._at_boot = AtBootSwitches(host, journal.boot)
        self._restoring: dict[PciAddress, asyncio.Task[None]] = {}
        self._retries: dict[PciAddress, Retry] = {}
        self._paces: dict[PciAddress, Pace] = {}
        self._put_off: asyncio.Handle | None = None
        self._again: asyncio.Handle | None = None
        self._blind = Pause()
        self._screen_unknown = False

    async def start(self) -> None:
        """Find every GPU, bring home what a dead daemon left half-way, move what is wanted elsewhere at boot.

        The host is followed from here on.
        """
        self._unwatch = self._host.watch(self._look_soon)
        left = await self._read()
        await asyncio.gather(*(self._outlive(address, entry) for address, entry in left.items()))
        await self._find_lost(left)
        self.look()
        while self._again is not None:
            # Nobody is told that the service is ready while it does not know of every GPU.
            await self._blind.wait()
            self.look()
        for address, entry in (await self._read()).items():
            if address not in self.actors:
                self._arbiter.claim(address, entry.restore_state)
        await _each(self.actors.values(), Actor.adopt)
        self.owners.start()
        # Nobody is told that the service is ready while a machine runs whose host may fall asleep.
        owned = [address for address, actor in self.actors.items() if actor.record.owned]
        await asyncio.gather(*map(self._arbiter.awake.settled_if_possible, owned))
        await self._at_boot.done(self.actors.values())

    async def _outlive(self, gpu: PciAddress, entry: Entry) -> None:
        """What a service that died had sent to the kernel goes on: nothing is believed before it is over, for as long
        as an unbind may take. After that, its GPU is wedged.
        """
        unfinished, kernel = entry.unfinished, self._host.kernel(str(gpu))
        if unfinished is None or unfinished.worker is None or entry.stuck is not None:
            return
        try:
            async with asyncio.timeout(self.config.deadlines.unbind):
                if kernel.adopt(Pending(unfinished.title, worker=unfinished.worker)):
                    await kernel.returned()
        except TimeoutError:
            _log.warning(
                "%s: what the last run of the service had sent is not over: '%s'",
                gpu,
                unfinished.title,
                extra=told(GPU=gpu),
            )
        except KernelError as error:
            _log.warning("%s: %s", gpu, error, extra=told(GPU=gpu))

    async def _find_lost(self, left: Mapping[PciAddress, Entry]) -> None:
        """A service that died between a removal and the rescan has left GPUs off the bus."""
        facts = await seen(self._host)
        there = facts.functions
        self._find(facts)
        self._fit([Gpu(address, tuple(entry.restore_state.functions)) for address, entry in left.items()], facts)
        for address, entry in left.items():
            lost = [function for function in entry.restore_state.functions if function not in there]
            if entry.unfinished is None or not lost or self.config.gpu(address).rules.rescan_on_failure is False:
                continue
            try:
                async with asyncio.timeout(self.config.deadlines.rescan):
                    await self._host.kernel(str(address)).rescan(tuple(entry.restore_state.functions))
            except (KernelError, TimeoutError) as error:
                _log.warning(
                    "%s is not on the PCI bus, and cannot be found again: %s", address, error, extra=told(GPU=address)
                )

    async def restore_deferred(self) -> None:
        """Give back what could not be waited for before READY: whoever waits for us may be what it waits for."""
        self._open = True
        self.owners.ready()
        for address, entry in (await self._read()).items():
            if address not in self.actors:
                await self._restore_for_absent(address, entry)
        await _each(self.actors.values(), Actor.restore_deferred_at_start)
        self._retry()
        self._follow_trials()

    async def _read(self) -> Mapping[PciAddress, Entry]:
        """All that is kept for any GPU, there or not, as soon as it can be read."""
        pause = Pause()
        while True:
            try:
                return {address: self._journal.load(address) for address in self._journal.kept()}
            except Failed as error:
                _log.warning("%s: it is tried again", error)
            await pause.wait()

    async def _restore_for_absent(self, gpu: PciAddress, entry: Entry) -> None:
        """It left the bus while nobody looked."""
        await restore_for_absent(gpu, entry.restore_state, self._host, self._arbiter, self.config.deadlines)
        self._arbiter.set_restore_state(gpu, NOTHING_TO_RESTORE)
        try:
            self._journal.save(gpu, Entry())
        except Failed as error:
            _log.error("%s", error, extra=told(GPU=gpu))

    def _restore_soon(self, actor: Actor, drift: Drift | None) -> None:
        """Give back what no switch will: a GPU that left the bus does not come home, and one that somebody else brought
        home is there already.
        """
        address = actor.gpu.address
        gone = actor.state is State.ABSENT and actor.record.has_shared_to_restore and not actor.record.owned
        home = actor.state is State.HOST and drift is not None
        if self._open and (gone or home) and address not in self._restoring:
            self._restoring[address] = asyncio.create_task(_each([actor], Actor.restore_deferred))
            self._restoring[address].add_done_callback(lambda _: self._restoring.pop(address))

    def _follow_trials(self) -> None:
        if self._open:
            self._trials.follow(self.actors)

    def _retry(self) -> None:
        """See to it that what did not come home is brought there when that may work."""
        for address, retry in list(self._retries.items()):
            if self.actors.get(address) is not retry.actor or not retry.is_needed:
                retry.stop()
                del self._retries[address]
        for address, actor in self.actors.items():
            if not actor.record.stays_out:
                if not actor.busy:
                    self._paces.pop(address, None)
            elif address in self._retries:
                self._retries[address].see(self.facts)
            elif self._open and not actor.busy:
                self._retries[address] = Retry(actor, self._host, self._paces.setdefault(address, Pace()))

    async def stop(self, reason: str) -> None:
        """End every switch at the next safe point. A GPU that the kernel has is left to it."""
        self._stopping = True
        if self._unwatch is not None:
            self._unwatch()
        for later in filter(None, (self._put_off, self._again)):
            later.cancel()
        for retry in self._retries.values():
            retry.stop()
        self._trials.stop()
        self._at_boot.stop()
        self.owners.stop()
        await asyncio.gather(*(actor.stop(reason) for actor in self.actors.values()))
        self._arbiter.awake.stop()

    def _look_soon(self) -> None:
        """Something happened: look at once, but not at each event of a burst, nor at each of a switch that runs.

        Its actor heeds no look before its end, and a look at everything each time would cost more than the switch.
        """
        if self._put_off is not None:
            return
        loop = asyncio.get_running_loop()
        moving = any(actor.state.moving for actor in self.actors.values())
        due = loop.time() + SWITCH_SECONDS if moving else self._looked + REST_SECONDS
        if due <= loop.time():
            self.look()
        else:
            self._put_off = loop.call_at(due, self.look)

    def _look_in_a_while(self) -> None:
        """Look once at all that a switch has brought about: its last events are yet to come.

        At once where a GPU was to have other functions as soon as it is home: the next switch is of these.
        """
        if self._regrouped:
            self.look()
            return
        if self._stopping:
            return
        if self._put_off is not None:
            self._put_off.cancel()
        self._put_off = asyncio.get_running_loop().call_later(REST_SECONDS, self.look)

    def look(self) -> None:
        """Look at the host and tell every actor what became of its GPU.

        Where the look, or one into the journal, could not see everything, nothing follows from it, and it is looked
        again at the next event, or after a while. Whoever has called for it, it is about all GPUs.
        """
        about_nothing(self._look)

    def _look(self) -> None:
        for later in filter(None, (self._put_off, self._again)):
            later.cancel()
        self._put_off = self._again = None
        loop = asyncio.get_running_loop()
        self._looked = loop.time()
        try:
            self._take_in(self._host.look())
        except (KernelError, Failed) as error:
            seconds = self._blind.seconds()
            _log.warning("%s: nothing follows from this look, and the next one comes in %g s at most", error, seconds)
            self._again = loop.call_later(seconds, self.look)
        else:
            self._blind.over()
        # Nobody has to see the host for that.
        self._follow_trials()

    def _take_in(self, facts: HostFacts) -> None:
        """Raises `Failed` where the journal of a GPU cannot be read now; it is not known then."""
        self.facts = facts
        nowhere = self._find(facts)
        gpus = {gpu.address: gpu for gpu in self._gpus()}
        absent = [actor.gpu for address, actor in self.actors.items() if address not in facts.functions]
        self._tell_misfits((*nowhere, *self._fit([*gpus.values(), *absent], facts)))
        self._tell_warnings(facts)
        self._tell_of_the_screen(facts)
        for address, actor in list(self.actors.items()):
            if address not in gpus and address in self.facts.functions:
                # Not gone from the bus: the config gave its functions to another GPU.
                del self.actors[address]
                actor.leave("its functions belong to another GPU now")
                self._observer.vanished(actor)
        for address, actor in self.actors.items():
            self._restore_soon(actor, actor.see(self.facts, gpus.get(address)))
        for address, gpu in gpus.items():
            if address not in self.actors:
                actor = Actor(
                    gpu,
                    self.facts,
                    host=self._host,
                    config=self.config,
                    journal=self._journal,
                    arbiter=self._arbiter,
                    observer=self._observer,
                    rested=self.look,
                    rested_as_wanted=self._look_in_a_while,
                )
                self.actors[address] = actor
                self._observer.appeared(actor)
        self._retry()

    def _gpus(self) -> Iterator[Gpu]:
        """Every GPU as hardware and config have it now; one that is under way, or away from home, as it set out.

        So a function belongs to one GPU at any time, and a new configuration of `members` waits for the way home.
        """
        found = discover(self.facts, self._found.members)
        bound = [actor.gpu for actor in self.actors.values() if actor.bound] if self.actors else self._away(found)
        self._regrouped = not set(bound) <= set(found)
        yield from bound
        theirs = {function for gpu in bound for function in gpu.functions}
        for gpu in found:
            if gpu.address not in theirs:
                yield Gpu(gpu.address, tuple(function for function in gpu.functions if function not in theirs))

    def _away(self, found: Iterable[Gpu]) -> list[Gpu]:
        """At the first look: the GPUs that an earlier run of the service moved, with what it moved and what is free."""
        journals = {address: self._journal.load(address).restore_state.functions for address in self._journal.kept()}
        restore_state = {
            a: set(functions) for a, functions in journals.items() if functions and a in self.facts.functions
        }
        moved = set().union(*restore_state.values())
        free = {gpu.address: set(gpu.functions) - moved for gpu in found}
        return [Gpu(a, tuple(sorted(functions | free.get(a, set())))) for a, functions in restore_state.items()]

    def reconfigure(self, config: Config) -> None:
        """Follow a new configuration. A switch under way ends under the deadlines that it began with."""
        self._written = config
        self._arbiter.awake.seconds = config.deadlines.inhibit
        # Also where no look sees everything now. What does not fit is told once more after the next that does.
        self._find(self.facts)
        self._fit([actor.gpu for actor in self.actors.values()], self.facts)
        self.misfits = ()
        self.warnings = ()
        self.look()
        for actor in self.actors.values():
            actor.record.tell()

    def _find(self, facts: HostFacts) -> tuple[Misfit, ...]:
        """Find the GPUs that tables tell by what they are; the tables that fit none, or several."""
        self._found, self._places, misfits = found(self._written, facts, self._places)
        return misfits

    def _fit(self, gpus: Iterable[Gpu], facts: HostFacts) -> tuple[Misfit, ...]:
        """Put each table under the address of its GPU; what fits none of them."""
        self.config, misfits = fitted(self._found, gpus, facts)
        for actor in self.actors.values():
            actor.record.config = self.config
        return misfits

    def _tell_of_the_screen(self, facts: HostFacts) -> None:
        """No GPU is refused for a screen that nobody knows of: so whoever relies on that is told, once."""
        displays = [f for f in facts.functions.values() if f.may_have_screen]
        unknown = bool(displays) and not any(f.boot_display for f in displays)
        if unknown and not self._screen_unknown:
            _log.warning(
                "nobody can tell which display this machine booted on, so no GPU is kept on the host for its sake; "
                "`allow_boot_display` has no effect"
            )
        self._screen_unknown = unknown

    def _tell_misfits(self, misfits: tuple[Misfit, ...]) -> None:
        """Once, and not again at each look."""
        for misfit in misfits:
            if misfit not in self.misfits:
                _log.warning("%s", misfit.sentence)
        self.misfits = misfits

    def _tell_warnings(self, facts: HostFacts) -> None:
        """The same of what is no matter of one GPU, or is none yet."""
        missing = missing_host_drivers(self._found, facts, self._host.installed)
        warnings = (*self._written.warnings, *missing)
        for sentence in warnings:
            if sentence not in self.warnings:
                _log.warning("%s", sentence)
        self.warnings = warnings

    def refuse_misfits(self, functions: Collection[PciAddress]) -> None:
        """A machine does not get what was meant to be managed, and is not.

        Raises:
            NotViable: it asks for some of that.
        """
        if found := [misfit.sentence for misfit in self.misfits if not misfit.functions.isdisjoint(functions)]:
            raise NotViable(Sentence.joined("\n", found))

    def stalled(self) -> list[Actor]:
        """Actors that stand still in the program itself."""
        return [actor for actor in self.actors.values() if actor.stalled]

    def find(self, selector: str) -> Actor:
        """The GPU by address, in any spelling, of any of its functions, or by its name in any case; "": see `_only`.

        Raises:
            NoSuchGpu, InvalidArgument: with the names that would do.
        """
        if not selector:
            return self._only()
        name = selector.casefold()
        for gpu in self.config.gpus:
            if gpu.name.casefold() == name and gpu.address in self.actors:
                return self.actors[gpu.address]
        try:
            address = PciAddress.parse(selector)
        except InvalidArgument:
            why = _said(misfit for misfit in self.misfits if misfit.name.casefold() == name)
            unknown = Sentence(
                "no GPU is named {name}; this host has {gpus}", name=repr(selector[:80]), gpus=self._names()
            )
            raise NoSuchGpu(why or unknown) from None
        for actor in self.actors.values():
            if address in actor.gpu.functions:
                return actor
        why = _said(misfit for misfit in self.misfits if address in misfit.addresses)
        unknown = Sentence(
            "{address} is not a GPU of this host; this host has {gpus}", address=address, gpus=self._names()
        )
        raise NoSuchGpu(why or unknown)

    def _only(self) -> Actor:
        """The only GPU, or the only one with a table in the configuration.

        Accelerators do not count as the only GPU: one may be the processor's own, which nobody means.
        """
        drawing = [a for a in self.actors.values() if a.state is State.ABSENT or a.gpu.draws(a.record.facts)]
        if len(drawing) == 1:
            return drawing[0]
        managed = [actor for actor in self.actors.values() if actor.record.own_config.managed]
        if len(managed) == 1:
            return managed[0]
        if not self.actors:
            raise NoSuchGpu(Sentence("this host has no GPU"))
        if len(self.actors) == 1:
            raise InvalidArgument(Sentence("this host has 1 GPU; name one of {gpus}", gpus=self._names()))
        raise InvalidArgument(
            Sentence("this host has {count} GPUs; name one of {gpus}", count=len(self.actors), gpus=self._names())
        )

    def _names(self) -> str:
        return ", ".join(called(self.config.gpu(a).name, a) for a in sorted(self.actors)) or Sentence("none")


def _said(misfits: Iterable[Misfit]) -> Sentence:
    """What is wrong with the configuration; "": nothing."""
    return Sentence.joined("\n", (misfit.sentence for misfit in misfits))


async def _each(actors: Iterable[Actor], work: Callable[[Actor], Coroutine[Any, Any, None]]) -> None:
    """Side by side; what goes wrong with one GPU takes nothing from the others."""

    async def done(actor: Actor) -> None:
        try:
            await work(actor)
        except Exception as fault:  # noqa: BLE001 -- whatever it was, it is told
            gpu = actor.gpu.address
            _log.critical("%s: a fault of gpuswitch itself", gpu, exc_info=fault, extra=told(GPU=gpu))
            actor.record.note(f"a fault of gpuswitch itself: {fault!r}")

    await asyncio.gather(*map(done, list(actors)))
