"""The machines that the simulation plays on: some from the catalogue, and small ones with several GPUs that share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import cast

from gpuswitch.config.kinds import checked_table
from gpuswitch.config.schema import Defaults
from gpuswitch.config.settings import Config, GpuConfig
from gpuswitch.host.simulated import catalogue as parts
from gpuswitch.host.simulated.catalogue import AMD, INTEL, NVIDIA, PLX, REALTEK, Slot, port
from gpuswitch.host.simulated.devices import Device
from gpuswitch.host.simulated.host import SimulatedHost
from gpuswitch.host.simulated.kernel import Machine
from gpuswitch.host.simulated.scenarios import PERSISTENCED, SCENARIOS, WIREPLUMBER, boot
from gpuswitch.model.address import PciAddress
from gpuswitch.model.gpu import discover
from gpuswitch.model.holders import Unit
from gpuswitch.model.policy import AtBoot
from tests.harness.simulated.harness import GPUS, Snapshot, settings_of, snapshot

_MEMBERS: Mapping[str, Mapping[str, str]] = {
    "shared": {"0000:01:00.0": "0000:02:00.0"},
    "hgx": {"0000:2a:00.0": "0000:2b:00.0"},
}
"""What the configuration has move along: a network card, and an NVSwitch."""
_DISPLAY_MANAGER = "display-manager.service"
OLLAMA, RENDERER = Unit("ollama.service"), Unit("renderer.service")
"""What is to be stopped where there are daemons: one that computes on nvidia's cards, and one that is not started."""


def pair() -> SimulatedHost:
    """Two GeForce cards with sound, on the same modules, daemon and PipeWire; Intel graphics draws the screen."""
    intel = Slot("0000:00:02", 1).function(0, INTEL, 0x46A6, parts.VGA, boot_display=True)
    return _with_daemons(boot([intel, *_two_geforces()]))


def twins() -> SimulatedHost:
    """The same without the Intel graphics: the first card draws the screen."""
    return _with_daemons(boot(_two_geforces()))


def _two_geforces() -> list[Device]:
    devices = []
    for number in (1, 2):
        slot = Slot(f"0000:0{number}:00", 10 + number, f"0000:00:1{number}.0")
        devices += [
            port(f"0000:00:1{number}.0", number + 1),
            slot.function(0, NVIDIA, 0x2484, parts.VGA, sleeps=number == 1),
            slot.function(1, NVIDIA, 0x228B, parts.AUDIO),
        ]
    return devices


def trio() -> SimulatedHost:
    """Three data centre GPUs below one PCIe switch, all of which nvidia's daemon has open."""
    root, upstream = "0000:00:01.0", "0000:0e:00.0"
    devices = [port(root, 1), Slot(upstream[:-2], 2, root).function(0, PLX, 0x8747, parts.PCI_BRIDGE)]
    for n in (1, 2, 3):
        below = f"0000:0f:0{n}"
        devices += [
            Slot(below, 10 + n, upstream).function(0, PLX, 0x8747, parts.PCI_BRIDGE),
            Slot(f"0000:{n}1:00", 10 + n, f"{below}.0").function(0, NVIDIA, 0x20F1, parts.DISPLAY_3D),
        ]
    return _with_daemons(boot(devices))


def crowded() -> SimulatedHost:
    """A GeForce that draws the screen and has a network card and a disk in its group: not to be given away."""
    slot = Slot("0000:01:00", 1, "0000:00:01.0")
    return boot(
        [
            port("0000:00:01.0", 1),
            slot.function(0, NVIDIA, 0x2484, parts.VGA, boot_display=True),
            slot.function(1, NVIDIA, 0x228B, parts.AUDIO),
            Slot("0000:02:00", 1).function(0, REALTEK, 0x8168, parts.ETHERNET),
            Slot("0000:03:00", 1).function(0, INTEL, 0xF1A8, parts.NVME),
        ]
    )


def bare() -> SimulatedHost:
    """A Radeon of one function that nobody has open, beside the Intel graphics: the shortest of all plans."""
    return boot(
        [
            Slot("0000:00:02", 1).function(0, INTEL, 0x46A6, parts.VGA, boot_display=True),
            Slot("0000:03:00", 13, "0000:00:1c.0").function(0, AMD, 0x73BF, parts.VGA),
        ]
    )


def mixed() -> SimulatedHost:
    """A Radeon and a GeForce, each with sound: they share PipeWire and the sound driver, and no module of their own."""
    radeon = Slot("0000:03:00", 13, "0000:00:03.0")
    geforce = Slot("0000:01:00", 11, "0000:00:01.0")
    return _with_daemons(
        boot(
            [
                port("0000:00:01.0", 2),
                geforce.function(0, NVIDIA, 0x2484, parts.VGA),
                geforce.function(1, NVIDIA, 0x228B, parts.AUDIO),
                port("0000:00:03.0", 3),
                radeon.function(0, AMD, 0x73BF, parts.VGA, boot_display=True),
                radeon.function(1, AMD, 0xAB28, parts.AUDIO),
            ]
        )
    )


def prebound() -> SimulatedHost:
    """As `laptop`, with the GeForce given to vfio-pci on the kernel command line, for whichever machine asks."""
    return SCENARIOS["laptop"](vfio_ids=[(NVIDIA, device) for device in (0x2484, 0x228B, 0x1AD8, 0x1AD9)])


def _never_reserved(boots: Callable[[], SimulatedHost], booted: Machine) -> Snapshot:
    """Where GPUs are at home that vfio-pci had from boot on: where they would have been without it.

    But for what they had all along, and nvidia_uvm, which shows nothing: who computes loads it.
    """
    home, now = snapshot(boots().machine), snapshot(booted)
    for function, device in booted.devices.items():
        if device.on_vfio:
            home[function] = settings_of(boots().machine.devices[function])._replace(power_control=device.power_control)
    modules = cast("frozenset[str]", home["modules"])
    return now | home | {"modules": modules - {"nvidia_uvm"}}


