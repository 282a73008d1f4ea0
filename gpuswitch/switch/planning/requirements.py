"""What a switch needs of the host around a GPU before it may touch it. Pure: facts and answers in, values out.

`survey.py` asks the host; this says what follows from the answers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from gpuswitch.config.settings import Config
from gpuswitch.errors import Busy as BusyError
from gpuswitch.model.address import PciAddress
from gpuswitch.model.drivers import Profile, lets_go_of_one, profile_of
from gpuswitch.model.facts import BootFramebuffer, Driver, HostFacts, Kind
from gpuswitch.model.gpu import Gpu
from gpuswitch.model.holders import Holder, HolderQuery, Unit
from gpuswitch.model.policy import Busy, ModulePolicy
from gpuswitch.sentence import Sentence
from gpuswitch.switch.holder_policy import Leaving, is_logind, never_ended, sentences
from gpuswitch.switch.planning.guards import GONE, Blocker
from gpuswitch.switch.planning.remedies import to_set, to_set_units

AUTOPROBE = "/sys/bus/pci/drivers_autoprobe"


@dataclass(frozen=True, slots=True)
class BoundDriver:
    """A host driver that has functions of the GPU, all of which are to leave it.

    `last`: no other device is on any driver of its module. `loaded`: the modules of its chain that can be unloaded, in
    that order; `unload`: doing so is how the functions are detached.
    """

    profile: Profile
    functions: tuple[PciAddress, ...]
    last: bool = True
    loaded: tuple[str, ...] = ()
    unload: bool = False


@dataclass(frozen=True, slots=True)
class DetachRequirements:
    """What is to be done around the GPU on its way out; by default, nothing.

    `stop` are the units to stop, of which `active` are to be started again: `later` with the GPU, the others at once,
    since they serve other GPUs too; those in `restarted` look for their GPUs when they start; not `units_told`: nobody
    could say which are active. `announce` pairs a subsystem with functions. `holding`: somebody has the GPU open, or
    may come to, who may be waited for, or ended; `passing_seconds`: how long one may take who has it open for a moment
    only, when all that is done.

    `query` is what to look for to find who has it open, `numbers` the device numbers that a look found.

    `shows`: it has a frame buffer. `terminals` are shown there, and can be moved `to` another; `terminals_of_others`
    are shown there while their own GPUs are away, and `shown_by_others` as in `RestoreState`. `unbind_consoles` are
    unbound, since fbcon would keep the driver's module, and bound again but for `leave_consoles`. `persistent`
    functions are in nvidia's persistence mode. `along`: functions that its machine is to have with it.
    `vfio_driver`: what the configuration names for its display functions ("" whatever fits best). `expected`: modules
    without which there is no picture, and which udev has yet to load while the machine starts.
    """

    query: HolderQuery | None = None
    numbers: tuple[str, ...] = ()
    busy: Busy = Busy.REFUSE
    wait_seconds: float = 0.0
    grace_seconds: float = 0.0
    passing_seconds: float = 0.0
    stop: tuple[Unit, ...] = ()
    active: tuple[Unit, ...] = ()
    later: tuple[Unit, ...] = ()
    restarted: tuple[Unit, ...] = ()
    units_told: bool = True
    sessions: tuple[str, ...] = ()
    announce: tuple[tuple[str, tuple[PciAddress, ...]], ...] = ()
    holding: bool = False
    bound_drivers: tuple[BoundDriver, ...] = ()
    terminals: tuple[int, ...] = ()
    terminals_of_others: frozenset[int] = frozenset()
    shown_by_others: tuple[tuple[int, PciAddress], ...] = ()
    shows: bool = False
    along: frozenset[PciAddress] = frozenset()
    to: int | None = None
    unbind_consoles: tuple[str, ...] = ()
    leave_consoles: tuple[str, ...] = ()
    boot_framebuffers: tuple[BootFramebuffer, ...] = ()
    persistent: tuple[PciAddress, ...] = ()
    vfio_driver: str = ""
    expected: tuple[str, ...] = ()

    @property
    def waits(self) -> bool:
        """Whether it takes systemd, or people."""
        return bool(self.stop or self.sessions or self.holding)

    @property
    def at_once(self) -> tuple[Unit, ...]:
        """Those to start again as soon as the GPU is away."""
        return tuple(unit for unit in self.active if unit not in self.later)

    @property
    def consoles_again(self) -> tuple[str, ...]:
        """Those of the unbound consoles that may be bound again."""
        return tuple(console for console in self.unbind_consoles if console not in self.leave_consoles)

    @property
    def chain(self) -> tuple[str, ...]:
        """The modules that are there around the host drivers, in the order to load them."""
        return tuple(module for o in self.bound_drivers for module in reversed(o.loaded))

    @property
    def unload(self) -> tuple[BoundDriver, ...]:
        return tuple(o for o in self.bound_drivers if o.unload)


def bound_drivers(
    gpu: Gpu, facts: HostFacts, policy: ModulePolicy, stuck: frozenset[str] = frozenset()
) -> tuple[BoundDriver, ...]:
    """The host drivers that have functions of this GPU, companions' first.

    `stuck` are drivers that the kernel is in with another device, although that shows no driver any more: to unload
    them would wait for it.
    """
    drivers: dict[Driver, list[PciAddress]] = {}
    for address in gpu.in_detach_order(facts):
        function = facts.functions.get(address)
        if function is not None and function.driver is not None and not function.on_vfio:
            drivers.setdefault(function.driver, []).append(address)
    others = {Driver(name, facts.pci_drivers.get(name)) for name in stuck}
    others |= {f.driver for a, f in facts.functions.items() if a not in gpu.functions and f.driver is not None}
    return tuple(
        _bound_driver(facts, policy, driver, tuple(own), last=not any(driver.comes_with(other) for other in others))
        for driver, own in drivers.items()
    )


def _bound_driver(
    facts: HostFacts, policy: ModulePolicy, driver: Driver, own: tuple[PciAddress, ...], *, last: bool
) -> BoundDriver:
    profile = profile_of(driver)
    loaded = tuple(m for m in profile.chain if m == driver.module or _can_go(facts, m))
    display = all(facts.functions[a].makes_gpu for a in own)
    wanted = policy is ModulePolicy.ALWAYS or (policy is ModulePolicy.AUTO and profile.unload_detaches)
    if profile.needs_device and not facts.autoprobe:
        # It would find none when it is to come back.
        wanted = False
    return BoundDriver(profile, own, last, loaded, unload=bool(wanted and last and display and driver.module))


def _can_go(facts: HostFacts, module: str) -> bool:
    return module in facts.modules and facts.modules[module].references is not None


def moves_in_turns(driver: str, policy: ModulePolicy) -> bool:
    """Whether a switch may unload the driver's modules, so that who is its last GPU must not change meanwhile."""
    return policy is ModulePolicy.ALWAYS or profile_of(Driver(driver, None)).unload_detaches


