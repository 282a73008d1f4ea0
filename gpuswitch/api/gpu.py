"""The object of a GPU. Reads memory only, so it always answers; Plan, Holders and a switch look at the host.

The annotations are signatures that `gpuswitch.api.interface` reads when the class is made, its docstrings what
introspection tells.
"""

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from typing_extensions import override

from gpuswitch.api.authority import Action
from gpuswitch.api.callers import Callers
from gpuswitch.api.connection import Variant
from gpuswitch.api.encoders import (
    holder_values,
    model_of,
    planned_values,
    sentence_values,
    switch_values,
    vendor_of,
)
from gpuswitch.api.interface import Interface, Member, dbus_constant, dbus_method, dbus_property, dbus_signal
from gpuswitch.api.metrics import Refusals
from gpuswitch.api.options import options_of, trial_seconds
from gpuswitch.api.permission import about, ends_more
from gpuswitch.api.signatures import (
    Bool,
    Double,
    Int64,
    Str,
    StrArray,
    StrDict,
    StrPair,
    StrTripleArray,
    UInt32Array,
    Values,
    ValuesArray,
)
from gpuswitch.errors import GpuswitchError, InvalidArgument
from gpuswitch.gpu.actor import Actor
from gpuswitch.gpu.remedies import remedies
from gpuswitch.model.facts import HostFacts
from gpuswitch.model.match import traits
from gpuswitch.model.policy import Options
from gpuswitch.model.states import State
from gpuswitch.sentence import Sentence

_TARGETS = {"host": State.HOST, "vfio": State.VFIO}
_MOMENT = 0.1
"""Seconds."""
_CLOCK_JUMPS = 0.5
"""Seconds by which the wall clock was set, at least: between two readings of it and of the other clock, less passes."""


