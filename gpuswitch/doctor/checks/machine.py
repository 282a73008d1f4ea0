"""Of the machine as a whole: kernel, IOMMU, vfio, what the firmware allows."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from gpuswitch.doctor import remedies
from gpuswitch.doctor.findings import Said, ok, problem, warning
from gpuswitch.doctor.seen import Seen, System
from gpuswitch.model.facts import VFIO_DRIVER, VFIO_MODULE
from gpuswitch.sentence import Sentence
from gpuswitch.switch.planning.guards import GONE, switch_on
from gpuswitch.switch.planning.requirements import AUTOPROBE
from gpuswitch.switch.steps.pci import NO_GROUPS

_NOTIFIER_GONE = (5, 19)
"""Before, binding a neighbour while its group was in use met a BUG_ON (iommu_group_notifier in drivers/vfio/vfio.c)."""
_OLDEST_TRIED = (6, 1)
_TABLES: Mapping[str, str] = {"intel": "DMAR", "amd": "IVRS", "arm": "IORT"}
"""By which the firmware tells of an IOMMU."""
_OFF: Mapping[str, tuple[str, ...]] = {
    "intel": ("intel_iommu=off", "iommu=off"),
    "amd": ("amd_iommu=off", "iommu=off"),
}
_ON = "intel_iommu=on"
_NVIDIA = 0x10DE
RESTART = Sentence("restart the machine")


def kernel(seen: Seen) -> Iterator[Said]:
    system = seen.system
    version = tuple(int(part) for part in re.findall(r"\d+", system.kernel)[:2])
    named = {"name": system.name or "Linux", "kernel": system.kernel}
    newer = remedies.install(system, "kernel")
    if version and version < _NOTIFIER_GONE:
        yield problem(
            Sentence("{name}, Linux {kernel}: binding a device whose group is in use may stop this kernel", **named),
            Sentence("install Linux 5.19 or later"),
            newer,
        )
    elif version and version < _OLDEST_TRIED:
        yield warning(
            Sentence("{name}, Linux {kernel}: older than any that gpuswitch was run on", **named),
            Sentence("install Linux 6.1 or later"),
            newer,
        )
    else:
        yield ok(Sentence("{name}, Linux {kernel}", **named))


def iommu(seen: Seen) -> Iterator[Said]:
    facts, system = seen.facts, seen.system
    if facts is None:
        return
    if facts.iommu and not facts.groups_without_iommu:
        groups = len({f.iommu_group for f in facts.functions.values() if f.iommu_group is not None})
        yield ok(Sentence("the IOMMU is on: {count} groups", count=groups))
        if changes := _with_graphics(system):
            yield warning(
                Sentence(
                    "the kernel command line has {option}: graphics of the processor have no IOMMU group",
                    option="igfx_off",
                ),
                Sentence("have {option} there instead", option=f"intel_iommu={[*changes.values()][-1]}"),
                remedies.change_options(
                    system, {f"intel_iommu={old}": f"intel_iommu={new}" for old, new in changes.items()}
                ),
            )
        return
    if facts.hypervisor:
        yield problem(Sentence("the IOMMU is off"), switch_on(facts))
        return
    yield from _off(system, facts.processor)


def _with_graphics(system: System) -> dict[str, str]:
    """The values of intel_iommu that leave graphics out, and what they are without that.

    "on" is among those, for kernels in which it is off by default, or off for graphics (intel_iommu_setup in
    drivers/iommu/intel/iommu.c, CONFIG_INTEL_IOMMU_DEFAULT_ON).
    """
    return {
        value: ",".join(["on", *(word for word in value.split(",") if word not in {"on", "igfx_off"})])
        for value in system.options("intel_iommu")
        if "igfx_off" in value.split(",")
    }


def _off(system: System, processor: str) -> Iterator[Said]:
    if off := [option for option in _OFF.get(processor, ("iommu=off",)) if option in system.command_line]:
        changes = dict.fromkeys(off, "")
        more: tuple[str, ...] = ()
        remedy = Sentence("take it off the kernel command line")
        if _wants_option(system, processor):
            # Else it is off after that as well, in a kernel where it is off by default.
            remedy = Sentence("take it off the kernel command line, and add {option}", option=_ON)
            if "intel_iommu=off" in changes:
                changes["intel_iommu=off"] = _ON
            else:
                more = (_ON,)
        yield problem(
            Sentence("the IOMMU is off: the kernel command line has {option}", option=" ".join(off)),
            remedy,
            remedies.change_options(system, changes, more),
        )
        return
    table = _TABLES.get(processor, "")
    if system.tables is not None and table and table not in system.tables:
        yield problem(
            Sentence("the IOMMU is off in the firmware, which has no {table} table", table=table),
            _IN_FIRMWARE.get(processor, _IN_ANY_FIRMWARE),
            remedies.add_option(system, _ON) if _wants_option(system, processor) else (),
        )
    elif _wants_option(system, processor):
        yield problem(
            Sentence("the IOMMU is off in the kernel; the firmware has it"),
            Sentence("add {option} to the kernel command line", option=_ON),
            remedies.add_option(system, _ON),
        )
    else:
        yield problem(Sentence("the IOMMU is off"), _IN_FIRMWARE.get(processor, _IN_ANY_FIRMWARE))


_IN_FIRMWARE: Mapping[str, Sentence] = {
    "intel": Sentence("enable VT-d in the firmware's setup, and have intel_iommu=on on the kernel command line"),
    "amd": Sentence("enable AMD-Vi (often called IOMMU) in the firmware's setup"),
    "arm": Sentence("enable the SMMU in the firmware's setup"),
}
_IN_ANY_FIRMWARE = Sentence("enable the IOMMU in the firmware's setup")


def _wants_option(system: System, processor: str) -> bool:
    """Intel's is off by default in many kernels (CONFIG_INTEL_IOMMU_DEFAULT_ON)."""
    return processor == "intel" and "on" not in (system.option("intel_iommu") or "").split(",")


