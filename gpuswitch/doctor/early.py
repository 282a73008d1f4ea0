"""Whether a GPU may be given to vfio-pci in the initrd: what would refuse its switch, but for who uses it now."""

from __future__ import annotations

import os
from collections.abc import Iterator

from gpuswitch.doctor.machine import Machine
from gpuswitch.doctor.seen import Patient, Seen
from gpuswitch.errors import ConfigError
from gpuswitch.model.address import PciAddress
from gpuswitch.model.drivers import vfio_drivers
from gpuswitch.model.facts import VFIO_DRIVER, PciFunction
from gpuswitch.model.policy import AtBoot
from gpuswitch.model.states import State
from gpuswitch.sentence import Sentence
from gpuswitch.switch.planning.guards import Blocker, blockers
from gpuswitch.switch.planning.remedies import to_set


def refused(seen: Seen, patient: Patient) -> Iterator[Blocker]:
    """Every reason why not. Holders are no matter: nothing is moved before the machine starts anew."""
    facts, config, gpu = seen.facts, seen.config, patient.gpu
    if facts is None:
        return
    # What is on vfio now is judged as if it were not: the next start is to bring it there.
    state = State.HOST if patient.state is State.VFIO else patient.state
    yield from blockers(gpu, State.VFIO, state, facts, config)
    own = config.gpu(gpu.address)
    if own.at_boot is AtBoot.HOST:
        sentence = Sentence(
            "the service would bring {gpu} to its host driver when the machine has started: {set}",
            gpu=gpu.address,
            set=to_set(config, gpu, "at_boot", '"keep"'),
        )
        yield Blocker("at_boot", sentence, ConfigError)
    for function, driver in vfio_drivers(gpu, facts, own.rules.vfio_driver).items():
        if driver.name != VFIO_DRIVER:
            sentence = Sentence(
                "{function} goes to {driver}, and the initrd gives functions to vfio-pci alone: have it there with "
                'at_boot = "vfio"',
                function=function,
                driver=driver.name,
            )
            yield Blocker("vfio_driver", sentence)


def place_of(machine: Machine, function: PciAddress) -> str:
    """Where the function is below /sys/devices: `pci0000:00/0000:00:01.0/0000:01:00.0`. Buses above it are in it."""
    devices = os.path.realpath(f"{machine.roots.sysfs}/devices")
    return os.path.relpath(os.path.realpath(f"{machine.roots.sysfs}/bus/pci/devices/{function}"), devices)


def may_be_dark(seen: Seen, patient: Patient, function: PciFunction) -> bool:
    """Whether the machine may have booted on it."""
    return not function.makes_gpu or seen.config.gpu(patient.address).rules.allow_boot_display
