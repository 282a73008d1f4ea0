"""Holders in words and in kinds: who they are, what frees the GPU of them, who goes by himself, who is never ended."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from shlex import quote

from gpuswitch.config.schema import NEVER_STOPPED
from gpuswitch.model.address import PciAddress
from gpuswitch.model.desktop import DISPLAY_MANAGER, DISPLAY_MANAGERS
from gpuswitch.model.holders import Holder, Unit
from gpuswitch.sentence import Sentence

_SHOWN = 3
"""Nodes of one holder that a sentence names; the rest is counted."""
_DISPLAY_MANAGERS = frozenset((DISPLAY_MANAGER, *DISPLAY_MANAGERS))


@dataclass(frozen=True, slots=True)
class Leaving:
    """What the switch does by itself to make holders go: it stops `units`, ends `sessions`, announces `sound`."""

    units: tuple[Unit, ...] = ()
    sessions: tuple[str, ...] = ()
    sound: bool = False

    def takes(self, holder: Holder) -> bool:
        """Whether this holder may go with them. It is looked at again, once all that is done."""
        if holder.unit in self.units or is_udevs(holder):
            return True
        desktop = any(unit.name in _DISPLAY_MANAGERS for unit in self.units)
        if holder.process is None:
            # What the kernel has may be a program's, as a buffer that it shares; that is seen when those are gone.
            return desktop or bool(self.sessions)
        if self.sound and holder.nodes and all(node.startswith("/dev/snd/") for node in holder.nodes):
            return True
        if not _of_a_session(holder):
            return False
        if holder.session in self.sessions or (self.sessions and _lives_with_sessions(holder)):
            return True
        # Whoever draws for a person lives in that person's session, not in the display manager's own unit.
        return desktop


def _of_a_session(holder: Holder) -> bool:
    """In a session, in a user's manager, or logind."""
    return bool(holder.session) or _lives_with_sessions(holder)


def _lives_with_sessions(holder: Holder) -> bool:
    """Without a session of its own, it lives as long as one: in a user's manager, or logind."""
    return is_logind(holder) or (holder.unit is not None and holder.unit.user is not None)


def is_logind(holder: Holder) -> bool:
    """It opens devices for the compositors of sessions, and closes them when these end.

    So does the init process, which keeps logind's descriptors for its next start (FDSTORE in sd_notify(3)).
    """
    return holder.unit == Unit("systemd-logind.service") or holder.pid == 1


def is_machine(holder: Holder) -> bool:
    """Whether it runs a virtual machine: by what it has open, whatever it is called, or, emulated, by QEMU's name.

    Of a container neither is so, though its scope may be named like a machine's.
    """
    # A wrapped program's name begins with a dot.
    return holder.machine or holder.command.removeprefix(".").startswith(("qemu-", "kvm"))


def is_udevs(holder: Holder) -> bool:
    """A rule of udev has it run for an event, to see what a device is; udev ends one that does not end by itself.

    Each DRM node is opened so, at each event (switcheroo-control 3.0), and logind makes one for every node of a seat
    when another session comes to the front (systemd 258).
    """
    return holder.unit == Unit("systemd-udevd.service")


def never_ended(holder: Holder) -> str:
    """Why no policy ends this one, and what to do instead; "" where one may."""
    if holder.process is None:
        return Sentence("nobody can end the kernel's own use of it")
    if holder.doubt and not holder.nodes:
        return Sentence("nobody can tell whether it has it open")
    return _stays(holder)


def _stays(holder: Holder) -> str:
    """Why nobody should end it, whether or not it has the GPU open; "" where somebody may."""
    if holder.pid == 1 and not holder.nodes:
        return Sentence(
            "it is the init process, which cannot be ended; have the service see what it has open: run gpuswitchd as "
            "its unit does, as root, with CAP_SYS_PTRACE and outside of any container"
        )
    if holder.pid == 1:
        return Sentence(
            "it is the init process, which cannot be ended, and keeps them for logind: end the session that draws on "
            "it: loginctl list-sessions, then loginctl terminate-session ID"
        )
    if is_machine(holder):
        return Sentence("it is a virtual machine: shut it down (libvirt: virsh list, then virsh shutdown NAME)")
    if is_logind(holder):
        return Sentence(
            "it has them for a session: end the one that draws on it: loginctl list-sessions, then loginctl "
            "terminate-session ID"
        )
    if is_udevs(holder):
        return Sentence("udev runs it to see what that is: try again in a moment")
    if holder.unit is not None and holder.unit.name in NEVER_STOPPED:
        return Sentence("the system lives by it, and it is not to be ended")
    return ""


