"""Which GPU each table of the configuration is about, and what in it is about none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from gpuswitch.config.settings import Config, GpuConfig
from gpuswitch.fleet.misfit import Misfit
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import HostFacts
from gpuswitch.model.gpu import Gpu
from gpuswitch.sentence import Sentence
from gpuswitch.switch.planning.guards import describe


def fitted(config: Config, gpus: Iterable[Gpu], facts: HostFacts) -> tuple[Config, tuple[Misfit, ...]]:
    """The configuration with each table under the address of its GPU, and what fits none.

    Any function of a GPU means the GPU. Of two tables for one GPU, the one with its own address holds, else the first.
    A table without a GPU stays: its GPU may come yet.
    """
    gpus = tuple(gpus)
    whose = {function: gpu for gpu in gpus for function in gpu.functions}
    held: dict[PciAddress, GpuConfig] = {}
    tables: dict[PciAddress, GpuConfig] = {}
    misfits = []
    for table in sorted(config.gpus, key=lambda table: _not_its_own(table, whose.get(table.address))):
        gpu = whose.get(table.address)
        if gpu is None:
            tables[table.address] = table
            misfits.append(_none(table, facts))
        elif gpu.address in held:
            misfits.append(_second(table, held[gpu.address], gpu))
        else:
            held[gpu.address] = table
            tables[table.address] = replace(table, address=gpu.address)
            misfits += _absent_members(table, gpu, facts)
    in_order = tuple(dict.fromkeys(tables[table.address] for table in config.gpus if table.address in tables))
    return replace(config, gpus=in_order), tuple(
        sorted(misfits, key=lambda misfit: (misfit.table, sorted(misfit.addresses)))
    )


def _not_its_own(table: GpuConfig, gpu: Gpu | None) -> bool:
    return gpu is not None and gpu.address != table.address


def _none(table: GpuConfig, facts: HostFacts) -> Misfit:
    function = facts.functions.get(table.address)
    if function is None:
        why = Sentence("there is no such function on the PCI bus")
    elif function.physical_function is not None:
        why = Sentence(
            "it is a virtual function of {physical}, and those are not managed", physical=function.physical_function
        )
    else:
        why = Sentence("that is {function}, which is part of none", function=describe(function))
    sentence = Sentence(
        "the [[gpu]] table of {gpu} is about no GPU: {why}; give it the address of one, as gpuswitchctl list shows it, "
        "or take it out",
        gpu=table.called,
        why=why,
    )
    named = frozenset({table.address})
    return Misfit(table.label, table.name, sentence, named, named | {*table.members})


def _second(table: GpuConfig, first: GpuConfig, gpu: Gpu) -> Misfit:
    sentence = Sentence(
        "the [[gpu]] table of {table} counts for nothing: it is about GPU {gpu}, and that has the table of {first} "
        "already; make one of them",
        table=table.called,
        gpu=gpu.address,
        first=first.called,
    )
    return Misfit(table.label, table.name, sentence, frozenset({table.address}))


def _absent_members(table: GpuConfig, gpu: Gpu, facts: HostFacts) -> Iterator[Misfit]:
    """Where the GPU itself is not there, nobody misses them."""
    for member in table.members if gpu.address in facts.functions else ():
        if member not in facts.functions:
            sentence = Sentence(
                "the [[gpu]] table of {gpu} has the member {member}, and there is no such function on the PCI bus: "
                "correct it, or take it out; until then the GPU cannot be moved",
                gpu=table.called,
                member=member,
            )
            yield Misfit(table.label, table.name, sentence, frozenset({member}))
