"""The devices of a simulated machine, what the drivers that have them made of them, and who has that open."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import lru_cache

from gpuswitch.host.port import ATTRIBUTES
from gpuswitch.host.simulated.drivers import PciDriver
from gpuswitch.model.facts import Driver, PciFunction

_HIDDEN_KINDS = frozenset({"", "nvidia", "vfio"})
"""Kinds whose nodes a look at the device does not show: they are not below it in sysfs, or are vfio's."""
_IDLE_KINDS = frozenset({"sound", "nvidia"})
"""Kinds that let the device sleep while somebody only has them open: a control node plays nothing."""

_OVERRIDE, _CONTROL = "driver_override", "power/control"
_ALSO = {"d3cold_allowed": "1"}
"""Attributes that each function has besides, which a step may change (`Kernel.attribute`), as they are at boot."""


class Trouble(StrEnum):
    """Why no host driver can take a device as it is: its probe fails.

    `LOST`: somebody has reset it by the bus, and its base addresses are gone: the kernel sets them up when it finds it
    anew. `HUNG`: a virtual machine left it so that only a reset helps. `UNKNOWN`: neither does.
    """

    LOST = "lost"
    HUNG = "hung"
    UNKNOWN = "unknown"


@dataclass(eq=False)
class Card:
    """What a driver, or a module above it, made of a device: its nodes, and who has them open.

    `kind`: `drm`, `sound`, `nvidia` or `vfio`; "" has no nodes of its own. Each that has it open is a reference to
    `module`. `ready`: the nodes are there for use. `frame_buffer`: the number of the one that it has. `keeps`: its
    module has the device in use by itself, and lets go of it only when it is unloaded.
    """

    kind: str = ""
    module: str | None = None
    number: int = 0
    render: bool = True
    ready: bool = True
    frame_buffer: int | None = None
    keeps: bool = False
    users: set[str] = field(default_factory=set)

    @property
    def nodes(self) -> tuple[str, ...]:
        match self.kind:
            case "drm":
                card = f"/dev/dri/card{self.number}"
                return (card, f"/dev/dri/renderD{128 + self.number}") if self.render else (card,)
            case "sound":
                return (f"/dev/snd/controlC{self.number}",)
            case "nvidia":
                return (f"/dev/nvidia{self.number}",)
            case "vfio":
                return (f"/dev/vfio/devices/vfio{self.number}",)
        return ()

    @property
    def numbers(self) -> tuple[str, ...]:
        """The device numbers of the nodes (Documentation/admin-guide/devices.txt)."""
        match self.kind:
            case "drm":
                return (f"c226:{self.number}", f"c226:{128 + self.number}")[: len(self.nodes)]
            case "sound":
                return (f"c116:{self.number}",)
            case "nvidia":
                return (f"c195:{self.number}",)
            case "vfio":
                return (f"c511:{self.number}",)
        return ()


@dataclass(eq=False)
class Binding:
    """A driver that has, or had, a device: what it made lives until the last user closes it. The first is its own."""

    driver: PciDriver
    cards: list[Card]
    idle: asyncio.Future[None] | None = None

    @property
    def ready(self) -> bool:
        return all(card.ready for card in self.cards)

    @property
    def nodes(self) -> tuple[str, ...]:
        """Those that a look shows."""
        return tuple(node for card in self.cards if card.kind not in _HIDDEN_KINDS for node in card.nodes)

    @property
    def users(self) -> frozenset[str]:
        return frozenset(user for card in self.cards for user in card.users)

    @property
    def at_work(self) -> bool:
        """Whether somebody keeps the device from sleeping."""
        return any(card.users for card in self.cards if card.kind not in _IDLE_KINDS)

    def card(self, kind: str = "") -> Card | None:
        """What somebody opens: the one of this kind, else one that a look shows before others."""
        there = [card for card in self.cards if card.nodes and kind in {"", card.kind}]
        return min(there, key=lambda card: card.kind in _HIDDEN_KINDS, default=None)

    def settle(self) -> None:
        """Somebody closed something, or a card is gone: perhaps that is what the driver waits for."""
        if not self.busy and self.idle is not None and not self.idle.done():
            self.idle.set_result(None)

    async def until_idle(self) -> None:
        """Wait for the last user to close it; one waiter at a time, who has the device lock."""
        while self.busy:
            self.idle = asyncio.get_running_loop().create_future()
            await self.idle

    @property
    def busy(self) -> bool:
        """Whether the driver's remove() would wait, if it is of those that do."""
        return any(card.users or card.keeps for card in self.cards)


