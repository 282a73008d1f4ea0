"""The verbs that move GPUs, end that, or say how they would: `to-vfio`, `to-host`, `recover`, `cancel`, `plan`."""

from __future__ import annotations

import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from shlex import quote
from typing import TYPE_CHECKING, Any

from gpuswitch.cli.asking import can_ask, is_to_ask
from gpuswitch.cli.client import Gpu, Options, Service, gpus_to_move, signals_of
from gpuswitch.cli.failures import EXIT_INTERRUPTED, CtlError, blocker_record
from gpuswitch.cli.follow import Following, joined_words
from gpuswitch.cli.keys import END, Question, pressed, single_keys
from gpuswitch.cli.layout import hung
from gpuswitch.cli.output import (
    OutputError,
    as_json,
    as_json_line,
    duration,
    line,
    lines_of,
    moment,
    on_terminal,
    problem,
    rfc3339,
    sentence,
)
from gpuswitch.cli.parser import TARGETS
from gpuswitch.cli.query import function_words, to_put_right, what_to_do
from gpuswitch.cli.records import naming, planned_record, remedies_of, switch_record
from gpuswitch.cli.steps import Above, Lines, display
from gpuswitch.cli.summary import NOT_BEGUN, REFUSED, Summary
from gpuswitch.cli.translate import _, is_english, recognized, reworded, state_word, step_title
from gpuswitch.cli.ways_out import ways_out, with_options, with_ways_out, without
from gpuswitch.cli.what_ends import STARTED, STOPPED, ask_before_a_desktop_ends, of_steps
from gpuswitch.errors import (
    EXIT_CODES,
    PREFIX,
    Busy,
    Failed,
    InProgress,
    InvalidArgument,
    NoSuchGpu,
    NotViable,
    Owned,
    Timeout,
    Wedged,
)

if TYPE_CHECKING:
    from jeepney import Message

_HAS_BLOCKERS = frozenset(kind.name for kind in (Busy, Failed, InProgress, NotViable, Owned, Wedged))
"""Errors that have what they say as data, too, for whoever asks (docs/dbus.md)."""
_WORST_FIRST = (EXIT_INTERRUPTED, 7, 1, 5, 4, 3, 6, 2)
_REFUSED = 3
_AWAITS_HOLDERS = "release"
"""The kind of the step that waits for who has a GPU open, or ends them (docs/states.md)."""
_TAKE_BACK, _LEAVE = "c", "l"


def move(service: Service, args: Namespace) -> int:
    options = options_of(args)
    try:
        gpus = gpus_to_move(service, args.gpus, every=args.all)
    except CtlError as error:
        raise _with_what_was_meant(error, args.gpus) from None
    if args.dry_run:
        ways = [(gpu, args.target) for gpu in gpus]
        return _print_plans(service, ways, args, options, f"gpuswitchctl to-{args.target} {{}} --dry-run")
    if is_to_ask(args):
        ask_before_a_desktop_ends(service, gpus, args.target, options)
    command = f"gpuswitchctl to-{args.target} {{}}"
    return Switches(
        service,
        args,
        begin=lambda gpu: gpu.move(args.target, options),
        purpose=_("move {gpu} to {target}", gpu="{}", target=args.target),
        again=with_options(command, options),
        ways_out=lambda gpu: ways_out([gpu], args.target, options, command.format(gpu.word)),
        blockers=lambda gpu: gpu.blockers(args.target, options),
    ).run(gpus)


def _with_what_was_meant(error: CtlError, words: Sequence[str]) -> CtlError:
    """The error, with the command where a target stands among the GPUs, as `plan` has it."""
    targets = [each for each in words if each.lower() in TARGETS]
    if error.name != NoSuchGpu.name or not targets:
        return error
    gpus = [each for each in words if each not in targets]
    command = " ".join([f"gpuswitchctl to-{targets[-1].lower()}", *map(quote, gpus)])
    hint = _("{word} is where a GPU goes, and no GPU: {command}", word=targets[-1], command=command)
    return CtlError(f"{error}\n{hint}", error.exit_code, name=error.name)