def vfio(seen: Seen) -> Iterator[Said]:
    facts = seen.facts
    if facts is None:
        return
    if not facts.modules_on_disk:
        yield problem(GONE, RESTART, (remedies.REBOOT,))
        if VFIO_DRIVER not in facts.pci_drivers:
            return
    if not facts.vfio_available:
        yield problem(
            Sentence("{driver} is not installed for this kernel", driver=VFIO_DRIVER),
            Sentence(
                "install the modules of the running kernel, so that this works: modprobe {module}", module=VFIO_MODULE
            ),
            remedies.install(seen.system, "vfio"),
        )
    elif facts.vfio_without_groups:
        yield problem(Sentence("vfio is of no use here: {why}", why=NO_GROUPS))
    elif VFIO_DRIVER in facts.pci_drivers:
        yield ok(Sentence("{driver} is in the kernel", driver=VFIO_DRIVER))
    else:
        yield ok(Sentence("{driver} is installed, and loaded when it is needed", driver=VFIO_DRIVER))
    if VFIO_MODULE in facts.barred:
        yield problem(
            Sentence("the kernel command line keeps {module} from being loaded (module_blacklist)", module=VFIO_MODULE),
            Sentence("take it off the kernel command line"),
            remedies.change_options(
                seen.system,
                {
                    f"module_blacklist={value}": remedies.without("module_blacklist", value, {VFIO_MODULE})
                    for value in seen.system.options("module_blacklist")
                    if VFIO_MODULE in map(remedies.underscored, value.split(","))
                },
            ),
        )


def autoprobe(seen: Seen) -> Iterator[Said]:
    if seen.facts is None:
        return
    if seen.facts.autoprobe:
        yield ok(Sentence("drivers are bound to the devices that they find"))
    else:
        yield warning(
            Sentence("{file} is 0: modules that need a device do not come back", file=AUTOPROBE),
            Sentence("switch it on"),
            (f"echo 1 > {AUTOPROBE}",),
        )


def secure_boot(seen: Seen) -> Iterator[Said]:
    """Both let vfio work. What they keep out are modules that nobody has signed for this machine."""
    system = seen.system
    locked = system.lockdown in {"integrity", "confidentiality"}
    homeless = [
        f.address
        for f in (seen.facts.functions.values() if seen.facts else ())
        if f.vendor == _NVIDIA and f.makes_gpu and f.driver is None
    ]
    if locked and homeless:
        yield warning(
            Sentence(
                "the kernel is locked down ({lockdown}), and {gpus} of NVIDIA has no driver: a module that is not "
                "signed does not load",
                lockdown=system.lockdown,
                gpus=", ".join(map(str, homeless)),
            ),
            Sentence("enrol the key that DKMS signs with, and confirm it at the next start"),
            _ENROL.get(system.family, ()),
        )
    elif locked:
        yield ok(Sentence("the kernel is locked down ({lockdown}): only signed modules load", lockdown=system.lockdown))
    elif system.secure_boot:
        yield ok(Sentence("Secure Boot is on, and the kernel is not locked down"))
    elif system.secure_boot is not None:
        yield ok(Sentence("Secure Boot is off"))


_ENROL: Mapping[str, tuple[str, ...]] = {
    "debian": ("mokutil --import /var/lib/dkms/mok.pub", remedies.REBOOT),
    "proxmox": ("mokutil --import /var/lib/dkms/mok.pub", remedies.REBOOT),
    "ubuntu": ("mokutil --import /var/lib/shim-signed/mok/MOK.der", remedies.REBOOT),
    "fedora": ("mokutil --import /etc/pki/akmods/certs/public_key.der", remedies.REBOOT),
}
