"""Machines to try things on, by name. Each call builds a new one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypedDict, Unpack

from gpuswitch.host.simulated import catalogue as parts
from gpuswitch.host.simulated.catalogue import (
    AMD,
    AMD_PROCESSOR,
    ASPEED,
    INTEL,
    MELLANOX,
    NVIDIA,
    PLX,
    REALTEK,
    Slot,
    port,
)
from gpuswitch.host.simulated.devices import Device
from gpuswitch.host.simulated.drivers import Module
from gpuswitch.host.simulated.host import SimulatedHost
from gpuswitch.host.simulated.kernel import Machine
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import VFIO_MODULE, BootFramebuffer
from gpuswitch.model.holders import Unit

DISPLAY_MANAGER = Unit("display-manager.service")
PERSISTENCED = Unit("nvidia-persistenced.service")
WIREPLUMBER = Unit("wireplumber.service", 1000)
_GEFORCE = PciAddress.parse("0000:01:00.0")


class Options(TypedDict, total=False):
    """How a machine is started, where it is not as everybody's.

    `modules`: what is installed. `vfio_ids`: vendor and device ids given to vfio-pci on the kernel command line; it is
    loaded before all others then. `iommu` False: it is off; `vfio_groups` and `vfio_devices`: see `Machine`.
    `direct_regions`: see `HostFacts`. `boot_framebuffers`: what the firmware left. `console_map`: `fbcon=map:` on the
    kernel command line.
    """

    modules: Sequence[Module]
    vfio_ids: Sequence[tuple[int, int]]
    iommu: bool
    vfio_groups: bool
    vfio_devices: bool
    direct_regions: Mapping[int, tuple[str, ...]]
    boot_framebuffers: Sequence[BootFramebuffer]
    console_map: Sequence[int]


def boot(devices: Iterable[Device], **options: Unpack[Options]) -> SimulatedHost:
    """Start a machine with these devices: udev has loaded what they ask for, and vfio-pci is only installed."""
    devices = list(devices)
    iommu = options.get("iommu", True)
    if not iommu:
        for device in devices:
            device.shape = replace(device.shape, iommu_group=None)
    modules = {module.name: module for module in options.get("modules", parts.MODULES)}
    first = []
    if ids := options.get("vfio_ids", ()):
        driver = replace(parts.VFIO, aliases=tuple(f"pci:v{vendor:08X}d{device:08X}*" for vendor, device in ids))
        modules[VFIO_MODULE] = replace(modules[VFIO_MODULE], drivers=(driver,))
        first.append(VFIO_MODULE)
    wanted = [
        module.name
        for module in modules.values()
        if module.name != VFIO_MODULE
        and not module.blacklisted
        and any(module.is_for(device.shape.modalias) for device in devices)
    ]
    # What sits on top of a driver is loaded with it, as its maker's files for modprobe say. It stands behind it.
    for module in modules.values():
        if not set(module.requires).isdisjoint(wanted):
            wanted.append(module.name)
    machine = Machine(
        devices,
        modules.values(),
        loaded=[*first, *wanted],
        builtin=(parts.PCIEPORT, parts.PCI_STUB),
        boot_framebuffers=options.get("boot_framebuffers", ()),
        console_map=options.get("console_map"),
        iommu=iommu,
        vfio_groups=options.get("vfio_groups", True),
        vfio_devices=options.get("vfio_devices", False),
        direct_regions=options.get("direct_regions"),
    )
    return SimulatedHost(machine)


def _with_sound(host: SimulatedHost) -> SimulatedHost:
    """PipeWire, which has the controls of every sound card open for as long as it runs."""
    host.machine.run("wireplumber", uid=1000, unit=WIREPLUMBER, opens="sound", polite=True)
    return host


def _with_persistenced(host: SimulatedHost) -> SimulatedHost:
    """The daemon that has every GPU of nvidia open, for shorter starts of programs."""
    host.machine.run("nvidia-persistenced", unit=PERSISTENCED, opens="nvidia")
    return host


def _with_desktop(host: SimulatedHost) -> SimulatedHost:
    """A display manager, its X server on the GeForce, and a person's session on that."""
    machine = host.machine
    machine.run("Xorg", unit=DISPLAY_MANAGER)
    machine.run("kwin_x11", uid=1000, unit=Unit("session-2.scope"), session="2", lives_by=DISPLAY_MANAGER)
    for kind in ("nvidia", "drm"):
        machine.open(_GEFORCE, "Xorg", kind)
    machine.open(_GEFORCE, "kwin_x11")
    return host