def recover(service: Service, args: Namespace) -> int:
    """Look for a known-good state. Done is home; on vfio-pci instead counts as failed, and is said."""
    return Switches(
        service,
        args,
        begin=Gpu.recover,
        purpose=_("recover {gpu}", gpu="{}"),
        again="gpuswitchctl recover {}",
        blockers=lambda gpu: gpu.blockers("host", {}),
    ).run(gpus_to_move(service, args.gpus, every=args.all))


def _under_way(service: Service) -> Gpu:
    """The only GPU that is being switched; where none is, the one that the service takes for meant."""
    moving = [gpu for gpu in service.gpus() if gpu.properties["Switch"] and not gpu.properties["Switch"]["result"]]
    if len(moving) > 1:
        names = ", ".join(gpu.word for gpu in moving)
        raise CtlError.of(InvalidArgument, _("several GPUs are being switched: name one of {gpus}", gpus=names))
    return moving[0] if moving else service.gpu("")


def cancel(service: Service, args: Namespace) -> int:
    """Cancel the switch under way, and follow it to its end. Done is what was cancelled."""
    gpu = service.gpu(args.gpu) if args.gpu else _under_way(service)
    switch = gpu.properties["Switch"]
    if not switch:
        raise CtlError.of(Failed, _("nobody has switched {gpu} since the service started", gpu=gpu.title))
    if switch["result"] and gpu.properties["State"] != "wedged":  # the service says what may make the kernel return
        text = _(
            "cannot cancel: no switch of {gpu} is under way; the last was {id} to {target}: {result} at {moment}",
            gpu=gpu.title,
            id=switch["id"],
            target=switch["target"],
            result=state_word(switch["result"]),
            moment=moment(switch["finished"]),
        )
        raise CtlError.of(Failed, text)
    service.subscribe(signals_of(gpu.owner))
    try:
        service.ask_allowed(gpu.cancel(switch["id"]))
        service.end_with_its_reader()
        following = Following(service, [(gpu, switch["id"])], None)
        with display(as_json=args.json, several=False) as shown:
            following.to_the_end(shown)
    except KeyboardInterrupt:
        text = _(
            "interrupted; what was cancelled is taken back all the same: {command} shows it",
            command=f"gpuswitchctl status {gpu.word}",
        )
        raise CtlError.interrupted(text) from None
    outcome = following.outcomes[gpu.address]
    if args.json:
        _print_result(gpu, outcome, changed=outcome["result"] == "cancelled")
    if (result := str(outcome["result"])) != "cancelled":
        text = _(
            "cannot cancel switch {id}: it is {result}: {reason}",
            id=switch["id"],
            result=state_word(result),
            reason=recognized(outcome["reason"]),
        )
        raise CtlError.of(Wedged if result == "wedged" else Failed, text)
    if not args.json:
        line(_cancelled(gpu, switch))
    return 0


def _cancelled(gpu: Gpu, switch: Mapping[str, Any]) -> str:
    return _(
        "switch {id} of {gpu} to {target} is cancelled: the GPU is as it was before",
        id=switch["id"],
        gpu=gpu.title,
        target=switch["target"],
    )


def plan(service: Service, args: Namespace) -> int:
    """Of the way that was named, else of the one that each GPU can go from where it is."""
    gpus = gpus_to_move(service, [args.gpu] if args.gpu else [], every=args.all)
    ways = [(gpu, args.target or ("vfio" if gpu.properties["State"] == "host" else "host")) for gpu in gpus]
    return _print_plans(service, ways, args, options_of(args), "gpuswitchctl plan {} {target}")


