"""The emulated PC: what is in it, and where Linux finds it.

Each PCIe root port is a slot of its own, and with intel-iommu a slot is an IOMMU group (a root port isolates what is
below it); behind a PCIe-to-PCI bridge everything shares one group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

BOOT_GPU = "0000:00:02.0"
"""The firmware's display (boot_vga is 1), driver bochs-drm."""
GPU, GPU_AUDIO = "0000:01:00.0", "0000:01:00.1"
"""A GPU of two functions in one IOMMU group: bochs-drm, and snd_hda_intel with a sound card."""
SINGLE_GPU = "0000:02:00.0"
"""A GPU of one function, driver bochs-drm."""
BARE_GPU, BARE_GPU_AUDIO = "0000:03:00.0", "0000:03:00.1"
"""A GPU without a driver (1b36:0100, class 0380) and its audio function, in one group; for the drivers in modules/."""
TWIN_GPU, TWIN_GPU_AUDIO = "0000:06:00.0", "0000:06:00.1"
"""Another one of the same kind."""
CROWDED_GPU, CROWDED_NIC = "0000:05:01.0", "0000:05:02.0"
"""A GPU, driver bochs-drm, in one IOMMU group with a network card, driver e1000: not viable."""

DISPLAY_DRIVER, AUDIO_DRIVER, NIC_DRIVER = "bochs-drm", "snd_hda_intel", "e1000"

Device = Mapping[str, str | int]
"""The properties of one device, as QEMU's device_add takes them."""


def root_port(number: int, address: str) -> Device:
    return {"driver": "pcie-root-port", "id": f"rp{number}", "bus": "pcie.0", "addr": address, "chassis": number}


def sound(number: int) -> tuple[Device, Device]:
    """The second function of the GPU in that root port, and the codec that makes a sound card of it."""
    return (
        {"driver": "intel-hda", "id": f"hda{number}", "bus": f"rp{number}", "addr": "00.1"},
        {"driver": "hda-duplex", "id": f"codec{number}", "bus": f"hda{number}.0", "audiodev": "silence"},
    )


def bare_gpu(number: int, address: str) -> tuple[Device, ...]:
    """A GPU that no driver of the kernel's own takes, and the root port that it is in."""
    gpu: Device = {"driver": "qxl", "id": f"gpu{number}", "bus": f"rp{number}", "addr": "00.0", "multifunction": True}
    return root_port(number, address), gpu, *sound(number)


DEVICES: tuple[Device, ...] = (
    {"driver": "intel-iommu", "intremap": "on", "caching-mode": True},
    {"driver": "VGA", "id": "vga0", "bus": "pcie.0", "addr": "02.0"},
    root_port(1, "05.0"),
    {"driver": "secondary-vga", "id": "gpu1", "bus": "rp1", "addr": "00.0", "multifunction": True},
    *sound(1),
    root_port(2, "06.0"),
    {"driver": "secondary-vga", "id": "gpu2", "bus": "rp2", "addr": "00.0"},
    *bare_gpu(3, "08.0"),
    root_port(4, "09.0"),
    {"driver": "pcie-pci-bridge", "id": "bridge4", "bus": "rp4"},
    {"driver": "secondary-vga", "id": "gpu4", "bus": "bridge4", "addr": "01.0"},
    {"driver": "e1000", "id": "nic4", "bus": "bridge4", "addr": "02.0"},
    *bare_gpu(5, "0a.0"),
)

DEVICE_IDS: Mapping[str, str] = {
    GPU: "gpu1",
    GPU_AUDIO: "hda1",
    SINGLE_GPU: "gpu2",
    BARE_GPU: "gpu3",
    BARE_GPU_AUDIO: "hda3",
    CROWDED_GPU: "gpu4",
    CROWDED_NIC: "nic4",
    TWIN_GPU: "gpu5",
    TWIN_GPU_AUDIO: "hda5",
}
"""QEMU's name of each function, for Machine.device_del and Machine.device_add."""

KERNEL_ARGUMENTS = (
    "root=/dev/vda rw rootflags=noatime,noinit_itable console=ttyS0 quiet systemd.show_status=0 "
    "intel_iommu=on iommu=pt "
    # the check of the timer counts ticks in a short while; on a busy host they come late, and the kernel panics
    "no_timer_check "
    # what costs time under emulation and protects nobody here
    "mitigations=off audit=0 nokaslr tsc=reliable clocksource=tsc"
)


@dataclass(frozen=True)
class Hardware:
    """What a template is made for. Two that differ in anything have templates of their own."""

    devices: tuple[Device, ...] = DEVICES
    kernel_arguments: str = KERNEL_ARGUMENTS
    memory_mib: int = 3072
    processors: int = 2
    # AVX and nested page tables are slow under emulation; 57-bit addresses only make page walks longer
    processor: str = "max,-avx,-avx2,-la57,-svm"
    # interrupt remapping asks for a split irqchip
    machine: str = "q35,kernel-irqchip=split"

    def device(self, device_id: str) -> Device:
        """The properties of the device of this id; KeyError where there is none."""
        for device in self.devices:
            if device.get("id") == device_id:
                return device
        raise KeyError(device_id)
