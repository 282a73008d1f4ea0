"""`hold`: a GPU is on vfio for as long as this runs, and what systemd's units need of that.

The service hands the GPU to a process that does nothing (`Child` of run.py): when that has ended, it brings the GPU
home. This one stays beside it, to say when the GPU is there, when it is lost, and when it is home.
"""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from gpuswitch.cli.asking import is_to_ask
from gpuswitch.cli.client import (
    MANAGER,
    NAME,
    PROPERTIES,
    ROOT,
    Gpu,
    Service,
    Signal,
    Typed,
    call,
    plain_values,
    signals_of,
)
from gpuswitch.cli.failures import CtlError
from gpuswitch.cli.follow import StepChange, Waits, at_work
from gpuswitch.cli.output import clock, line, numbered, on_terminal, problem
from gpuswitch.cli.run import MOMENT, Child, why_not_home
from gpuswitch.cli.steps import Ended
from gpuswitch.cli.switch import options_of
from gpuswitch.cli.translate import _, catalogue, recognized, state_word
from gpuswitch.cli.watching import name_owner
from gpuswitch.cli.what_ends import ask_before_a_desktop_ends
from gpuswitch.errors import EXIT_UNREACHABLE, Failed, InvalidArgument

_INSTANCE = re.compile(r"[^@]+@(.+)\.service")
_ESCAPED = re.compile(r"\\x([0-9a-f]{2})")
_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class _StoppedError(Exception):
    """Somebody wants it to end, by this signal."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def hold(service: Service, args: Namespace) -> int:
    if args.json:
        raise CtlError.of(InvalidArgument, _("hold prints nothing for programs: leave --json out"), is_whole=True)
    if args.unit and args.gpu:
        raise CtlError.of(InvalidArgument, _("cannot take a GPU and --unit together: leave one of them out"))
    args.gpu = instance_of(args.unit) if args.unit else args.gpu
    gpu = service.gpu(args.gpu)
    args.gpu = gpu.title
    if is_to_ask(args):
        ask_before_a_desktop_ends(service, [gpu], "vfio", options_of(args))
    # An upgrade takes away what we are read from, and this ends long after it began.
    catalogue()
    child = Child()
    holding = _Holding(service, gpu, child, args.bus)
    try:
        with _stopping():
            _acquire(service, gpu, child, args)
            holding.begin()
            holding.until_lost()
    except _StoppedError:
        child.forget()
        return holding.end()
    except BaseException:
        child.forget()
        raise


def instance_of(unit: str) -> str:
    """What the name of a template's unit says after its @, as systemd-escape(1) writes it.

    A name in the configuration has no slash, so that a dash is one here: nobody has to escape it.

    Raises:
        CtlError: it is no unit of a template.
    """
    found = _INSTANCE.fullmatch(unit)
    if found is None:
        text = _(
            "{unit} names no GPU: write it like {example}",
            unit=repr(unit),
            example="gpuswitch-vfio@rtx3070.service",
        )
        raise CtlError.of(InvalidArgument, text)
    return _ESCAPED.sub(lambda escaped: chr(int(escaped[1], 16)), found[1])


def _acquire(service: Service, gpu: Gpu, child: Child, args: Namespace) -> None:
    """Have it on vfio, and the child's. Whoever ends us meanwhile has asked for nothing: the service sees that."""
    name = args.unit or "gpuswitchctl hold"
    to, options = [gpu.address], dict(options_of(args))
    message = call(NAME, ROOT, MANAGER, "AcquireForProcess", "xxsasa{sv}", child.pid, child.started, name, to, options)
    try:
        service.subscribe(signals_of(gpu.owner))
        tell_systemd(status=_("waiting for {gpu}", gpu=gpu.title))
        serial, waits, ended = service.send(message), Waits(), Ended()
        while (event := service.next_event()) != serial:
            if isinstance(event, Signal) and event.path == gpu.path:
                _tell(gpu, event, waits, ended)
        service.answer_allowed(message, serial, None)
    except _StoppedError as stopped:
        error = CtlError.interrupted(_("interrupted; {gpu} goes back to where it was", gpu=gpu.title))
        error.exit_code = 128 + stopped.number
        raise error from None
    except CtlError as error:
        tell_systemd(status=recognized(str(error)))
        raise


