"""The devices of a simulated machine, the drivers that have them, and who has them open."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace

from gpuswitch.host.simulated.drivers import PciDriver
from gpuswitch.model.facts import Driver, PciFunction


@dataclass(eq=False)
class Binding:
    """A driver that has, or had, a device: its instance lives until the last user closes it.

    `ready`: its nodes are there for use.
    """

    driver: PciDriver
    number: int | None = None
    nodes: tuple[str, ...] = ()
    ready: bool = True
    users: set[str] = field(default_factory=set)
    idle: asyncio.Future[None] | None = None

    def close(self, user: str) -> None:
        self.users.discard(user)
        if not self.users and self.idle is not None and not self.idle.done():
            self.idle.set_result(None)

    async def until_idle(self) -> None:
        """Wait for the last user to close it; one waiter at a time, who has the device lock."""
        while self.users:
            self.idle = asyncio.get_running_loop().create_future()
            await self.idle


class Device:
    """One function in the machine. `shape` is all of it that does not change.

    `link` is what its `driver` link says, `binding` the driver that the kernel has for it: not the same thing while
    an unbind is under way. `lock` is the device lock, first come, first served. `first_control`: what power/control
    is before anybody writes to it.
    """

    def __init__(self, shape: PciFunction, first_control: str = "on") -> None:
        self.shape = shape
        self.address = shape.address
        self.first_control = first_control
        self.override: str | None = None
        self.power_control = first_control
        self.link: Driver | None = None
        self.binding: Binding | None = None
        self.lock = asyncio.Lock()
        self._seen: PciFunction | None = None

    @property
    def asleep(self) -> bool:
        """Suspended: it is not pinned, nobody uses it, and its driver knows how; without a driver it needs none."""
        if self.power_control != "auto":
            return False
        return self.binding is None or (
            self.link is not None and self.binding.driver.suspends and not self.binding.users
        )

    def bound_to(self, driver: str) -> Binding | None:
        return self.binding if self.binding is not None and self.binding.driver.name == driver else None

    def changed(self) -> None:
        self._seen = None

    def seen(self) -> PciFunction:
        """What a look shows of it."""
        if self._seen is None:
            binding = self.binding if self.link is not None else None
            self._seen = replace(
                self.shape,
                driver=self.link,
                nodes=binding.nodes if binding is not None and binding.ready else (),
                nodes_pending=binding is not None and not binding.ready,
                asleep=self.asleep,
            )
        return self._seen


class Group:
    """An IOMMU group: who has /dev/vfio/GROUP open, and which VM owns its DMA."""

    def __init__(self) -> None:
        self.opened_by: str | None = None
        self.dma_owner: str | None = None


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


def nodes_of(driver: PciDriver, number: int) -> tuple[str, ...]:
    """The device nodes that a driver makes for the device with this number."""
    if driver.makes == "drm":
        card = f"/dev/dri/card{number}"
        return (card, f"/dev/dri/renderD{128 + number}") if driver.render else (card,)
    return (f"/dev/snd/controlC{number}",)
