"""The object at the root: the service as a whole. Reads memory only, so it always answers; the history lies on disk.

The annotations are signatures that `gpuswitch.api.interface` reads when the class is made, its docstrings what
introspection tells.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import cast

from gpuswitch import __version__
from gpuswitch.api.authority import Action
from gpuswitch.api.encoders import entry_values, function_values, steps_values
from gpuswitch.api.interface import Interface, Member, dbus_constant, dbus_method
from gpuswitch.api.options import access_of, options_of
from gpuswitch.api.paths import path_of
from gpuswitch.api.permission import about, actions_of
from gpuswitch.api.signatures import Int64, ObjectPath, Str, StrArray, UInt32, Values, ValuesArray, typed
from gpuswitch.api.vms import VirtualMachines, printable
from gpuswitch.fleet.fleet import Fleet
from gpuswitch.gpu.gpu_record import GpuRecord
from gpuswitch.history.history import History
from gpuswitch.model.holders import Process
from gpuswitch.model.policy import Options


class ManagerObject(Interface, name="org.gpuswitch1.Manager"):
    """The service as a whole."""

    def __init__(
        self,
        fleet: Fleet,
        vms: VirtualMachines,
        history: History,
        reload: Callable[[], Awaitable[None]],
        *,
        directory: str = "",
        simulated: str = "",
    ) -> None:
        self._fleet = fleet
        self._vms = vms
        self._history = history
        self._reload = reload
        self._directory = directory
        self._simulated = simulated

    @dbus_constant
    def version(self) -> Str:
        """The version of the service."""
        return __version__

    @dbus_constant
    def config_directory(self) -> Str:
        """Where it reads its configuration."""
        return self._directory

    @dbus_constant
    def simulated(self) -> Str:
        """The machine in memory whose GPUs it moves; empty: those of this machine."""
        return self._simulated

    @dbus_method(returns="gpu")
    def get_gpu(self, selector: Str) -> ObjectPath:
        """A GPU by its address, that of a function, or its name in any case; "": the only (managed) one."""
        return path_of(self._fleet.find(selector).gpu.address)

    @dbus_method(returns="functions", action=Action.INSPECT)
    def groups(self) -> ValuesArray:
        """Every function that is in an IOMMU group, with that group, its driver, and the GPU that it belongs to."""
        owners = {f: actor.gpu.address for actor in self._fleet.actors.values() for f in actor.gpu.functions}
        functions = sorted(self._fleet.facts.functions.items())
        return [
            function_values(function, owners.get(address), self._fleet.facts.adds(function))
            for address, function in functions
            if function.iommu_group is not None
        ]

    @dbus_method(returns="settings", action=Action.INSPECT)
    def config(self) -> ValuesArray:
        """Every setting in force: its key, its value and its default as TOML has them, and what set it."""
        settings = self._fleet.config.settings
        return [{"key": s.key, "value": s.value, "origin": s.origin, "default": s.default} for s in settings]

    @dbus_method(returns="sentences", action=Action.INSPECT)
    def warnings(self) -> StrArray:
        """What of the configuration is about no GPU of this host, or has no effect otherwise, a sentence each."""
        return [*self._fleet.warnings, *(misfit.sentence for misfit in self._fleet.misfits)]

    @dbus_method(returns="switches", action=Action.INSPECT)
    async def history(self, limit: UInt32) -> ValuesArray:
        """The last finished switches without their steps, and what somebody else moved, newest first; 0: all kept."""
        return [entry_values(entry) for entry in await self._history.last(limit)]

    @dbus_method(returns="switch", action=Action.INSPECT)
    async def history_entry(self, id: Str) -> Values:  # noqa: A002 -- the argument's name on the bus
        """One finished switch with its steps, by its id, or by the beginning of it where no other begins so."""
        entry = await self._history.find(id)
        return {**entry_values(entry), "steps": typed("aa{sv}", steps_values(entry))}

    @dbus_method(returns="gpus", action=Action.VM)
    async def acquire_for_vm(self, name: Str, uuid: Str, addresses: StrArray) -> StrArray:
        """Hand every managed GPU that has one of these functions over to this virtual machine, all or none.

        Returns their addresses when all are on vfio. A caller that leaves before has asked for nothing.
        """
        return await self._vms.acquire(name, uuid, addresses)

    @dbus_method(returns="functions", action=Action.SWITCH)
    async def acquire_for_process(
        self, pid: Int64, started: Int64, name: Str, gpus: StrArray, options: Values
    ) -> StrArray:
        """Hand these GPUs to a process of the caller's, until it has ended and nobody has them open; all or none.

        It is told from others by its start (proc_pid_stat(5), field 22). GPUs by address or name; none: the only one.
        Returns their functions when all are on vfio. A caller that leaves before has asked for nothing. Options as of
        ToVfio, and `access` (b): the caller may open their nodes of vfio as long as that process runs.
        """
        access, others = access_of(options)
        process = Process(pid, started)
        return await self._vms.acquire_for_process(process, name, gpus, options_of(others), access=access)

    @dbus_method(action=Action.VM, outlives=True)
    def adopt_vm(self, name: Str, uuid: Str, addresses: StrArray) -> None:
        """This virtual machine runs, and has these functions."""
        self._vms.adopt(name, uuid, addresses)

    @dbus_method(action=Action.VM, outlives=True)
    def release_from_vm(self, name: Str, uuid: Str, reason: Str) -> None:
        """This virtual machine is gone: its GPUs go where the configuration says, as soon as nobody has them open."""
        self._vms.release(name, uuid, reason)

    @dbus_method(action=Action.MANAGE, outlives=True)
    async def reload(self) -> None:
        """Read the configuration again; one with a fault is refused whole, and the old one stays."""
        await self._reload()

    def actions(self, method: Member, arguments: Sequence[object]) -> Sequence[str]:
        """What the GPUs that a process is to have ask for."""
        if method.action is not Action.SWITCH:
            return super().actions(method, arguments)
        return actions_of(*self._asked(arguments))

    def about(self, method: Member, arguments: Sequence[object]) -> Mapping[str, str]:
        """For `VM`, the machine; for `SWITCH`, the GPUs."""
        if method.action is Action.SWITCH:
            return about(*self._asked(arguments), "vfio")
        if method.action is not Action.VM:
            return {}
        return {"machine": printable(str(arguments[0])[:80])}

    def _asked(self, arguments: Sequence[object]) -> tuple[list[GpuRecord], Options]:
        """The GPUs that are to be switched, and how: the last two arguments of whoever asks for that."""
        selectors, options = cast("tuple[list[str], dict[str, object]]", tuple(arguments[-2:]))
        _access, others = access_of(options)
        return [actor.record for actor in self._vms.named(selectors)], options_of(others)
