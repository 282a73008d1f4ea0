"""The virtual machines of a world, which live as libvirt has them live or as commands, and what they may expect."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from gpuswitch.errors import Failed, KernelError
from gpuswitch.gpu.actor import Actor
from gpuswitch.host.simulated.device_nodes import IOMMU
from gpuswitch.host.simulated.libvirt import LIBVIRTD
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import VFIO_DRIVER
from gpuswitch.model.gpu import harmless
from gpuswitch.model.holders import Process
from gpuswitch.model.owner import Owner
from gpuswitch.model.policy import AS_CONFIGURED
from gpuswitch.model.states import State
from gpuswitch.switch.record import Requester
from tests.harness.simulated.harness import Settings
from tests.harness.simulation.invariants import Ask, difference

if TYPE_CHECKING:
    from tests.harness.simulation.world import World

_HOOK = Requester(uid=0, command="libvirt-hook")
_CTL = Requester(uid=0, command="gpuswitchctl")
_FIRST_USER = 1000
_QEMU_SECONDS = 2.0
"""From libvirt's `prepare` until QEMU has opened its devices."""
_CLEARING_SECONDS = (0.0, 0.3, 15.0)
"""From QEMU's end until libvirt has cleared up after it, quick or slow."""


class VirtualMachines:
    """Checks invariants 5 and 7: what machines have stays as it is, and goes back when they are done with it."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._lent: dict[str, dict[PciAddress, Settings]] = {}
        """What they have open, as it was when they took it."""
        self._promised: dict[PciAddress, tuple[str, float]] = {}
        """What they were given and have not opened: whose it is, and until when."""
        self._asking: dict[str, tuple[PciAddress, ...]] = {}
        """The machines whose hook waits for an answer, and what they ask for."""
        self._own: dict[str, tuple[PciAddress, ...]] = {}
        """The machines that asked for their GPUs, and have them."""
        self._commands: set[str] = set()
        """Those that are commands: libvirt knows nothing of them."""
        self._books = world.machine.libvirt
        self._away_since: float | None = None
        """Since when there is no daemon of libvirt's."""
        self._absences: list[tuple[float, float]] = []
        """When it was away before."""
        self._ended: dict[str, float] = {}
        """When the QEMU of a machine has ended."""
        self._books.started = self._daemon_starts

    # What libvirt does ----------------------------------------------------------------------------------------------

    def asks(self, name: str, gpus: tuple[PciAddress, ...]) -> None:
        """`virsh start`: the hook asks for the GPUs; when it has them, QEMU starts."""
        actor = self._who_may_be_asked_for(name, gpus, command=False)
        if self._books.running and actor is not None:
            self._ask(name, actor, gpus, f"acquire for {name}", lambda: self._acquired(name, gpus))

    def runs(self, name: str, gpus: tuple[PciAddress, ...]) -> None:
        """`gpuswitchctl run`: there is a process, which asks; when it has the GPUs, it may open them.

        Those with one GPU are of users who say --user: each of another.
        """
        if (actor := self._who_may_be_asked_for(name, gpus, command=True)) is not None:
            user = _FIRST_USER + int(name.rpartition(" ")[2]) if len(gpus) == 1 else None
            process = self._world.machine.run(name, uid=user or 0)
            self._ask(name, actor, gpus, f"run {name}", lambda: self._acquired_for(process, name, gpus, user))

    def _who_may_be_asked_for(self, name: str, gpus: tuple[PciAddress, ...], *, command: bool) -> Actor | None:
        """The first GPU, where the service is there, and nobody of that name is there, or asks already."""
        service = self._world.ready
        busy = self._runs(name) or name in self._own or name in self._asking or _owner(name) in self._books.machines
        if service is None or service.fleet is None or busy:
            return None
        # A process has a UUID of its own. Here it is made of the name, as that of the machine is which had this before.
        owners = [actor.owner for actor in service.fleet.actors.values() if actor.owner is not None]
        if any(owner == _owner(name) and (owner.process is not None) != command for owner in owners):
            return None
        return self._world.actor(gpus[0])

    def _ask(
        self,
        name: str,
        actor: Actor,
        gpus: tuple[PciAddress, ...],
        what: str,
        acquired: Callable[[], Coroutine[Any, Any, None]],
    ) -> None:
        self._asking[name] = gpus
        others = tuple(filter(None, map(self._world.actor, gpus[1:])))
        _ = self._world.ask(Ask(what, actor, target=State.VFIO, others=others), acquired)

    async def _acquired_for(self, process: Process, name: str, gpus: tuple[PciAddress, ...], user: int | None) -> None:
        service, owner = self._world.ready, replace(_owner(name), process=process)
        actors = list(filter(None, map(self._world.actor, gpus)))
        try:
            if service is None or service.fleet is None:
                raise Failed("the service is stopping")
            await service.fleet.owners.acquire_for_process(owner, actors, _CTL, AS_CONFIGURED, user)
        except BaseException:
            self._world.machine.end(name)
            raise
        finally:
            self._asking.pop(name, None)
        if not self._runs(name):
            return
        self._own[name] = gpus
        self._commands.add(name)
        for actor in actors:
            self._handed_over(name, actor)
            self._may_open(user, actor)
            # As long as it runs, whether it opens it or not.
            self._promised[actor.gpu.address] = name, float("inf")
        loop = self._world.loop
        loop.run_as(None, loop.call_later, _QEMU_SECONDS, self._opens, name, gpus)

    def _may_open(self, user: int | None, actor: Actor) -> None:
        """The user whose command has it, and nobody else, may open it."""
        gpu, access = actor.gpu.address, self._world.machine.access
        nodes = frozenset(access.nodes(actor.gpu.functions)) - {IOMMU}
        may = {(each.uid, each.node) for each in access.entries if each.node in nodes}
        if may != ({(user, node) for node in nodes} if user is not None else set()) and not self._world.checker.lately(
            gpu
        ):
            self._world.checker.broken(7, f"{gpu} is handed to uid {user}, and who may open it is {sorted(may)}")

    def opens_no_more(self, actor: Actor) -> None:
        """What no command owns, nobody but root may open, nor a user whose command that is not."""
        access = self._world.machine.access
        name = actor.owner.name if actor.owner is not None and actor.owner.process is not None else ""
        user = _FIRST_USER + int(name.rpartition(" ")[2]) if name else None
        nodes = frozenset(access.nodes(actor.gpu.functions)) - {IOMMU}
        for each in access.entries:
            if each.node in nodes and each.uid != user and actor.state is State.VFIO:
                text = f"uid {each.uid} may open {each.node}, and {actor.gpu.address} belongs to {actor.owner}"
                self._world.checker.broken(7, text)

    def nobody_is_left(self) -> None:
        """At rest, who may open a node has a command that runs, and a GPU."""
        for each in self._world.machine.access.entries:
            if not (self._runs(name := f"vm {each.uid - _FIRST_USER}") and name in self._commands):
                self._world.checker.broken(7, f"uid {each.uid} may open {each.node}, and no command of his has a GPU")

    def _opens(self, name: str, gpus: tuple[PciAddress, ...]) -> None:
        """A command opens what it has; every other one never does."""
        functions = self._functions(gpus)
        if not (name in self._own and self._runs(name)) or int(self._now) % 2:
            return
        with suppress(KernelError):
            self._world.machine.start_vm(name, functions)
            self._world.checker.note(f"{name} has opened {' and '.join(map(str, gpus))}")
            self._lent[name] = self._world.checker.settings(functions)
            for gpu in gpus:
                self._promised.pop(gpu, None)

    def _command_ends(self, name: str) -> None:
        self.untouched()
        self._lent.pop(name, None)
        self._commands.discard(name)
        self._own.pop(name, None)
        self._expects_nothing(name)
        self._world.machine.end(name)

    def _expects_nothing(self, name: str) -> None:
        for gpu in [gpu for gpu, (whose, _) in self._promised.items() if whose == name]:
            del self._promised[gpu]

    async def _acquired(self, name: str, gpus: tuple[PciAddress, ...]) -> None:
        service = self._world.ready
        try:
            if service is None or service.fleet is None:
                raise Failed("the service is stopping")
            actors = await service.fleet.owners.acquire(_owner(name), self._functions(gpus), _HOOK)
        finally:
            self._asking.pop(name, None)
        self._own[name] = gpus
        for actor in actors:
            self._handed_over(name, actor)
        loop = self._world.loop
        loop.run_as(None, loop.call_later, _QEMU_SECONDS, self._starts, name, gpus)

    def _handed_over(self, name: str, actor: Actor) -> None:
        gpu = actor.gpu.address
        self._promised[gpu] = name, self._now + actor.record.rules.start_grace
        on_vfio = all(f.on_vfio for f in actor.gpu.present(self._world.machine.look()))
        if not on_vfio and not self._world.checker.lately(gpu):
            self._world.checker.broken(7, f"{gpu} is handed to {name}, and is {actor.state}")
        facts = self._world.machine.look()
        staying = [f for f in actor.gpu.neighbours(facts) if not harmless(f)]
        claimed = [number for number in actor.gpu.groups(facts) if number in facts.direct_regions]
        if (staying or claimed) and not self._world.checker.lately(gpu):
            self._world.checker.broken(
                7, f"{gpu} is handed to {name}, which cannot have its group: {staying or claimed}"
            )
        if not self._world.checker.awake(gpu):
            self._world.checker.broken(3, f"{gpu} is handed to {name}, and the machine may sleep")
        if actor.owner != _owner(name):
            self._world.checker.broken(7, f"{gpu} is handed to {name}, and belongs to {actor.owner}")

    def along(self, gpu: PciAddress) -> frozenset[PciAddress]:
        """The functions of the GPUs that the machine which asks, or asked, for this one asked for, too."""
        asked = (gpus for gpus in (*self._own.values(), *self._asking.values()) if gpu in gpus)
        return frozenset(function for gpus in asked for function in self._functions(gpus))

    def _starts(self, name: str, gpus: tuple[PciAddress, ...]) -> None:
        """QEMU opens what it was promised; the hook says `started`."""
        if name not in self._own:
            return
        if not self.takes(name, gpus):
            self.released(name, "failed")
        elif (service := self._world.ready) is not None and service.fleet is not None:
            self._world.loop.tell(service.life, service.fleet.owners.adopt, _owner(name), self._functions(gpus))

    def takes(self, name: str, gpus: tuple[PciAddress, ...]) -> bool:
        """A machine opens GPUs, whoever may have let it."""
        checker, functions = self._world.checker, self._functions(gpus)
        if self._runs(name) or name in self._asking or _owner(name) in self._books.machines:
            return False
        try:
            self._world.machine.start_vm(name, functions)
        except KernelError:
            return False
        checker.note(f"{name} runs with {' and '.join(map(str, gpus))}")
        self._lent[name] = checker.settings(functions)
        actors = filter(None, map(self._world.actor, gpus))
        if self._books.running and (name in self._own or not any(actor.owner == _owner(name) for actor in actors)):
            # libvirt would have asked for what this machine had before.
            self._books.enter(_owner(name), functions)
        for gpu in gpus:
            self._promised.pop(gpu, None)
        return True

    def ends(self, name: str, *, unheard: bool = False) -> None:
        """Its QEMU ends, and libvirt clears up and says so; `unheard`: libvirt's daemon has ended, too."""
        if name in self._commands:
            self._command_ends(name)
            return
        self.untouched()
        self._lent.pop(name, None)
        if unheard:
            self._world.checker.units_touched.add(str(LIBVIRTD))
            self._away_since = self._now if self._books.running else self._away_since
            self._world.machine.units.settle(LIBVIRTD, "inactive")
        self._world.machine.end(name)
        self._ended[name] = self._now
        if _owner(name) in self._books.machines:
            self._clears_up_soon(name)
        elif not unheard:
            self.released(name, "shutdown")

    def daemon_comes(self) -> None:
        """Somebody starts libvirt's daemon, where it is not there."""
        if not self._books.running:
            self._world.machine.units.settle(LIBVIRTD, "active")

    def _daemon_starts(self) -> None:
        """It finds in its books which machines have ended, and says of the others that it has them again."""
        if self._away_since is not None:
            self._absences.append((self._away_since, self._now))
            self._away_since = None
        for owner, functions in list(self._books.machines.items()):
            service = self._world.ready
            if not self._runs(owner.name):
                self._clears_up_soon(owner.name)
            elif service is not None and service.fleet is not None:
                self._world.loop.tell(service.life, service.fleet.owners.adopt, owner, functions)

    def _clears_up_soon(self, name: str) -> None:
        loop = self._world.loop
        seconds = _CLEARING_SECONDS[int(self._now) % len(_CLEARING_SECONDS)]
        loop.run_as(None, loop.call_later, seconds, self._clears_up, name)

    def _clears_up(self, name: str) -> None:
        if self._books.running and not self._runs(name) and _owner(name) in self._books.machines:
            self._books.cleared_up(_owner(name))
            self.released(name, "shutdown")

    def leaves_vfio(self, function: PciAddress) -> None:
        """The service takes it from vfio: of no machine that is in the books, unless libvirt was not to be had."""
        for owner, functions in self._books.machines.items():
            if function in functions and self._away(owner.name) < self._world.config.defaults.libvirt_patience:
                self._world.checker.broken(3, f"{function} leaves vfio, and libvirt is not done with {owner}")

    def _away(self, name: str) -> float:
        """How long, in all, libvirt's daemon was not there since this machine ended."""
        ended = self._ended.get(name, self._now)
        away = [*self._absences, *([(self._away_since, self._now)] if self._away_since is not None else [])]
        return sum(end - max(begun, ended) for begun, end in away if end > ended)

    def released(self, name: str, reason: str) -> None:
        """The hook says that a machine is gone; it may be one that has nothing."""
        if name in self._commands:
            return
        self._books.machines.pop(_owner(name), None)
        self._own.pop(name, None)
        self._expects_nothing(name)
        if (service := self._world.ready) is not None and service.fleet is not None:
            self._world.checker.note(f"{name} is released: {reason}")
            self._world.loop.tell(service.life, service.fleet.owners.release, _owner(name), reason)

    # What may be expected -------------------------------------------------------------------------------------------

    def killed(self) -> None:
        """Whoever was promised something has to look again."""
        self._promised = {gpu: (name, until) for gpu, (name, until) in self._promised.items() if name in self._commands}
        self._asking.clear()

    def moves(self, actor: Actor) -> None:
        """A switch begins: of nothing that was promised to a machine which is about to open it."""
        name, until = self._promised.get(actor.gpu.address, ("", 0.0))
        if name and actor.switch is not None and actor.switch.target is State.HOST and self._now < until:
            self._world.checker.broken(7, f"{actor.gpu.address} goes to the host, and {name} is about to open it")

    def untouched(self) -> None:
        """What machines have is as it was when they took it."""
        for name, before in self._lent.items():
            # Where an override aims is nothing to a machine; vfio-pci is where it has to.
            now = {
                a: settings._replace(override=before[a].override) if settings.override == VFIO_DRIVER else settings
                for a, settings in self._world.checker.settings(tuple(before)).items()
            }
            meddled = any(self._world.checker.lately(gpu) for gpu in self._world.spec.gpus)
            if now != before and not meddled:
                self._world.checker.broken(5, f"{name} has it, and {difference(before, now)}")
                self._lent[name] = now

    def at_rest(self, actor: Actor) -> None:
        """Who owns it has it; who does not run owns nothing."""
        checker, gpu = self._world.checker, actor.gpu.address
        if actor.owner is None or actor.state is State.WEDGED or checker.lately(gpu):
            return
        if str(gpu) not in self._world.machine.units.inhibitors:
            checker.broken(3, f"{gpu} belongs to {actor.owner}, and the machine may sleep")
        groups = {self._world.machine.devices[f].shape.iommu_group or 0 for f in actor.gpu.functions}
        if any(self._world.machine.group(number).opened_by for number in groups):
            # Whoever has it open: it is not given back while he does.
            return
        if any(not {*functions}.isdisjoint(actor.gpu.functions) for functions in self._books.machines.values()):
            # Nor while libvirt is not done with a machine, be it another one.
            return
        if not self._runs(actor.owner.name):
            checker.broken(7, f"{gpu} belongs to {actor.owner}, which does not run")

    # ----------------------------------------------------------------------------------------------------------------

    @property
    def _now(self) -> float:
        return self._world.loop.time()

    def _runs(self, name: str) -> bool:
        return self._world.machine.processes.named(name) is not None

    def _functions(self, gpus: tuple[PciAddress, ...]) -> tuple[PciAddress, ...]:
        return tuple(function for gpu in gpus for function in self._world.functions[gpu])

    @property
    def names(self) -> tuple[str, ...]:
        """Of all machines that there may be."""
        return tuple(dict.fromkeys((*self._own, *self._lent, *self._commands)))


def _owner(name: str) -> Owner:
    return Owner(name, f"uuid of {name}")