def _geforce(slot: Slot, *, boot_display: bool = False, sleeps: bool = False) -> list[Device]:
    """A card with a USB-C socket: picture, sound, USB, and the controller of the socket."""
    model = "GA104 [GeForce RTX 3070]"
    return [
        slot.function(0, NVIDIA, 0x2484, parts.VGA, model, boot_display=boot_display, sleeps=sleeps),
        slot.function(1, NVIDIA, 0x228B, parts.AUDIO, "GA104 High Definition Audio Controller", sleeps=sleeps),
        slot.function(2, NVIDIA, 0x1AD8, parts.USB, "TU104 USB 3.1 Host Controller", sleeps=sleeps),
        slot.function(3, NVIDIA, 0x1AD9, parts.UCSI, "TU104 USB Type-C UCSI Controller", sleeps=sleeps),
    ]


def _board() -> list[Device]:
    """What every machine has."""
    return [
        Slot("0000:00:00", 0).function(0, INTEL, 0x4660, parts.HOST_BRIDGE, "Host Bridge"),
        Slot("0000:00:1f", 9).function(3, INTEL, 0x51C8, parts.AUDIO, "Alder Lake PCH-P HD Audio Controller"),
    ]


def laptop(**options: Unpack[Options]) -> SimulatedHost:
    """As `plain`, with what runs on every laptop: nvidia's daemon on the GeForce, and PipeWire on its sound."""
    return _with_sound(_with_persistenced(plain(**options)))


def plain(**options: Unpack[Options]) -> SimulatedHost:
    """Intel graphics (0000:00:02.0) draws the screen, a GeForce with sound, USB and UCSI (0000:01:00) sleeps.

    Nobody has anything open.
    """
    return boot(
        [
            *_board(),
            Slot("0000:00:02", 1).function(
                0, INTEL, 0x46A6, parts.VGA, "Alder Lake-P GT2 [Iris Xe Graphics]", boot_display=True
            ),
            port("0000:00:01.0", 2),
            *_geforce(Slot("0000:01:00", 13, "0000:00:01.0"), sleeps=True),
            port("0000:00:06.0", 3),
            Slot("0000:02:00", 14, "0000:00:06.0").function(0, INTEL, 0xF1A8, parts.NVME, "SSD 660P Series"),
        ],
        **options,
    )


def server(**options: Unpack[Options]) -> SimulatedHost:
    """Eight data centre GPUs (0000:11:00.0 to 0000:81:00.0) and two network cards, each in a group of its own.

    nvidia's daemon has all GPUs open.
    """
    devices = _board()
    for number in range(8):
        root, bus = f"0000:{number + 1:x}0:01.0", f"0000:{number + 1:x}1:00"
        gpu = Slot(bus, 40 + number, root).function(0, NVIDIA, 0x20F1, parts.DISPLAY_3D, "GA100 [A100 PCIe 40GB]")
        devices += [port(root, 20 + number), gpu]
    for number in range(2):
        root, bus = f"0000:a{number}:01.0", f"0000:a{number + 2}:00"
        model = "MT28908 Family [ConnectX-6]"
        nic = Slot(bus, 60 + number, root).function(0, MELLANOX, 0x101B, parts.INFINIBAND, model)
        devices += [port(root, 30 + number), nic]
    return _with_persistenced(boot(devices, **options))


def shared(**options: Unpack[Options]) -> SimulatedHost:
    """A GeForce (0000:01:00) whose IOMMU group also holds the network card (0000:02:00.0): not to be given away."""
    return boot(
        [
            *_board(),
            port("0000:00:01.0", 1),
            port("0000:00:01.1", 1),
            *_geforce(Slot("0000:01:00", 1, "0000:00:01.0")),
            Slot("0000:02:00", 1, "0000:00:01.1").function(
                0, REALTEK, 0x8168, parts.ETHERNET, "RTL8111/8168/8411 PCI Express Gigabit Ethernet Controller"
            ),
        ],
        **options,
    )


def apu(**options: Unpack[Options]) -> SimulatedHost:
    """An AMD processor whose graphics shares the slot (0000:04:00) with the user's USB and sound."""
    root = "0000:00:08.1"
    slot = Slot("0000:04:00", 10, root)
    return boot(
        [
            Slot("0000:00:00", 0).function(0, AMD_PROCESSOR, 0x1630, parts.HOST_BRIDGE, "Renoir/Cezanne Root Complex"),
            port(root, 4),
            slot.function(0, AMD, 0x1638, parts.VGA, "Cezanne [Radeon Vega Series]", boot_display=True),
            slot.function(1, AMD, 0x1637, parts.AUDIO, "Renoir Radeon High Definition Audio Controller", group=11),
            slot.function(2, AMD_PROCESSOR, 0x15DF, parts.ENCRYPTION, "Platform Security Processor", group=12),
            slot.function(3, AMD_PROCESSOR, 0x1639, parts.USB, "Renoir/Cezanne USB 3.1", group=13),
            slot.function(4, AMD_PROCESSOR, 0x1639, parts.USB, "Renoir/Cezanne USB 3.1", group=14),
            slot.function(6, AMD_PROCESSOR, 0x15E3, parts.AUDIO, "Family 17h/19h HD Audio Controller", group=15),
        ],
        **options,
    )