def _with_daemons(host: SimulatedHost) -> SimulatedHost:
    host.machine.run("nvidia-persistenced", unit=PERSISTENCED, opens="nvidia")
    host.machine.run("wireplumber", uid=1000, unit=WIREPLUMBER, opens="sound", polite=True)
    host.machine.run("ollama", unit=OLLAMA, opens="nvidia")
    host.machine.units.add(RENDERER, active=False)
    return host


_SHARING = ("pair", "twins", "trio", "mixed")
"""The machines whose GPUs share units."""


@dataclass(frozen=True)
class MachineSpec:
    """A machine to boot, and its GPUs that are asked to move."""

    name: str
    boot: Callable[[], SimulatedHost]
    gpus: tuple[PciAddress, ...]
    home: Callable[[Machine], Snapshot] = snapshot
    """All that a machine that was just booted has where its GPUs are at home."""

    def machine(self) -> Machine:
        return self.boot().machine

    def slots(self) -> tuple[str, ...]:
        return tuple(gpu.slot_name for gpu in self.gpus)


def _spec(
    name: str, boots: Callable[..., SimulatedHost], *gpus: str, home: Callable[[Machine], Snapshot] = snapshot
) -> MachineSpec:
    return MachineSpec(name, boots, tuple(PciAddress.parse(gpu) for gpu in gpus), home)


SCENARIO_MACHINES = tuple(_spec(name, SCENARIOS[name], gpu) for name, gpu in GPUS.items())
MACHINES: Mapping[str, MachineSpec] = {
    spec.name: spec
    for spec in (
        *SCENARIO_MACHINES,
        _spec("pair", pair, "0000:01:00.0", "0000:02:00.0"),
        _spec("twins", twins, "0000:01:00.0", "0000:02:00.0"),
        _spec("trio", trio, "0000:11:00.0", "0000:21:00.0", "0000:31:00.0"),
        _spec("crowded", crowded, "0000:01:00.0"),
        _spec("bare", bare, "0000:03:00.0"),
        _spec("mixed", mixed, "0000:01:00.0", "0000:03:00.0"),
        _spec("plx", SCENARIOS["plx"], "0000:27:00.0", "0000:28:00.0"),
        _spec("arc", SCENARIOS["arc"], "0000:03:00.0"),
        _spec("reserved", SCENARIOS["reserved"], "0000:01:00.0", home=partial(_never_reserved, SCENARIOS["shared"])),
        _spec("prebound", prebound, "0000:01:00.0", home=partial(_never_reserved, SCENARIOS["laptop"])),
        _spec("driverless", SCENARIOS["driverless"], "0000:01:00.0"),
        _spec("rmrr", SCENARIOS["rmrr"], "0000:01:00.0"),
        _spec("hgx", SCENARIOS["hgx"], "0000:2a:00.0", "0000:3a:00.0"),
        _spec("instinct", SCENARIOS["instinct"], "0000:05:00.0", "0000:26:00.0"),
        _spec("superchip", SCENARIOS["superchip"], "0009:01:00.0"),
        _spec("workstation", SCENARIOS["workstation"], "0000:01:00.0", "0000:41:00.0"),
        _spec("hybrid", SCENARIOS["hybrid"], "0000:64:00.0", "0000:65:00.0"),
    )
}

RULES: Mapping[str, Mapping[str, object]] = {
    "refuse": {},
    "wait": {"busy": "wait", "wait_seconds": 30.0},
    "terminate": {"busy": "terminate", "grace_seconds": 5.0},
    "kill": {"busy": "kill", "grace_seconds": 5.0},
    "unload": {"module_policy": "always"},
    "stay": {"module_policy": "never", "announce_display": True, "on_release": "stay"},
    "rough": {"reset_on_failure": True, "rescan_on_failure": True},
    "gentle": {"reset_on_failure": False, "rescan_on_failure": False},
    "after": {"after_host": str(PERSISTENCED), "end_sessions": True},
    "at boot": {"at_boot": AtBoot.VFIO},
}
"""What the configuration says, by a word for it."""


@cache
def settings(machine_name: str, rules: str) -> Config:
    """A configuration under which the GPUs of this machine may go, and these rules for all of them."""
    stopped = dict.fromkeys(("single", "driverless"), (_DISPLAY_MANAGER,)) | dict.fromkeys(
        _SHARING, (str(OLLAMA), str(RENDERER))
    )
    chosen = {"allow_boot_display": True, "stop_units": stopped.get(machine_name, ())} | dict(RULES[rules])
    at_boot = AtBoot(str(chosen.pop("at_boot", AtBoot.KEEP)))
    own = checked_table(Defaults, chosen)
    members = _MEMBERS.get(machine_name, {})
    gpus = tuple(
        GpuConfig(gpu, managed=True, rules=own, at_boot=at_boot, members=_addresses(members.get(str(gpu))))
        for gpu in MACHINES[machine_name].gpus
    )
    return Config(gpus=gpus, defaults=own)


def _addresses(text: str | None) -> tuple[PciAddress, ...]:
    return (PciAddress.parse(text),) if text else ()


@cache
def functions(machine_name: str) -> Mapping[PciAddress, tuple[PciAddress, ...]]:
    """Those of each GPU of this machine, by its address."""
    facts = MACHINES[machine_name].machine().look()
    return {gpu.address: gpu.functions for gpu in discover(facts, settings(machine_name, next(iter(RULES))).members)}