def _print_plans(
    service: Service, ways: Sequence[tuple[Gpu, str]], args: Namespace, options: Options, command: str
) -> int:
    """Of GPUs, each with where it is to go. `command` is what was typed for that, without the `options`, {} being the
    GPU, and {target} where to.

    Raises:
        CtlError: it is refused, where it is about one GPU; of several, each that is has its reasons.
    """
    records: list[dict[str, Any]] = []
    failures: list[CtlError] = []
    for gpu, target in ways:
        typed = command.replace("{target}", target).format(gpu.word)
        if not args.json:
            _tell_of_a_bad_state(gpu)
        try:
            steps = _or_blockers(gpu, target, options, args, typed)
        except CtlError as error:
            if not args.json and _is_bad(gpu):
                _tell_remedies(gpu)
            if len(ways) == 1:
                raise
            failures.append(error)
            if args.json:
                as_json_line(error.as_json())
            purpose = args.purpose.format(gpu=gpu.title)
            problem(sentence(purpose, str(error), is_whole=error.is_whole, lead=error.lead))
            continue
        in_the_way = _in_the_way(gpu, steps, target, options)
        if not args.json:
            ends: list[str] = []
            with suppress(CtlError):  # the plan is known, whoever cannot answer now
                ends = of_steps(service, gpu, steps).lines()
            _print_plan(gpu, target, steps, in_the_way, ends, options, several=len(ways) > 1)
        records.append(
            {
                **naming(gpu),
                "target": target,
                "state": gpu.properties["State"],
                "steps": list(map(planned_record, steps)),
                "in_the_way": list(map(blocker_record, in_the_way)),
            }
        )
    if args.json and records:
        as_json({"plans": records}, among_lines=bool(failures))
    return _worst(failures)


def _is_bad(gpu: Gpu) -> bool:
    """Whether it is in no known-good state."""
    return gpu.properties["State"] in {"failed", "unknown"}


def _tell_of_a_bad_state(gpu: Gpu) -> None:
    """Of a GPU that is in no known-good state: why. What a plan is from there may not work."""
    if not _is_bad(gpu):
        return
    state, reason = state_word(gpu.properties["State"]), gpu.properties["Reason"]
    first, *more = lines_of(reason)
    if reason:
        line(_("{gpu} is {state}: {reason}", gpu=gpu.title, state=state, reason=first))
    else:
        line(_("{gpu} is {state}", gpu=gpu.title, state=state))
    for each in more:
        hung("  ", each)
    hung("  ", _("what there is to do about that: {command}", command=f"gpuswitchctl status {gpu.word}"))


def _tell_remedies(gpu: Gpu) -> None:
    """What the service says that may help, as `status` has it."""
    for each in remedies_of(gpu.properties):
        line(reworded(each["text"], [each]))


def _print_plan(
    gpu: Gpu,
    target: str,
    steps: Sequence[Mapping[str, Any]],
    in_the_way: Sequence[Mapping[str, Any]],
    ends: Sequence[str],
    options: Options,
    *,
    several: bool,
) -> None:
    if several:
        line(f"{gpu.title}:")
    if not steps:
        line(_("nothing to do: it is {place} already", place=place(gpu, target)))
        return
    _print_verdict(steps, in_the_way, gpu, target)
    for each in ends:
        hung("  ", each)
    for number, step in enumerate(steps, 1):
        within = _("{title} (within {seconds} s)", title=step_title(step["title"]), seconds=f"{step['deadline']:g}")
        hung(f"{number:>{len(str(len(steps)))}}. ", within)
    remedies = remedies_of(gpu.properties)
    # What status does not offer is not offered here either.
    if remedies and (_is_bad(gpu) or (target == "host" and remedies[0]["kind"] != "to_host")):
        _tell_remedies(gpu)
    else:
        line(_("to do it: {command}", command=with_options(f"gpuswitchctl to-{target} {gpu.word}", options)))


def _in_the_way(gpu: Gpu, steps: Sequence[Mapping[str, Any]], target: str, options: Options) -> list[dict[str, Any]]:
    """Who has it open now, and is waited for or ended by these steps: what would be in the way if nobody were."""
    if not any(step["kind"] == _AWAITS_HOLDERS for step in steps):
        return []
    now = {**without(options, "wait_seconds"), "busy": ("s", "refuse")}
    with suppress(CtlError):  # the plan is known, whoever cannot answer now
        return [each for each in gpu.blockers(target, now) if each["error"] == Busy.name]
    return []


