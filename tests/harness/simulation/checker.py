"""Hears of everything that happens, and checks after each of it what must always be so: the ten invariants.

What can be seen at one event alone is checked here; what must be so once all is quiet, `rest_checks.py` checks.
"""

from __future__ import annotations

import json
from asyncio import futures
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from gpuswitch.errors import Busy, GpuswitchError, InProgress, NotViable, Wedged
from gpuswitch.fleet.at_boot import LONGEST_SECONDS
from gpuswitch.fleet.fleet import Fleet
from gpuswitch.gpu.actor import Actor
from gpuswitch.model.address import PciAddress
from gpuswitch.model.drivers import NVIDIA
from gpuswitch.model.gpu import harmless
from gpuswitch.model.holders import HolderQuery, Scan
from gpuswitch.model.policy import AtBoot, Options
from gpuswitch.model.policy import Busy as Policy
from gpuswitch.model.states import State
from gpuswitch.switch.engine import Status, StepEvent
from gpuswitch.switch.record import Drift, Result, Switch
from gpuswitch.switch.steps.attributes import RestoreAttribute
from gpuswitch.switch.steps.host import RestartUnits, StartUnits, StopUnits
from tests.harness.simulated.harness import Settings
from tests.harness.simulation.actions import ActionChecker
from tests.harness.simulation.doubles import AT, At
from tests.harness.simulation.invariants import Ask, difference
from tests.harness.simulation.loop import Killed

if TYPE_CHECKING:
    from tests.harness.simulation.world import World

ANSWER_SECONDS = 200.0
"""The longest that any one request may take to be answered, others before it not counted: all its deadlines."""
NOTICE_SECONDS = 1.3
"""After that long, whatever somebody else did to a GPU has been seen."""
BEGINS = frozenset({Status.RUNNING, Status.REVERTING})
"""What is told of a step when it begins, forward or back."""
_SLEEP = getattr(futures, "_set_result_unless_cancelled")  # noqa: B009 -- typeshed lacks it
_WITH_UNITS = (RestartUnits, StartUnits, StopUnits)
_TAKEN_BACK = frozenset({"LoadDriver", "Bind", "LoadModules", "AwaitNodes", "RestorePower"})
"""Steps of the way home at which a host driver may have the GPU, and that are taken back when one fails."""
_OF_ATTRIBUTES = frozenset({"attribute", "set_attribute"})
_FAULT_OF_ITS_OWN = "a fault of gpuswitch itself"


