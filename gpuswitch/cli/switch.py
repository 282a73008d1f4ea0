"""The verbs that move GPUs, end that, or say how they would: `to-vfio`, `to-host`, `recover`, `cancel`, `plan`."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from gpuswitch.cli.client import Gpu, Options, Service, gpus_to_move, signals_of
from gpuswitch.cli.failures import CtlError
from gpuswitch.cli.follow import Following
from gpuswitch.cli.output import as_json, as_json_line, duration, line, on_terminal, problem, sentence
from gpuswitch.cli.query import what_to_do
from gpuswitch.cli.records import switch_record
from gpuswitch.cli.steps import display
from gpuswitch.errors import EXIT_CODES, PREFIX, Failed, Wedged

if TYPE_CHECKING:
    from jeepney import Message

EXIT_INTERRUPTED = 130
_WORST_FIRST = (EXIT_INTERRUPTED, 7, 1, 5, 4, 3, 6, 2)
_REFUSED = 3
_DESKTOPS = frozenset(
    f"{name}.service"
    for name in ("display-manager", "gdm", "gdm3", "greetd", "lightdm", "lxdm", "ly", "plasmalogin", "sddm", "xdm")
)
"""Units that a screen is gone with: display managers, by the names that distributions give them."""


def move(service: Service, args: Namespace) -> int:
    options = options_of(args)
    gpus = gpus_to_move(service, args.gpus, every=args.all)
    if args.dry_run:
        return _print_plans(gpus, args.target, options, args)
    if not args.yes and _can_ask():
        _ask_before_a_desktop_ends(gpus, args.target, options)
    return _Switches(
        service,
        args,
        begin=lambda gpu: gpu.move(args.target, options),
        purpose=f"move {{}} to {args.target}",
        again=f"gpuswitchctl to-{args.target} {{}}",
        remark="not all went well",
        blockers=lambda gpu: gpu.blockers(args.target, options),
    ).run(gpus)


def recover(service: Service, args: Namespace) -> int:
    """Look for a known-good state. Done is home; on vfio-pci instead counts as failed, and is said."""
    return _Switches(
        service,
        args,
        begin=Gpu.recover,
        purpose="recover {}",
        again="gpuswitchctl recover {}",
        remark="it has recovered from this",
    ).run(gpus_to_move(service, args.gpus, every=args.all))


def cancel(service: Service, args: Namespace) -> int:
    """Cancel the switch under way, and follow it to its end. Done is what was cancelled."""
    gpu = service.gpu(args.gpu)
    address, switch = gpu.address, gpu.properties["Switch"]
    if not switch:
        raise CtlError.of(Failed, f"nobody has switched {address} since the service started")
    service.subscribe(signals_of(gpu.owner))
    try:
        message = gpu.cancel(switch["id"])
        service.answer_allowed(message, service.send(message))
        following = Following(service, [(gpu, switch["id"])], None)
        with display(as_json=args.json, several=False) as shown:
            following.to_the_end(shown)
    except KeyboardInterrupt:
        text = f"interrupted; what was cancelled is taken back all the same: gpuswitchctl status {address} shows it"
        raise CtlError(text, EXIT_INTERRUPTED, name="Interrupted") from None
    outcome = following.outcomes[address]
    if args.json:
        _print_result(address, outcome, changed=outcome["result"] == "cancelled")
    if (result := str(outcome["result"])) != "cancelled":
        text = f"cannot cancel switch {switch['id']}: it is {result}: {outcome['reason']}"
        raise CtlError.of(Wedged if result == "wedged" else Failed, text)
    if not args.json:
        line(f"switch {switch['id']} of {address} to {switch['target']} is cancelled: all is as before")
    return 0


def plan(service: Service, args: Namespace) -> int:
    return _print_plans([service.gpu(args.gpu)], args.target, options_of(args), args)


def _print_plans(gpus: Sequence[Gpu], target: str, options: Options, args: Namespace) -> int:
    plans = [(gpu, _or_blockers(gpu, target, options, args)) for gpu in gpus]
    if args.json:
        as_json({"plans": [{"gpu": gpu.address, "target": target, "steps": steps} for gpu, steps in plans]})
        return 0
    for gpu, steps in plans:
        if len(plans) > 1:
            line(f"{gpu.address}:")
        for number, step in enumerate(steps, 1):
            line(f"{number:>{len(str(len(steps)))}}. {step['title']} (within {step['deadline']:g} s)")
        if not steps:
            line(f"nothing to do: it is {place(gpu, target)} already")
    return 0


def _or_blockers(gpu: Gpu, target: str, options: Options, args: Namespace) -> list[dict[str, Any]]:
    """The steps of its plan.

    Raises:
        CtlError: it is refused; with the reasons as data, where they are to be printed so.
    """
    try:
        return gpu.plan(target, options)
    except CtlError as error:
        raise _with_blockers(error, lambda: gpu.blockers(target, options), args) from None


def _with_blockers(error: CtlError, blockers: Callable[[], Sequence[Mapping[str, Any]]], args: Namespace) -> CtlError:
    if args.json and error.exit_code == _REFUSED:
        error.blockers = blockers()
    return error


def place(gpu: Gpu, target: str) -> str:
    """How a person says where a GPU is that a switch to `target` brought there."""
    if target == "host":
        return "on the host"
    try:
        return f"on {gpu.look()['Driver']}"
    except CtlError:
        return "on vfio"  # there it is, although the service has gone since


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


class _Switches:
    """One switch of each of several GPUs, at the same time.

    `begin` makes the call that begins one, `purpose` says what that is for and `again` what to type for it once more,
    {} being the GPU. `remark` introduces what there is to say about one that is done. `blockers` asks what is in the
    way.
    """

    def __init__(
        self,
        service: Service,
        args: Namespace,
        *,
        begin: Callable[[Gpu], Message],
        purpose: str,
        again: str,
        remark: str,
        blockers: Callable[[Gpu], Sequence[Mapping[str, Any]]] = lambda _: (),
    ) -> None:
        self._service = service
        self._args = args
        self._begin = begin
        self._purpose = purpose
        self._again = again
        self._remark = remark
        self._blockers = blockers
        self._several = False
        self._failures: list[CtlError] = []

    def run(self, gpus: Sequence[Gpu]) -> int:
        """To their end, unless that is not waited for; the exit status: the worst there is.

        Raises:
            CtlError: what went wrong, where it is about one GPU.
        """
        self._several = len(gpus) > 1
        addresses = [gpu.address for gpu in gpus]
        for owner in {gpu.owner for gpu in gpus}:
            self._service.subscribe(signals_of(owner))
        try:
            begun = self._begun(gpus)
        except KeyboardInterrupt:
            raise _interrupted(addresses, self._again.format(" ".join(addresses))) from None
        if self._args.no_wait:
            for gpu, switch in begun:
                self._print_id(gpu, switch)
        elif begun:
            following = Following(self._service, begun, self._args.timeout)
            unwatched = self._followed(following)
            for gpu, _ in begun:
                if gpu.address in following.outcomes:
                    self._finished(gpu, following.outcomes[gpu.address])
            if unwatched is not None:
                unwatched.exit_code = _worst([*self._failures, unwatched])
                raise unwatched
        return _worst(self._failures)

    def _begun(self, gpus: Sequence[Gpu]) -> list[tuple[Gpu, str]]:
        """Those that were begun, with the ids of their switches."""
        sent = [(gpu, message, self._service.send(message)) for gpu in gpus for message in [self._begin(gpu)]]
        begun = []
        for gpu, message, serial in sent:
            try:
                begun.append((gpu, str(self._service.answer_allowed(message, serial).body[0])))
            except CtlError as error:
                self._fail(gpu, _with_blockers(error, partial(self._blockers, gpu), self._args))
        return begun

    def _followed(self, following: Following) -> CtlError | None:
        """Until all are over, or why nobody looks any longer."""
        asked = False
        while True:
            try:
                with display(as_json=self._args.json, several=self._several) as shown:
                    following.to_the_end(shown)
            except CtlError as error:
                return error
            except KeyboardInterrupt:
                under_way = following.under_way
                if asked or not _can_ask() or not self._cancelled(under_way):
                    addresses = [gpu.address for gpu, _ in under_way]
                    return _interrupted(addresses, self._again.format(" ".join(addresses)))
                asked = True
            else:
                return None

    def _cancelled(self, under_way: Iterable[tuple[Gpu, str]]) -> bool:
        """Whether a person says that they are to be taken back, and they are being."""
        named = " and ".join(gpu.address for gpu, _ in under_way)
        try:
            if _answer(f"Take the switch of {named} back (c), or leave it to go on (l)? [c/L] ") not in {"c", "cancel"}:
                return False
            for gpu, switch in under_way:
                self._cancel(gpu, switch)
        except KeyboardInterrupt:
            return False
        return True

    def _cancel(self, gpu: Gpu, switch: str) -> None:
        try:
            message = gpu.cancel(switch)
            self._service.answer_allowed(message, self._service.send(message))
        except CtlError as error:
            # It may be over by now, or too far: what becomes of it is told.
            problem(sentence(f"cancel the switch of {gpu.address}", str(error)))

    def _print_id(self, gpu: Gpu, switch: str) -> None:
        if self._args.json:
            as_json_line({"event": "begun", "id": switch, "gpu": gpu.address, "target": self._args.target})
        else:
            line(f"{gpu.address}: {switch}" if self._several else switch)

    def _finished(self, gpu: Gpu, outcome: Mapping[str, Any]) -> None:
        """Say how it ended. Anything but `done` is an error."""
        address, result = gpu.address, str(outcome["result"])
        if self._args.json:
            changed = bool(outcome["count"]) if result == "done" else result in {"failed", "wedged"}
            _print_result(address, outcome, changed=changed)
        if result != "done":
            self._fail(gpu, self._failure(gpu, outcome), told=self._args.json)
        elif not self._args.json:
            took = duration(outcome["finished"] - outcome["started"])
            # A recovery of one that is in a known-good state leaves it there, whichever that is.
            where = place(gpu, str(outcome["target"]))
            line(f"{address} is {where} {f'now, after {took}' if outcome['count'] else 'already'}")
            if outcome["reason"]:
                problem(f"{self._remark}: {outcome['reason']}")

    def _failure(self, gpu: Gpu, outcome: Mapping[str, Any]) -> CtlError:
        """With what there is to do next."""
        address, result, name = gpu.address, str(outcome["result"]), str(outcome.get("error", ""))
        text = f"cannot {self._purpose.format(address)} ({result}): {outcome['reason']}"
        again = self._again.format(address)
        if result == "wedged":
            return CtlError.of(Wedged, f"{text}\ngpuswitchctl status {address} tells when the kernel has returned")
        with suppress(CtlError):  # the service has gone since; how the switch ended is known
            if (now := gpu.look())["State"] == "failed":
                return CtlError.of(Failed, f"{text}\n{what_to_do(now)}")
        if result == "reverted":
            text += f"\nput right what is named here, then: {again}"
        status = EXIT_CODES.get(PREFIX + name, Failed.exit_code) if result == "reverted" else Failed.exit_code
        return CtlError(text, status, name=name)

    def _fail(self, gpu: Gpu, error: CtlError, *, told: bool = False) -> None:
        """`told`: programs have heard of it already."""
        if not self._several:
            if told:
                problem(str(error))
                self._failures.append(error)
                return
            raise error
        self._failures.append(error)
        if self._args.json and not told:
            as_json_line({"event": "error", "gpu": gpu.address, **error.as_json()})
        problem(sentence(self._purpose.format(gpu.address), str(error)))


def _worst(failures: Iterable[CtlError]) -> int:
    """The exit status of several; 0 where all went well."""
    statuses = {each.exit_code for each in failures}
    return next((status for status in _WORST_FIRST if status in statuses), 0)


def _print_result(address: str, outcome: Mapping[str, Any], *, changed: bool) -> None:
    as_json_line({"event": "result", "gpu": address, **switch_record(outcome), "changed": changed})


def _interrupted(addresses: Sequence[str], again: str) -> CtlError:
    """A switch is not ours to end: ^C ends the watching, and says so."""
    named = " ".join(addresses)
    return CtlError(
        f"interrupted; the switch, once begun, goes on: gpuswitchctl status {named} shows it, {again} follows it "
        f"again, gpuswitchctl cancel {named} takes it back",
        EXIT_INTERRUPTED,
        name="Interrupted",
    )


def _can_ask() -> bool:
    return sys.stdin.isatty() and sys.stderr.isatty() and on_terminal(sys.stdout)


def _answer(question: str) -> str:
    """What a person at the terminal says; no answer at all is "". Not by input(), which writes to where it may."""
    print(question, end="", file=sys.stderr, flush=True)
    said = ""
    try:
        said = sys.stdin.readline()
    finally:
        if not said.endswith("\n"):
            print(file=sys.stderr, flush=True)
    return said.strip().casefold()


def _ask_before_a_desktop_ends(gpus: Sequence[Gpu], target: str, options: Options) -> None:
    """Ask whoever sits there, where the switch ends a desktop or a session.

    Raises:
        CtlError: they say no.
    """
    ending = list(dict.fromkeys(what for gpu in gpus for what in ended(gpu, target, options)))
    if not ending:
        return
    named = " and ".join(gpu.address for gpu in gpus)
    problem(f"to move {named} to {target} ends what runs on this screen: {', '.join(ending)}")
    if _answer("Go on? [y/N] ") not in {"y", "yes"}:
        raise CtlError.of(Failed, "cannot go on: you said no; nothing was changed")


def ended(gpu: Gpu, target: str, options: Options) -> list[str]:
    """The desktops and sessions that such a switch ends now; none where it would be refused anyway."""
    try:
        steps = gpu.plan(target, options)
    except CtlError:
        return []
    stops = [name for step in steps for name in step["stops"]]
    found = [name for name in stops if name in _DESKTOPS or name.startswith("session ")]
    if any(step["ends_programs"] for step in steps):
        found += [f"{each['command']} in session {each['session']}" for each in gpu.holders() if each["session"]]
    return found
