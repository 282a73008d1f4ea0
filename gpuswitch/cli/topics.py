"""`gpuswitchctl help`: a command, or something that several commands have in common."""

from __future__ import annotations

from argparse import Namespace

from gpuswitch.cli.failures import CtlError
from gpuswitch.cli.layout import pairs
from gpuswitch.cli.output import write
from gpuswitch.cli.parser import EXIT_STATUSES, TOPICS, UsageError, parser
from gpuswitch.errors import InvalidArgument

STATES = (
    ("host", "on its host drivers; people read host-nvidia, after the driver of its display function"),
    ("detaching", "on its way to vfio"),
    ("vfio", "all its functions are on a vfio driver: a virtual machine can have it"),
    ("reattaching", "on its way to the host"),
    ("recovering", "on its way to a known-good state, after a failure or a crash"),
    ("failed", "no known-good state could be reached; gpuswitchctl recover tries again"),
    ("wedged", "the kernel has not returned from an operation on it; nothing more is written to it"),
    ("unknown", "half-way, and nobody asked for that: somebody else moved a part of it"),
    ("absent", "its functions are not on the PCI bus"),
)

_CONFIGURATION = """\
/etc/gpuswitch/config.toml, then /etc/gpuswitch/conf.d/*.toml by name, then variables such as
GPUSWITCH_DEADLINES__UNBIND=60; the later ones override single keys. None is needed.

  [[gpu]]                         # one table for each GPU that is managed
  address = "0000:01:00.0"
  name = "rtx3070"

  [defaults]                      # for all GPUs; each key can stand in a [[gpu]] table, too
  busy = "wait"                   # what becomes of programs that have it open: refuse, wait, terminate, kill
  wait_seconds = 60

gpuswitchctl config        shows every key, its value, and the file that set it
systemctl reload gpuswitchd   reads it again; with a mistake in it, all stays as it was"""


def show_help(args: Namespace) -> int:
    """Explain a command, or a topic.

    Raises:
        CtlError: there is no such topic.
    """
    topic = args.topic.casefold()
    if topic == "states":
        pairs(STATES)
        write("\nEdges between them: docs/states.md.")
    elif topic == "exit-status":
        pairs([(str(status), text) for status, text in EXIT_STATUSES])
        write("\nWith several GPUs, the worst of theirs.")
    elif topic == "configuration":
        write(_CONFIGURATION)
    else:
        _show_command(topic)
    return 0


def _show_command(topic: str) -> None:
    try:
        parser().parse_args([topic, "--help"] if topic else ["--help"])
    except UsageError:
        text = f"{topic!r} is neither a command nor one of {', '.join(TOPICS)}; gpuswitchctl help lists the commands"
        raise CtlError.of(InvalidArgument, text) from None
    except SystemExit:
        """It has printed its help."""
