"""Which service `--bus` or its variable leads to: one may have a machine in memory, or a configuration elsewhere.

The verbs that look at this machine, or write to it, are not to mix it with one in memory: whoever tries them beside a
simulated service is told so, and nothing of this machine is written for it.
"""

from __future__ import annotations

from collections import namedtuple
from contextlib import closing

from gpuswitch.cli.client import Service
from gpuswitch.cli.failures import CtlError
from gpuswitch.cli.output import problem
from gpuswitch.cli.translate import _, mark
from gpuswitch.errors import InvalidArgument

_SECONDS = 5.0
_OF_THIS = mark(
    "this looks at this machine and at /etc/gpuswitch, not at the simulated machine {machine}, of which status tells"
)
_OF_ANOTHER = mark(
    "the GPUs and their configuration are those of the simulated machine {machine}; all else that this looks at is of "
    "this machine"
)

Serving = namedtuple("Serving", "machine directory")
"""The name of the machine in memory that a service has, "" where it is this one; and where it reads its configuration,
"" where nobody says.
"""


def serving(address: str | None) -> Serving:
    """What the service on the bus at `address` says of itself. It is not started for this.

    There is none with a machine in memory on the system bus: gpuswitchd refuses that.
    """
    try:
        with closing(Service.connect(address, _SECONDS)) as service:
            about = service.about() if service.runs(_SECONDS) else {}
    except CtlError:
        about = {}
    # One that is older does not say.
    return Serving(about.get("Simulated", "") if address else "", about.get("ConfigDirectory", ""))


def refuse_for_another_machine(address: str | None) -> None:
    """Before anything of this machine is written that has no --dry-run.

    Raises:
        CtlError: the service there has another, one in memory.
    """
    if machine := _in_memory(address):
        raise CtlError.of(InvalidArgument, _not_to_be_written(address, machine))


def tell_of_this_machine(address: str | None, *, writes: bool = False) -> bool:
    """Say so where `status` would show another; whether it would. `writes`: something of this machine would be written.

    Raises:
        CtlError: it would, and `writes`.
    """
    return _tell(_OF_THIS, address, writes=writes)


def tell_of_another_machine(address: str | None, *, writes: bool = False) -> bool:
    """The same where GPUs and settings are those of another than all else that is looked at."""
    return _tell(_OF_ANOTHER, address, writes=writes)


def _tell(text: str, address: str | None, *, writes: bool) -> bool:
    machine = _in_memory(address)
    if machine and writes:
        refusal = _not_to_be_written(address, machine)
        raise CtlError.of(InvalidArgument, _("{text}; to see what would be written, add --dry-run", text=refusal))
    if machine:
        problem(_(text, machine=machine))
    return bool(machine)


def _not_to_be_written(address: str | None, machine: str) -> str:
    return _(
        "cannot write to this machine: the service at {address} has another, the simulated machine {machine}, whose "
        "configuration is changed by {command}; to set up this machine, leave out --bus, and unset GPUSWITCH_BUS",
        address=address or "",
        machine=machine,
        command="gpuswitchctl config edit",
    )


def _in_memory(address: str | None) -> str:
    """The machine in memory, where there is one: nobody is asked where no address was given."""
    return str(serving(address).machine) if address else ""
