"""The verbs for hooks of what runs virtual machines: `acquire`, `adopt`, `release`. libvirt's hook needs none."""

from __future__ import annotations

from argparse import Namespace

from gpuswitch.cli.client import MANAGER, NAME, ROOT, Service, call
from gpuswitch.cli.output import as_json, line
from gpuswitch.cli.translate import _


def acquire(service: Service, args: Namespace) -> int:
    """Wait until it has them. Who is ended meanwhile has asked for nothing: the service sees that."""
    message = call(NAME, ROOT, MANAGER, "AcquireForVm", "ssas", args.name, args.uuid, args.addresses)
    gpus = list(service.ask_allowed(message, None).body[0])
    if args.json:
        as_json({"gpus": gpus, "changed": bool(gpus)})
    for gpu in () if args.json else gpus:
        line(_("{gpu} is ready for {machine}", gpu=gpu, machine=args.name))
    if not gpus and not args.json:
        line(_("none of these belongs to a managed GPU: nothing to do"))
    return 0


def adopt(service: Service, args: Namespace) -> int:
    service.ask_allowed(call(NAME, ROOT, MANAGER, "AdoptVm", "ssas", args.name, args.uuid, args.addresses))
    return _told(args)


def release(service: Service, args: Namespace) -> int:
    service.ask_allowed(call(NAME, ROOT, MANAGER, "ReleaseFromVm", "sss", args.name, args.uuid, args.reason))
    return _told(args)


def _told(args: Namespace) -> int:
    """It is known now; what follows is the service's."""
    if args.json:
        as_json({"changed": True})
    return 0