def _print_verdict(
    steps: Sequence[Mapping[str, Any]], in_the_way: Sequence[Mapping[str, Any]], gpu: Gpu, target: str
) -> None:
    if not in_the_way and _is_bad(gpu):
        text = _(
            "from there, {gpu} would go to {target} by these steps, which may fail again", gpu=gpu.title, target=target
        )
    elif not in_the_way:
        text = _("nothing keeps {gpu} from going to {target}", gpu=gpu.title, target=target)
    elif any(step["ends_programs"] for step in steps):
        text = _("{gpu} can go to {target}, which ends who has it open", gpu=gpu.title, target=target)
    else:
        text = _("{gpu} goes to {target} once nobody has it open any more", gpu=gpu.title, target=target)
    line(text)
    for each in in_the_way:
        hung("  ", reworded(str(each["text"]), [each]))


def _or_blockers(gpu: Gpu, target: str, options: Options, args: Namespace, command: str) -> list[dict[str, Any]]:
    """The steps of its plan.

    Raises:
        CtlError: it is refused; with the reasons as data, where they are to be printed so, and with what else there is
            to type.
    """
    try:
        return gpu.plan(target, options)
    except CtlError as error:
        named = with_blockers(error, lambda: gpu.blockers(target, options), args)
        named.about(gpu.address, gpu.name)
        told = with_ways_out(named, ways_out([gpu], target, options, command, looks=True))
        if told.exit_code == _REFUSED:
            # Who asks for a plan wants to know whether it can be done.
            told.lead = _("{gpu} cannot go to {target} now:", gpu=gpu.title, target=target)
        raise told from None


def with_blockers(error: CtlError, blockers: Callable[[], Sequence[Mapping[str, Any]]], args: Namespace) -> CtlError:
    """The refusal with its reasons as data where they are to be printed so, and in the language of whoever reads it."""
    if args.json and error.exit_code == _REFUSED:
        error.blockers = blockers()
    elif not is_english() and error.name in _HAS_BLOCKERS:
        # Others have been there in between: what it said is true all the same.
        with suppress(CtlError):
            return CtlError(reworded(str(error), blockers()), error.exit_code, name=error.name)
    return error


def place(gpu: Gpu, target: str) -> str:
    """How a person says where a GPU is that a switch to `target` brought there."""
    if target == "host":
        return _("on the host")
    try:
        driver = gpu.look()["Driver"]
    except CtlError:  # there it is, although the service has gone since, or no time is left to ask
        driver = gpu.properties["Driver"] if gpu.properties["State"] == "vfio" else "vfio"
    return _("on {driver}", driver=driver)


def options_of(args: Namespace) -> Options:
    """What the service is told besides the target: only what was said on the command line."""
    options: dict[str, tuple[str, Any]] = {}
    if args.busy is not None:
        options["busy"] = ("s", args.busy)
    if args.wait is not None:
        options["wait_seconds"] = ("u", args.wait)
    if args.stop_unit:
        options["stop_units"] = ("as", args.stop_unit)
    return options