def single(**options: Unpack[Options]) -> SimulatedHost:
    """One GeForce (0000:01:00) and no other graphics: it draws the only screen, for somebody who is logged in."""
    card = _geforce(Slot("0000:01:00", 13, "0000:00:01.0"), boot_display=True)
    return _with_desktop(_with_sound(boot([*_board(), port("0000:00:01.0", 2), *card], **options)))


def superchip(**options: Unpack[Options]) -> SimulatedHost:
    """A Grace Hopper, for whose GPU (0009:01:00.0) there is a vfio driver of its own."""
    slot = Slot("0009:01:00", 21, "0009:00:00.0")
    gpu = slot.function(0, NVIDIA, parts.GRACE_HOPPER, parts.DISPLAY_3D, "GH100 [GH200 120GB / 480GB]")
    return boot([port("0009:00:00.0", 20), gpu], **options)


def reserved() -> SimulatedHost:
    """As `shared`, with the GeForce given to vfio-pci on the kernel command line: no host driver has ever seen it."""
    return shared(vfio_ids=[(NVIDIA, device) for device in (0x2484, 0x228B, 0x1AD8, 0x1AD9)])


def driverless() -> SimulatedHost:
    """As `plain`, with no driver for the GeForce. What the firmware left there is all that X can draw on."""
    modules = [m for m in parts.MODULES if "nvidia" not in m.name and m.name != "nouveau"]
    framebuffer = BootFramebuffer("efi-framebuffer.0", "efi-framebuffer", _GEFORCE)
    host = plain(modules=modules, boot_framebuffers=[framebuffer])
    host.machine.run("Xorg", unit=DISPLAY_MANAGER)
    host.machine.frame_buffers.open(framebuffer.device, "Xorg")
    return host


def rmrr() -> SimulatedHost:
    """As `plain`, on an old server whose firmware claims memory for the sound of the card (group 13)."""
    return plain(direct_regions={13: ("0xbdf6e000-0xbdf6efff",)})


def arc(**options: Unpack[Options]) -> SimulatedHost:
    """An Arc (0000:03:00.0) beside the processor's graphics: behind a switch of its own, its sound on another bus."""
    picture, sound = Slot("0000:03:00", 21, "0000:02:01.0"), Slot("0000:04:00", 22, "0000:02:04.0")
    return boot(
        [
            *_board(),
            Slot("0000:00:02", 1).function(0, INTEL, 0x4680, parts.VGA, "AlderLake-S GT1", boot_display=True),
            port("0000:00:01.0", 2),
            Slot("0000:01:00", 18, "0000:00:01.0").function(0, INTEL, 0x4FA0, parts.PCI_BRIDGE),
            Slot("0000:02:01", 19, "0000:01:00.0").function(0, INTEL, 0x4FA4, parts.PCI_BRIDGE),
            Slot("0000:02:04", 20, "0000:01:00.0").function(0, INTEL, 0x4FA4, parts.PCI_BRIDGE),
            picture.function(0, INTEL, 0x56A1, parts.VGA, "DG2 [Arc A750]"),
            sound.function(0, INTEL, 0x4F90, parts.AUDIO, "DG2 Audio Controller"),
        ],
        **options,
    )


def plx(**options: Unpack[Options]) -> SimulatedHost:
    """Two data centre GPUs (0000:27:00.0, 0000:28:00.0) in one IOMMU group, since the switch above them has no ACS."""
    root, upstream = "0000:20:03.1", "0000:25:00.0"
    devices = [*_board(), port(root, 30), Slot(upstream[:-2], 31, root).function(0, PLX, 0x8747, parts.PCI_BRIDGE)]
    for downstream, bus in (("0000:26:08.0", "0000:27:00"), ("0000:26:10.0", "0000:28:00")):
        devices += [
            Slot(downstream[:-2], 32, upstream).function(0, PLX, 0x8747, parts.PCI_BRIDGE),
            Slot(bus, 32, downstream).function(0, NVIDIA, 0x1DB4, parts.DISPLAY_3D, "GV100GL [Tesla V100 PCIe 16GB]"),
        ]
    return _with_persistenced(boot(devices, **options))


