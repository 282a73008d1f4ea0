"""Of other tools that want the same cards."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from shlex import quote

from gpuswitch.doctor import remedies
from gpuswitch.doctor.findings import Said, ok, warning
from gpuswitch.doctor.looks.libvirt import HOOKS
from gpuswitch.doctor.looks.units import OTHERS
from gpuswitch.doctor.seen import IncusDevice, Line, Patient, ProxmoxMachine, Seen
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import VFIO_MODULE, PciFunction
from gpuswitch.sentence import Sentence

_VFIO_NAMES = frozenset({"vfio-pci", "vfio_pci"})
_DO_NOTHING = frozenset({"false", "true", ":", "exit"})
"""Commands of which nothing is loaded; others are wrappers, such as `modprobe -i nvidia-current`."""
_DRIVERS: Mapping[int, frozenset[str]] = {
    # nouveau is not among them: to keep it out is what NVIDIA's own driver wants.
    0x10DE: frozenset({"nvidia", "nvidia_drm", "nvidia_modeset", "nvidia_current"}),
    0x1002: frozenset({"amdgpu"}),
    0x8086: frozenset({"i915", "xe"}),
}
"""Whose cards a host has no use of without them, by vendor."""


def driverctl(seen: Seen) -> Iterator[Said]:
    """It has udev set an override whenever the device appears (driverctl(8))."""
    own = {str(function) for patient in seen.patients for function in patient.gpu.functions}
    for address in seen.tools.driverctl:
        if address in own:
            yield warning(
                Sentence(
                    "driverctl has a driver override for {function}, and sets it whenever that appears",
                    function=address,
                ),
                # `driverctl unset-override` unbinds at once, and waits in the kernel for who has the card open.
                Sentence("leave it to gpuswitch, from the next start of the machine on"),
                (f"rm {quote(f'/etc/driverctl.d/pci-{address}')}",),
            )


def modprobe(seen: Seen) -> Iterator[Said]:
    functions = _functions(seen)
    for line in seen.tools.modprobe:
        if said := _line(line, functions):
            reason, instead = said
            remedy = (
                Sentence("have this line there instead, and make the initramfs anew: {line}", line=" ".join(instead))
                if instead
                else Sentence("take that line out, and make the initramfs anew: {line}", line=" ".join(line.words))
            )
            commands = (*remedies.change_line(line, instead), *remedies.rebuild_initramfs(seen.system))
            yield warning(reason, remedy, commands)
    yield from _at_boot(seen, functions)


def _at_boot(seen: Seen, functions: Collection[PciFunction]) -> Iterator[Said]:
    """The same on the kernel's command line."""
    # modprobe and the kernel take both names for one.
    for option in ("vfio-pci.ids", "vfio_pci.ids"):
        for ids in seen.system.options(option):
            if caught := _caught(ids, functions):
                word, rest = f"{option}={ids}", _other_ids(ids, functions)
                new = f"{option}={rest}" if rest else ""
                reason = Sentence(
                    "the kernel command line has {option}, which gives {functions} to vfio-pci when the machine "
                    "starts, and every other card of the same kind",
                    option=word,
                    functions=", ".join(caught),
                )
                yield warning(reason, _instead(new), remedies.change_options(seen.system, {word: new}))
    for option in ("modprobe.blacklist", "module_blacklist"):
        for value in seen.system.options(option):
            if kept := sorted(_drivers_of(functions).intersection(map(remedies.underscored, value.split(",")))):
                new = remedies.without(option, value, kept)
                reason = Sentence("the kernel command line keeps {modules} from being loaded", modules=", ".join(kept))
                yield warning(reason, _instead(new), remedies.change_options(seen.system, {f"{option}={value}": new}))


def _instead(new: str) -> Sentence:
    if new:
        return Sentence("have {option} there instead", option=new)
    return Sentence("take it off the kernel command line")


def _functions(seen: Seen) -> list[PciFunction]:
    """Those of the GPUs that are judged."""
    return [f for patient in seen.patients for f in patient.gpu.present(seen.facts)] if seen.facts else []


def _line(line: Line, functions: Collection[PciFunction]) -> tuple[Sentence, tuple[str, ...]] | None:
    """What is wrong with a line of modprobe's configuration, and what is left of it without that: words, or none."""
    drivers = _drivers_of(functions)
    match line.words:
        case ["options", name, *options] if name in _VFIO_NAMES:
            lists = {option: option.partition("=")[2].strip('"') for option in options if option.startswith("ids=")}
            ids = ",".join(lists.values())
            if caught := _caught(ids, functions):
                reason = Sentence(
                    "{file} gives {functions} to vfio-pci when the machine starts, and every other card of the same "
                    "kind (ids={ids})",
                    file=line.file,
                    functions=", ".join(caught),
                    ids=ids,
                )
                others = {option: _other_ids(each, functions) for option, each in lists.items()}
                kept = [f"ids={others[option]}" if option in lists else option for option in options]
                kept = [option for option in kept if option != "ids="]
                return reason, ("options", name, *kept) if kept else ()
        case ["blacklist", name] if remedies.underscored(name) in drivers:
            return Sentence("{file} keeps {module} from being loaded for its cards", file=line.file, module=name), ()
        case ["install", name, command, *_] if (
            remedies.underscored(name) in drivers | {VFIO_MODULE} and command.rpartition("/")[2] in _DO_NOTHING
        ):
            return Sentence(
                "{file} keeps {module} from being loaded: {command} is run instead",
                file=line.file,
                module=name,
                command=command,
            ), ()
        case ["softdep", name, *others] if _VFIO_NAMES.intersection(others) and remedies.underscored(name) in drivers:
            reason = Sentence("{file} has vfio-pci loaded before {module}", file=line.file, module=name)
            kept = [word for word in others if word not in _VFIO_NAMES]
            return reason, () if {*kept} <= {"pre:", "post:"} else ("softdep", name, *kept)
    return None


