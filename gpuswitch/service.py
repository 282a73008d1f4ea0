"""gpuswitchd: from the command line to an exit status.

What the service is made of is imported when it starts: `--help` is there as soon as argparse is.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Sequence
from contextlib import nullcontext

from gpuswitch import __version__

DIRECTORY = "/etc/gpuswitch"

MACHINES = (
    *("apu", "arc", "driverless", "hgx", "hybrid", "instinct", "laptop", "plain", "plx", "reserved", "rmrr"),
    *("server", "shared", "single", "superchip", "workstation"),
)
"""The names of `gpuswitch.host.simulated.scenarios.SCENARIOS`, which take long to import."""
_FAULT = "OPERATION[@SUBJECT][#NTH]=errno, silent, hang or SECONDSs, like probe@0000:01:00.1#1=EINVAL"

EXIT_STATUSES = (
    (0, "ended by SIGTERM or SIGINT"),
    (1, "could not start, or lost the bus: a second try may help, and systemd makes it"),
    (2, "wrong usage, or a configuration with a fault: no second try helps"),
)


def parser() -> argparse.ArgumentParser:
    """What gpuswitchd understands. Paths are texts in it, and `None` where they are left out."""
    options = argparse.ArgumentParser(
        prog="gpuswitchd",
        description="Moves GPUs between their host drivers and vfio-pci. Usually started by systemd.",
        epilog="example: gpuswitchd --simulate laptop --bus unix:path=/tmp/bus",
    )
    options.add_argument("--version", action="version", version=f"gpuswitchd {__version__}")
    options.add_argument("--config", metavar="DIRECTORY", help=f"default: {DIRECTORY}")
    options.add_argument("--runtime", metavar="DIRECTORY", help="default: /run/gpuswitch")
    options.add_argument("--state", metavar="DIRECTORY", help="default: /var/lib/gpuswitch")
    options.add_argument("--bus", metavar="ADDRESS", help="a D-Bus address; default: the system bus")
    options.add_argument(
        "--simulate",
        metavar="MACHINE",
        choices=MACHINES,
        help=f"a machine in memory instead of this one: {', '.join(MACHINES)}",
    )
    options.add_argument("--fault", action="append", default=[], metavar="FAULT", help=f"with --simulate: {_FAULT}")
    options.add_argument("--verbose", action="store_true", help="log every step")
    options.add_argument(
        "--check-config",
        nargs="?",
        const=DIRECTORY,
        metavar="PATH",
        help="say what is wrong with this directory or file, and end (default: %(const)s)",
    )
    options.add_argument(
        "--instead", nargs=2, metavar=("FILE", "COPY"), help="with --check-config: read COPY instead of FILE"
    )
    options.add_argument("--json", action="store_true", help="with --check-config: print JSON")
    return options


def _check(options: argparse.Namespace) -> None:
    """See that these can be meant, all together.

    Raises:
        InvalidArgument: they cannot.
    """
    from gpuswitch.errors import InvalidArgument  # noqa: PLC0415 -- help needs none of it
    from gpuswitch.runtime.buses import check_simulated, system_bus  # noqa: PLC0415 -- as above

    for name in ("bus", "config", "runtime", "state", "check_config"):
        if getattr(options, name) == "":
            raise InvalidArgument(f"cannot use an empty --{name.replace('_', '-')}: leave it out for the usual one")
    if options.check_config is not None:
        return
    if options.instead or options.json:
        raise InvalidArgument("cannot use --instead and --json without --check-config: they say how to check")
    if options.simulate:
        check_simulated(options.bus or system_bus())
    if options.fault and not options.simulate:
        raise InvalidArgument("cannot inject a --fault into this machine, only into one in memory: add --simulate")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the service; returns its exit status. Ends the process where there is only something to say."""
    options = parser().parse_args(arguments)
    from gpuswitch.errors import InvalidArgument  # noqa: PLC0415 -- help needs none of it

    try:
        _check(options)
    except InvalidArgument as error:
        print(f"gpuswitchd: {error}", file=sys.stderr)  # noqa: T201 -- there is no log yet
        return 2
    if options.check_config is None:
        from gpuswitch.runtime.hangups import HANGUPS  # noqa: PLC0415 -- help needs none of it

        HANGUPS.hold()
    # Nothing of what is imported is ever garbage: it is not looked through meanwhile, nor each time later.
    gc.disable()
    from gpuswitch.config.reading import Reading  # noqa: PLC0415 -- all of it takes a second, and help needs none

    with nullcontext() if options.check_config is not None else Reading(options.config or DIRECTORY) as reading:
        from gpuswitch.daemon import run  # noqa: PLC0415 -- as above; the configuration is read meanwhile

        gc.freeze()
        gc.enable()
        return run(options, reading.result if reading is not None else None)