def _tell(gpu: Gpu, event: Signal, waits: Waits, ended: Ended) -> None:
    """What step it is at, to systemd, and on a terminal; what it waits for, everywhere."""
    if event.member == "StepChanged":
        change = StepChange(*event.body[1:])
        if at_work(change):
            tell_systemd(status=f"{gpu.title}: {numbered(change.index, change.count, change.title)}")
        elif on_terminal(sys.stderr):
            for each in ended.of(gpu, event.body[0], change):
                problem(f"{gpu.title}: {each}")
    elif event.member == "PropertiesChanged" and (switch := plain_values(event.body[1]).get("Switch")):
        waiting = waits.news(gpu, switch)
        if waiting is not None and waiting.until:
            text = _("{gpu} waits until {time}: {what}", gpu=gpu.title, time=clock(waiting.until), what=waiting.what)
            _say(text)


@contextmanager
def _stopping() -> Iterator[None]:
    """Signals that end the command raise `_StoppedError`: whatever is cut short by that is not gone on with."""

    def stop(number: int, _frame: object) -> NoReturn:
        for each in _STOPS:
            signal.signal(each, signal.SIG_IGN)
        raise _StoppedError(number)

    for number in _STOPS:
        signal.signal(number, stop)
    yield


class _Holding:
    """One GPU that is the child's."""

    def __init__(self, service: Service, gpu: Gpu, child: Child, bus: str | None) -> None:
        self._service = service
        self._gpu = gpu
        # Of one that was found anew they would have to be asked for, maybe of nobody.
        self._address, self._title = gpu.address, gpu.title
        self._child = child
        self._bus = bus
        self._childs_end = os.pidfd_open(child.pid)
        self._uuid = ""

    def begin(self) -> None:
        """It has it now."""
        self._uuid = self._gpu.look()["Owner"][1]
        text = _("{gpu} is on vfio", gpu=self._title)
        tell_systemd(status=text, ready=True)
        line(_("{sentence}; it comes home when this ends", sentence=text))

    def until_lost(self) -> NoReturn:
        """Until it is not the child's any more, or not on vfio.

        Raises:
            CtlError: it is; or the bus cannot be had.
        """
        while True:
            try:
                self._follow()
            except CtlError as error:
                if error.exit_code != EXIT_UNREACHABLE:
                    raise
                problem(str(error))
            # A bus that is started anew takes nothing from anybody.
            self._service.close()
            self._service = Service.connect(self._bus)

    def _follow(self) -> NoReturn:
        """Until the child has it no more, or the bus is lost.

        Raises:
            CtlError: it is lost; or the connection to the bus is.
            _StoppedError: somebody has ended the child.
        """
        self._service.subscribe(name_owner())
        owner, told = "", None
        while True:
            if not owner and (owner := self._found()):
                tell_systemd(status=_("{gpu} is on vfio", gpu=self._title))
                told = signals_of(owner)
                self._service.subscribe(told)
                self._check()
            try:
                with self._service.listening_to(self._childs_end):
                    event = self._service.next_event()
            except Typed:
                raise self._ended() from None
            if isinstance(event, Signal) and event.member == "NameOwnerChanged":
                if told is not None:
                    self._service.unsubscribe(told)
                owner, told = "", None
                if not event.body[2]:
                    text = _("the service has ended; {gpu} stays on vfio", gpu=self._title)
                    _say(text)
            elif isinstance(event, Signal) and event.path in {self._gpu.path, ROOT}:
                # Its own, or that it has left.
                self._check()

    def _found(self) -> str:
        """The process of the service that tells of it, by its name on the bus; "": there is none now.

        Raises:
            CtlError: the service knows of no such GPU.
        """
        if not self._service.runs():
            return ""
        try:
            self._gpu = self._service.gpu(self._address)
        except CtlError as error:
            if error.exit_code != EXIT_UNREACHABLE:
                raise self._lost(str(error)) from error
            return ""
        return self._gpu.owner

    def _ended(self) -> _StoppedError:
        problem(_("process {pid}, which has {gpu}, was ended", pid=self._child.pid, gpu=self._title))
        return _StoppedError(signal.SIGTERM)

    def _check(self) -> None:
        """Raises CtlError: it is lost; _StoppedError: as somebody has ended the child."""
        try:
            now = self._gpu.look()
        except CtlError as error:
            if error.exit_code == EXIT_UNREACHABLE:
                # It has just ended: that is told next, or the bus is lost.
                return
            raise self._lost(str(error)) from error
        if now["State"] == "vfio" and now["Owner"][1] == self._uuid:
            return
        # The service may have seen that first.
        if select.select([self._childs_end], [], [], 0)[0]:
            raise self._ended()
        where = _("it is {state} now", state=state_word(now["State"]))
        raise self._lost("; ".join(filter(None, (where, recognized(now["Reason"])))))

    def _lost(self, why: str) -> CtlError:
        text = _("lost {gpu}: {why}", gpu=self._title, why=why)
        tell_systemd(status=text)
        return CtlError.of(Failed, text, is_whole=True)

    def end(self) -> int:
        """Give it back, and wait until it is home; nothing is started for that."""
        self._service.close()
        # Whoever does not want to wait says so once more.
        with suppress(_StoppedError), _stopping():
            try:
                return self._until_home()
            except CtlError as error:
                text = _("{error}; the service brings home what it had as soon as it can", error=str(error))
                _say(text)
        return 0

    def _until_home(self) -> int:
        service = Service.connect(self._bus)
        try:
            if not service.runs():
                raise CtlError(_("the service does not run"), EXIT_UNREACHABLE, name="Unreachable")
            gpu = service.gpu(self._address)
            if _goes_down(service):
                # No GPU is moved then: the next start of the machine finds it where it belongs.
                return 0
            service.subscribe(name_owner())
            service.subscribe(signals_of(gpu.owner))
            tell_systemd(status=_("{gpu} is on its way home", gpu=gpu.title))
            # Stopped before it was looked at, it is the child's all the same.
            uuid = self._uuid or gpu.look()["Owner"][1]
            deadline: float | None = time.monotonic() + MOMENT
            while gpu.look()["Owner"][1] == uuid != "":
                if service.next_event(deadline) is None:
                    deadline = None
                    _say_what_it_waits_for(gpu)
        finally:
            service.close()
        reason = gpu.properties["Reason"]
        if not reason or gpu.properties["State"] in {"host", "absent"}:
            return 0
        text = f"{gpu.title}: {recognized(reason)}"
        _say(text)
        return Failed.exit_code


def _goes_down(service: Service) -> bool:
    """Whether systemd is stopping the machine (org.freedesktop.systemd1(5), SystemState)."""
    name = "org.freedesktop.systemd1"
    message = call(name, "/org/freedesktop/systemd1", PROPERTIES, "Get", "ss", f"{name}.Manager", "SystemState")
    with suppress(CtlError):
        return bool(service.ask(message).body[0][1] == "stopping")
    return False


def _say_what_it_waits_for(gpu: Gpu) -> None:
    text = _("{gpu} is not home yet: {why}", gpu=gpu.title, why=why_not_home(gpu))
    _say(text)


def _say(text: str) -> None:
    """To people, and to systemd."""
    problem(text)
    tell_systemd(status=text)


def tell_systemd(*, status: str, ready: bool = False) -> None:
    """Tell it how we are (sd_notify(3)); where it has not started us, nothing happens."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    words = [*(["READY=1"] if ready else []), f"STATUS={'; '.join(status.splitlines())}"]
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.settimeout(MOMENT)
        sender.connect(path.replace("@", "\0", 1) if path.startswith("@") else path)
        sender.sendall("\n".join(words).encode("utf-8", "replace"))