class Device:
    """One function in the machine. `shape` is all of it that does not change.

    `link` is what its `driver` link says, `binding` the driver that the kernel has for it: not the same thing while
    an unbind is under way. `lock` is the device lock, first come, first served. `first_control`: what power/control
    is before anybody writes to it. `persistent`: nvidia's persistence mode is on. `reset_errno`: what a reset of it
    fails with, 0 where it works; ENOENT: it has no reset method. `trouble`: why a host driver cannot take it now.
    `settings` are its attributes that can be written, by their paths: those of `gpuswitch.host.port.ATTRIBUTES`, and
    some that are about power.
    """

    def __init__(self, shape: PciFunction, first_control: str = "on", *, reset_errno: int = 0) -> None:
        self.shape = shape
        self.address = shape.address
        self.first_control = first_control
        self.reset_errno = reset_errno
        self.settings = {each.path: each.at_boot for each in ATTRIBUTES.values()} | _ALSO | {_CONTROL: first_control}
        self.persistent = False
        self.trouble: Trouble | None = None
        self.link: Driver | None = None
        self.binding: Binding | None = None
        self.lock = asyncio.Lock()
        self._seen: PciFunction | None = None

    @property
    def override(self) -> str | None:
        return self.settings[_OVERRIDE] or None

    @override.setter
    def override(self, driver: str | None) -> None:
        self.settings[_OVERRIDE] = driver or ""

    @property
    def power_control(self) -> str:
        return self.settings[_CONTROL]

    @power_control.setter
    def power_control(self, control: str) -> None:
        self.settings[_CONTROL] = control

    @property
    def asleep(self) -> bool:
        """Suspended: it is not pinned, nobody uses it, and its driver knows how; without a driver it needs none."""
        if self.power_control != "auto":
            return False
        return self.binding is None or (
            self.link is not None and self.binding.driver.suspends and not self.binding.at_work
        )

    def bound_to(self, driver: str) -> Binding | None:
        return self.binding if self.binding is not None and self.binding.driver.name == driver else None

    @property
    def on_vfio(self) -> bool:
        return self.binding is not None and bool(self.binding.driver.vfio)

    def anew(self) -> Device:
        """The same function as it is when the kernel finds it: nothing of what was set is left."""
        device = Device(self.shape, self.first_control, reset_errno=self.reset_errno)
        device.trouble = None if self.trouble is Trouble.LOST else self.trouble
        return device

    def changed(self) -> None:
        self._seen = None

    def seen(self) -> PciFunction:
        """What a look shows of it."""
        if self._seen is None:
            binding = self.binding if self.link is not None else None
            pending = binding is not None and not binding.ready
            nodes = binding.nodes if binding is not None and not pending else ()
            vfio = binding is not None and bool(binding.driver.vfio)
            self._seen = _shown(self.shape, self.link, nodes, pending=pending, asleep=self.asleep, vfio=vfio)
        return self._seen


@lru_cache(maxsize=1024)
def _shown(
    shape: PciFunction,
    driver: Driver | None,
    nodes: tuple[str, ...],
    *,
    pending: bool,
    asleep: bool,
    vfio: bool,
) -> PciFunction:
    """There are few looks that a function has."""
    return replace(shape, driver=driver, nodes=nodes, nodes_pending=pending, asleep=asleep, vfio_device=vfio)


class Group:
    """An IOMMU group: who has /dev/vfio/GROUP open, and which VM owns its DMA."""

    def __init__(self) -> None:
        self.opened_by: str | None = None
        self.dma_owner: str | None = None

    @property
    def taken(self) -> bool:
        """A group and its devices exclude each other (vfio_device_block_group in drivers/vfio/group.c)."""
        return self.opened_by is not None or self.dma_owner is not None


class Numbers:
    """Numbers of device nodes: always the lowest that is free, and one is free once nobody has it open any more."""

    def __init__(self) -> None:
        self._taken: dict[str, set[int]] = {}

    def take(self, kind: str) -> int:
        taken = self._taken.setdefault(kind, set())
        number = next(n for n in range(len(taken) + 1) if n not in taken)
        taken.add(number)
        return number

    def give(self, kind: str, number: int) -> None:
        self._taken[kind].discard(number)
