"""Which pods of the node have to go before a GPU moves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Object = Mapping[str, Any]

RESOURCES: Mapping[str, tuple[str, ...]] = {
    "nvidia": ("nvidia.com/gpu", "nvidia.com/mig-", "nvidia.com/gpu.shared"),
    "amd": ("amd.com/gpu",),
    "intel": ("gpu.intel.com/i915", "gpu.intel.com/xe"),
}
"""What their device plugins call GPUs, by who made them. One that ends in - is the beginning of names."""


@dataclass(frozen=True)
class Rules:
    """`everything`: before a GPU goes to vfio, all but static pods and those of DaemonSets have to go, whatever they
    ask for, as with `kubectl drain`.

    `resources` are asked for by pods beside those of the maker (an own name of a shared GPU). `vfio_resources` are
    what pods with virtual machines ask for (KubeVirt): they have to go before a GPU goes home. `labels`: pods with
    one of these `(key, value)` go as well, such as the device plugin itself.
    """

    everything: bool = False
    resources: tuple[str, ...] = ()
    vfio_resources: tuple[str, ...] = ()
    labels: tuple[tuple[str, str], ...] = ()


def users(vendor: str, target: str, pods: Sequence[Object], rules: Rules) -> list[Object]:
    """Those that may use a GPU of this maker that is to go to `target`, and have not ended.

    Which of several GPUs a pod has, no API tells: all that ask for one have to go.
    """
    names = (*RESOURCES.get(vendor, ()), *rules.resources) if target == "vfio" else rules.vfio_resources
    everything = rules.everything and target == "vfio"
    return [
        pod
        for pod in pods
        if not _ended(pod) and (_uses(pod, names, rules) or (everything and not of_daemon_set(pod) and not static(pod)))
    ]


def _uses(pod: Object, names: tuple[str, ...], rules: Rules) -> bool:
    labels = pod["metadata"].get("labels") or {}
    if any(labels.get(key) == value for key, value in rules.labels):
        return True
    return any(
        resource == name or (name.endswith("-") and resource.startswith(name))
        for resource in _asked(pod)
        for name in names
    )


def _asked(pod: Object) -> set[str]:
    """Extended resources have limits that are their requests, and either may be left out of what is written by hand."""
    spec = pod["spec"]
    containers = (*(spec.get("initContainers") or ()), *spec["containers"])
    found: set[str] = set()
    for container in containers:
        resources = container.get("resources") or {}
        for kind in ("requests", "limits"):
            found.update(name for name, count in (resources.get(kind) or {}).items() if str(count) != "0")
    return found


def _ended(pod: Object) -> bool:
    return (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed")


def of_daemon_set(pod: Object) -> bool:
    return any(owner.get("kind") == "DaemonSet" for owner in pod["metadata"].get("ownerReferences") or ())


def static(pod: Object) -> bool:
    """The kubelet runs it from a file: the API can only delete its mirror."""
    return "kubernetes.io/config.mirror" in (pod["metadata"].get("annotations") or {})