def stoppable_unit(holder: Holder) -> Unit | None:
    """The service to stop in order to end this holder for good: killed, systemd or a socket might start it again."""
    unit = holder.unit
    if unit is None or not unit.name.endswith(".service") or unit.name in NEVER_STOPPED:
        return None
    # The manager of a user's units holds nothing itself; what it runs outside of any service is not its service.
    return None if unit.name.startswith("user@") else unit


def in_the_way(gpu: PciAddress, holders: Iterable[Holder]) -> Sentence:
    """All of them, a line each, with what frees the GPU."""
    return Sentence.joined("\n", sentences(gpu, holders))


def sentences(gpu: PciAddress, holders: Iterable[Holder]) -> Iterator[Sentence]:
    """One for each program: the processes of one unit that have the same name are told together."""
    together: dict[tuple[str, Unit | None, str, bool], list[Holder]] = {}
    for holder in holders:
        together.setdefault((holder.command, holder.unit, holder.user, holder.process is None), []).append(holder)
    for alike in together.values():
        yield _sentence(gpu, alike)


def _sentence(gpu: PciAddress, alike: list[Holder]) -> Sentence:
    first = alike[0]
    if first.process is None:
        return Sentence("{gpu} is in use by the kernel: {doubt}", gpu=gpu, doubt=first.doubt)
    who, what = _who(alike), remedy(alike)
    if not (nodes := list(dict.fromkeys(node for holder in alike for node in holder.nodes))):
        return Sentence(
            "{who} may have {gpu} open: {doubt}; {remedy}", who=who, gpu=gpu, doubt=first.doubt, remedy=what
        )
    shown = ", ".join(nodes[:_SHOWN])
    if more := len(nodes) - _SHOWN if len(nodes) > _SHOWN else 0:
        shown = Sentence("{nodes} and {count} more", nodes=shown, count=more)
    return Sentence("{who} has {nodes} open; {remedy}", who=who, nodes=shown, remedy=what)


def _who(alike: list[Holder]) -> Sentence:
    command, pids = alike[0].command, ", ".join(str(holder.pid) for holder in alike)
    if whose := _whose(alike[0]):
        return Sentence(
            "{command} (pid {pids}, {whose})" if len(alike) == 1 else "{command} (pids {pids}, {whose})",
            command=command,
            pids=pids,
            whose=whose,
        )
    return Sentence(
        "{command} (pid {pids})" if len(alike) == 1 else "{command} (pids {pids})", command=command, pids=pids
    )


def _whose(holder: Holder) -> str:
    if holder.session:
        return Sentence("session {session} of {user}", session=holder.session, user=holder.user)
    if holder.unit is not None and holder.unit.user is None:
        return holder.unit.name
    if holder.unit is not None:
        return Sentence("{unit} of {user}", unit=holder.unit.name, user=holder.user)
    return Sentence("user {user}", user=holder.user) if holder.user else ""


def remedy(alike: list[Holder]) -> str:
    """What a person can do about them, all of one program."""
    first = alike[0]
    # A person may know what nobody else can tell: whether it has the GPU open.
    if why := never_ended(first) if first.process is None else _stays(first):
        return why
    unit = stoppable_unit(first)
    if unit is not None and unit.user is None:
        return Sentence("stop it: systemctl stop {unit}", unit=quote(unit.name))
    if unit is not None:
        # People choose what is below their manager: it is copied into a shell, perhaps root's.
        user, name = quote(first.user), quote(unit.name)
        return Sentence("stop it: systemctl --user --machine={user}@ stop {unit}", user=user, unit=name)
    return Sentence("close it, or: kill {pids}", pids=" ".join(str(holder.pid) for holder in alike))
