"""The steps that are left when a device is in no state to be used, or when neither the way on nor the way back worked.

A reset, and a removal with a rescan. What is off the bus is found again; nothing else is taken back: what was set on a
function that is removed, its driver override and its power setting, goes with it.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

from gpuswitch.errors import KernelError
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import HostFacts
from gpuswitch.sentence import Sentence
from gpuswitch.switch.steps.step import Step, StepContext


@dataclass(frozen=True)
class ResetFunction(Step):
    """Reset one function: what hangs in the device is over, and whatever driver comes next finds it as at power-on."""

    kind = "reset"
    function: PciAddress

    @property
    def title(self) -> str:
        return Sentence("reset {function}", function=self.function)

    async def apply(self, context: StepContext) -> None:
        await context.kernel.reset(self.function)


@dataclass(frozen=True)
class RemoveFunctions(Step):
    """Take the functions off the PCI bus; their drivers let go of them, which may wait as an unbind does.

    The last one first, as the kernel itself empties a slot (pciehp_unconfigure_device in drivers/pci/hotplug).
    """

    kind = "rescan"
    functions: tuple[PciAddress, ...]

    @property
    def title(self) -> str:
        return Sentence("remove {functions} from the PCI bus", functions=_and(self.functions))

    async def apply(self, context: StepContext) -> None:
        await context.kernel.remove(tuple(reversed(self.functions)))

    async def verify(self, context: StepContext) -> None:
        await context.check(self._unmet, self.functions)

    async def revert(self, context: StepContext) -> None:
        # As a removal that ends after its time.
        there = (await context.look(self.functions)).functions
        if gone := tuple(function for function in self.functions if function not in there):
            await context.kernel.rescan(gone)

    def _unmet(self, facts: HostFacts) -> str | None:
        left = [function for function in self.functions if function in facts.functions]
        return f"{_and(left)} did not leave the PCI bus" if left else None


@dataclass(frozen=True)
class Rescan(Step):
    """Have the kernel find the functions again, and wait until it has: a device may take its time to answer.

    In Linux since 6.17 a driver may bind what is found after the write has returned (device_initial_probe instead of
    device_attach in pci_bus_add_device). A probe of our own waits for that, and finds nothing to do or does it: from
    then on, what a look shows stays. Where nothing is bound by itself (`drivers_autoprobe`), nor do we.
    """

    kind = "rescan"
    functions: tuple[PciAddress, ...]

    @property
    def title(self) -> str:
        return Sentence("find {functions} on the PCI bus again", functions=_and(self.functions))

    async def apply(self, context: StepContext) -> None:
        await context.kernel.rescan(self.functions)

    async def verify(self, context: StepContext) -> None:
        await context.until(self._unmet, self.functions)
        if context.host.look().autoprobe:
            for function in self.functions:
                # Which driver could not take it is told when the GPU is brought home.
                with suppress(KernelError):
                    await context.kernel.probe(function)

    def _unmet(self, facts: HostFacts) -> str | None:
        missing = [function for function in self.functions if function not in facts.functions]
        return f"{_and(missing)} did not come back to the PCI bus" if missing else None


def _and(functions: tuple[PciAddress, ...] | list[PciAddress]) -> str:
    return " and ".join(map(str, functions))
