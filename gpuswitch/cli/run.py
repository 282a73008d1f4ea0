"""`run`: a command that has GPUs on vfio for as long as it runs.

The process that becomes the command is there before the GPUs are asked for, since the service hands them to it: it
waits to be told what to run. So whatever is killed, the service sees the end of that process, and brings them home.
"""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from shlex import join, quote
from typing import NoReturn

from gpuswitch.cli import memlock
from gpuswitch.cli.asking import is_to_ask
from gpuswitch.cli.client import (
    MANAGER,
    NAME,
    ROOT,
    Gpu,
    Service,
    Signal,
    call,
    signals_of,
)
from gpuswitch.cli.failures import CtlError
from gpuswitch.cli.follow import StepChange
from gpuswitch.cli.output import clean, on_terminal, problem
from gpuswitch.cli.parser import TARGETS
from gpuswitch.cli.steps import Ended
from gpuswitch.cli.switch import options_of, place, with_blockers
from gpuswitch.cli.translate import _, recognized, state_word
from gpuswitch.cli.ways_out import ways_out, with_ways_out
from gpuswitch.cli.what_ends import ask_before_a_desktop_ends
from gpuswitch.errors import InvalidArgument

EXIT_CANNOT_RUN = 126
EXIT_NOT_FOUND = 127
"""As env(1) and nohup(1) have them."""
VARIABLE = "GPUSWITCH_ADDRESSES"
_PASSED_ON = (signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_FROM_THE_TERMINAL = (signal.SIGINT, signal.SIGQUIT)
"""The terminal sends them to the command as well: it decides what becomes of them."""
_FUNCTION = re.compile(r"\{(\d*)\}")
MOMENT = 2.0
"""Seconds until it is said why this has not ended yet."""
_LONG = 60
"""Letters of a command that is repeated whole where it is said what else to type."""


def run(service: Service, args: Namespace) -> int:
    if args.json:
        text = _("run prints what its command prints: leave --json out")
        raise CtlError.of(InvalidArgument, text, is_whole=True)
    _look_for(args.command[0])
    gpus = _each_once(service, args.gpus)
    options = options_of(args)
    # What it cannot stand for is told before anything is moved.
    filled(args.command, [function for gpu in gpus for function, _kind, _driver in gpu.properties["Functions"]])
    with service.clock_stopped():
        memlock.check(user=args.user, yes=args.yes)
    if is_to_ask(args):
        ask_before_a_desktop_ends(service, gpus, "vfio", options)
    child = Child()
    try:
        # Root may open everything anyway.
        access = {"access": ("b", True)} if args.user and os.geteuid() else {}
        try:
            functions = _acquired(service, gpus, child, {**options, **access}, args)
        except CtlError as error:
            before, behind = _typed(args, gpus)
            named = with_blockers(error, lambda: [each for gpu in gpus for each in gpu.blockers("vfio", options)], args)
            if len(gpus) == 1:
                named.about(gpus[0].address, gpus[0].name)
            raise with_ways_out(named, ways_out(gpus, "vfio", options, before, behind=behind)) from None
        # One whose process has been ended in the meantime may be nobody's already.
        uuids = {gpu.address: uuid for gpu in gpus if (uuid := gpu.look()["Owner"][1])}
        command = filled(args.command, functions)
    except BaseException:
        child.forget()
        raise
    # It would be told all that happens meanwhile, and read none of it.
    service.close()
    status = child.runs(command, {**os.environ, VARIABLE: " ".join(functions)})
    with suppress(KeyboardInterrupt):
        _until_home(args, uuids)
    return _ended(status)


def _look_for(program: str) -> None:
    """Whether there is such a program, before anything is moved.

    Raises:
        CtlError: there is none.
    """
    if shutil.which(program) is not None:
        return
    raise _cannot_run(program, errno.ENOENT if shutil.which(program, os.F_OK) is None else errno.EACCES)


def _cannot_run(program: str, number: int) -> CtlError:
    text = _("cannot run {command}: {why}", command=clean(program), why=os.strerror(number))
    status = EXIT_NOT_FOUND if number == errno.ENOENT else EXIT_CANNOT_RUN
    return CtlError(text, status, name=InvalidArgument.name)


def _each_once(service: Service, selectors: Sequence[str]) -> list[Gpu]:
    gpus: dict[str, Gpu] = {}
    for gpu in map(service.gpu, selectors or [""]):
        if gpu.path in gpus:
            raise CtlError.of(InvalidArgument, _("{gpu} is named twice: leave one of them out", gpu=gpu.title))
        gpus[gpu.path] = gpu
    return list(gpus.values())


def _acquired(
    service: Service, gpus: Sequence[Gpu], child: Child, options: Mapping[str, tuple[str, object]], args: Namespace
) -> list[str]:
    """The functions that the child has now; what happens meanwhile is told on a terminal, by standard error."""
    for owner in {gpu.owner for gpu in gpus}:
        service.subscribe(signals_of(owner))
    named = [gpu.address for gpu in gpus]
    name = args.name or os.path.basename(args.command[0])  # noqa: PTH119 -- of a word, which may name no path
    signature = "xxsasa{sv}"
    message = call(
        NAME, ROOT, MANAGER, "AcquireForProcess", signature, child.pid, child.started, name, named, dict(options)
    )
    serial, ended = service.send(message), Ended()
    try:
        while (event := service.next_event()) != serial:
            _tell(event, gpus, ended)
        return list(service.answer_allowed(message, serial, None).body[0])
    except KeyboardInterrupt:
        text = _(
            "interrupted; nothing is run, and what was begun is taken back: {command} shows it",
            command=f"gpuswitchctl status {' '.join(gpu.word for gpu in gpus)}",
        )
        raise CtlError.interrupted(text) from None


def _typed(args: Namespace, gpus: Sequence[Gpu]) -> tuple[str, str]:
    """What was typed, as far as before the options that say what becomes of holders, and what stands behind these; a
    long command of which only the beginning.
    """
    words = ["gpuswitchctl", "run", *(word for gpu in gpus for word in ("--gpu", gpu.word))]
    words += ["--name", args.name] if args.name else []
    words += ["--user"] if args.user else []
    command = join(args.command)
    return join(words), f"-- {command if len(command) <= _LONG else f'{quote(args.command[0])} ...'}"


def _tell(event: Signal | int | None, gpus: Sequence[Gpu], ended: Ended) -> None:
    """Say on a terminal which step was taken."""
    if not (isinstance(event, Signal) and event.member == "StepChanged" and on_terminal(sys.stderr)):
        return
    for gpu in gpus:
        if gpu.path == event.path:
            for each in ended.of(gpu, event.body[0], StepChange(*event.body[1:])):
                problem(f"{gpu.title}: {each}")


def filled(command: Sequence[str], functions: Sequence[str]) -> list[str]:
    """The command with the addresses of the functions in it.

    `{0}` is the first one, `{1}` the next. What has `{}` in it stands once for each function, with the option before
    it, where that is one: `-device vfio-pci,host={}`.

    Raises:
        CtlError: there are not so many.
    """
    filled: list[str] = []
    for word in command:
        numbers = {found[1] for found in _FUNCTION.finditer(word)}
        if beyond := sorted(number for number in numbers if number and int(number) >= len(functions)):
            text = _(
                "{word} names function {number}, and there are {count}",
                word=repr(word),
                number=beyond[0],
                count=len(functions),
            )
            raise CtlError.of(InvalidArgument, text)
        this = _FUNCTION.sub(lambda found: functions[int(found[1])] if found[1] else found[0], word)
        if "" not in numbers:
            filled.append(this)
            continue
        option = [filled.pop()] if filled[1:] and filled[-1].startswith("-") and not this.startswith("-") else []
        for function in functions:
            filled += [*option, this.replace("{}", function)]
    return filled


class Child:
    """The process that becomes the command: it waits to be told, and ends where nobody is left to tell it."""

    def __init__(self) -> None:
        theirs, self._ours = os.pipe()
        self._failures, failing = os.pipe()
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            os.close(self._ours)
            _become(theirs, failing)
        os.close(theirs)
        os.close(failing)
        self.started = int(Path(f"/proc/{self.pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()[19])
        """Field 22 of proc_pid_stat(5)."""

    def forget(self) -> None:
        """There is nothing to run."""
        os.close(self._ours)
        os.waitpid(self.pid, 0)

    def runs(self, command: Sequence[str], environment: Mapping[str, str]) -> int:
        """Become that; its wait status when it has ended. Signals that end us are passed on.

        Raises:
            CtlError: it cannot be run.
        """
        for number in _FROM_THE_TERMINAL:
            signal.signal(number, signal.SIG_IGN)
        for number in _PASSED_ON:
            signal.signal(number, lambda number, _frame: os.kill(self.pid, number))
        with suppress(BrokenPipeError), os.fdopen(self._ours, "wb") as pipe:
            pipe.write(json.dumps([command, dict(environment)]).encode("utf-8", "surrogateescape"))
        with os.fdopen(self._failures, "rb") as pipe:
            failed = pipe.read()
        _pid, status = os.waitpid(self.pid, 0)
        for number in (*_PASSED_ON, *_FROM_THE_TERMINAL):
            signal.signal(number, signal.SIG_DFL if number in _PASSED_ON else signal.default_int_handler)
        if failed:
            raise _cannot_run(command[0], int(failed))
        return status


def _become(orders: int, failures: int) -> NoReturn:
    """In the child. Nothing of Python's is to end here as it does in the parent."""
    try:
        with os.fdopen(orders, "rb") as pipe:
            said = pipe.read()
        if said:
            command, environment = json.loads(said.decode("utf-8", "surrogateescape"))
            # What Python ignores for its own sake (subprocess has the same two).
            for number in (signal.SIGPIPE, signal.SIGXFSZ):
                signal.signal(number, signal.SIG_DFL)
            try:
                os.execvpe(command[0], command, environment)  # noqa: S606 -- that is what was asked for
            except OSError as error:
                os.write(failures, str(error.errno).encode())
    finally:
        os._exit(EXIT_CANNOT_RUN)


def _until_home(args: Namespace, uuids: Mapping[str, str]) -> None:
    """Until none of them is this command's any more: it may have left something that still has one open."""
    try:
        service = Service.connect(args.bus)
        try:
            gpus = [service.gpu(address) for address in uuids]
            for owner in {gpu.owner for gpu in gpus}:
                service.subscribe(signals_of(owner))
            _wait_for_all(service, gpus, uuids)
        finally:
            service.close()
        for gpu in gpus:
            if reason := gpu.properties["Reason"]:
                problem(f"{gpu.title}: {recognized(reason)}")
            state = gpu.properties["State"]
            if on_terminal(sys.stderr) and state in TARGETS and not any(gpu.properties["Owner"]):
                problem(_("{gpu} is {place} now", gpu=gpu.title, place=place(gpu, state)))
    except CtlError as error:
        text = _("{error}; the service brings home what it had as soon as it can", error=str(error))
        problem(text)


def _wait_for_all(service: Service, gpus: Sequence[Gpu], uuids: Mapping[str, str]) -> None:
    deadline: float | None = time.monotonic() + MOMENT
    while left := [gpu for gpu in gpus if gpu.look()["Owner"][1] == uuids[gpu.address]]:
        event = service.next_event(deadline)
        if event is None:
            deadline = None
            for gpu in left:
                why = why_not_home(gpu)
                problem(_("{gpu} is not home yet: {why}; ^C leaves that to the service", gpu=gpu.title, why=why))


def why_not_home(gpu: Gpu) -> str:
    """Who keeps it on vfio; of one that is on its way, that: who opens its sound card by then keeps nobody waiting."""
    now = gpu.properties
    if now["State"] == "vfio" and (
        holders := ", ".join(f"{each['command']} ({each['pid']})" for each in gpu.holders() if each["pid"])
    ):
        return _("{holders} has it open", holders=holders)
    return recognized(now["Reason"]) or _("{gpu} is {state}", gpu=gpu.title, state=state_word(now["State"]))


def _ended(status: int) -> int:
    """As the command did: with its status, or by its signal."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        sys.stdout.flush()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if number not in {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return 128 + number
    return os.WEXITSTATUS(status)