def cannot_load(drivers: Iterable[Driver], facts: HostFacts) -> Iterator[Blocker]:
    """Drivers whose modules find no device to load for."""
    for driver in () if facts.autoprobe else drivers:
        if profile_of(driver).needs_device and driver.module and driver.name not in facts.pci_drivers:
            sentence = Sentence(
                "the module {module} is given no device, and does not load, while {file} is 0: switch that on first: "
                "echo 1 > {file}",
                module=driver.module,
                file=AUTOPROBE,
            )
            yield Blocker("no_autoprobe", sentence)


def no_way_home(facts: HostFacts, found: Iterable[BoundDriver]) -> Iterator[Blocker]:
    """Modules that would be unloaded, and could not be loaded again."""
    modules = [module for bound_driver in found if bound_driver.unload for module in reversed(bound_driver.loaded)]
    if modules and not facts.modules_on_disk:
        sentence = Sentence(
            "{modules} would have to be unloaded and could not be loaded again, since the {gone}: restart the machine "
            "first",
            modules=", ".join(modules),
            gone=GONE,
        )
        yield Blocker("no_modules", sentence)


def cannot_unload(gpu: Gpu, facts: HostFacts, config: Config, found: Iterable[BoundDriver]) -> Iterator[Blocker]:
    """Modules that would be unloaded, in a kernel that unloads none."""
    for bound_driver in found:
        own = facts.modules.get(bound_driver.loaded[-1]) if bound_driver.unload else None
        if own is not None and own.references is None and not own.built_in:
            sentence = Sentence(
                "{module} would have to be unloaded, and this kernel unloads no modules (CONFIG_MODULE_UNLOAD is not "
                "set): start one that does; or, to have the driver unbound instead, which waits for ever where "
                "something still uses the GPU: {set}",
                module=bound_driver.loaded[-1],
                set=to_set(config, gpu, "module_policy", '"never"'),
            )
            yield Blocker("no_unload", sentence)


