"""What simulated machines are built from: the drivers and modules of a real kernel, and devices as one can buy them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

from gpuswitch.host.simulated.devices import Device
from gpuswitch.host.simulated.drivers import Module, PciDriver
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import VFIO_DRIVER, VFIO_MODULE, PciFunction

AMD, INTEL, NVIDIA, REALTEK, MELLANOX = 0x1002, 0x8086, 0x10DE, 0x10EC, 0x15B3
AMD_PROCESSOR, ASPEED, PLX = 0x1022, 0x1A03, 0x10B5

GRACE_HOPPER = 0x2342
VGA, DISPLAY_3D, DISPLAY_OTHER, AUDIO, USB, UCSI = 0x030000, 0x030200, 0x038000, 0x040300, 0x0C0330, 0x0C8000
ETHERNET, INFINIBAND, NVME, ENCRYPTION = 0x020000, 0x020700, 0x010802, 0x108000
HOST_BRIDGE, PCI_BRIDGE, NVSWITCH, ACCELERATOR = 0x060000, 0x060400, 0x068000, 0x120000

_MAKERS = {
    AMD: "Advanced Micro Devices, Inc. [AMD/ATI]",
    AMD_PROCESSOR: "Advanced Micro Devices, Inc. [AMD]",
    INTEL: "Intel Corporation",
    NVIDIA: "NVIDIA Corporation",
    REALTEK: "Realtek Semiconductor Co., Ltd.",
    MELLANOX: "Mellanox Technologies",
    ASPEED: "ASPEED Technology, Inc.",
    PLX: "PLX Technology, Inc.",
}


def alias(
    vendor: int | None,
    base: int | None = None,
    sub: int | None = None,
    interface: int | None = None,
    *,
    device: int | None = None,
) -> str:
    """The modalias pattern of a driver for these devices, None: any (do_pci_entry in scripts/mod/file2alias.c)."""
    ids = "".join(f"{sign}{_id(number, 8)}" for sign, number in (("v", vendor), ("d", device)))
    classes = "".join(f"{sign}{_id(number, 2)}" for sign, number in (("bc", base), ("sc", sub), ("i", interface)))
    return f"pci:{ids}sv*sd*{classes}{'' if classes.endswith('*') else '*'}"


def _id(number: int | None, digits: int) -> str:
    return "*" if number is None else f"{number:0{digits}X}"


def vfio_alias(vendor: int | None = None, device: int | None = None) -> str:
    """The pattern of a vfio driver for these devices (None: any)."""
    vendor_id, device_id = (f"{number:08X}" if number is not None else "*" for number in (vendor, device))
    return f"vfio_pci:v{vendor_id}d{device_id}sv*sd*bc*sc*i*"


VFIO = PciDriver(
    VFIO_DRIVER,
    waits="S",
    kernel_wait="vfio_unregister_group_dev",
    suspends=True,
    allows=True,
    manages_dma=True,
    vfio=(vfio_alias(),),
)
PCI_STUB = PciDriver("pci-stub", manages_dma=True)
PCIEPORT = PciDriver("pcieport", (alias(None, 0x06, 0x04, 0x00),), manages_dma=True)
"""Built into every kernel of a distribution."""

_SOUND = PciDriver(
    "snd_hda_intel",
    tuple(alias(vendor, 0x04, 0x03, 0x00) for vendor in (NVIDIA, AMD, AMD_PROCESSOR, INTEL)),
    makes="sound",
    waits="D",
    kernel_wait="snd_card_free",
    suspends=True,
)
# Its remove() looks at the count of users in a loop of interruptible sleeps (nv_pci_remove() of the open module).
_NVIDIA = PciDriver(
    "nvidia",
    (alias(NVIDIA, 0x03, 0x00, 0x00), alias(NVIDIA, 0x03, 0x02, 0x00)),
    makes="nvidia",
    waits="S",
    suspends=True,
)
_NVSWITCH = PciDriver("nvidia-nvswitch", (alias(NVIDIA, 0x06, 0x80, 0x00),), suspends=True)
_NVIDIA_VERSION = "580.105.08"


def _graphics(name: str, *aliases: str) -> PciDriver:
    return PciDriver(name, aliases, makes="drm", suspends=True)


def _other(name: str, *aliases: str) -> PciDriver:
    return PciDriver(name, aliases, suspends=True)


def _variant(name: str, *aliases: str) -> PciDriver:
    """A vfio driver that knows more of some devices."""
    return replace(VFIO, name=name, vfio=aliases)


_OF_I915 = tuple(alias(INTEL, 0x03, device=device) for device in (0x46A6, 0x4680, 0x56A1))
MODULES = (
    Module(VFIO_MODULE, (VFIO,)),
    # It alone shows a machine the memory of a superchip's GPU. Its driver's name is not its module's.
    Module("nvgrace_gpu_vfio_pci", (_variant("nvgrace-gpu-vfio-pci", vfio_alias(NVIDIA, GRACE_HOPPER)),)),
    Module("mlx5_vfio_pci", (_variant("mlx5_vfio_pci", vfio_alias(MELLANOX, 0x101E)),)),
    # These two make their frame buffers themselves; for the others, it is the module of DRM's helpers that fbcon keeps.
    Module("i915", (_graphics("i915", *_OF_I915),), pins=True),
    # It has those in its table, too, and leaves them to i915 where nobody forces it (xe_pci_probe).
    Module("xe", (_graphics("xe", alias(INTEL, 0x03, device=0xE20B)),), aliases=_OF_I915),
    Module("ast", (_graphics("ast", alias(ASPEED, 0x03, device=0x2000)),)),
    Module(
        "amdgpu", (_graphics("amdgpu", *(alias(AMD, *classes, 0x00) for classes in ((3, 0), (3, 0x80), (0x12, 0)))),)
    ),
    Module("nouveau", (_graphics("nouveau", alias(NVIDIA, 0x03)),), pins=True, blacklisted=True),
    Module("nvidiafb", (_other("nvidiafb", alias(NVIDIA, 0x03)),), blacklisted=True),
    Module("nvidia", (_NVSWITCH, _NVIDIA), needs_device=True, version=_NVIDIA_VERSION),
    Module("nvidia_uvm", requires=("nvidia",), version=_NVIDIA_VERSION),
    Module("nvidia_modeset", requires=("nvidia",), version=_NVIDIA_VERSION),
    Module(
        "nvidia_drm",
        requires=("nvidia_modeset",),
        above="nvidia",
        makes="drm",
        # The table of nvidia's is compiled into this one, too (nv-pci-table.c), which has no driver of the PCI bus.
        aliases=(*_NVSWITCH.aliases, *_NVIDIA.aliases),
        version=_NVIDIA_VERSION,
        modeset=True,
    ),
    Module("snd_hda_intel", (_SOUND,)),
    Module("xhci_pci", (_other("xhci_hcd", alias(None, 0x0C, 0x03, 0x30)),)),
    Module("i2c_nvidia_gpu", (_other("nvidia-gpu", alias(NVIDIA, 0x0C, 0x80)),)),
    Module("ccp", (_other("ccp", *(alias(AMD_PROCESSOR, device=device) for device in (0x15DF, 0x17E0))),)),
    Module("nvme", (_other("nvme", alias(None, 0x01, 0x08, 0x02)),)),
    Module("r8169", (_other("r8169", alias(REALTEK, device=0x8168)),)),
    Module("mlx5_core", (_other("mlx5_core", alias(MELLANOX, device=0x101B)),)),
)
"""Installed. udev has loaded those whose devices are there; vfio-pci has no device of its own.

