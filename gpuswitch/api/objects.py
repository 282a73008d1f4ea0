"""What the bus shows: the Manager at the root and an object for each GPU. Reads memory only, so it always answers.

The annotations are signatures that `gpuswitch.api.interface` reads when the classes are made.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence

from gpuswitch import __version__
from gpuswitch.api.bus import Bus
from gpuswitch.api.callers import Callers
from gpuswitch.api.interface import Interface, dbus_method, dbus_property, dbus_signal
from gpuswitch.api.metrics import Refusals
from gpuswitch.api.options import options_of
from gpuswitch.api.signatures import (
    Bool,
    Double,
    Int64,
    ObjectPath,
    Str,
    StrArray,
    StrPair,
    StrTripleArray,
    UInt32,
    UInt32Array,
    Values,
    ValuesArray,
    typed,
)
from gpuswitch.api.vms import VirtualMachines
from gpuswitch.errors import InvalidArgument
from gpuswitch.fleet.fleet import Fleet
from gpuswitch.gpu.actor import Actor
from gpuswitch.gpu.gpu_record import GpuRecord
from gpuswitch.history.archive import Entry, StepEntry
from gpuswitch.history.history import History
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import PciFunction
from gpuswitch.model.holders import Holder
from gpuswitch.model.states import State
from gpuswitch.switch.engine import StepEvent
from gpuswitch.switch.holder_policy import is_machine, remedy
from gpuswitch.switch.record import Drift, Switch

NAME = "org.gpuswitch1"
ROOT = "/org/gpuswitch1"

_VENDORS = {0x10DE: "nvidia", 0x1002: "amd", 0x8086: "intel"}
_TARGETS = {"host": State.HOST, "vfio": State.VFIO}
_MOMENT = 0.1
"""Seconds."""


def path_of(address: PciAddress) -> str:
    """The object path of a GPU."""
    return f"{ROOT}/gpu/{address.identifier}"


class ManagerObject(Interface, name="org.gpuswitch1.Manager"):
    """The service as a whole."""

    def __init__(
        self, fleet: Fleet, vms: VirtualMachines, history: History, reload: Callable[[], Awaitable[None]]
    ) -> None:
        self._fleet = fleet
        self._vms = vms
        self._history = history
        self._reload = reload

    @dbus_property
    def version(self) -> Str:
        return __version__

    @dbus_method
    def get_gpu(self, selector: Str) -> ObjectPath:
        return path_of(self._fleet.find(selector).gpu.address)

    @dbus_method
    def groups(self) -> ValuesArray:
        """Every function that is in an IOMMU group."""
        owners = {f: actor.gpu.address for actor in self._fleet.actors.values() for f in actor.gpu.functions}
        functions = sorted(self._fleet.facts.functions.items())
        return [
            _function(function, owners.get(address), self._fleet.facts.adds(function))
            for address, function in functions
            if function.iommu_group is not None
        ]

    @dbus_method
    def config(self) -> ValuesArray:
        """Every setting in force, with the file that set it."""
        return [{"key": s.key, "value": s.value, "origin": s.origin} for s in self._fleet.config.settings]

    @dbus_method
    def warnings(self) -> StrArray:
        """What the configuration says that is about no GPU of this host, a sentence each."""
        return [misfit.sentence for misfit in self._fleet.misfits]

    @dbus_method
    async def history(self, limit: UInt32) -> ValuesArray:
        """The last finished switches, newest first; 0: all."""
        return [_entry(entry) for entry in await self._history.last(limit)]

    @dbus_method
    async def history_entry(self, id: Str) -> Values:  # noqa: A002 -- the argument's name on the bus
        """A finished switch with its steps."""
        entry = await self._history.find(id)
        return {**_entry(entry), "steps": typed("aa{sv}", [_step(step) for step in entry.steps])}

    @dbus_method
    async def acquire_for_vm(self, name: Str, uuid: Str, addresses: StrArray) -> StrArray:
        """Hand every managed GPU that these functions belong to over to this machine; which ones."""
        return await self._vms.acquire(name, uuid, addresses)

    @dbus_method
    def adopt_vm(self, name: Str, uuid: Str, addresses: StrArray) -> None:
        """This machine runs with these functions."""
        self._vms.adopt(name, uuid, addresses)

    @dbus_method
    def release_from_vm(self, name: Str, uuid: Str, reason: Str) -> None:
        """This machine is gone."""
        self._vms.release(name, uuid, reason)

    @dbus_method
    async def reload(self) -> None:
        await self._reload()


class GpuObject(Interface, name="org.gpuswitch1.Gpu"):
    """One GPU."""

    def __init__(self, actor: Actor, callers: Callers, refusals: Refusals) -> None:
        self.actor = actor
        self._record = actor.record
        self._callers = callers
        self._refusals = refusals
        self._told: dict[str, object] = {}
        self._telling: asyncio.Handle | None = None

    @dbus_property
    def address(self) -> Str:
        return str(self._record.gpu.address)

    @dbus_property
    def name(self) -> Str:
        return self._record.own_config.name

    @dbus_property
    def model(self) -> Str:
        display = self._display
        return " ".join(filter(None, (display.maker, display.model))) if display else ""

    @dbus_property
    def vendor(self) -> Str:
        display = self._display
        return _VENDORS.get(display.vendor, f"0x{display.vendor:04x}") if display else ""

    @dbus_property
    def managed(self) -> Bool:
        return self._record.own_config.managed

    @dbus_property
    def state(self) -> Str:
        return str(self._record.state)

    @dbus_property
    def driver(self) -> Str:
        display = self._record.facts_now.functions.get(self._record.gpu.address)
        return (display.driver_name if display else None) or ""

    @dbus_property
    def host_driver(self) -> Str:
        return self._record.host_driver or ""

    @dbus_property
    def functions(self) -> StrTripleArray:
        present = self._record.gpu.present(self._record.facts_now)
        return [(str(f.address), str(f.kind), f.driver_name or "") for f in present]

    @dbus_property
    def iommu_groups(self) -> UInt32Array:
        return list(self._record.gpu.groups(self._record.facts))

    @dbus_property
    def adds(self) -> StrArray:
        return list(self._record.gpu.adds(self._record.facts))

    @dbus_property
    def owner(self) -> StrPair:
        owner = self._record.owner
        return (owner.name, owner.uuid) if owner else ("", "")

    @dbus_property
    def switch(self) -> Values:
        return _switch(self._record.switch) if self._record.switch else {}

    @dbus_property
    def reason(self) -> Str:
        return self._record.reason

    @dbus_property
    def stays_out(self) -> Bool:
        """Its last way home ended elsewhere; `reason` says why."""
        return bool(self._record.stays_out)

    @dbus_property
    def state_since(self) -> Double:
        return self._record.since

    @dbus_method
    async def to_vfio(self, options: Values) -> Str:
        return await self._move(State.VFIO, options)

    @dbus_method
    async def to_host(self, options: Values) -> Str:
        return await self._move(State.HOST, options)

    @dbus_method
    async def recover(self, options: Values) -> Str:
        """Look for a known-good state, from `failed` and `unknown`."""
        with self._refusals([self._record.gpu.address]):
            return (await self.actor.recover(options_of(options), await self._callers.requester())).id

    @dbus_method
    async def cancel(self, id: Str) -> None:  # noqa: A002 -- the argument's name on the bus
        self.actor.cancel(id, await self._callers.requester())

    @dbus_method
    async def plan(self, target: Str, options: Values) -> ValuesArray:
        chosen = options_of(options)
        if target not in _TARGETS:
            raise InvalidArgument(f"{target[:80]!r} is not a target; it is one of {', '.join(_TARGETS)}")
        plan = await self.actor.plan(_TARGETS[target], chosen)
        deadlines: dict[str, float] = self._record.config.deadlines.model_dump()
        return [{"kind": step.kind, "title": step.title, "deadline": step.deadline(deadlines)} for step in plan.steps]

    @dbus_method
    async def holders(self) -> ValuesArray:
        """Who has it open, now."""
        return [_holder(holder) for holder in await self.actor.holders()]

    @dbus_method
    async def wait(self, id: Str) -> Values:  # noqa: A002 -- the argument's name on the bus
        switch = self._record.known_switch(id)
        await switch.wait()
        return _switch(switch)

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
        """A step began or ended; `seconds` is how long it took."""

    @dbus_signal
    def switch_finished(self, id: Str, result: Str, reason: Str) -> None:  # noqa: A002 -- as above
        """A switch is over."""

    async def _move(self, target: State, options: Mapping[str, object]) -> str:
        with self._refusals([self._record.gpu.address]):
            return (await self.actor.request(target, options_of(options), await self._callers.requester())).id

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
        now = self._now()
        changed = [name for name, value in now.items() if self._told.get(name) != value]
        self._told = now
        if changed:
            self.emit_properties_changed(*changed)

    def _now(self) -> dict[str, object]:
        return {name: property_.__get__(self, type(self)) for name, property_ in self.properties.items()}

    @property
    def _display(self) -> PciFunction | None:
        return self._record.facts.functions.get(self._record.gpu.address)


class BusObserver:
    """Keeps the objects on the bus true to the fleet. An `Observer` (`gpuswitch.gpu.observer`)."""

    def __init__(self, bus: Bus, refusals: Refusals) -> None:
        self._bus = bus
        self._refusals = refusals
        self._callers = Callers(bus)
        self._objects: dict[PciAddress, GpuObject] = {}

    def appeared(self, actor: Actor) -> None:
        gpu = self._objects[actor.gpu.address] = GpuObject(actor, self._callers, self._refusals)
        self._bus.export(path_of(actor.gpu.address), gpu)
        gpu.remember()

    def vanished(self, actor: Actor) -> None:
        del self._objects[actor.gpu.address]
        self._bus.unexport(path_of(actor.gpu.address))

    def changed(self, record: GpuRecord) -> None:
        if gpu := self._objects.get(record.gpu.address):
            gpu.tell_soon()

    def stepped(self, record: GpuRecord, switch: Switch, event: StepEvent) -> None:
        gpu = self._objects[record.gpu.address]
        gpu.step_changed(
            switch.id, event.index, event.count, event.step.kind, event.step.title, event.status, event.seconds
        )
        gpu.tell_in_a_moment()

    def finished(self, record: GpuRecord, switch: Switch) -> None:
        gpu = self._objects[record.gpu.address]
        # Whoever hears of the end and then reads the properties must find the end there, too.
        gpu.tell()
        gpu.switch_finished(switch.id, str(switch.result), switch.reason)

    def drifted(self, record: GpuRecord, drift: Drift) -> None:
        """Nothing to tell: the properties that changed are."""

    def recovered(self, record: GpuRecord, outcome: str) -> None:
        """Nothing to tell, as above."""


def _switch(switch: Switch) -> dict[str, object]:
    return {
        "id": switch.id,
        "target": str(switch.target),
        "index": switch.index,
        "count": switch.count,
        "kind": switch.step_kind,
        "title": switch.step,
        "started": switch.started,
        "finished": switch.finished or 0.0,
        "result": str(switch.result or ""),
        "reason": switch.reason,
    }


def _entry(entry: Entry) -> dict[str, object]:
    return {
        "id": entry.id,
        "gpu": entry.gpu,
        "target": entry.target,
        "count": entry.count,
        "started": entry.started / 1e6,
        "finished": entry.finished / 1e6,
        "result": entry.result,
        "reason": entry.reason,
        "options": dict(entry.options),
        "asker": dict(entry.requester),
    }


def _step(step: StepEntry) -> dict[str, object]:
    return {
        "index": step.number,
        "kind": step.kind,
        "title": step.title,
        "status": step.status,
        "started": step.started / 1e6,
        "seconds": step.usec / 1e6,
    }


def _holder(holder: Holder) -> dict[str, object]:
    return {
        "pid": holder.pid,
        "command": holder.command,
        "uid": holder.uid,
        "user": holder.user,
        "unit": holder.unit.name if holder.unit else "",
        "user_unit": holder.unit is not None and holder.unit.user is not None,
        "session": holder.session,
        "nodes": list(holder.nodes),
        "doubt": holder.doubt,
        "machine": is_machine(holder),
        "remedy": remedy([holder]),
    }


def _function(function: PciFunction, gpu: PciAddress | None, adds: Sequence[str]) -> dict[str, object]:
    return {
        "group": function.iommu_group or 0,
        "address": str(function.address),
        "kind": str(function.kind),
        "class": function.class_code,
        "vendor": function.vendor,
        "device": function.device,
        "maker": function.maker,
        "model": function.model,
        "driver": function.driver_name or "",
        "gpu": str(gpu or ""),
        "adds": list(adds),
    }
