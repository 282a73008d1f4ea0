"""The verbs that move a GPU, end that, or say how they would: `to-vfio`, `to-host`, `recover`, `cancel`, `plan`."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from gpuswitch.cli.client import CtlError, Gpu, Options, Service, StepChange
from gpuswitch.cli.output import as_json, as_json_line, duration, line, problem
from gpuswitch.cli.query import what_to_do
from gpuswitch.cli.steps import display
from gpuswitch.errors import Failed, Wedged

EXIT_INTERRUPTED = 130
"""What a shell expects of a program that ^C ended."""


def place(gpu: Gpu, target: str) -> str:
    """How a person says where a GPU is that a switch to `target` brought there."""
    if target == "host":
        return "on the host"
    try:
        return f"on {gpu.properties()['Driver']}"
    except CtlError:
        return "on vfio"  # there it is, although the service has gone since


def move(service: Service, args: Namespace) -> int:
    if args.dry_run:
        return plan(service, args)
    gpu = service.gpu(args.gpu)
    address = str(gpu.properties()["Address"])
    with _explained_interrupt(address, f"to-{args.target}"):
        switch = gpu.move(args.target, options_of(args))
        if args.no_wait:
            _print_id(switch, address, args)
            return 0
        outcome = _follow(gpu, switch, args)
    return finish(outcome, gpu, address, args, purpose=f"move {address} to {args.target}", remark="not all went well")


def recover(service: Service, args: Namespace) -> int:
    """Look for a known-good state. Done is home; on vfio-pci instead counts as failed, and is said."""
    gpu = service.gpu(args.gpu)
    address = str(gpu.properties()["Address"])
    with _explained_interrupt(address, "recover"):
        switch = gpu.recover()
        if args.no_wait:
            _print_id(switch, address, args)
            return 0
        outcome = _follow(gpu, switch, args)
    # One that is in a known-good state stays there, whichever that is.
    args.target = str(outcome["target"])
    return finish(outcome, gpu, address, args, purpose=f"recover {address}", remark="it has recovered from this")


def cancel(service: Service, args: Namespace) -> int:
    """Cancel the switch under way, and follow it to its end. Done is what was cancelled."""
    gpu = service.gpu(args.gpu)
    properties = gpu.properties()
    address, switch = str(properties["Address"]), properties["Switch"]
    if not switch:
        raise CtlError(f"nobody has switched {address} since the service started", Failed.exit_code)
    with _explained_interrupt(address, f"to-{switch['target']}"):
        gpu.cancel(switch["id"])
        outcome = _follow(gpu, switch["id"], args)
    if args.json:
        as_json_line({"event": "result", "gpu": address, **outcome})
    if (result := str(outcome["result"])) != "cancelled":
        text = f"cannot cancel switch {switch['id']}: it is {result}: {outcome['reason']}"
        raise CtlError(text, Wedged.exit_code if result == "wedged" else Failed.exit_code)
    if not args.json:
        line(f"switch {switch['id']} of {address} to {switch['target']} is cancelled: all is as before")
    return 0


def plan(service: Service, args: Namespace) -> int:
    gpu = service.gpu(args.gpu)
    steps = gpu.plan(args.target, options_of(args))
    if args.json:
        as_json(steps)
        return 0
    for number, step in enumerate(steps, 1):
        line(f"{number:>{len(str(len(steps)))}}. {step['title']} (within {step['deadline']:g} s)")
    if not steps:
        line(f"nothing to do: it is {place(gpu, args.target)} already")
    return 0


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


@contextmanager
def _explained_interrupt(address: str, verb: str) -> Iterator[None]:
    """A switch is not ours to end: ^C ends the watching, and says so."""
    try:
        yield
    except KeyboardInterrupt:
        raise CtlError(
            f"interrupted; the switch, once begun, goes on: gpuswitchctl status {address} shows it, "
            f"gpuswitchctl {verb} {address} follows it again",
            EXIT_INTERRUPTED,
        ) from None


def _follow(gpu: Gpu, switch: str, args: Namespace) -> Mapping[str, Any]:
    outcome: Mapping[str, Any] = {}
    with display(switch, as_json=args.json) as shown:
        for event in gpu.follow(switch, args.timeout):
            if isinstance(event, StepChange):
                shown.step(event)
            else:
                outcome = event
    return outcome


def _print_id(switch: str, address: str, args: Namespace) -> None:
    if args.json:
        as_json_line({"id": switch, "gpu": address, "target": args.target})
    else:
        line(switch)


def finish(outcome: Mapping[str, Any], gpu: Gpu, address: str, args: Namespace, *, purpose: str, remark: str) -> int:
    """Say how it ended. Anything but `done` is an error; `remark` introduces what there is to say about one that is."""
    if args.json:
        as_json_line({"event": "result", "gpu": address, **outcome})
    result = str(outcome["result"])
    if result != "done":
        text = f"cannot {purpose} ({result}): {outcome['reason']}"
        if (now := gpu.properties())["State"] == "failed":
            text += f"\n{what_to_do(now)}"
        raise CtlError(text, Wedged.exit_code if result == "wedged" else Failed.exit_code)
    if not args.json:
        took = duration(outcome["finished"] - outcome["started"])
        line(f"{address} is {place(gpu, args.target)} {f'now, after {took}' if outcome['count'] else 'already'}")
        if outcome["reason"]:
            problem(f"{remark}: {outcome['reason']}")
    return 0