Each says that it is for what a real one says, as far as there are such devices here:
`tests/simulated_host/modules.alias`.
"""


@dataclass(frozen=True)
class Slot:
    """A place on the board: `0000:01:00` behind the bridge `parent`, its functions in IOMMU group `group`."""

    name: str
    group: int
    parent: str | None = None

    def function(
        self,
        number: int,
        vendor: int,
        device: int,
        class_code: int,
        model: str = "",
        *,
        boot_display: bool = False,
        sleeps: bool = False,
        group: int | None = None,
        reset_errno: int = 0,
    ) -> Device:
        """One function in it. `sleeps`: power/control is `auto` from the start. `group`: where it has its own.

        `reset_errno`: see `Device`.
        """
        slot = self if group is None else replace(self, group=group)
        shape = _shape(slot, number, vendor, device, class_code, model=model, boot_display=boot_display)
        return Device(shape, "auto" if sleeps else "on", reset_errno=reset_errno)


@cache
def _shape(
    slot: Slot, number: int, vendor: int, device: int, class_code: int, *, model: str, boot_display: bool
) -> PciFunction:
    """What does not change of a function, however often its machine is booted."""
    return PciFunction(
        address=PciAddress.parse(f"{slot.name}.{number}"),
        vendor=vendor,
        device=device,
        class_code=class_code,
        maker=_MAKERS.get(vendor, ""),
        model=model,
        modalias=(
            f"pci:v{vendor:08X}d{device:08X}sv{vendor:08X}sd00000000"
            f"bc{class_code >> 16:02X}sc{class_code >> 8 & 0xFF:02X}i{class_code & 0xFF:02X}"
        ),
        iommu_group=slot.group,
        parent=PciAddress.parse(slot.parent) if slot.parent else None,
        boot_display=boot_display,
    )


def port(address: str, group: int) -> Device:
    """The root port above a slot."""
    name, _, number = address.rpartition(".")
    return Slot(name, group).function(int(number), INTEL, 0x460D, PCI_BRIDGE, "PCI Express Root Port")
