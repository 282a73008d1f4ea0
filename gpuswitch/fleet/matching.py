"""Where the GPUs are that the configuration does not tell by their address, but by what they are: `match`."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Mapping
from dataclasses import replace

from gpuswitch.config.settings import Config, Sought
from gpuswitch.fleet.misfit import Misfit
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import HostFacts, PciFunction
from gpuswitch.model.gpu import Gpu, discover
from gpuswitch.sentence import Sentence

NOWHERE: Mapping[str, PciAddress] = {}


def found(
    config: Config, facts: HostFacts, before: Mapping[str, PciAddress] = NOWHERE
) -> tuple[Config, Mapping[str, PciAddress], tuple[Misfit, ...]]:
    """The configuration with an address in each table whose GPU is there; the addresses by the tables' labels; and the
    tables that fit no GPU, or several.

    `before` is where they were. A GPU that has left the bus keeps its table until another one fits it, and one that is
    there keeps it when another comes that fits as well: what is under way with it goes on by the same rules.
    """
    if not config.sought:
        return config, NOWHERE, ()
    gpus = discover(facts)
    places: dict[str, PciAddress] = {}
    misfits = []
    for sought in config.sought:
        label = sought.table.label
        fitting = [gpu for gpu in gpus if sought.match.fits(gpu, facts)]
        chosen = _chosen(sought, fitting, before.get(label), facts)
        if chosen is not None:
            places[label] = chosen
        if len(fitting) > 1 and not _said(sought, fitting):
            misfits.append(_several(sought, fitting, chosen))
        elif chosen is None:
            misfits.append(_none(sought, facts))
    tables = tuple(s.at(places[s.table.label]) for s in config.sought if s.table.label in places)
    return replace(config, gpus=(*config.gpus, *tables)), places, tuple(misfits)


def _chosen(sought: Sought, fitting: list[Gpu], before: PciAddress | None, facts: HostFacts) -> PciAddress | None:
    if said := _said(sought, fitting):
        return said.address
    if before is not None and any(gpu.address == before for gpu in fitting):
        return before
    if len(fitting) == 1:
        return fitting[0].address
    return before if before is not None and before not in facts.functions and not fitting else None


def _said(sought: Sought, fitting: Iterable[Gpu]) -> Gpu | None:
    """The one of them that the table names by its address."""
    return next((gpu for gpu in fitting if sought.address in gpu.functions), None)


def _several(sought: Sought, fitting: list[Gpu], chosen: PciAddress | None) -> Misfit:
    addresses = " and ".join(str(gpu.address) for gpu in fitting)
    if chosen is not None:
        sentence = Sentence(
            "the [[gpu]] table of {gpu} fits {addresses}, and stays that of {chosen} until the service starts anew: "
            "add slot, port or serial to its match, as gpuswitchctl status shows them, or its address",
            gpu=sought.table.called,
            addresses=addresses,
            chosen=chosen,
        )
        return Misfit(sought.table.label, sought.table.name, sentence, frozenset({chosen}))
    sentence = Sentence(
        "the [[gpu]] table of {gpu} fits {addresses}, and is about none of them: add slot, port or serial to its "
        "match, as gpuswitchctl status shows them, or its address",
        gpu=sought.table.called,
        addresses=addresses,
    )
    functions = frozenset(function for gpu in fitting for function in gpu.functions)
    return Misfit(sought.table.label, sought.table.name, sentence, functions, functions | {*sought.table.members})


def _no_serial(gpus: Iterable[PciFunction]) -> Sentence:
    """Why no GPU has a number; those that sleep, and those that root alone may ask, may have one yet."""
    if any(function.serial_errno in {errno.EACCES, errno.EPERM} for function in gpus):
        return Sentence("the kernel tells serial numbers to root alone: ask again as root")
    if asleep := [str(f.address) for f in gpus if f.serial_errno == errno.EIO and f.asleep]:
        return Sentence(
            "no GPU tells a serial number now; {sleeping} may have one, and cannot tell it while asleep: use slot or "
            "port instead",
            sleeping=" and ".join(asleep),
        )
    return Sentence(
        "the kernel tells no serial number of any GPU (it does since Linux 6.18, of those that have one): use slot or "
        "port instead"
    )


def _none(sought: Sought, facts: HostFacts) -> Misfit:
    why = Sentence("no GPU of this host is like that")
    gpus = [function for function in facts.functions.values() if function.makes_gpu]
    if sought.match.serial and not any(function.serial for function in gpus):
        why = _no_serial(gpus)
    elif sought.match.slot and sought.match.slot not in facts.slots:
        why = Sentence("there is no {slot} in /sys/bus/pci/slots", slot=sought.match.slot)
    sentence = Sentence(
        "the [[gpu]] table of {gpu} is about no GPU: {why}; gpuswitchctl status shows what each of them is like",
        gpu=sought.table.called,
        why=why,
    )
    named = frozenset({sought.address} if sought.address is not None else ())
    return Misfit(sought.table.label, sought.table.name, sentence, named, named | {*sought.table.members})