class Switches:
    """One switch of each of several GPUs, at the same time.

    `begin` makes the call that begins one, `purpose` says what that is for and `again` what to type for it once more,
    {} being the GPU; `ways_out` are sentences that say what else to type where somebody has it open. `blockers` asks
    what is in the way.
    """

    def __init__(
        self,
        service: Service,
        args: Namespace,
        *,
        begin: Callable[[Gpu], Message],
        purpose: str,
        again: str,
        ways_out: Callable[[Gpu], Iterable[str]] = lambda _: (),
        blockers: Callable[[Gpu], Sequence[Mapping[str, Any]]],
    ) -> None:
        self._service = service
        self._args = args
        self._begin = begin
        self._purpose = purpose
        self._again = again
        self._ways_out = ways_out
        self._blockers = blockers
        self._several = False
        self._taken_back: list[tuple[Gpu, str]] = []
        """Those that somebody here wanted to be taken back."""
        self._failures: list[CtlError] = []
        self._summary = Summary()
        self._before: dict[str, str] = {}
        """The state of each GPU when its switch was asked for."""
        self._stopped: dict[str, list[str]] = {}
        """The units that were stopped for each by then."""
        self._asked: float | None = None
        """When that was, in seconds since the epoch; None: not by us."""

    def run(self, gpus: Sequence[Gpu]) -> int:
        """To their end, unless that is not waited for; the exit status: the worst there is.

        Raises:
            CtlError: what went wrong, where it is about one GPU.
        """
        self._several = len(gpus) > 1
        for owner in {gpu.owner for gpu in gpus}:
            self._service.subscribe(signals_of(owner))
        try:
            begun = self._begun(gpus)
        except KeyboardInterrupt:
            raise _interrupted(gpus, self._again) from None
        if self._args.no_wait:
            for gpu, switch in begun:
                self._print_id(gpu, switch)
        elif begun:
            self.to_the_end(begun)
        return _worst(self._failures)

    def to_the_end(self, begun: Sequence[tuple[Gpu, str]]) -> None:
        """Follow those that were begun, whoever did that, and say how they ended.

        Raises:
            CtlError: what went wrong, where it is about one GPU, or why nobody looks any longer.
        """
        self._service.end_with_its_reader()
        following = Following(self._service, begun, self._args.timeout, is_joined=self._is_joined)
        try:
            unwatched = self._followed(following)
        except OutputError as error:
            raise _unwritten(error, [gpu for gpu, _switch in following.under_way]) from None
        over = [(gpu, following.outcomes[gpu.address]) for gpu, _switch in begun if gpu.address in following.outcomes]
        # Of several, how each ended stands below why.
        for gpu, outcome in sorted(over, key=lambda each: self._several and bool(each[1]["result"] == "done")):
            self._finished(gpu, outcome)
        if self._several and not self._args.json:
            self._summary.print()
        if unwatched is not None:
            unwatched.exit_code = _worst([*self._failures, unwatched])
            raise unwatched

    def _begun(self, gpus: Sequence[Gpu]) -> list[tuple[Gpu, str]]:
        """Those that were begun, with the ids of their switches."""
        self._before = {gpu.path: gpu.properties["State"] for gpu in gpus}
        # A service that is older does not say which.
        self._stopped = {gpu.path: gpu.properties.get("StoppedUnits", []) for gpu in gpus}
        self._asked = time.time()
        sent = [(gpu, message, self._service.send(message)) for gpu in gpus for message in [self._begin(gpu)]]
        begun = []
        for gpu, message, serial in sent:
            try:
                begun.append((gpu, str(self._service.answer_allowed(message, serial).body[0])))
            except CtlError as error:
                if error.exit_code != EXIT_INTERRUPTED:
                    self._fail(gpu, self._refused(gpu, error))
                elif len(sent) > 1:
                    raise _interrupted(gpus, self._again) from None
                else:
                    raise
        return begun

    def _is_joined(self, switch: Mapping[str, Any]) -> bool:
        """Whether somebody else had asked for this one, by what property Switch says of it."""
        if self._asked is None:
            return False
        asker = switch.get("asker", {})
        if switch["started"] < self._asked or asker.get("service"):
            return True
        # Of two who ask in the same moment, one joins the other.
        pid = asker.get("pid", os.getpid())
        if pid == os.getpid():
            return False
        with suppress(CtlError):  # the time is over, or the bus is gone
            return bool(pid != self._service.own_pid())
        return True

    def _refused(self, gpu: Gpu, error: CtlError) -> CtlError:
        """With its reasons as data where they are to be printed so, and with what else there is to type."""
        if error.name == Timeout.name:
            shows = _("{command} shows whether the switch has begun", command=f"gpuswitchctl status {gpu.word}")
            return CtlError.of(Timeout, f"{error}\n{shows}", is_whole=True)
        named = with_blockers(error, partial(self._blockers, gpu), self._args)
        told, ways = self._with_ways_out(gpu, named)
        again = _("put right what is named here, then: {command}", command=self._again.format(gpu.word))
        self._summary.add(gpu, REFUSED if error.exit_code == _REFUSED else NOT_BEGUN, str(named), ways or [again])
        return told

    def _with_ways_out(self, gpu: Gpu, error: CtlError) -> tuple[CtlError, list[str]]:
        """The error with the ways out below it, and these."""
        told = with_ways_out(error, self._ways_out(gpu))
        return told, str(told).removeprefix(str(error)).splitlines()[1:]

    def _followed(self, following: Following) -> CtlError | None:
        """Until all are over, or why nobody looks any longer."""
        while True:
            try:
                if self._followed_or_left(following):
                    return None
            except CtlError as error:
                return error

    def _followed_or_left(self, following: Following) -> bool:
        """Whether all are over; else they are being taken back.

        Raises:
            CtlError: nobody looks any longer.
        """
        try:
            with display(as_json=self._args.json, several=self._several) as shown:
                following.to_the_end(shown)
        except KeyboardInterrupt:
            if self._taken_back or not self._can_ask_meanwhile() or not self._settled(following):
                raise _interrupted([gpu for gpu, _switch in following.under_way], self._again) from None
            return False
        return True

    def _can_ask_meanwhile(self) -> bool:
        """What happens stands above the question; and who reads a pipe of ours has heard the same ^C, and is gone."""
        return not self._args.json and can_ask() and on_terminal(sys.stdout)

    def _settled(self, following: Following) -> bool:
        """Whether a person says that they are to be taken back, and they are being, or they are over meanwhile."""
        named = _(" and ").join(gpu.word for gpu, _switch in following.under_way)
        question = Question(_("Cancel the switch of {gpus} (c), or leave it to go on (l)? [c/L] ", gpus=named))
        # It was drawn in place, and has until when there is something to decide.
        following.tell_again(Lines(several=self._several))
        try:
            # They go on while somebody thinks about it.
            key = _answer(question, partial(following.until_typed, Above(question, several=self._several)))
        except KeyboardInterrupt:
            return False
        if key == _LEAVE:
            return False
        if key == _TAKE_BACK:
            self._taken_back = following.under_way
            for gpu, switch in following.under_way:
                if not self._cancel(gpu, switch):
                    self._taken_back = []
                    return False
        return True

    def _cancel(self, gpu: Gpu, switch: str) -> bool:
        """False: ^C, while somebody was asked for a password."""
        try:
            self._service.ask_allowed(gpu.cancel(switch))
        except CtlError as error:
            if error.exit_code == EXIT_INTERRUPTED:
                return False
            # It may be over by now, or too far: what becomes of it is told.
            problem(sentence(_("cancel the switch of {gpu}", gpu=gpu.title), str(error), is_whole=error.is_whole))
        return True

    def _print_id(self, gpu: Gpu, switch: str) -> None:
        """And how it is followed, for whoever sits there; a program gets the id alone."""
        now: Mapping[str, Any] = {}
        with suppress(CtlError):  # the service has gone since; it was begun
            now = gpu.look()["Switch"]
        known = now.get("id") == switch
        joined = self._is_joined(now) if known else None
        if self._args.json:
            whose = {"started": rfc3339(now["started"]), "requester": now.get("asker")} if known else {}
            told = {"joined": joined, "started": None, "requester": None, **whose}
            as_json_line({"event": "begun", "id": switch, **naming(gpu), "target": self._args.target, **told})
            return
        line(f"{gpu.title}: {switch}" if self._several else switch)
        if joined:
            problem(joined_words(gpu, now))
        if on_terminal(sys.stdout):
            problem(
                _(
                    "it is not followed: {wait} waits for its end, {show} has each step after that, {watch} tells what "
                    "happens meanwhile",
                    wait=f"gpuswitchctl wait {switch}",
                    show=f"gpuswitchctl show {switch}",
                    watch=f"gpuswitchctl watch {gpu.word}",
                )
            )

    def _finished(self, gpu: Gpu, outcome: Mapping[str, Any]) -> None:
        """Say how it ended. Anything but `done` is an error."""
        result = str(outcome["result"])
        if self._args.json:
            changed = bool(outcome["count"]) if result == "done" else result in {"failed", "wedged"}
            _print_result(gpu, outcome, changed=changed, joined=self._is_joined(outcome))
        if result != "done":
            self._fail(gpu, self._failure(gpu, outcome), told=self._args.json)
        elif not self._args.json:
            took = duration(outcome["finished"] - outcome["started"])
            # A recovery of one that is in a known-good state leaves it there, whichever that is.
            where = place(gpu, str(outcome["target"]))
            if outcome["count"]:
                line(_("{gpu} is {place} now, after {duration}", gpu=gpu.title, place=where, duration=took))
            else:
                line(_("{gpu} is {place} already", gpu=gpu.title, place=where))
            self._tell_what_was_stopped(gpu, str(outcome["target"]))
            if (gpu, outcome["id"]) in self._taken_back:
                verb = "to-host" if outcome["target"] == "vfio" else "to-vfio"
                problem(_("it was too late to take it back: {command}", command=f"gpuswitchctl {verb} {gpu.word}"))
            _tell_what_was_met(outcome)

    def _tell_what_was_stopped(self, gpu: Gpu, target: str) -> None:
        """The units that are not as they were before, by the words that the plan has for them."""
        before = self._stopped.get(gpu.path, [])
        if target == "host" and before:
            with suppress(CtlError):  # the service has gone since; it is home
                gpu.look()
        now = gpu.properties.get("StoppedUnits", [])
        told = (
            (STOPPED, [each for each in now if each not in before]),
            (STARTED, [each for each in before if each not in now]),
        )
        for text, units in told:
            if units:
                hung("  ", _(text, what=", ".join(units)))

    def _failure(self, gpu: Gpu, outcome: Mapping[str, Any]) -> CtlError:
        """With what there is to do next."""
        result, name = str(outcome["result"]), str(outcome.get("error", ""))
        text = _(
            "cannot {purpose} ({result}): {reason}",
            purpose=self._purpose.format(gpu.title),
            result=state_word(result),
            reason=recognized(outcome["reason"]),
        )
        again = self._again.format(gpu.word)
        ended = partial(self._summary.add, gpu, result, str(outcome["reason"]))
        if result == "cancelled" and (gpu, outcome["id"]) in self._taken_back:
            ended([])
            return CtlError.of(Failed, _("interrupted; {what}", what=_cancelled(gpu, outcome)), is_whole=True)
        if result == "wedged":
            status = _("gpuswitchctl status {gpu} tells when the kernel has returned", gpu=gpu.word)
            ended([status])
            return CtlError.of(Wedged, f"{text}\n{status}")
        now = gpu.properties
        with suppress(CtlError):  # the service has gone since; how the switch ended is known
            now = gpu.look()
        if now["State"] == "failed":
            ended([_("what there is to do about that: {command}", command=f"gpuswitchctl status {gpu.word}")])
            there = _("it is left with {functions}", functions=", ".join(function_words(now)))
            # What stands there may be of an earlier switch, and this one has nothing of that.
            since = outcome["id"] if now["Reason"].endswith(outcome["reason"]) else ""
            sentences = what_to_do(now, switch=since)
            return CtlError.of(Failed, "\n".join([text, there, *sentences]))
        if result == "failed":
            # It stands, and not all around it is as before: on the host, that is what to-host puts right.
            verb = "to-host" if now["State"] in {"host", "vfio"} else "recover"
            again = f"gpuswitchctl {verb} {gpu.word}"
        shown = f"gpuswitchctl show {outcome['id']}"
        # What was failed may be elsewhere now, and well.
        if result in {"reverted", "cancelled"} and now["State"] == self._before.get(gpu.path):
            text += "\n" + _("the GPU is as it was before; {command} has each step", command=shown)
        if result in {"failed", "reverted"}:
            reason, switch = str(outcome["reason"]), outcome["id"]
            remedies = remedies_of(now) if now["StaysOut"] else ()
            text = "\n".join([text, *to_put_right(reason, gpu.word, again, switch=switch, remedies=remedies)])
        code = EXIT_CODES.get(PREFIX + name, Failed.exit_code) if result == "reverted" else Failed.exit_code
        error = CtlError(text, code, name=name)
        told, ways = self._with_ways_out(gpu, error) if result == "reverted" else (error, [])
        ended(ways or [_("each step, and what the kernel said: {command}", command=shown)])
        return told

    def _fail(self, gpu: Gpu, error: CtlError, *, told: bool = False) -> None:
        """`told`: programs have heard of it already."""
        error.about(gpu.address, gpu.name)
        if not self._several:
            if told:
                problem(str(error))
                self._failures.append(error)
                return
            raise error
        self._failures.append(error)
        if self._args.json and not told:
            as_json_line(error.as_json())
        problem(sentence(self._purpose.format(gpu.title), str(error), is_whole=error.is_whole))


