"""Which service `--bus` or its variable leads to: one with a machine in memory has a configuration of its own.

The verbs that need no service look at this machine, and at `/etc/gpuswitch`: whoever tries them beside a simulated
service is told so.
"""

from __future__ import annotations

from collections import namedtuple
from contextlib import closing

from gpuswitch.cli.client import Service
from gpuswitch.cli.failures import CtlError
from gpuswitch.cli.output import problem
from gpuswitch.cli.translate import _

_SECONDS = 5.0

Simulated = namedtuple("Simulated", "machine directory")
"""The name of the machine in memory, and where the service reads its configuration."""


def simulated(address: str | None) -> Simulated | None:
    """The service on the bus at `address`, where that is one with a machine in memory; None: it is another, or none.

    There is none on the system bus (gpuswitchd refuses that), so nobody is asked where no address was given.
    """
    if not address:
        return None
    try:
        with closing(Service.connect(address, _SECONDS)) as service:
            about = service.about() if service.runs() else {}
    except CtlError:
        return None
    # One that is older does not say.
    return Simulated(about["Simulated"], about["ConfigDirectory"]) if about.get("Simulated") else None


def tell_of_this_machine(address: str | None) -> None:
    """Say so where `status` would show another."""
    if found := simulated(address):
        problem(
            _(
                "this looks at this machine and at /etc/gpuswitch, not at the simulated machine {machine}, of which "
                "status tells",
                machine=found.machine,
            )
        )