def _caught(ids: str, functions: Collection[PciFunction]) -> list[str]:
    """The functions that these ids are of: `10de:2484,10de:228b` (vfio_pci_fill_ids in drivers/vfio/pci/vfio_pci.c)."""
    wanted = [_model(each) for each in ids.split(",")]
    return [str(f.address) for f in functions if (f.vendor, f.device) in wanted]


def _other_ids(ids: str, functions: Collection[PciFunction]) -> str:
    """What is left of them without those of these functions."""
    models = {(f.vendor, f.device) for f in functions}
    return ",".join(each for each in ids.split(",") if each and _model(each) not in models)


def _model(text: str) -> tuple[int, int] | None:
    """Vendor and device; None where it has none."""
    try:
        vendor, device = (int(part, 16) for part in text.split(":")[:2])
    except ValueError:
        return None
    return vendor, device


def _drivers_of(functions: Collection[PciFunction]) -> frozenset[str]:
    return frozenset().union(*(_DRIVERS.get(f.vendor, frozenset()) for f in functions if f.makes_gpu))


def switchers(seen: Seen) -> Iterator[Said]:
    """Tools that load, unload, bind or hide GPUs by themselves."""
    for name in OTHERS:
        unit = seen.unit(name)
        if unit.active or (unit.found and unit.enabled):
            yield warning(
                Sentence("{unit} moves or hides GPUs by itself, and knows nothing of gpuswitch", unit=name),
                Sentence("stop it, and keep it from being started"),
                (f"systemctl disable --now {name}",),
            )


def old_hooks(seen: Seen) -> Iterator[Said]:
    for script in seen.tools.moving:
        # What libvirt itself runs is there for every machine, and may be what runs all other scripts.
        alone = script.count("/") > f"{HOOKS}/qemu.d/".count("/")
        yield warning(
            Sentence("{script} moves devices, too: two that move one card will meet each other", script=script),
            Sentence("take its lines for this card out, or keep it from being run (docs/libvirt.md)")
            if alone
            else Sentence("take its lines for this card out; all else that it does goes on (docs/libvirt.md)"),
            (f"chmod a-x {quote(script)}",) if alone else (),
        )


def proxmox(seen: Seen) -> Iterator[Said]:
    """It takes whatever a machine is given from its driver, and asks nobody, but for the machine's hookscript.

    That is how it does it: PVE::QemuServer::PCI.
    """
    for machine in seen.tools.proxmox:
        for patient in seen.patients:
            if machine.gets(patient.gpu.functions):
                yield _of_proxmox(machine, patient.address)


def _of_proxmox(machine: ProxmoxMachine, gpu: PciAddress) -> Said:
    values = {"machine": machine.name, "gpu": gpu, "script": machine.hookscript}
    commands = (f"gpuswitchctl setup proxmox {quote(machine.vmid)}",)
    match machine.script:
        case "ours":
            return ok(Sentence("Proxmox has {machine} ask for {gpu} before it starts, by its hookscript", **values))
        case "outdated":
            return warning(
                Sentence("the hookscript of {machine}, {script}, is not that of this version", **values),
                Sentence("put this one in its place"),
                commands,
            )
        case "foreign":
            return warning(
                Sentence("the hookscript of {machine}, {script}, does not ask for {gpu} before it starts", **values),
                Sentence("have it run ours, too (docs/proxmox.md)"),
            )
    return warning(
        Sentence("Proxmox gives {gpu} to {machine}, and takes it from its driver without asking anybody", **values),
        Sentence("have the machine ask for it, by a hookscript"),
        commands,
    )


def incus(seen: Seen) -> Iterator[Said]:
    """It moves a `gpu` of a virtual machine by itself, and asks nobody (gpu_physical.go in its source).

    At the machine's end it gives the card back to the driver that it had, and clears the overrides of the other
    functions: one that was on vfio before is torn apart by that. Of a `pci` device it leaves that alone. Containers are
    given nodes of the host's driver, and nothing is moved for them.
    """
    for patient in seen.patients:
        functions = patient.gpu.present(seen.facts) if seen.facts is not None else ()
        alone: dict[str, set[str]] = {}
        for device in seen.incus:
            if not device.gets(functions):
                continue
            if device.type == "pci":
                alone.setdefault(device.owner, set()).add(device.function)
            elif device.kind != "container":
                yield _of_incus(device, patient)
        for owner, given in alone.items():
            yield ok(
                Sentence(
                    "Incus gives {functions} to {owner}, and leaves on vfio what is there before: start {unit} first",
                    functions=", ".join(sorted(given)),
                    owner=owner,
                    unit=f"gpuswitch-vfio@{patient.address}.service",
                )
            )


def _of_incus(device: IncusDevice, patient: Patient) -> Said:
    values = {"gpu": patient.address, "owner": device.owner, "device": device.name}
    remedy = Sentence("give it as devices of type pci instead (docs/incus.md)")
    if device.kind == "profile":
        reason = Sentence(
            "the device {device} of Incus' profile {owner} gives {gpu} to whoever uses that: Incus takes it from its "
            "driver without asking anybody",
            **values,
        )
        return warning(reason, remedy)
    reason = Sentence(
        "Incus gives {gpu} to {owner}, by its device {device}, and takes it from its driver without asking anybody",
        **values,
    )
    return warning(reason, remedy)


def none(seen: Seen) -> Iterator[Said]:
    """All of the above, where nothing was found."""
    found = (driverctl, modprobe, switchers, old_hooks, proxmox, incus)
    if seen.patients and not any(said for check in found for said in check(seen)):
        yield ok(Sentence("no other tool was found that moves these cards"))