def _answer(question: Question, typed: Callable[[int], bool]) -> str:
    """The key that answers it; "": `typed` says that nobody needs to know any more.

    Raises:
        KeyboardInterrupt: ^C.
    """
    known = dict.fromkeys((_TAKE_BACK, *_first_letters(_("c cancel"))), _TAKE_BACK)
    known |= dict.fromkeys((_LEAVE, "\n", "\r", END, *_first_letters(_("l leave"))), _LEAVE)
    other = ""
    with single_keys(question.show) as descriptor:
        question.show()
        try:
            while typed(descriptor):
                key = pressed(descriptor)
                if other and key in {"\n", "\r"}:
                    # Whoever answers in another way, and ends that as a line, has not chosen what is likely.
                    other = ""
                elif answered := known.get(key):
                    question.answered(key if key.isalpha() else answered)
                    return answered
                else:
                    other = key
        except CtlError:
            question.hide()
            raise
        except BaseException:
            question.answered("")
            raise
        question.hide()
        return ""


def _first_letters(words: str) -> Iterator[str]:
    return (word[0] for word in words.split())


def _worst(failures: Iterable[CtlError]) -> int:
    """The exit status of several; 0 where all went well."""
    statuses = {each.exit_code for each in failures}
    return next((status for status in _WORST_FIRST if status in statuses), 0)


