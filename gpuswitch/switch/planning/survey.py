"""Asks the host what a switch to vfio needs of it, and refuses where somebody is in the way. Changes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, replace

from gpuswitch.config.schema import Defaults
from gpuswitch.config.settings import Config
from gpuswitch.errors import Busy as BusyError
from gpuswitch.errors import Failed, GpuswitchError, KernelError
from gpuswitch.host.operation import seconds_for
from gpuswitch.host.port import Host, Kernel
from gpuswitch.model.drivers import PERSISTENCED, kernel_name, shown_by
from gpuswitch.model.facts import HostFacts
from gpuswitch.model.gpu import Gpu
from gpuswitch.model.holders import Holder, HolderQuery, Scan, Unit
from gpuswitch.model.policy import Busy, Options
from gpuswitch.runtime.pause import answered
from gpuswitch.sentence import Sentence
from gpuswitch.switch.holder_policy import Leaving
from gpuswitch.switch.planning import requirements as rules
from gpuswitch.switch.planning.guards import Blocker, refusal
from gpuswitch.switch.planning.requirements import BoundDriver, DetachRequirements
from gpuswitch.switch.restore_state import Baseline
from gpuswitch.switch.shared.arbiter import Arbiter
from gpuswitch.switch.steps.consoles import consoles_to_move, shown_by_other_gpus


@dataclass(frozen=True)
class DetachSurvey:
    """About one GPU, once. `kernel` is who reads its settings. `at_boot`: no unit is stopped, and nobody is ended."""

    gpu: Gpu
    facts: HostFacts
    config: Config
    options: Options
    host: Host
    kernel: Kernel
    arbiter: Arbiter
    at_boot: bool = False

    async def run(self, found: Iterable[Blocker] = ()) -> tuple[Baseline, DetachRequirements]:
        """What the functions have now, and what is to be done around them.

        `found` are the blockers that the facts show: what is found here is named with them.

        Raises:
            GpuswitchError: refused, with every blocker.
            KernelError, LateError: the GPU's worker could not tell.
        """
        occupied = rules.bound_drivers(
            self.gpu, self.facts, self._rules.module_policy, frozenset(self.arbiter.stuck.values())
        )
        found = [
            *found,
            *rules.cannot_let_go(self.gpu, self.facts, self.config, occupied),
            *rules.cannot_unload(self.gpu, self.facts, self.config, occupied),
            *rules.no_way_home(self.facts, occupied),
            *rules.used_besides(self.gpu, self.facts, self.config, occupied),
        ]
        if not found:
            found = [*await self._not_found_again(occupied)]
        if found:
            raise refusal([*found, *await self._besides(occupied)])
        async with answered(seconds_for(Kernel.capture, self.config.deadlines)):
            now = await self._capture()
        if not (occupied or rules.boot_framebuffers(self.gpu, self.facts)):
            # Nobody has open what no driver has, the firmware's neither.
            return now, DetachRequirements()
        query = rules.query(self.gpu, self.facts, occupied)
        requirements, unknown = await self._units(DetachRequirements(query=query, bound_drivers=occupied), occupied)
        if not unknown:
            async with answered(self.config.deadlines.module):
                requirements = await self._of_the_kernel(requirements)
        # Not before: nvidia-smi, which may have been asked, has the GPU open as long as it runs.
        scan = await self._scan(query)
        requirements, staying = await self._holding(replace(requirements, numbers=scan.numbers), scan.holders)
        if unknown or staying:
            raise refusal([*unknown, *staying])
        return now, replace(requirements, expected=await self._expected(occupied)) if self.at_boot else requirements

    async def _expected(self, occupied: tuple[BoundDriver, ...]) -> tuple[str, ...]:
        """What comes on top of these drivers by itself, and was not there yet when we looked."""
        there = {module for bound_driver in occupied for module in bound_driver.loaded}
        drivers = [function.driver for function in self.gpu.present(self.facts) if function.driver is not None]
        wanted = dict.fromkeys(m for driver in drivers for m in shown_by(driver) if kernel_name(m) not in there)
        try:
            async with answered(seconds_for(Kernel.loadable, self.config.deadlines)):
                found = await self.kernel.loadable(tuple(wanted)) if wanted else ()
        except KernelError:
            return ()
        return tuple({kernel_name(module): module for module in reversed(found)}.values())

    async def _not_found_again(self, occupied: tuple[BoundDriver, ...]) -> tuple[Blocker, ...]:
        """Where nobody can tell, that a module does not come back is told when it does not."""
        if not (modules := rules.unloaded(occupied)):
            return ()
        try:
            async with answered(seconds_for(Kernel.loadable, self.config.deadlines)):
                known = await self.kernel.loadable(modules, by_name=True)
        except KernelError:
            return ()
        return tuple(rules.not_found_again(self.gpu, self.config, modules, known))

    async def _besides(self, occupied: tuple[BoundDriver, ...]) -> tuple[Blocker, ...]:
        """What else is in the way of a switch that is refused already, as far as it can be told.

        Nothing is asked for it that takes a device lock.
        """
        if not (occupied or rules.boot_framebuffers(self.gpu, self.facts)):
            return ()
        unknown: tuple[Blocker, ...] = ()
        try:
            requirements, unknown = await self._units(DetachRequirements(), occupied)
            scan = await self._scan(rules.query(self.gpu, self.facts, occupied))
            _, staying = await self._holding(requirements, scan.holders)
        except GpuswitchError as error:
            return (*unknown, Blocker("unknown", Sentence.of(error), type(error)))
        return (*unknown, *staying)

    @property
    def _rules(self) -> Defaults:
        rules = self.config.gpu(self.gpu.address).rules
        return replace(rules, stop_units=(), end_sessions=False) if self.at_boot else rules

    @property
    def _busy(self) -> Busy:
        return self.options.policy(self._rules.busy)

    async def _capture(self) -> Baseline:
        return await self.kernel.capture(self.gpu.functions)

    async def _of_the_kernel(self, requirements: DetachRequirements) -> DetachRequirements:
        """Consoles, the firmware's frame buffer, persistence mode."""
        consoles = await self.kernel.consoles()
        terminals, to, unbind = consoles_to_move(
            self.gpu.functions,
            consoles,
            unload=bool(requirements.unload),
            leaving=self.arbiter.functions_away_from_host(besides=self.gpu.address),
        )
        terminals_of_others = self.arbiter.terminals_of_others(self.gpu.address)
        # A daemon that keeps it persistent ends that when it is stopped; to ask otherwise may take nvidia-smi a second.
        asked = [
            function
            for bound_driver in requirements.bound_drivers
            if bound_driver.profile.persistence and requirements.units_told and PERSISTENCED not in requirements.active
            for function in bound_driver.functions
        ]
        return replace(
            requirements,
            # Another GPU that is on its way home has been drawn over some of them.
            terminals=tuple(sorted({*terminals, *self.arbiter.terminals_of_absent_gpus(self.gpu.functions, consoles)})),
            terminals_of_others=terminals_of_others,
            shown_by_others=shown_by_other_gpus(
                self.gpu.functions,
                consoles,
                terminals_of_others,
                boot_display=any(function.boot_display for function in self.gpu.present(self.facts)),
                console_map=self.facts.console_map,
            ),
            shows=any(function in self.gpu.functions for function in consoles.frame_buffers.values()),
            to=to,
            unbind_consoles=unbind,
            leave_consoles=self._rules.leave_consoles,
            boot_framebuffers=rules.boot_framebuffers(self.gpu, self.facts),
            persistent=tuple([f for f in asked if await self.kernel.persistence(f)]),
        )

    async def _units(
        self, requirements: DetachRequirements, found: tuple[BoundDriver, ...]
    ) -> tuple[DetachRequirements, tuple[Blocker, ...]]:
        """Those to stop, and those of them that there are not.

        Those that are to be started again for some other GPU's sake were active, too.
        """
        own, comfort = rules.units_to_stop(found, (*self._rules.stop_units, *self.options.stop_units))
        if self.at_boot:
            # Systemd has its hands full. One that has the GPU open already is named.
            return requirements, ()
        told = True
        try:
            async with asyncio.timeout(self.config.deadlines.inhibit):
                running = await self.host.systemd.active((*own, *comfort))
                missing = await self.host.systemd.missing(own)
        except (KernelError, TimeoutError) as error:
            if own:
                sentence = Sentence(
                    "cannot tell whether {units} is active: {why}", units=", ".join(map(str, own)), why=_said(error)
                )
                raise Failed(sentence) from error
            running, missing, told = frozenset(), frozenset(), False
        active = tuple(unit for unit in (*own, *comfort) if unit in running or self.arbiter.is_to_be_started(unit))
        at_once = rules.back_at_once(found)
        unknown = tuple(Blocker("unknown_unit", self._no_unit(unit)) for unit in own if unit in missing)
        requirements = replace(
            requirements,
            stop=(*own, *(unit for unit in comfort if unit in active)),
            active=active,
            units_told=told,
            later=tuple(unit for unit in active if unit not in at_once or unit in own),
            restarted=tuple(unit for unit in active if unit in comfort),
        )
        return requirements, unknown

    def _no_unit(self, unit: Unit) -> Sentence:
        if str(unit) in self.options.stop_units:
            return Sentence("there is no {unit}, which is to be stopped first: correct its name", unit=unit)
        return rules.no_such_unit(self.gpu, self.config, unit)

    async def _scan(self, query: HolderQuery) -> Scan:
        try:
            async with asyncio.timeout(self.config.deadlines.holders):
                return await self.host.processes.scan(query)
        except (KernelError, TimeoutError) as error:
            sentence = Sentence(
                "nobody can tell who has {gpu} open, so it counts as busy: {why}",
                gpu=self.gpu.address,
                why=_said(error),
            )
            raise BusyError(sentence) from error

    async def _holding(
        self, requirements: DetachRequirements, holders: tuple[Holder, ...]
    ) -> tuple[DetachRequirements, tuple[Blocker, ...]]:
        """What is to be done about those who have it open, and who keeps it all the same."""
        mine = self._rules
        sessions = await self._sessions(holders) if mine.end_sessions else ()
        desk_ends = bool(mine.stop_units or self.options.stop_units or sessions)
        announced = tuple(
            rules.announcements(
                self.gpu,
                self.facts,
                holders,
                sound=mine.announce_sound,
                display=mine.announce_display,
                coming=desk_ends,
            )
        )
        stopped = (*requirements.stop, *await self._canonical(requirements.stop))
        leaving = Leaving(stopped, sessions, sound=any(subsystem == "sound" for subsystem, _ in announced))
        staying = tuple(rules.refuse_holders(self.gpu, holders, leaving, self._busy))
        wait = self.options.wait_seconds or mine.wait_seconds
        requirements = replace(
            requirements,
            busy=self._busy,
            wait_seconds=wait if self._busy is Busy.WAIT else self.config.deadlines.release,
            grace_seconds=mine.grace_seconds,
            passing_seconds=self.config.deadlines.release,
            sessions=sessions,
            announce=announced,
            holding=bool(holders or desk_ends),
        )
        return requirements, staying

    async def _canonical(self, units: Iterable[Unit]) -> tuple[Unit, ...]:
        """By the names that holders run under; one that nobody knows is told of when it is to be stopped."""
        try:
            async with asyncio.timeout(self.config.deadlines.inhibit):
                return tuple([await self.host.systemd.canonical(unit) for unit in units])
        except (KernelError, TimeoutError):
            return ()

    async def _sessions(self, holders: Iterable[Holder]) -> tuple[str, ...]:
        """The sessions that have it open, and those of a user whose manager runs somebody who has."""
        sessions = {holder.session for holder in holders if holder.session}
        users = {h.unit.user for h in holders if not h.session and h.unit is not None and h.unit.user is not None}
        try:
            async with asyncio.timeout(self.config.deadlines.sessions):
                for uid in users:
                    sessions.update(await self.host.systemd.sessions(uid))
        except (KernelError, TimeoutError) as error:
            sentence = Sentence(
                "cannot tell which sessions have {gpu} open: {why}", gpu=self.gpu.address, why=_said(error)
            )
            raise Failed(sentence) from error
        return tuple(sorted(sessions))


def _said(error: KernelError | TimeoutError) -> Sentence:
    return Sentence.of(error) if str(error) else Sentence("the answer did not come in time")