def unloaded(found: Iterable[BoundDriver]) -> tuple[str, ...]:
    """The drivers' own modules that would be unloaded, and without which nothing comes home."""
    return tuple(dict.fromkeys(bound_driver.loaded[-1] for bound_driver in found if bound_driver.unload))


def not_found_again(gpu: Gpu, config: Config, modules: Iterable[str], known: Collection[str]) -> Iterator[Blocker]:
    """Those that modprobe does not know, as when they were loaded out of a container, or by hand."""
    for module in modules:
        if module not in known:
            sentence = Sentence(
                "{module} would have to be unloaded and could not be loaded again, since modprobe finds no module of "
                "that name: install it for this kernel; or keep it loaded: {set}",
                module=module,
                set=to_set(config, gpu, "module_policy", '"never"'),
            )
            yield Blocker("no_modules", sentence)


def used_besides(gpu: Gpu, facts: HostFacts, config: Config, found: Iterable[BoundDriver]) -> Iterator[Blocker]:
    """Modules that nobody here knows, and without which one that would be unloaded cannot go."""
    for bound_driver in found:
        for module in bound_driver.loaded if bound_driver.unload else ():
            there = facts.modules.get(module)
            # Where nothing can be unloaded, that is what is in the way (`cannot_unload`).
            users = there.users if there is not None and there.references is not None else ()
            if others := [user for user in users if user not in bound_driver.loaded]:
                sentence = Sentence(
                    "{others} uses {module}, which would have to be unloaded: unload it first: modprobe -r {first}; or "
                    "keep both loaded: {set}"
                    if len(others) == 1
                    else "{others} use {module}, which would have to be unloaded: unload them first: modprobe -r "
                    "{first}; or keep all of them loaded: {set}",
                    others=", ".join(others),
                    module=module,
                    first=" ".join(others),
                    set=to_set(config, gpu, "module_policy", '"never"'),
                )
                yield Blocker("module_users", sentence)


def cannot_let_go(gpu: Gpu, facts: HostFacts, config: Config, found: Iterable[BoundDriver]) -> Iterator[Blocker]:
    """Drivers that would have to let one device go, and cannot."""
    for bound_driver in found:
        profile = bound_driver.profile
        modeset = facts.modules.get(profile.modeset)
        own = facts.modules.get(profile.module)
        version = own.version if own else ""
        if bound_driver.unload or modeset is None or not modeset.modeset or lets_go_of_one(profile, version):
            continue
        why, remedy = Sentence("other GPUs stay on it"), None
        if bound_driver.last and facts.autoprobe:
            why, remedy = Sentence("module_policy is never"), to_set(config, gpu, "module_policy", '"auto"')
        elif bound_driver.last:
            why, remedy = Sentence("{file} is 0", file=AUTOPROBE), Sentence("echo 1 > {file}", file=AUTOPROBE)
        sentence = Sentence(
            "{driver} {version} cannot let go of {gpu} alone while {modeset} has modeset on, and it cannot be "
            "unloaded, since {why}: install {driver} {since} or later",
            driver=profile.driver,
            version=version,
            gpu=gpu.address,
            modeset=profile.modeset,
            why=why,
            since=".".join(map(str, profile.single_from[0])),
        )
        if remedy is not None:
            sentence = Sentence("{sentence}; or: {remedy}", sentence=sentence, remedy=remedy)
        yield Blocker("driver_too_old", sentence)


def query(gpu: Gpu, facts: HostFacts, found: Collection[BoundDriver]) -> HolderQuery:
    """What to look for: whoever has these devices open, through whatever node.

    Programs may draw on it by the firmware's frame buffer, whoever has the GPU, and if nobody does. What no host driver
    has may have been given to a machine by hand.
    """
    nodes = [node for framebuffer in boot_framebuffers(gpu, facts) for node in framebuffer.nodes]
    nodes += [f"vfio/{number}" for number in (() if found else gpu.groups(facts))]
    modules: list[str] = []
    for bound_driver in found:
        profile = bound_driver.profile
        if bound_driver.last:
            nodes += profile.nodes
        # Shared nodes of other GPUs count as references too, and are not looked for then.
        if profile.waits and (bound_driver.last or not profile.nodes):
            modules += bound_driver.loaded
    return HolderQuery(gpu.functions, tuple(nodes), modules=tuple(modules))


