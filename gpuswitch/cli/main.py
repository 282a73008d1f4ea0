"""gpuswitchctl: from the command line to an exit status.

What a verb needs is imported when it runs: `--help` is there as soon as argparse is.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Sequence

from gpuswitch.cli.parser import UsageError, parse
from gpuswitch.cli.translate import _, speak

TYPE_CHECKING = False  # as typing has it, which takes longer to import than argparse
if TYPE_CHECKING:
    from argparse import Namespace

    from gpuswitch.cli.failures import CtlError

EXIT_USAGE = 2
EXIT_OUTPUT = 8
_WITHOUT_SERVICE = frozenset(
    f"gpuswitch.cli.{module}"
    for module in (
        "configuration",
        "demo",
        "doctor",
        "editing",
        "prometheus",
        "proxmox",
        "report",
        "setup",
        "setup_boot",
        "topics",
    )
)
"""Modules whose verbs ask no service, find it by themselves, or do what they can without."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; ends by SIGPIPE where nobody reads what it says."""
    _open_what_is_closed()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # the locale may not have what a device is called
    try:
        return _written(_main(sys.argv[1:] if arguments is None else arguments))
    except KeyboardInterrupt:
        from gpuswitch.cli.failures import EXIT_INTERRUPTED  # noqa: PLC0415 -- help needs none of it

        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return _nobody_reads()


def _main(arguments: Sequence[str]) -> int:
    if arguments[:1] == ["__complete"]:
        return _complete(arguments[1:])
    if "--json" in arguments:
        # Programs read it, and what stands beside it is for whoever reads these.
        speak("en")
    try:
        args = parse(arguments)
    except UsageError as error:
        return _wrong_usage(error, arguments)
    except SystemExit as told:  # it was asked for help or for the version, and has printed that
        return int(told.code or 0)
    except BrokenPipeError:
        raise
    except OSError as error:  # it has not
        return _cannot_write(str(error.strerror))
    from gpuswitch.cli.failures import CtlError  # noqa: PLC0415 -- help needs none of it
    from gpuswitch.cli.output import OutputError, ReaderGoneError  # noqa: PLC0415 -- as above

    try:
        try:
            return _run(args)
        except CtlError as error:
            return _failed(error, args, arguments)
    except ReaderGoneError:
        return _nobody_reads()
    except OutputError as error:
        return _cannot_write(str(error))


def _complete(words: Sequence[str]) -> int:
    from gpuswitch.cli.complete import complete  # noqa: PLC0415 -- for shells alone
    from gpuswitch.cli.output import OutputError  # noqa: PLC0415 -- by need

    try:
        return complete(words)
    except OutputError as error:
        return _cannot_write(str(error))


def _run(args: Namespace) -> int:
    from importlib import import_module  # noqa: PLC0415 -- by need, as above

    module, _colon, name = args.run.partition(":")
    work: Callable[..., int] = getattr(import_module(module), name)
    if module in _WITHOUT_SERVICE:
        return work(args)
    from gpuswitch.cli.client import Service  # noqa: PLC0415 -- by need, as above

    service = Service.connect(args.bus, getattr(args, "timeout", None))
    try:
        return work(service, args)
    finally:
        service.close()


def _failed(error: CtlError, args: Namespace, words: Sequence[str]) -> int:
    from gpuswitch.cli.output import as_json_line, problem, sentence  # noqa: PLC0415 -- by need, as above
    from gpuswitch.cli.typed import as_shown  # noqa: PLC0415 -- as above

    named = error.title or _(" and ").join(getattr(args, "gpus", None) or filter(None, [getattr(args, "gpu", "")]))
    purpose = args.purpose.format(gpu=named or _("the GPU"))
    said = sentence(purpose, str(error), is_whole=error.is_whole, lead=error.lead)
    problem(as_shown(said, words))
    if args.json:
        # On one line: events may stand before it, a line each.
        as_json_line(error.as_json())
    return error.exit_code


def _wrong_usage(error: UsageError, words: Sequence[str]) -> int:
    from gpuswitch.cli.failures import CtlError  # noqa: PLC0415 -- by need, as above
    from gpuswitch.cli.output import OutputError, as_json_line, wrong_usage  # noqa: PLC0415 -- as above
    from gpuswitch.cli.typed import as_shown  # noqa: PLC0415 -- as above

    text = as_shown(str(error), words)
    wrong_usage(error.usage, text)
    if "--json" in words:
        try:
            as_json_line(CtlError(text, EXIT_USAGE, name="InvalidArgument").as_json())
        except OutputError as unwritten:
            return _cannot_write(str(unwritten))
    return EXIT_USAGE


def _open_what_is_closed() -> None:
    """Give the standard streams that our caller has closed to /dev/null: Python has None for them, and what is opened
    next, the connection to the bus, would be taken for one of them.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115, PTH123 -- until we end


def _written(status: int) -> int:
    """The exit status, when all that was said is out."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        return _cannot_write(str(error.strerror))
    return status


def _cannot_write(why: str) -> int:
    _close_output()
    print(f"gpuswitchctl: {_('cannot write the output: {why}', why=why)}", file=sys.stderr)
    return EXIT_OUTPUT


def _nobody_reads() -> int:
    """End as a program does that the kernel tells so (signal(7), SIGPIPE), and quietly."""
    import signal  # noqa: PLC0415 -- by need, as above

    _close_output()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGPIPE)
    return 128 + signal.SIGPIPE  # where it is blocked


def _close_output() -> None:
    """So that Python does not try to write the rest at its exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