class GpuObject(Interface, name="org.gpuswitch1.Gpu"):
    """One GPU."""

    def __init__(self, actor: Actor, callers: Callers, refusals: Refusals) -> None:
        self.actor = actor
        self._record = actor.record
        self._callers = callers
        self._refusals = refusals
        self._told: dict[str, object] = {}
        self._telling: asyncio.Handle | None = None
        self._trial_ends = 0.0
        self._looked: HostFacts | None = None

    @dbus_constant
    def address(self) -> Str:
        """Of its first display function; of an accelerator without one, of that itself."""
        return str(self._record.gpu.address)

    @dbus_property
    def name(self) -> Str:
        """From the configuration; empty where it has none."""
        return self._record.own_config.name

    @dbus_property
    def model(self) -> Str:
        """Maker and model, from the hardware database."""
        return model_of(self._record)

    @dbus_property
    def vendor(self) -> Str:
        """`nvidia`, `amd`, `intel`, or the id: `0x1234`."""
        return vendor_of(self._record)

    @dbus_property
    def managed(self) -> Bool:
        """Whether the configuration has a table for it."""
        return self._record.own_config.managed

    @dbus_property
    def at_boot(self) -> Str:
        """Where the configuration wants it when the machine has started: `host`, `vfio`, or `keep`."""
        return str(self._record.own_config.at_boot)

    @dbus_property
    def state(self) -> Str:
        """`host`, `vfio`, or one of the states between and beside these: docs/states.md has all."""
        return str(self._record.state)

    @dbus_property
    def driver(self) -> Str:
        """The driver of its display function now; empty: none."""
        display = self._facts_now.functions.get(self._record.gpu.address)
        return (display.driver_name if display else None) or ""

    @dbus_property
    def host_driver(self) -> Str:
        """The driver of its display function at home; empty: none."""
        return self._record.host_driver or ""

    @dbus_property
    def functions(self) -> StrTripleArray:
        """Address, kind and driver of each of its functions."""
        present = self._record.gpu.present(self._facts_now)
        return [(str(f.address), str(f.kind), f.driver_name or "") for f in present]

    @dbus_property
    def iommu_groups(self) -> UInt32Array:
        """The IOMMU groups of its functions."""
        return list(self._record.gpu.groups(self._record.facts))

    @dbus_property
    def adds(self) -> StrArray:
        """What its functions bring with them, such as virtual functions or memory that the firmware claims."""
        return list(self._record.gpu.adds(self._record.facts))

    @dbus_property
    def match(self) -> StrDict:
        """What `match` in the configuration may say of it: vendor, device, and those that there are of the others."""
        return {key: values[0] for key, values in traits(self._record.gpu, self._record.facts).items()}

    @dbus_property
    def owner(self) -> StrPair:
        """Name and UUID of the virtual machine, or the process, that has it, or is about to have it; empty: none."""
        owner = self._record.owner
        return (owner.name, owner.uuid) if owner else ("", "")

    @dbus_property
    def switch(self) -> Values:
        """The switch in flight, or the last; empty: none since the service started."""
        return switch_values(self._record.switch) if self._record.switch else {}

    @dbus_property
    def reason(self) -> Str:
        """Why it is where it is, where that is not where somebody wanted it; empty: nothing to say."""
        return self._record.reason

    @dbus_property
    def stays_out(self) -> Bool:
        """Whether its last way home ended elsewhere; Reason says why."""
        return bool(self._record.stays_out)

    @dbus_property
    def remedies(self) -> ValuesArray:
        """What may help where it is failed, unknown, or stays out, the least rough first: kind and text of each.

        To say it in another language: the template of the text, with {named} fields, and the data that stands in these.
        """
        return [
            {"kind": remedy.kind, "text": str(remedy.sentence), **sentence_values(remedy.sentence)}
            for remedy in remedies(self._record)
        ]

    @dbus_property
    def state_since(self) -> Double:
        """Since when it is in this state, in seconds since the epoch."""
        return self._record.since

    @dbus_property
    def trial_ends(self) -> Double:
        """When it goes home by itself, since its trial is over then, in seconds since the epoch; 0: it has none."""
        ends = self._record.trial_ends
        if abs(ends - self._trial_ends) > _CLOCK_JUMPS:
            # Nothing is told as changed that is the same but for the time between two readings.
            self._trial_ends = ends
        return self._trial_ends

    @dbus_property
    def stopped_units(self) -> StrArray:
        """The units that were stopped for it, and are started again when it is home."""
        return [str(unit) for unit in self._record.restore_state.units]

    @dbus_method(returns="id", action=Action.SWITCH, outlives=True)
    async def to_vfio(self, options: Values) -> Str:
        """Start a switch to vfio, or join the one that goes there; gives its id. It stays there: a trial ends with it.

        Options: busy (refuse, wait, terminate, kill), wait_seconds, stop_units.
        """
        return await self._move(State.VFIO, options)

    @dbus_method(returns="id", action=Action.SWITCH, outlives=True)
    async def trial(self, seconds: Double, options: Values) -> Str:
        """Start a switch to vfio that goes home by itself 1 to 86400 seconds after it came there; gives its id.

        On vfio already: from now on. Options as of ToVfio, which keeps it there.
        """
        return await self._move(State.VFIO, options, seconds)

    @dbus_method(returns="id", action=Action.SWITCH, outlives=True)
    async def to_host(self, options: Values) -> Str:
        """Start a switch to its host drivers, or join the one that goes there; gives its id. Options as of ToVfio."""
        return await self._move(State.HOST, options)

    @dbus_method(returns="id", action=Action.RECOVER, outlives=True)
    async def recover(self, options: Values) -> Str:
        """Bring one that is failed or unknown into a known-good state; gives the id of that switch."""
        with self._refusals([self._record.gpu.address]):
            return (await self.actor.recover(options_of(options), await self._callers.requester())).id

    @dbus_method(action=Action.SWITCH, outlives=True)
    async def cancel(self, id: Str) -> None:  # noqa: A002 -- the argument's name on the bus
        """Take the running switch of that id back, once the step that runs is over; Wait tells what came of it."""
        self.actor.cancel(id, await self._callers.requester())

    @dbus_method(returns="steps", action=Action.INSPECT)
    async def plan(self, target: Str, options: Values) -> ValuesArray:
        """The steps to `vfio` or `host`, each with kind, title, deadline in seconds, and what it ends. Looks only."""
        plan = await self.actor.plan(_target(target), options_of(options))
        deadlines: dict[str, float] = self._record.config.deadlines.by_kind()
        return [planned_values(step, deadlines) for step in plan.steps]

    @dbus_method(returns="blockers", action=Action.INSPECT)
    async def blockers(self, target: Str, options: Values) -> ValuesArray:
        """Why a switch to `vfio` or `host` would be refused now: kind, text, error of each reason. Changes nothing.

        To say it in another language: the template of the text, with {named} fields, and the data that stands in these.
        """
        wanted, chosen = _target(target), options_of(options)
        try:
            await self.actor.plan(wanted, chosen)
        except GpuswitchError as error:
            alone = {"kind": error.kind, "text": str(error), "error": error.name}
            return [{**blocker, **sentence_values(blocker["text"])} for blocker in error.blockers or (alone,)]
        return []

    @dbus_method(returns="holders", action=Action.INSPECT)
    async def holders(self) -> ValuesArray:
        """Who has it open, now, what frees the GPU of them, and whether a switch to vfio does that by itself."""
        holders = await self.actor.holders()
        by_itself = await self.actor.goes_by_itself(holders)
        return [{**holder_values(holder), "goes_by_itself": holder in by_itself} for holder in holders]

    @dbus_method(returns="switch")
    async def wait(self, id: Str) -> Values:  # noqa: A002 -- the argument's name on the bus
        """Return when that switch is over, with what the property Switch says of it."""
        switch = self._record.known_switch(id)
        await switch.wait()
        return switch_values(switch)

    @dbus_signal
    def step_changed(
        self,
        id: Str,  # noqa: A002 -- the argument's name on the bus
        index: Int64,
        count: Int64,
        kind: Str,
        title: Str,
        status: Str,
        seconds: Double,
    ) -> None:
        """A step began or ended: it is running, done, failed, cancelled, reverting, reverted or revert-failed."""

    @dbus_signal
    def switch_finished(self, id: Str, result: Str, reason: Str) -> None:  # noqa: A002 -- as above
        """A switch is over: it is done, reverted, failed, cancelled or wedged."""

    def actions(self, method: Member, arguments: Sequence[object]) -> Sequence[str]:
        """`FORCE` for options that end more than the configuration does: it goes for the method's own as well."""
        options = self._options(method, arguments)
        if options and ends_more(self._record, options):
            return [Action.FORCE]
        return super().actions(method, arguments)

    def about(self, method: Member, arguments: Sequence[object]) -> Mapping[str, str]:
        """The GPU, where it goes, and what may be stopped for a switch of it."""
        return about([self._record], self._options(method, arguments), _GOES_TO.get(method.name, ""))

    def _options(self, method: Member, arguments: Sequence[object]) -> Options | None:
        """Those of the switch that this call asks for, its last argument; None: it asks for none."""
        if method.action not in {Action.SWITCH, Action.RECOVER} or not isinstance(arguments[-1], dict):
            return None
        with self._refusals([self._record.gpu.address]):
            return options_of(arguments[-1])

    async def _move(self, target: State, values: Mapping[str, object], seconds: float | None = None) -> str:
        with self._refusals([self._record.gpu.address]):
            options = options_of(values)
            if seconds is not None:
                options = replace(options, trial_seconds=trial_seconds(seconds))
            return (await self.actor.request(target, options, await self._callers.requester())).id

    def remember(self) -> None:
        """What the bus was told when the object appeared there."""
        self._told = self._now()

    def tell_soon(self) -> None:
        """Send what changed, once for all that changes in this turn of the loop."""
        if self._telling is not None:
            self._telling.cancel()
        self._telling = asyncio.get_running_loop().call_soon(self.tell)

    def tell_in_a_moment(self) -> None:
        """Send what changed, once for all that changes until then: steps that take no time have their own signals."""
        if self._telling is None:
            self._telling = asyncio.get_running_loop().call_later(_MOMENT, self.tell)

    def tell(self) -> None:
        """Send PropertiesChanged for what differs from what was last told."""
        if self._telling is not None:
            self._telling.cancel()
            self._telling = None
        with self._of_one_look():
            now = self._now()
            changed = [name for name, value in now.items() if self._told.get(name) != value]
            self._told = now
            if changed:
                self.emit_properties_changed(*changed)

    @override
    def read_properties(self, names: Iterable[str]) -> tuple[dict[str, Variant], list[str]]:
        with self._of_one_look():
            return super().read_properties(names)

    def _now(self) -> dict[str, object]:
        return {name: property_.__get__(self, type(self)) for name, property_ in self.properties.items()}

    @contextmanager
    def _of_one_look(self) -> Iterator[None]:
        """What is read of several properties meanwhile is of the same moment."""
        outer = self._looked
        self._looked = outer or self._record.facts_now
        try:
            yield
        finally:
            self._looked = outer

    @property
    def _facts_now(self) -> HostFacts:
        return self._looked or self._record.facts_now


_GOES_TO = {"ToVfio": "vfio", "Trial": "vfio", "ToHost": "host"}
"""By the method that is called."""


def _target(name: str) -> State:
    if name not in _TARGETS:
        raise InvalidArgument(
            Sentence("{name} is not a target; it is one of {known}", name=repr(name[:80]), known=", ".join(_TARGETS))
        )
    return _TARGETS[name]