class InvariantChecker(ActionChecker):
    """Hears what the service tells, and what it is asked. `steps` counts the steps that began, forward or back."""

    def __init__(self, world: World, *, trace: bool) -> None:
        super().__init__(world, trace=trace)
        self.steps = 0
        self.crashes: Counter[tuple[str, str]] = Counter()
        """At which step the service was killed."""
        self.ends: Counter[tuple[str, str]] = Counter()
        self.asks: list[Ask] = []
        self.started = 0.0
        self._at: dict[str, At] = {}
        """The steps that are under way."""
        self._current: dict[str, Switch | None] = {}
        self._unstuck: set[str] = set()
        """GPUs that were wedged, and have not come to rest since."""
        self._before: dict[str, dict[PciAddress, Settings]] = {}
        self._at_boot: dict[str, str] = {}
        """The switch at boot that each GPU has had."""
        self._on_vfio: dict[str, tuple[set[bool], float]] = {}

    # The program itself ---------------------------------------------------------------------------------------------

    def unhandled(self, context: Mapping[str, Any]) -> None:
        """The loop tells of an exception that nobody caught."""
        error = context.get("exception")
        if not isinstance(error, Killed):
            self.fault(f"{context['message']}: {error!r}")

    def timed(self, callback: Callable[..., object], seconds: float) -> None:
        """The service has set a timer."""
        if callback is _SLEEP and seconds > 0:
            self.broken(9, f"it sleeps for {seconds:g} s at {AT.get()}")

    def starts(self) -> None:
        self.note("the service starts")
        self.started = self.now

    def ready(self, fleet: Fleet) -> None:
        """It says that it can be asked: every GPU is where it may stay, or says why not."""
        self.note("ready")
        for actor in fleet.actors.values():
            wanted = actor.record.own_config.at_boot is AtBoot.VFIO and self.world.machine.units.booting
            if wanted and actor.state is State.HOST and not actor.reason and not self.lately(actor.gpu.address):
                self.broken(5, f"{actor.gpu.address} is not where it is wanted at boot, and does not say why")
            # Nobody waits longer than that for what is moved at boot.
            at_boot = actor.switch is not None and actor.switch.requester.at_boot
            late = at_boot and actor.state.moving and self.now - self.started >= LONGEST_SECONDS
            if str(actor.gpu.address) not in self._unstuck and not late:
                self.explained(actor, "when the service is ready")

    def stopped(self, fleet: Fleet) -> None:
        self.note("stopped")
        for actor in fleet.actors.values():
            if actor.state.moving and not self._left_to_the_journal(actor):
                self.broken(5, f"the service has stopped, and {actor.gpu.address} is {actor.state}")

    def _left_to_the_journal(self, actor: Actor) -> bool:
        """Whether the next start finds out that a recovery is not over: a switch is taken back within the time there is
        to stop, but the ways that are left when that fails have none.
        """
        page = self.world.disk.pages.get(actor.gpu.address.identifier)
        climbs = actor.state is State.RECOVERING and actor.switch is not None and actor.switch.recovery
        return climbs and page is not None and json.loads(page)["unfinished"] is not None

    def killed(self) -> None:
        self.note("killed")
        self.crashes.update((at.step, "crash while taken back" if at.back else "crash") for at in self._at.values())
        self._at.clear()
        self.asks.clear()
        self.world.virtual_machines.killed()
        self.world.promises.killed()
        self._before.clear()

    def tore(self, page: str) -> None:
        """What was owed to this GPU is lost, or was written too long ago: others have to put it right."""
        self.note(f"torn: {page}")
        self.torn.add(page)
        self.meddled.add(PciAddress.parse(f"pci_{page}"))

    def explained(self, actor: Actor, when: str) -> None:
        if actor.state.moving:
            self.broken(5, f"{actor.gpu.address} is {actor.state} {when}")
        if not actor.state.stable and actor.state is not State.ABSENT and not actor.reason:
            self.broken(5, f"{actor.gpu.address} is {actor.state} {when}, and does not say why")

    # Requests -------------------------------------------------------------------------------------------------------

    def asked(self, ask: Ask) -> None:
        self.note(f"{ask.actor.gpu.address}: asked {ask.what}")
        ask.began = self.now
        ask.rules = ask.actor.record.rules if ask.target is not None else None
        ask.along = self.world.virtual_machines.along(ask.actor.gpu.address)
        ask.before = sum(other.actor is ask.actor for other in self.asks)
        ask.sent = self.sent[str(ask.actor.gpu.address)]
        ask.quiet = not ask.actor.state.moving and ask.actor.state is not State.WEDGED and not ask.before
        self.asks.append(ask)
        self.world.promises.asked(ask)

    def answered(self, ask: Ask, answer: object) -> None:
        told = f" ({answer.result})" if isinstance(answer, Switch) else ""
        self.note(f"{ask.actor.gpu.address}: answered {ask.what}{told}")
        self._over(ask)
        self.world.promises.answered(ask, answer)

    def refused(self, ask: Ask, error: GpuswitchError) -> None:
        gpu, text = ask.actor.gpu, str(error)
        self.note(f"{gpu.address}: refused {ask.what}: {error.name}")
        self._over(ask)
        self.world.promises.refused(ask)
        if not text.strip():
            self.broken(8, f"{ask.what} of {gpu.address} is refused without a word")
        if ask.what.startswith("plan") and "has not returned from" in text and isinstance(error, Wedged):
            self.broken(8, f"{ask.what} of {gpu.address} has made it {ask.actor.state}: {text}")
        if ask.quiet and self.sent[str(gpu.address)] != ask.sent:
            self.broken(8, f"{ask.what} of {gpu.address} is refused ({text}), and yet something was changed")
        self._named(ask, error)
        if isinstance(error, InProgress) and "on its way to" in text and ask.what != "recover":
            ids = [switch.id for switch in ask.actor.record.recent]
            if not any(id_ in text for id_ in ids):
                self.broken(8, f"the refusal does not name the switch: {text}")

    def _named(self, ask: Ask, error: GpuswitchError) -> None:
        """All that is in the way, and nothing else."""
        text = str(error)
        # Of a card that is being pulled, and waits for who has it open, no link tells any more that it is in use.
        if ask.target is State.VFIO and ask.quiet and not self.world.others_wait:
            for each in self._in_the_way(ask, error):
                if each not in text:
                    self.broken(8, f"the refusal does not name {each}: {text}")
        for function in _of(ask.others):
            if "too and stays on" in text.partition(f"{function} ")[2].partition("\n")[0]:
                self.broken(8, f"the refusal names {function}, which goes along: {text}")

    def _in_the_way(self, ask: Ask, error: GpuswitchError) -> list[str]:
        """Neighbours that stay on their drivers, what the firmware claims, and the programs that nobody makes go."""
        gpu, facts = ask.actor.gpu, self.world.machine.look()
        if not isinstance(error, (Busy, NotViable)):
            return []
        along = self._along(ask)
        neighbours = [str(f.address) for f in gpu.neighbours(facts) if not harmless(f) and f.address not in along]
        neighbours += [region for number in gpu.groups(facts) for region in facts.direct_regions.get(number, ())]
        rules = (ask.rules, ask.actor.record.rules)
        policies = {ask.options.policy(each.busy) for each in rules if each is not None}
        # On vfio-pci it is in nobody's way: a machine that asks for several waits for whoever is done with this one.
        if policies != {Policy.REFUSE} or "nobody can tell" in str(error) or ask.actor.state is State.VFIO:
            return neighbours
        # Of those who have its sound open, it may be hoped that they let go.
        users = self.users(gpu.address)
        if ask.seen is not None:
            # Nobody knows of those who come after the look.
            users &= ask.seen
        programs = [p for p in self.world.machine.processes.running() if p.name in users]
        return neighbours + [str(p.process.pid) for p in programs if p.unit is None and not p.session]

    def _along(self, ask: Ask) -> frozenset[PciAddress]:
        """What goes to the same machine, and so is in nobody's way."""
        return self.world.virtual_machines.along(ask.actor.gpu.address) | ask.along | _of(ask.others)

    def scans(self, query: HolderQuery, scan: Scan) -> None:
        super().scans(query, scan)
        for ask in self.asks:
            if ask.actor.gpu.address in query.functions:
                ask.seen = self.users(ask.actor.gpu.address)

    def _over(self, ask: Ask) -> None:
        if ask in self.asks:
            self.asks.remove(ask)

    # Observers ------------------------------------------------------------------------------------------------------

    def changed(self, actor: Actor) -> None:
        gpu = str(actor.gpu.address)
        self.note(f"{gpu} is {actor.state}")
        if actor.state is State.WEDGED:
            # The kernel may let go of it at any moment, and then it is on its way.
            self._unstuck.add(gpu)
        elif not actor.state.moving:
            self._unstuck.discard(gpu)
        if actor.state.moving:
            for ask in self.asks:
                ask.quiet = ask.quiet and ask.actor is not actor
        if actor.state.moving and actor.switch is not self._current.get(gpu):
            self._current[gpu] = actor.switch
            self.world.virtual_machines.moves(actor)
            own = [ask for ask in self.asks if actor in (ask.actor, *ask.others)]
            asked = [ask.rules for ask in own if ask.rules is not None]
            self.options_of[gpu] = actor.switch.options if actor.switch is not None else Options()
            self.rules_of[gpu] = (*asked[:1], actor.record.rules)
            self._before[gpu] = self.settings(actor.gpu.functions)
        self.split(actor, NOTICE_SECONDS)
        self._has_what_it_needs(actor)
        self.world.virtual_machines.opens_no_more(actor)
        self.world.promises.changed(actor)
        self._came_back(actor)
        at_boot = actor.switch if actor.switch is not None and actor.switch.requester.at_boot else None
        if at_boot is not None and self._at_boot.setdefault(gpu, at_boot.id) != at_boot.id:
            self.broken(5, f"{gpu} is moved at boot twice")
        if sum(switch.result is None for switch in actor.record.recent) > 1:
            self.broken(6, f"{gpu} has two switches at once")

    def _starts(self, unit: str) -> None:
        """Nor may it open what is on its way home, and may have to go back: a switch that is taken back may do so."""
        super()._starts(unit)
        by = AT.get()
        for gpu, at in self._at.items() if unit in map(str, NVIDIA.units) and by.gpu and not by.back else ():
            actor = self.world.actor(PciAddress.parse(gpu))
            if gpu != by.gpu and actor is not None and actor.state is State.REATTACHING and at.step in _TAKEN_BACK:
                self.broken(1, f"{by.gpu} has {unit} started while {gpu} is at {at.step}, and may go back")

    def stepped(self, actor: Actor, switch: Switch, event: StepEvent) -> None:
        gpu = str(actor.gpu.address)
        if self.trace is not None:
            self.note(f"{gpu} {event.index}/{event.count} {event.step.title}: {event.status}")
        for each in self._actors():
            self._has_what_it_needs(each)
        if event.status in BEGINS:
            self.steps += 1
            if isinstance(event.step, _WITH_UNITS) and (event.status is Status.REVERTING or event.step.optional):
                self.needs_none(gpu)
            self._at[gpu] = AT.get()
        else:
            self._at.pop(gpu, None)
        if switch is not actor.switch or switch.result is not None:
            self.broken(6, f"{gpu}: a step of a switch that is over")
        if not actor.state.moving:
            self.broken(6, f"{gpu}: a step while it is {actor.state}")

    def finished(self, actor: Actor, switch: Switch) -> None:
        gpu = str(actor.gpu.address)
        self.note(f"{gpu}: to {switch.target} {switch.result}")
        self.ends[str(switch.target), str(switch.result)] += 1
        self.world.promises.finished(actor, switch)
        before = self._before.pop(gpu, None)
        self.needs_none(gpu)
        if _FAULT_OF_ITS_OWN in switch.reason:
            self.fault(f"{gpu}: {switch.reason}")
        if switch.result is None or (switch.result is not Result.DONE and not switch.reason):
            self.broken(5, f"{gpu}: {switch.result} without a reason")
        if switch.result is Result.WEDGED:
            return
        self.split(actor, 0.0)
        if switch.result is Result.DONE and actor.state is not switch.target and not switch.recovery:
            self.broken(5, f"{gpu}: to {switch.target} is done, and it is {actor.state}")
        taken_back = switch.result in {Result.REVERTED, Result.CANCELLED} and not switch.recovery
        now = self.settings(actor.gpu.functions)
        if taken_back and before not in (None, now) and not self.lately(actor.gpu.address):
            self.broken(3, f"{gpu}: {switch.result}, and {difference(before or {}, now)}")

    def drifted(self, actor: Actor, drift: Drift) -> None:
        self.note(f"{actor.gpu.address} drifted from {drift.before} to {drift.after}")
        # What it shares is given back when it leaves, whatever becomes of who asked.
        for ask in self.asks:
            ask.quiet = ask.quiet and ask.actor is not actor

    def split(self, actor: Actor, patience: float) -> None:
        """A stable state is one for all functions; for so many seconds, the service may not have seen otherwise."""
        gpu = str(actor.gpu.address)
        if self.world.others_wait or self.world.senses.blinded:
            # A driver link goes without a word, before anything else does; whoever is blind knows of nothing.
            return
        on_vfio = {f.on_vfio for f in actor.gpu.present(self.world.machine.look())}
        known, since = self._on_vfio.get(gpu, (None, 0.0))
        if known != on_vfio:
            since = self.now
            self._on_vfio[gpu] = on_vfio, since
        if actor.state.stable and on_vfio != {actor.state is State.VFIO} and self.now - since >= patience:
            self.broken(2, f"{gpu} is {actor.state}, and its functions are on vfio-pci: {on_vfio}")

    def _has_what_it_needs(self, actor: Actor) -> None:
        """Whatever others do, an attribute that a GPU shares with them is as it needs it while it is away."""
        gpu = actor.gpu.address
        if actor.state is not State.VFIO or self.lately(gpu) or self.failed_to_restore:
            return
        for attribute, change in actor.record.restore_state.attributes.items():
            now = self.world.machine.devices[attribute.function].settings[attribute.path]
            if now != change.needed:
                self.broken(3, f"{attribute} is {now}, and {gpu} needs it to be {change.needed}")

    def _actors(self) -> Iterable[Actor]:
        service = self.world.service
        return service.fleet.actors.values() if service is not None and service.fleet is not None else ()

    @property
    def failed_to_restore(self) -> bool:
        """Whether what is shared could not be given back, or not taken again: nobody knows what it is then."""
        # The steps of a GPU that has left the bus belong to no switch.
        return any(
            struck.operation in _OF_ATTRIBUTES
            and struck.at.step in ("", RestoreAttribute.__name__)
            and wrong != "delay"
            for struck, wrong in self.world.trouble.hit
        )

    def _came_back(self, actor: Actor) -> None:
        if actor.state is not State.HOST or actor.bound or actor.gpu.address in self.meddled or self.torn:
            return
        now = self.settings(actor.gpu.functions)
        home = {a: self.home[a] for a in now}
        if now != home:
            self.broken(3, f"{actor.gpu.address} is home, and {difference(home, now)}")


def _of(actors: Iterable[Actor]) -> frozenset[PciAddress]:
    return frozenset(function for actor in actors for function in actor.gpu.functions)
