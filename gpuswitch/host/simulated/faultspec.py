"""Faults as text, for whoever starts a simulated host from outside: `probe@0000:01:00.1#1=EINVAL`.

    OPERATION[@SUBJECT][#NTH]=FAULT

OPERATION is one of `gpuswitch.host.simulated.faults.OPERATIONS`, and SUBJECT what it is about, as `Faults.add` says: a
function, a module, a unit ...; left out: any. NTH counts from 1; left out: each one. FAULT is the name of an errno,
`silent` (says that it worked, and did not), `hang`, or how long it takes: `0.3s`.
"""

from __future__ import annotations

import errno
import re

from gpuswitch.errors import InvalidArgument
from gpuswitch.host.simulated.faults import OPERATIONS, Delay, Errno, Fault, Hang, Operation, Silent
from gpuswitch.host.simulated.host import SimulatedHost
from gpuswitch.host.simulated.kernel import Machine
from gpuswitch.model.address import PciAddress

_SHAPE = re.compile(r"(?P<operation>[a-z_]+)(?:@(?P<subject>[^@#=]+))?(?:#(?P<nth>[1-9][0-9]{0,8}))?=(?P<fault>[^=]+)")
_SECONDS = re.compile(r"([0-9]{1,6}(?:\.[0-9]{1,6})?)s")


def inject(host: SimulatedHost, text: str) -> None:
    """Add one fault to what is to go wrong with `host`.

    Raises:
        InvalidArgument: it is not written so, or speaks of what this host does not have.
    """
    if (match := _SHAPE.fullmatch(text)) is None:
        raise _refused(text, "write it like probe@0000:01:00.1#1=EINVAL or unbind=0.3s")
    name, subject, nth = match["operation"], match["subject"], match["nth"]
    if name not in OPERATIONS:
        raise _refused(text, f"no operation is named {name!r}; known are {', '.join(OPERATIONS)}")
    fault = _fault(text, match["fault"])
    about = None if subject is None else _subject(host.machine, name, subject, text)
    try:
        host.faults.add(fault, operation=name, subject=about, nth=None if nth is None else int(nth))
    except ValueError as error:
        raise _refused(text, str(error)) from None


def _fault(text: str, word: str) -> Fault:
    if word == "silent":
        return Silent()
    if word == "hang":
        return Hang()
    if (seconds := _SECONDS.fullmatch(word)) is not None:
        return Delay(float(seconds[1]))
    if isinstance(number := getattr(errno, word, None), int):
        return Errno(number)
    raise _refused(text, f"{word!r} is no fault; use the name of an errno, silent, hang, or seconds like 0.3s")


def _subject(machine: Machine, operation: Operation, subject: str, text: str) -> str:
    """The subject in its one spelling."""
    match operation:
        case "load" | "unload":
            known = set(machine.drivers.modules)
        case "hold_group" | "release_group":
            known = {str(d.shape.iommu_group) for d in machine.devices.values() if d.shape.iommu_group is not None}
        case "consoles" | "map_consoles" | "bind_console" | "unbind_platform" | "bind_platform":
            known = set(machine.frame_buffers.names(operation))
        case "active" | "sockets" | "stop_unit" | "start_unit":
            known = set(machine.units.names())
        case "end_session":
            known = set(machine.units.sessions)
        case "signal" | "let_go":
            known = {program.name for program in machine.processes.running()}
        case _:
            known = {str(address) for address in machine.devices}
            try:
                subject = str(PciAddress.parse(subject))
            except InvalidArgument as error:
                raise _refused(text, str(error)) from None
    if subject not in known:
        raise _refused(text, f"this host has no {subject}")
    return subject


def _refused(text: str, why: str) -> InvalidArgument:
    return InvalidArgument(f"cannot use the fault {text[:80]!r}: {why}")
