"""References to a driver's module that no process explains: a descriptor that is in flight in a socket message, say."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cmp_to_key

from gpuswitch.host.linux.scanning.devices import Devices
from gpuswitch.host.linux.scanning.files import names, text
from gpuswitch.host.linux.scanning.kernel import Client
from gpuswitch.host.linux.scanning.open_files import Opened, order

# How many references one open file is, where it is more than one: chrdev_open in fs/char_dev.c takes one for the
# owner of the device, if it has one, and one for that of the operations; nvidia's old front end took another.
_REFERENCES = {"nvidia-frontend": 3, "nvidia-uvm": 2, "nvidia-caps": 2}


class Modules:
    """Modules of drivers. Those that use each other count as one: who holds one of them may show at another.

    `nodes` has the modules, each with the nodes that all its devices share: shell patterns below /dev. One that is not
    there, or built in, has no references.
    """

    def __init__(self, sysfs: str, devices: Devices, nodes: Mapping[str, Sequence[str]]) -> None:
        self._devices = devices
        loadable = [module for module in nodes if text(f"{sysfs}/module/{module}/refcnt")]
        self._families = [_Family(sysfs, devices, family, nodes) for family in _families(sysfs, loadable)]

    @property
    def numbers(self) -> set[str]:
        """All devices of all their functions: whoever has one of them open explains a reference."""
        return {number for family in self._families for number in family.numbers}

    @property
    def moved(self) -> bool:
        """Whether somebody has opened or closed a device while the processes were looked at."""
        return any(family.moved for family in self._families)

    def unexplained(self, opened: Sequence[Opened], mapped: Collection[str]) -> Iterator[Client]:
        """What is left, after all processes were looked at. `mapped` are the devices that somebody has mapped."""
        weights = {
            major: max(_REFERENCES.get(name, 1) for name in called) for major, called in self._devices.majors().items()
        }
        for family in self._families:
            if client := family.unexplained(opened, mapped, weights):
                yield client


class _Family:
    def __init__(
        self, sysfs: str, devices: Devices, modules: Sequence[str], nodes: Mapping[str, Sequence[str]]
    ) -> None:
        self._sysfs = sysfs
        self._modules = modules
        self._functions = devices.functions_of(modules)
        shared = devices.of_nodes(pattern for module in modules for pattern in nodes[module])
        self.numbers = shared.union(*map(devices.of_function, self._functions))
        self._before = self._references()
        self.moved = False

    def unexplained(
        self, opened: Iterable[Opened], mapped: Collection[str], weights: Mapping[str, int]
    ) -> Client | None:
        now = self._references()
        self.moved = now != self._before
        # Somebody may have opened or closed a device while the processes were looked at: then this is too many.
        references = {module: max(now[module], self._before[module]) for module in self._modules}
        mine = [descriptor for descriptor in opened if descriptor.number in self.numbers]
        files = [descriptor.number for descriptor in _different(mine)]
        files += (set(mapped) & self.numbers) - set(files)
        left = sum(references.values()) - sum(weights.get(number[1:].partition(":")[0], 1) for number in files)
        if left > 0:
            left -= self._consoles()
        if left <= 0:
            return None
        module = max(reversed(self._modules), key=references.__getitem__)
        users = "1 user" if left == 1 else f"{left} users"
        return Client(module, f"module {module} has {users} that no process explains")

    def _references(self) -> dict[str, int]:
        """How many each module has beyond those of other modules."""
        folders = {module: f"{self._sysfs}/module/{module}" for module in self._modules}
        return {m: int(text(f"{path}/refcnt") or 0) - len(names(f"{path}/holders")) for m, path in folders.items()}

    def _consoles(self) -> int:
        """The references that the text console may have: one for each frame buffer (fbcon_open in fbcon.c)."""
        consoles = f"{self._sysfs}/class/vtconsole"
        if not any(
            text(f"{consoles}/{name}/bind") == "1" and "frame buffer device" in text(f"{consoles}/{name}/name")
            for name in names(consoles)
        ):
            return 0
        return sum(len(names(f"{self._sysfs}/bus/pci/devices/{address}/graphics")) for address in self._functions)


def _families(sysfs: str, modules: Iterable[str]) -> list[list[str]]:
    """The modules, those together that use each other."""
    families: list[list[str]] = []
    for module in modules:
        users = set(names(f"{sysfs}/module/{module}/holders"))
        related = [family for family in families if users & set(family) or _uses(sysfs, module, family)]
        families = [family for family in families if family not in related]
        families.append([*(member for family in related for member in family), module])
    return families


def _uses(sysfs: str, module: str, others: Iterable[str]) -> bool:
    return any(module in names(f"{sysfs}/module/{other}/holders") for other in others)


def _different(opened: Iterable[Opened]) -> list[Opened]:
    """One descriptor of each open file: a file that was passed on, or inherited, has several."""
    found: list[Opened] = []
    for descriptor in sorted(opened, key=cmp_to_key(order)):
        if not found or order(found[-1], descriptor) != 0:
            found.append(descriptor)
    return found
