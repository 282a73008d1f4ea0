"""gpuswitchctl: what it understands, and what it ends with."""

from __future__ import annotations

import argparse
import io
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from gpuswitch import __version__
from gpuswitch.cli import history as past
from gpuswitch.cli import query as look
from gpuswitch.cli import switch as move
from gpuswitch.cli import trial as tried
from gpuswitch.cli.client import CtlError, Service
from gpuswitch.cli.output import problem

BUS_VARIABLE = "GPUSWITCH_BUS"

EXIT_STATUS = """\
exit status:
  0  done, or there already        4  you may not do this
  1  failed, reverted, cancelled   5  the service cannot be reached
  2  wrong usage, no such GPU      6  not finished in time
  3  refused, with the reasons     7  wedged: the kernel does not return

a GPU is named like 0000:01:00.0, 01:00.0, pci_0000_01_00_0, or by its name in the configuration
"""

_LONGEST_WAIT = 86400
Verb = Callable[[Service, argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # the locale may not have what a device is called
    args = parser().parse_args(arguments)
    try:
        status = _run(args)
        sys.stdout.flush()
    except CtlError as error:
        problem(sentence(args.purpose.format(gpu=getattr(args, "gpu", "") or "the GPU"), str(error)))
        return error.exit_code
    except KeyboardInterrupt:
        return move.EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read us has gone; Python must not trip over it once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def parser() -> argparse.ArgumentParser:
    shared = _shared_options()
    top = argparse.ArgumentParser(
        prog="gpuswitchctl",
        description="Move GPUs between their host drivers and vfio-pci, and see where they are.",
        epilog=EXIT_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"gpuswitchctl {__version__}")
    verbs = top.add_subparsers(metavar="COMMAND", required=True)

    def verb(name: str, run: Verb, purpose: str, example: str, **defaults: Any) -> argparse.ArgumentParser:
        added = verbs.add_parser(
            name,
            help=purpose.format(gpu="a GPU"),
            description=f"{purpose[0].upper()}{purpose[1:].format(gpu='a GPU')}.",
            epilog=f"example: {example}",
            parents=[shared],
            allow_abbrev=False,
        )
        added.set_defaults(run=run, purpose=purpose, **defaults)
        return added

    verb("list", look.list_gpus, "list the GPUs", "gpuswitchctl list")
    _gpu_argument(verb("status", look.status, "show the state of {gpu}", "gpuswitchctl status 01:00.0"))
    _switch_verbs(verb)
    _gpu_argument(verb("holders", look.holders, "show who has {gpu} open", "gpuswitchctl holders 01:00.0"))
    planned = verb("plan", move.plan, "show the steps of a switch of {gpu}", "gpuswitchctl plan 01:00.0 vfio")
    _gpu_argument(planned)
    planned.add_argument("target", metavar="TARGET", type=str.lower, choices=("host", "vfio"), help="host or vfio")
    _busy_arguments(planned)
    _history_verbs(verb)
    verb("groups", look.groups, "show the IOMMU groups", "gpuswitchctl groups")
    verb("config", look.config, "show the configuration", "gpuswitchctl config --json")
    purpose = "show switches on simulated machines"
    demonstration = verbs.add_parser("demo", help=purpose, description=f"{purpose.capitalize()}.", allow_abbrev=False)
    demonstration.set_defaults(run=None, purpose=purpose)
    return top


def _switch_verbs(verb: Callable[..., argparse.ArgumentParser]) -> None:
    for target in ("vfio", "host"):
        example = f"gpuswitchctl to-{target} 01:00.0 --wait 60"
        _switch_arguments(verb(f"to-{target}", move.move, f"move {{gpu}} to {target}", example, target=target))
    trial = verb("trial", tried.trial, "try {gpu} on vfio", "gpuswitchctl trial 01:00.0 --seconds 60")
    trial.description = (
        "Move a GPU to vfio, and home by itself after a while, whatever becomes of this terminal, the desktop or the "
        "service. On a terminal, h brings it home before, and k keeps it on vfio; so does to-vfio."
    )
    _gpu_argument(trial)
    _busy_arguments(trial)
    trial.add_argument(
        "--seconds",
        metavar="N",
        type=_trial_seconds,
        default=60.0,
        help="from when it is on vfio (default: 60; to 86400)",
    )
    recovered = verb("recover", move.recover, "recover {gpu}", "gpuswitchctl recover 01:00.0", target="host")
    recovered.description = (
        "Bring a GPU that is failed or unknown home, else to vfio-pci; then whatever the configuration allows. "
        "Nothing to do where it is in a known-good state."
    )
    _gpu_argument(recovered)
    _watching_arguments(recovered)
    example = "gpuswitchctl cancel 01:00.0"
    _gpu_argument(verb("cancel", move.cancel, "cancel the switch of {gpu}", example, timeout=None))


def _history_verbs(verb: Callable[..., argparse.ArgumentParser]) -> None:
    told = verb("history", past.history, "list finished switches", "gpuswitchctl history 01:00.0 --limit 5")
    told.add_argument("gpu", metavar="GPU", nargs="?", default="", help="of this one only")
    told.add_argument("--limit", metavar="N", type=_count, default=20, help="the last N (default: 20; 0: all)")
    shown = verb("show", past.show, "show the steps of a finished switch", "gpuswitchctl show 5f0c3a1b")
    shown.add_argument("id", metavar="ID", help="as `history` lists it")


def sentence(purpose: str, text: str) -> str:
    """`cannot PURPOSE: TEXT`; several reasons stand below each other. Text that says what it cannot stays as it is."""
    if text.startswith(("cannot ", "interrupted; ")):
        return text
    return f"cannot {purpose}:\n{text}" if "\n" in text else f"cannot {purpose}: {text}"


def _run(args: argparse.Namespace) -> int:
    if args.run is None:
        from gpuswitch.cli.demo import demo  # noqa: PLC0415  # the one that brings its own service, and all that it takes

        return demo()
    service = Service.connect(args.bus)
    try:
        status: int = args.run(service, args)
    finally:
        service.close()
    return status


def _shared_options() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--json", action="store_true", help="print JSON")
    shared.add_argument(
        "--bus",
        metavar="ADDRESS",
        default=os.environ.get(BUS_VARIABLE) or None,
        help=f"the D-Bus address to find the service at (default: ${BUS_VARIABLE}, else the system bus)",
    )
    return shared


def _gpu_argument(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("gpu", metavar="GPU", nargs="?", default="", help="may be left out where there is only one")


def _switch_arguments(verb: argparse.ArgumentParser) -> None:
    _gpu_argument(verb)
    _busy_arguments(verb)
    _watching_arguments(verb, dry_run=True)


def _watching_arguments(verb: argparse.ArgumentParser, *, dry_run: bool = False) -> None:
    how = verb.add_mutually_exclusive_group()
    how.add_argument("--timeout", metavar="SECONDS", type=_seconds, help="stop watching then; the switch goes on")
    how.add_argument("--no-wait", action="store_true", help="print the id of the switch, do not follow it")
    if dry_run:
        how.add_argument("--dry-run", action="store_true", help="print the steps, take none")


def _busy_arguments(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--busy",
        choices=("refuse", "wait", "terminate", "kill"),
        help="what becomes of programs that have it open (default: as the configuration says)",
    )
    verb.add_argument(
        "--wait",
        metavar="SECONDS",
        type=_whole_seconds,
        help="wait this long for them; by itself, the same as --busy=wait",
    )
    verb.add_argument(
        "--stop-unit", metavar="UNIT", action="append", default=[], help="stop this unit first; may be given again"
    )


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < 1 << 32):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of switches")
    return int(text)


def _whole_seconds(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) <= _LONGEST_WAIT):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of seconds from 1 to {_LONGEST_WAIT}")
    return int(text)


def _trial_seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 1 <= seconds <= tried.LONGEST_SECONDS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 1 to {tried.LONGEST_SECONDS}")
    return seconds


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return seconds
