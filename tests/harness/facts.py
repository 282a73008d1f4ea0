"""Facts made by hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from gpuswitch.host.port import Captured
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import VFIO_DRIVER, VFIO_MODULE, Driver, HostFacts, PciFunction

NVIDIA, AMD, INTEL, AMD_PROCESSOR = 0x10DE, 0x1002, 0x8086, 0x1022
VGA, AUDIO, USB, UCSI = 0x030000, 0x040300, 0x0C0330, 0x0C8000
BRIDGE, ETHERNET, NVME, ENCRYPTION = 0x060400, 0x020000, 0x010802, 0x108000
HOST_BRIDGE, NVSWITCH, ACCELERATOR, DISPLAY = 0x060000, 0x068000, 0x120000, 0x038000
PORT = PciAddress.parse("0000:00:01.0")
"""The bridge that a graphics card is behind."""
VFIO = Driver(VFIO_DRIVER, VFIO_MODULE)
MODULES = {"nvidia": "nvidia", "snd_hda_intel": "snd_hda_intel", "xhci_hcd": None, "nvidia-gpu": "i2c_nvidia_gpu"}
"""Registered drivers, with their modules."""


def at(text: str) -> PciAddress:
    return PciAddress.parse(text)


def driver(name: str | None) -> Driver | None:
    if name is None:
        return None
    return VFIO if name == VFIO_DRIVER else Driver(name, MODULES.get(name, name))


def function(
    address: str,
    class_code: int,
    on: str | None = None,
    *,
    group: int | None = 1,
    vendor: int = NVIDIA,
    parent: PciAddress | None = PORT,
    boot_display: bool = False,
    physical_function: str | None = None,
    virtual_functions: int = 0,
    mediated_devices: int = 0,
) -> PciFunction:
    """One function, on the driver `on`."""
    return PciFunction(
        address=at(address),
        vendor=vendor,
        device=0x1234,
        class_code=class_code,
        driver=driver(on),
        iommu_group=group,
        parent=parent,
        boot_display=boot_display,
        physical_function=at(physical_function) if physical_function else None,
        virtual_functions=virtual_functions,
        mediated_devices=mediated_devices,
    )


def facts(
    functions: Iterable[PciFunction],
    *,
    iommu: bool = True,
    vfio_available: bool = True,
    registered: Mapping[str, str | None] = MODULES,
    vfio_nodes: frozenset[str] = frozenset({"vfio"}),
    direct_regions: Mapping[int, tuple[str, ...]] | None = None,
    processor: str = "",
    hypervisor: str = "",
    groups_without_iommu: frozenset[int] = frozenset(),
) -> HostFacts:
    return HostFacts(
        functions={f.address: f for f in functions},
        iommu=iommu,
        vfio_available=vfio_available,
        pci_drivers=registered,
        vfio_nodes=vfio_nodes,
        processor=processor,
        hypervisor=hypervisor,
        groups_without_iommu=groups_without_iommu,
        direct_regions=direct_regions or {},
    )


def captured(host: HostFacts, override: str | None = None, power_control: str = "auto") -> dict[PciAddress, Captured]:
    """What every function of the host has, with the same override and power setting."""
    return {a: Captured(f.driver, override, power_control) for a, f in host.functions.items()}


def geforce(*on: str | None) -> list[PciFunction]:
    """A card of as many functions as drivers are given: picture, sound, USB, UCSI."""
    return [
        function(f"0000:01:00.{number}", class_code, name)
        for number, (class_code, name) in enumerate(zip((VGA, AUDIO, USB, UCSI), on, strict=False))
    ]