def hgx(**options: Unpack[Options]) -> SimulatedHost:
    """Two H100 of an HGX board; the group of the first (0000:2a:00.0) holds an NVSwitch (0000:2b:00.0) as well."""
    devices = _board()
    for number, group in enumerate((50, 51)):
        bus = 0x2A + 0x10 * number
        root, model = f"0000:{bus - 1:02x}:01.0", "GH100 [H100 SXM5 80GB]"
        devices += [
            port(root, group),
            Slot(f"0000:{bus:02x}:00", group, root).function(0, NVIDIA, 0x2330, parts.DISPLAY_3D, model),
        ]
    switch = Slot("0000:2b:00", 50, "0000:29:01.0")
    return boot([*devices, switch.function(0, NVIDIA, 0x22A3, parts.NVSWITCH, "GH100 [H100 NVSwitch]")], **options)


def instinct(**options: Unpack[Options]) -> SimulatedHost:
    """Two accelerators (0000:05:00.0 and 0000:26:00.0), and the picture of the board's management controller."""
    devices = _board()
    for bus, group in ((0x05, 10), (0x26, 11)):
        root, model = f"0000:{bus - 1:02x}:01.0", "Aqua Vanjaram [Instinct MI300X]"
        card = Slot(f"0000:{bus:02x}:00", group, root).function(0, AMD, 0x74A1, parts.ACCELERATOR, model)
        devices += [port(root, group), card]
    bmc = Slot("0000:c4:00", 30, "0000:c3:00.0")
    return boot(
        [*devices, bmc.function(0, ASPEED, 0x2000, parts.VGA, "ASPEED Graphics Family", boot_display=True)], **options
    )


def workstation(**options: Unpack[Options]) -> SimulatedHost:
    """A Threadripper with two equal GeForce cards (0000:01:00, 0000:41:00) that booted on its management controller.

    nvidia's daemon has both cards open, and PipeWire their sound.
    """
    devices = [
        Slot("0000:00:00", 0).function(0, AMD_PROCESSOR, 0x1480, parts.HOST_BRIDGE, "Starship/Matisse Root Complex")
    ]
    for bus, group in ((0x01, 20), (0x41, 40)):
        root = f"0000:{bus - 1:02x}:03.1"
        slot = Slot(f"0000:{bus:02x}:00", group + 1, root)
        devices += [
            port(root, group),
            slot.function(0, NVIDIA, 0x2204, parts.VGA, "GA102 [GeForce RTX 3090]"),
            slot.function(1, NVIDIA, 0x1AEF, parts.AUDIO, "GA102 High Definition Audio Controller"),
        ]
    # Behind a conventional bridge, whose group has all that is below it.
    devices += [
        port("0000:60:01.3", 60),
        Slot("0000:61:00", 61, "0000:60:01.3").function(
            0, ASPEED, 0x1150, parts.PCI_BRIDGE, "AST1150 PCI-to-PCI Bridge"
        ),
        Slot("0000:62:00", 61, "0000:61:00.0").function(
            0, ASPEED, 0x2000, parts.VGA, "ASPEED Graphics Family", boot_display=True
        ),
    ]
    return _with_sound(_with_persistenced(boot(devices, **options)))


def hybrid(**options: Unpack[Options]) -> SimulatedHost:
    """A laptop with a GeForce (0000:64:00), whose panel hangs on the processor's graphics of class 0380 (0000:65:00).

    Functions of that class have no `boot_vga` in sysfs. Nobody has the GeForce open.
    """
    dedicated, own = Slot("0000:64:00", 20, "0000:00:01.1"), Slot("0000:65:00", 21, "0000:00:08.1")
    return boot(
        [
            Slot("0000:00:00", 0).function(
                0, AMD_PROCESSOR, 0x1507, parts.HOST_BRIDGE, "Strix/Strix Halo Root Complex"
            ),
            port("0000:00:01.1", 4),
            dedicated.function(0, NVIDIA, 0x2D58, parts.VGA, "GB206M [GeForce RTX 5070 Max-Q / Mobile]", sleeps=True),
            dedicated.function(1, NVIDIA, 0x22EB, parts.AUDIO, "GB206 High Definition Audio Controller", sleeps=True),
            port("0000:00:08.1", 5),
            own.function(0, AMD, 0x150E, parts.DISPLAY_OTHER, "Strix [Radeon 880M / 890M]", boot_display=True),
            own.function(1, AMD, 0x1640, parts.AUDIO, "Radeon High Definition Audio Controller", group=22),
            own.function(2, AMD_PROCESSOR, 0x17E0, parts.ENCRYPTION, "Strix/Krackan/Strix Halo CCP/ASP", group=23),
            own.function(4, AMD_PROCESSOR, 0x151E, parts.USB, "Strix USB 3.1 xHCI", group=24),
        ],
        **options,
    )


SCENARIOS: Mapping[str, Callable[..., SimulatedHost]] = {
    scenario.__name__: scenario
    for scenario in (
        *(laptop, plain, server, shared, apu, single, superchip),
        *(reserved, driverless, rmrr, plx, arc, hgx, instinct, workstation, hybrid),
    )
}
