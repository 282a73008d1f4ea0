"""`gpuswitchctl demo`: the real service moves the GPUs of machines in memory, step by step. No GPU, no root needed."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from typing import Any

from gpuswitch.cli.demo_service import DemoService, demo_service
from gpuswitch.cli.failures import CtlError
from gpuswitch.cli.output import in_colour, line, width, wrapped, write
from gpuswitch.cli.programs import as_typed
from gpuswitch.cli.translate import _, state_word
from gpuswitch.errors import Failed, InvalidArgument

PACE = ("load=0.3s", "unbind=0.1s", "probe=0.15s", "keep_awake=0.02s", "set_override=0.01s")
"""How long the operations of the simulated kernel take: about as long as those of a real one."""
REFUSAL = "probe@0000:01:00.3#1=EINVAL"
NAMED = '[[gpu]]\naddress = "0000:01:00.0"\nname = "geforce"\n'


def demo(args: Namespace) -> int:
    """Play all acts.

    Raises:
        CtlError: something did not go as the captions say.
    """
    if args.json:
        raise CtlError.of(InvalidArgument, _("cannot show it as JSON: it is text for people; leave --json out"))
    with demo_service() as service:
        _laptop(service)
        _server(service)
        _failure(service)
    _caption(
        _(
            "That was all. Nothing of it touched this machine; {command} looks at the GPUs that it has, without the "
            "service.",
            command=f"'{as_typed('gpuswitchctl')} doctor'",
        )
    )
    return 0


def _laptop(service: DemoService) -> None:
    _caption(_("1. A laptop. The integrated graphics draw the screen, and nobody uses the GeForce."))
    with service.machine("laptop", *PACE, config=NAMED):
        service.ctl("list")
        _caption(_("A virtual machine is given whole IOMMU groups. The GeForce has one of its own:"))
        service.ctl("groups")
        _caption(_("All four functions of the card leave their drivers for vfio-pci; each step is verified."))
        service.ctl("to-vfio", "geforce")
        service.ctl("status", "geforce")
        _expect(service, "geforce", "vfio")
        _caption(_("The virtual machine is gone: everything comes back as it was."))
        service.ctl("to-host", "geforce")
        service.ctl("status", "geforce")
        _expect(service, "geforce", "host")


def _server(service: DemoService) -> None:
    _caption(_("2. A server with eight GPUs. Two of them switch at the same time."))
    with service.machine("server", *PACE):
        service.ctl("list")
        service.ctl_at_once(("to-vfio", "11:00.0"), ("to-vfio", "21:00.0"))
        service.ctl("list")
        _expect(service, "11:00.0", "vfio")
        _expect(service, "21:00.0", "vfio")


def _failure(service: DemoService) -> None:
    _caption(_("3. The laptop again, and this time its kernel refuses one step. All before it is undone, in reverse."))
    with service.machine("laptop", *PACE, REFUSAL, config=NAMED):
        before = _look(service, "geforce")
        service.ctl("to-vfio", "geforce", expect=Failed.exit_code)
        service.ctl("status", "geforce")
        _expect(service, "geforce", "host")
        if _look(service, "geforce")["functions"] != before["functions"]:
            raise CtlError.of(Failed, _("the drivers are not as they were before"))


def _expect(service: DemoService, gpu: str, state: str) -> None:
    if (found := _look(service, gpu)["state"]) != state:
        raise CtlError.of(
            Failed, _("{gpu} is {found}, not {state}", gpu=gpu, found=state_word(found), state=state_word(state))
        )


def _look(service: DemoService, gpu: str) -> dict[str, Any]:
    looked = service.look(gpu)
    unseen = {"state": _("not to be seen"), "functions": []}
    found: dict[str, Any] = json.loads(looked)["gpus"][0] if looked else unseen
    return found


def _caption(text: str) -> None:
    write("")
    columns = width(sys.stdout)
    for each in wrapped(text, columns) if columns else [text]:
        if in_colour(sys.stdout):
            write(f"\x1b[1m{each}\x1b[0m")
        else:
            line(each)