def _tell_what_was_met(outcome: Mapping[str, Any]) -> None:
    """Of a switch that is done: what it has recovered from, after which all is as it should be, and what is not."""
    reason = str(outcome["reason"])
    # A service that is older does not tell them apart.
    forgone = "\n".join(outcome.get("forgone", [reason]))
    if met := reason.removesuffix(forgone).rstrip("\n"):
        problem(_("it has recovered from this: {reason}", reason=recognized(met)))
    if forgone:
        problem(_("not all went well: {reason}", reason=recognized(forgone)))


def _print_result(gpu: Gpu, outcome: Mapping[str, Any], *, changed: bool, joined: bool = False) -> None:
    as_json_line({"event": "result", **naming(gpu), **switch_record(outcome), "changed": changed, "joined": joined})


def _unwritten(error: OutputError, gpus: Sequence[Gpu]) -> OutputError:
    """With what becomes of the switches that nobody could be told of."""
    if not gpus:
        return error
    status = f"gpuswitchctl status {' '.join(gpu.word for gpu in gpus)}"
    return OutputError(_("{why}; the switch goes on: {command} shows it", why=error, command=status))


def _interrupted(gpus: Sequence[Gpu], again: str) -> CtlError:
    """A switch is not ours to end: ^C ends the watching, and says so."""
    named = " ".join(gpu.word for gpu in gpus)
    return CtlError.interrupted(
        _(
            "interrupted; the switch, once begun, goes on: gpuswitchctl status {gpus} shows it, {again} follows it "
            "again, gpuswitchctl cancel {gpus} takes it back",
            gpus=named,
            again=again.format(named),
        )
    )
