"""Who else moves GPUs of this node: NVIDIA's vfio-manager, and claims of dynamic resource allocation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gpuswitch_kubernetes.gpus import Gpu

Object = Mapping[str, Any]

WORKLOAD = "nvidia.com/gpu.workload.config"
DEPLOYED = "nvidia.com/gpu.deploy.vfio-manager"
"""Labels of the node: gpu-operator, controllers/state_manager.go. The first is set by people, the second follows from
it.
"""
VFIO_MANAGER = "nvidia-vfio-manager"
"""The label `name` of its pods (assets/state-vfio-manager/0500_daemonset.yaml), and `app` of its DaemonSet."""
ADDRESS_ATTRIBUTES = ("resource.kubernetes.io/pciBusID", "pciBusID", "pciAddress")
"""The first is the standard one (k8s.io/dynamic-resource-allocation/deviceattribute); drivers from before it had
their own.
"""
_VENDORS = {"nvidia": "nvidia.com", "amd": "amd.com", "intel": "intel.com"}


def other_owner(
    gpu: Gpu, node: Object, pods: Sequence[Object], slices: Sequence[Object], claims: Sequence[Object]
) -> str:
    """Who has this GPU, and what to do, in a sentence; "": nobody."""
    return (_vfio_manager(node, pods) if gpu.vendor == "nvidia" else "") or _claim(gpu, node, slices, claims)


def _vfio_manager(node: Object, pods: Sequence[Object]) -> str:
    labels = node["metadata"].get("labels") or {}
    way = f"give the node another label {WORKLOAD} than vm-passthrough, and wait until its pod is gone"
    if labels.get(WORKLOAD) == "vm-passthrough" or labels.get(DEPLOYED) == "true":
        return f"NVIDIA's vfio-manager moves the GPUs of this node, as its labels say: {way}"
    for pod in pods:
        if VFIO_MANAGER in ((pod["metadata"].get("labels") or {}).get(key) for key in ("name", "app")):
            return f"NVIDIA's vfio-manager moves the GPUs of this node, in pod {called(pod)}: {way}"
    return ""


def _claim(gpu: Gpu, node: Object, slices: Sequence[Object], claims: Sequence[Object]) -> str:
    devices = {
        (spec["driver"], spec["pool"]["name"], device["name"]): address
        for spec in (each["spec"] for each in slices)
        if spec.get("nodeName") == node["metadata"]["name"]
        for device, address in _devices(spec)
    }
    for claim in claims:
        allocation = (claim.get("status") or {}).get("allocation") or {}
        for result in (allocation.get("devices") or {}).get("results") or ():
            key = (result["driver"], result["pool"], result["device"])
            # A driver that tells no address may mean any GPU of its maker.
            if key in devices and devices[key] in (gpu.address, "") and (devices[key] or _makes(result["driver"], gpu)):
                device = f"{result['device']} of {result['driver']}"
                return (
                    f"ResourceClaim {called(claim)} has it allocated (device {device}): "
                    "delete what uses that claim, and wait until it is no longer allocated"
                )
    return ""


def _devices(spec: Object) -> Iterator[tuple[Object, str]]:
    """Each device of a ResourceSlice, with its PCI address; "": it does not say."""
    for device in spec.get("devices") or ():
        # resource.k8s.io/v1beta1 has one more floor
        attributes = (device.get("basic") or device).get("attributes") or {}
        values = (attributes[name].get("string", "") for name in ADDRESS_ATTRIBUTES if name in attributes)
        yield device, next(values, "").lower()


def _makes(driver: str, gpu: Gpu) -> bool:
    maker = _VENDORS.get(gpu.vendor)
    return maker is None or maker in driver


def called(thing: Object) -> str:
    return f"{thing['metadata']['namespace']}/{thing['metadata']['name']}"