def boot_framebuffers(gpu: Gpu, facts: HostFacts) -> tuple[BootFramebuffer, ...]:
    """Those that lie in the memory of this GPU."""
    return tuple(each for each in facts.boot_framebuffers if each.function in gpu.functions)


def everything(gpu: Gpu, facts: HostFacts) -> HolderQuery:
    """What to look for where a person asks: whatever driver it is on."""
    host = query(gpu, facts, bound_drivers(gpu, facts, ModulePolicy.AUTO))
    groups = tuple(f"vfio/{number}" for number in gpu.groups(facts))
    return HolderQuery(gpu.functions, tuple(dict.fromkeys(host.nodes + groups)), modules=host.modules)


def units_to_stop(found: Iterable[BoundDriver], configured: Iterable[str]) -> tuple[tuple[Unit, ...], tuple[Unit, ...]]:
    """The configured units, and those that the drivers' profiles name."""
    own = tuple(dict.fromkeys(map(Unit, configured)))
    comfort = dict.fromkeys(unit for bound_driver in found for unit in bound_driver.profile.units)
    return own, tuple(unit for unit in comfort if unit not in own)


def no_such_unit(gpu: Gpu, config: Config, unit: Unit) -> Sentence:
    """One that the configuration names, and systemd does not know."""
    return Sentence(
        "there is no {unit}, which is to be stopped first: correct its name, or leave it out: {set}",
        unit=unit,
        set=to_set_units(config, gpu, less=str(unit)),
    )


def back_at_once(found: Iterable[BoundDriver]) -> frozenset[Unit]:
    """Units that serve the GPUs which stay on the host as well."""
    return frozenset(unit for bound_driver in found if not bound_driver.last for unit in bound_driver.profile.units)


def announcements(
    gpu: Gpu, facts: HostFacts, holders: Iterable[Holder], *, sound: bool, display: bool, coming: bool
) -> Iterator[tuple[str, tuple[PciAddress, ...]]]:
    """Which cards to announce as gone: those that may be announced, and that somebody has open.

    Or will have (`coming`): where a display manager ends, the session behind it gets its devices back, and PipeWire
    opens the sound card that very moment.
    """
    nodes = [node for holder in holders for node in holder.nodes]
    for subsystem, folder, wanted in (("sound", "/dev/snd/", sound), ("drm", "/dev/dri/", display)):
        kind = Kind.AUDIO if subsystem == "sound" else Kind.DISPLAY
        functions = tuple(f.address for f in gpu.present(facts) if f.kind is kind and f.driver and not f.on_vfio)
        if wanted and functions and (coming or any(node.startswith(folder) for node in nodes)):
            yield subsystem, functions


def leaving_as_configured(gpu: Gpu, facts: HostFacts, config: Config, holders: Iterable[Holder]) -> Leaving:
    """What a switch to vfio does by itself to make holders go, as far as that can be told without asking systemd: units
    by the names that the configuration has for them.
    """
    own = config.gpu(gpu.address).rules
    found = bound_drivers(gpu, facts, own.module_policy)
    units = (*map(Unit, own.stop_units), *(unit for each in found for unit in each.profile.units))
    sessions = tuple({holder.session for holder in holders if holder.session}) if own.end_sessions else ()
    return Leaving(units, sessions, own.announce_sound)


def refuse_holders(gpu: Gpu, holders: Iterable[Holder], leaving: Leaving, busy: Busy) -> Iterator[Blocker]:
    """Those who keep the GPU, come what may that this switch is allowed to do."""
    staying = [holder for holder in holders if not leaving.takes(holder)]
    if busy is Busy.WAIT:
        return
    if busy is not Busy.REFUSE:
        ended = any(not never_ended(holder) for holder in staying)
        staying = [holder for holder in staying if never_ended(holder) and not is_logind(holder)]
        # What the kernel has may go with those who are ended.
        if ended and all(holder.process is None for holder in staying):
            return
    for sentence in sentences(gpu.address, staying):
        yield Blocker("busy", sentence, BusyError)
