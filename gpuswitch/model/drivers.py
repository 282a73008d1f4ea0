"""What is known of host drivers, as data."""

from __future__ import annotations

from collections.abc import Mapping

from gpuswitch.model.facts import Driver

# Modules whose PCI driver goes by another name; for all others the two are the same.
_DRIVER_OF_MODULE: Mapping[str, str] = {
    "bochs": "bochs-drm",
    "i2c_nvidia_gpu": "nvidia-gpu",
    "vfio_pci": "vfio-pci",
    "xhci_pci": "xhci_hcd",
}
_MODULE_OF_DRIVER: Mapping[str, str] = {driver: module for module, driver in _DRIVER_OF_MODULE.items()}


def from_module(module: str, registered: Mapping[str, str | None]) -> Driver:
    """The PCI driver that a module brings. `registered` (driver: module) is believed first, where it is loaded."""
    loaded = sorted(name for name, owner in registered.items() if owner == module)
    return Driver(loaded[0] if loaded else _DRIVER_OF_MODULE.get(module, module), module)


def from_name(name: str, registered: Mapping[str, str | None]) -> Driver:
    """The driver of that name, with the module to load for it."""
    if name in registered:
        return Driver(name, registered[name])
    return Driver(name, _MODULE_OF_DRIVER.get(name, name.replace("-", "_")))
