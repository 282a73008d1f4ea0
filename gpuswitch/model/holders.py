"""Holders: who has a GPU open, and what a scan for them looks for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import dropwhile

from gpuswitch.model.address import PciAddress
from gpuswitch.sentence import Sentence, template

_DOUBTS = (
    template("its descriptors cannot be read"),
    template("its mappings cannot be read"),
    template("it is stuck in the kernel, or was looked at for too long"),
    template("module {module} has 1 user that no process explains"),
    template("module {module} has {count} users that no process explains"),
    template("mounted on {folder}"),
    template("used as swap space"),
)
_MANAGER = re.compile(r"user@(\d+)\.service")
_SESSION = re.compile(r"session-(\w+)\.scope")
_KINDS = (".service", ".scope")


@dataclass(frozen=True, slots=True, order=True)
class Unit:
    """A systemd unit by its full name (`gdm.service`); `user` is the uid whose manager has it, None the system's."""

    name: str
    user: int | None = None

    def __str__(self) -> str:
        return self.name if self.user is None else f"{self.name} of user {self.user}"


@dataclass(frozen=True, slots=True)
class Process:
    """A process, told from a later one of the same number by `started` (clock ticks since boot, proc(5) field 22)."""

    pid: int
    started: int


@dataclass(frozen=True, slots=True)
class Holder:
    """One process that has something of a GPU open, or may have.

    `command` is its name, `uid` and `user` whose it is; `unit` is the service or scope that it runs in (a container's
    scope, too), `session` its logind session ("" none). `nodes` are what it has open, by the host's names
    (`/dev/dri/card0`), in order. `doubt` says in a few words why it counts as a holder where its nodes do not:
    "its descriptors cannot be read". With `process` None it is the kernel: `doubt` says what shows it ("module
    nvidia has 2 users that no process explains"), `command` is the module. `machine`: by what else it has open, it runs
    a virtual machine, whatever it is called.
    """

    process: Process | None
    command: str
    uid: int = 0
    user: str = ""
    unit: Unit | None = None
    session: str = ""
    nodes: tuple[str, ...] = ()
    doubt: str = ""
    machine: bool = False

    @property
    def pid(self) -> int:
        """Its number, 0 for the kernel."""
        return self.process.pid if self.process else 0


@dataclass(frozen=True, slots=True)
class HolderQuery:
    """What to scan for: every device node below the `functions`, and those that these do not show.

    `nodes` are paths below /dev, shell patterns allowed (`nvidiactl`, `nvidia-caps/*`, `vfio/12`). `numbers` are
    device numbers that an earlier scan found (`Scan.numbers`): after an unbind that hangs, sysfs shows them no more.
    `modules`: report the references to them that no process explains.
    """

    functions: tuple[PciAddress, ...]
    nodes: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Scan:
    """The holders, in order of pid, and the device numbers that were looked for (`c226:0`, `b8:16`)."""

    holders: tuple[Holder, ...] = ()
    numbers: tuple[str, ...] = ()


def doubt(text: str) -> str:
    """A `Holder.doubt`, as whoever looks for holders says it; "" none."""
    return Sentence.read(text, _DOUBTS) if text else ""


def unit_and_session(cgroup: str) -> tuple[Unit | None, str]:
    r"""The unit and the session ("" none) of a process, by the text of its /proc/PID/cgroup.

    As systemd reads it (cg_path_get_unit and cg_path_get_user_unit in src/basic/cgroup-util.c): below the slices lies
    the unit, and below a user's manager his slices and units. What lies deeper is the unit's own affair: a container's
    services are not the host's, though their names may be the same. Escapes such as `\x2d` belong to the name. So does
    whatever else ends a line to Python: below his manager a user chooses the names, and the kernel refuses a new line
    in them only (cgroup_mkdir in kernel/cgroup/cgroup.c).
    """
    lines = [line.split(":", 2) for line in cgroup.split("\n") if line]
    paths = {controllers: path for _, controllers, path in lines}
    # cgroup v1, or both: systemd has a hierarchy of its own. A systemd in a container that has version 2 alone does not
    # use it, though the machine has both.
    own = paths.get("name=systemd", "/")
    names = (own if own != "/" else paths.get("", "")).split("/")[1:]
    unit, *inside = _below_slices(names) or [""]
    if not unit.endswith(_KINDS):
        return None, ""
    session = _SESSION.fullmatch(unit)
    if manager := _MANAGER.fullmatch(unit):
        theirs = (_below_slices(inside) or [""])[0]
        if theirs.endswith(_KINDS):
            return Unit(theirs, int(manager[1])), ""
    return Unit(unit), session[1] if session else ""


def _below_slices(names: list[str]) -> list[str]:
    """A path without the slices that it begins with; names that would mean something else begin with `_`."""
    return [name.removeprefix("_") for name in dropwhile(lambda name: name.endswith(".slice"), names)]
