"""Every check: what it is called, what it is about, what docs/doctor.md says of it, and the function that judges."""

from __future__ import annotations

from gpuswitch.doctor.checks import early, gpu, libvirt, machine, service, tools
from gpuswitch.doctor.findings import Area, Check

_COMMAND_LINE = "the option is put on the kernel's command line, or taken off, with the tool of this boot loader"
_BY_GUARD = "the sentence says it whole: the command, or the file, the table and the line"
CHECKS: tuple[Check, ...] = (
    Check(
        "kernel",
        Area.MACHINE,
        "Before Linux 5.19 a device that is bound while its group is in use may stop the kernel; gpuswitch was run on "
        "6.1 and later",
        "a newer kernel",
        run=machine.kernel,
    ),
    Check(
        "iommu",
        Area.MACHINE,
        "Without an IOMMU no virtual machine can have a device. It is off in the firmware (no DMAR, IVRS or IORT "
        "table), in the kernel (Intel's wants `intel_iommu=on`), by an option, or this virtual machine has none",
        f"the firmware's setup; {_COMMAND_LINE}",
        run=machine.iommu,
    ),
    Check(
        "vfio",
        Area.MACHINE,
        "vfio-pci has to be installed for the running kernel, allowed to load, and to have groups (CONFIG_VFIO_GROUP); "
        "modules of the running kernel may be gone after an upgrade",
        "the package that has it; a restart",
        run=machine.vfio,
    ),
    Check(
        "autoprobe",
        Area.MACHINE,
        "With `drivers_autoprobe` 0 a module that needs a device does not load again",
        "write 1 to it",
        run=machine.autoprobe,
    ),
    Check(
        "secure_boot",
        Area.MACHINE,
        "vfio works under Secure Boot and lockdown. Modules that nobody has signed do not load: NVIDIA's by DKMS, "
        "vendor-reset",
        "enrol the key",
        run=machine.secure_boot,
    ),
    Check(
        "service",
        Area.SERVICE,
        "Whether gpuswitchd is installed, enabled, runs, and is of this version",
        "`systemctl enable --now`, `restart`",
        run=service.service,
    ),
    Check(
        "broker",
        Area.SERVICE,
        "Which system bus runs (either will do), and whether it has our policy",
        "install gpuswitch again",
        run=service.broker,
    ),
    Check(
        "polkit",
        Area.SERVICE,
        "Without polkit, or without our actions there, only root may switch",
        "install polkit, or gpuswitch again",
        run=service.polkit,
    ),
    Check(
        "configuration",
        Area.SERVICE,
        "Faults in the configuration, what of it is about nothing on this machine, and what was changed since the "
        "service read it",
        "`gpuswitchctl config edit`; `systemctl reload gpuswitchd`",
        run=service.configuration,
    ),
    Check(
        "early",
        Area.SERVICE,
        "What `gpuswitchctl setup boot` has the initrd bind: another device is at that place, the initrd is older than "
        "what was written for it, or the kernel's command line keeps it from binding",
        "`gpuswitchctl setup boot`, or `setup boot undo`; the initrd is made anew",
        run=early.early,
    ),
    Check(
        "prometheus",
        Area.SERVICE,
        "Where Prometheus runs on this machine: whether it has a job `gpuswitch`, and the alerts",
        "`gpuswitchctl setup prometheus`",
        run=service.prometheus,
    ),
    Check(
        "state",
        Area.GPU,
        "Where it is, as the service says, or as its drivers show: `failed`, `wedged`, half-way, or "
        "out since it did not come home",
        "`gpuswitchctl recover`, `to-host`",
        of_gpu=gpu.state,
        guards=gpu.STATE,
    ),
    Check(
        "managed",
        Area.GPU,
        "Whether virtual machines get it by themselves: it has a `[[gpu]]` table",
        "`gpuswitchctl config edit`",
        of_gpu=gpu.managed,
    ),
    Check(
        "members",
        Area.GPU,
        "Functions of it that are not on the bus, or that cannot be members",
        _BY_GUARD,
        of_gpu=gpu.members,
        guards=gpu.MEMBERS,
    ),
    Check(
        "groups",
        Area.GPU,
        "With whom it shares its IOMMU groups: what stays on a host driver there is in the way",
        _BY_GUARD,
        of_gpu=gpu.groups,
        guards=gpu.NEIGHBOURS,
    ),
    Check(
        "reserved_region",
        Area.GPU,
        "Memory of its group that the firmware claims (RMRR, IVMD, RMR)",
        "another slot, or the firmware's settings",
        of_gpu=gpu.reserved,
        guards=gpu.RESERVED,
    ),
    Check(
        "boot_display",
        Area.GPU,
        "Whether the machine booted on it: its screen goes dark",
        "`allow_boot_display = true`, where that is wanted",
        of_gpu=gpu.boot_display,
        guards=gpu.BOOT_DISPLAY,
    ),
    Check(
        "vfio_driver",
        Area.GPU,
        "The vfio driver that it goes to, where that is another than vfio-pci",
        _BY_GUARD,
        of_gpu=gpu.vfio_driver,
        guards=gpu.VFIO,
    ),
    Check(
        "driver",
        Area.GPU,
        "Its host driver, with its version and what is known of that: NVIDIA's before 580.105 cannot let go of one of "
        "several GPUs with modeset on, and from 595.45.04 on it waits for ever for who comes too late; modules that "
        "could not be unloaded, or not be loaded again",
        _BY_GUARD,
        of_gpu=gpu.driver,
        guards=gpu.DRIVER,
    ),
    Check(
        "persistence",
        Area.GPU,
        "nvidia-persistenced and modeset, which a switch deals with by itself",
        "none is needed",
        of_gpu=gpu.persistence,
    ),
    Check(
        "holders",
        Area.GPU,
        "Who has it open now, and would keep a switch from being made",
        "what frees the GPU of each; `stop_units`",
        of_gpu=gpu.holders,
        guards=gpu.HOLDERS,
    ),
    Check(
        "stop_units",
        Area.GPU,
        "Units in `stop_units` that systemd does not know",
        _BY_GUARD,
        of_gpu=gpu.units,
        guards=gpu.UNITS,
    ),
    Check(
        "shared_out",
        Area.GPU,
        "Virtual functions and mediated devices, which are in use or may be",
        _BY_GUARD,
        of_gpu=gpu.shared_out,
        guards=gpu.SHARED_OUT,
    ),
    Check(
        "reset",
        Area.GPU,
        "Cards of AMD (Polaris, Vega, Navi 1x) that do not come back from a reset",
        "vendor-reset",
        of_gpu=gpu.reset,
    ),
    Check(
        "rebar",
        Area.GPU,
        "Resizable BAR is on, with which some guests stay black",
        "the firmware's setup",
        of_gpu=gpu.rebar,
    ),
    Check(
        "libvirt",
        Area.LIBVIRT,
        "Whether libvirt is there, and runs hooks in `qemu.d` (6.5 and later)",
        "a newer libvirt",
        run=libvirt.version,
    ),
    Check(
        "hook",
        Area.LIBVIRT,
        "Whether our hook is there, ours, executable, whole, and seen: libvirt looks for hooks when it starts, and "
        "when it is reloaded",
        "install it, or `/usr/lib/gpuswitch/maintain after-installation` of a package; `chmod`; `systemctl reload`",
        run=libvirt.hook,
    ),
    Check(
        "mandatory_access",
        Area.LIBVIRT,
        "What SELinux and AppArmor let hooks do",
        "`setsebool -P`; another prefix",
        run=libvirt.access,
    ),
    Check(
        "driverctl",
        Area.OTHER_TOOLS,
        "Overrides that driverctl sets by udev whenever a function appears",
        "remove its file, which counts from the next start on. `driverctl unset-override` would unbind the card at "
        "once, and wait in the kernel as long as somebody has it open",
        run=tools.driverctl,
    ),
    Check(
        "modprobe",
        Area.OTHER_TOOLS,
        "`options vfio-pci ids=`, which catches every card of the same kind and keeps it from the host; blacklists, "
        "softdeps and `install ... /bin/false` of its host driver; the same on the kernel's command line",
        "comment the line out, or have it without this card, make the initramfs anew (a package's file is copied to "
        f"`/etc/modprobe.d` for that); {_COMMAND_LINE}",
        run=tools.modprobe,
    ),
    Check(
        "switchers",
        Area.OTHER_TOOLS,
        "supergfxd, cardwired, optimus-manager, bumblebeed: they move or hide GPUs, too",
        "`systemctl disable --now`",
        run=tools.switchers,
    ),
    Check(
        "old_hooks",
        Area.OTHER_TOOLS,
        "Scripts among libvirt's hooks that bind, unbind or detach devices",
        "take their lines out; `chmod a-x` where it is a script of one virtual machine",
        run=tools.old_hooks,
    ),
    Check(
        "proxmox",
        Area.OTHER_TOOLS,
        "Machines of Proxmox that get the card: it binds by itself, and asks nobody, but for a hookscript",
        "`gpuswitchctl setup proxmox`",
        run=tools.proxmox,
    ),
    Check(
        "incus",
        Area.OTHER_TOOLS,
        "Virtual machines and profiles of Incus that have the card as a device of type `gpu`: it binds by itself, asks "
        "nobody, and tears a card apart that was on vfio before. Asked of its daemon, as root, where that runs",
        "devices of type `pci` ([incus.md](incus.md))",
        run=tools.incus,
    ),
    Check("other_tools", Area.OTHER_TOOLS, "None of these was found", "none is needed", run=tools.none),
)
"""In the order in which they are told."""
