"""Faults on demand: the nth operation of a kind fails, waits, hangs, or says that it worked when it did not."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import TypeAlias, TypeVar

from gpuswitch.errors import KernelError
from gpuswitch.host.operation import Request
from gpuswitch.host.port import OPERATIONS as DECLARED

Operation: TypeAlias = str
"""One of OPERATIONS."""
OPERATIONS = (
    *("look", "libvirt", "adopt", "access", "scan", "signal"),
    *DECLARED,
    *("active", "sockets", "stop_unit", "start_unit", "end_session", "inhibit", "release_inhibitor", "booting"),
    *("nodes", "let_go"),
)
"""The operations of the port (`gpuswitch.host.port`), and what others do that nobody is told the end of.

`access` is whatever is asked of `DeviceNodes` about a user; `nodes` is udev's work on the nodes of a bound driver;
`let_go` is that of a polite process which closes an announced card.
"""
_AT_ONCE = frozenset({"look", "adopt", "access"})
_UNHEARD = {"nodes": "udev", "let_go": "a process"}


class Call:
    """One operation while the kernel has it: what it is, and what it waits for.

    `verb` and `subject` say it to a person, and so does `what`, by the `whole` of the subject (`Words`). `request` is
    what was asked for, None where that is not declared (`gpuswitch.host.operation`); `user` is the worker that does it.
    `process_state` and `kernel_wait` are what /proc would show of the process that sits in it (see
    `gpuswitch.host.port.Pending`).
    """

    def __init__(self, verb: str, subject: object, whole: str = "", request: Request | None = None) -> None:
        self.verb = verb
        self.subject = str(subject)
        self.whole = whole or self.subject
        self.what = f"{verb} {self.whole}"
        self.request = request
        self.user = ""
        self.process_state = "R"
        self.kernel_wait = ""

    async def wait_in(self, wait: Awaitable[object], process_state: str, kernel_wait: str = "") -> None:
        """Wait, and let /proc tell so meanwhile."""
        before = self.process_state, self.kernel_wait
        self.process_state, self.kernel_wait = process_state, kernel_wait
        await wait
        self.process_state, self.kernel_wait = before

    def about(self, subject: object) -> Call:
        """The same call, busy with one of several subjects now."""
        if self.subject != str(subject):
            self.subject = self.whole = str(subject)
        return self

    def error(self, errno: int) -> KernelError:
        return KernelError(self.verb, self.subject, errno, os.strerror(errno), whole=self.whole)


@dataclass(frozen=True)
class Errno:
    """The operation fails with this errno, and has changed nothing."""

    errno: int


@dataclass(frozen=True)
class Silent:
    """The operation says that it worked, and did nothing: so drivers_probe where a driver turns the device down."""


@dataclass(frozen=True)
class Delay:
    """The operation takes this many seconds of the loop's clock."""

    seconds: float


@dataclass(frozen=True, eq=False)
class Hang:
    """The operation does not return until `release()`; then it goes on as if nothing had been.

    `reached` is set once an operation is in it. `process_state` and `kernel_wait` are what /proc shows meanwhile.
    """

    process_state: str = "D"
    kernel_wait: str = ""
    reached: asyncio.Event = field(default_factory=asyncio.Event)
    released: asyncio.Event = field(default_factory=asyncio.Event)

    def release(self) -> None:
        self.released.set()


Fault = Errno | Silent | Delay | Hang
AnyFault = TypeVar("AnyFault", bound=Fault)


class Strike:
    """The faults that hit one operation. It waits first, and fails then, in whatever order they were added."""

    def __init__(self, faults: list[Fault]) -> None:
        self.silent = any(isinstance(fault, Silent) for fault in faults)
        self.errno = next((fault.errno for fault in faults if isinstance(fault, Errno)), 0)
        self.hits = bool(faults)
        self._waits = [fault for fault in faults if isinstance(fault, Delay | Hang)]

    @property
    def fails(self) -> bool:
        """Whether the operation will change nothing."""
        return self.silent or self.errno != 0

    async def land(self, call: Call) -> bool:
        """Wait as told, then fail as told; whether the operation is still to be done."""
        for fault in self._waits:
            if isinstance(fault, Delay):
                await call.wait_in(asyncio.sleep(fault.seconds), "D")
            else:
                fault.reached.set()
                await call.wait_in(fault.released.wait(), fault.process_state, fault.kernel_wait)
        if self.errno:
            raise call.error(self.errno)
        return not self.silent


_NONE = Strike([])


@dataclass
class _Rule:
    fault: Fault
    operation: str
    subject: str | None
    nth: int | None
    seen: int = 0

    def hits(self, operation: str, subject: str) -> bool:
        if self.operation != operation or self.subject not in {None, subject}:
            return False
        self.seen += 1
        return self.nth in {None, self.seen}


class Faults:
    """What is to go wrong with a host, and when."""

    def __init__(self) -> None:
        self._rules: list[_Rule] = []

    def add(self, fault: AnyFault, *, operation: Operation, subject: object = None, nth: int | None = 1) -> AnyFault:
        """Let `fault` hit the `nth` operation of this kind from now on (None: each one); returns the fault.

        `subject` is what the operation is about: a function's address, for `load` and `unload` the module, for
        `hold_group` and `release_group` the group's number, for `map_consoles` the frame buffer's, for the others on
        consoles the vtconsole or platform device, for `adopt` the process by number, for units and sessions these, for
        the inhibitor the GPU, for `signal` and `let_go` the process by name, for `look` nothing; None: any. An
        operation on several functions counts once for each, but for `look`.

        Raises:
            ValueError: no operation is named so, or this one has nobody to tell an errno to.
        """
        if operation not in OPERATIONS:
            raise ValueError(f"no operation is named {operation!r}")
        if operation in _UNHEARD and isinstance(fault, Errno):
            raise ValueError(f"{_UNHEARD[operation]} tells nobody that it failed; what never happens is Silent()")
        if operation == "signal" and isinstance(fault, Delay | Hang):
            raise ValueError("a signal is sent at once; a process that takes no notice is Silent()")
        if operation in _AT_ONCE and not isinstance(fault, Errno):
            raise ValueError(f"{operation} returns at once: it may fail, and nothing else")
        self._rules.append(_Rule(fault, operation, None if subject is None else str(subject), nth))
        return fault

    def clear(self) -> None:
        """Nothing further goes wrong; what hangs already still waits for its `release()`."""
        self._rules.clear()

    def strike(self, operation: Operation, subject: object) -> Strike:
        """Count one operation, and tell what hits it."""
        if not self._rules:
            return _NONE
        text = str(subject)
        hit = [rule.fault for rule in self._rules if rule.hits(operation, text)]
        return Strike(hit) if hit else _NONE
