"""The steps that change an attribute of a function which several GPUs share, such as the bridge above them.

`ChangeAttribute` says which function, which attribute and what it is to say; the rest follows. Whoever comes first
records what the attribute said, the next one records the same, and the last one home gives it back: `to_host` and
`restore_shared` have a `RestoreAttribute` for each that a GPU has recorded. Who needs it, `SharedSettings` counts.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from gpuswitch.errors import KernelError
from gpuswitch.host.port import AttributeChange
from gpuswitch.model.address import PciAddress
from gpuswitch.model.attribute import FunctionAttribute
from gpuswitch.sentence import Sentence
from gpuswitch.switch.restore_state import RestoreState, SharedSetting
from gpuswitch.switch.steps.step import Step, StepContext, StepError


@dataclass(frozen=True)
class _OfAttribute(Step):
    """`path` is below the function's folder in sysfs: `d3cold_allowed`. It can be read as well as written.

    All that is known of it is looked at in the step: another GPU may come home between a plan and its steps.
    """

    kind = "power"
    function: PciAddress
    path: str

    @property
    def _attribute(self) -> FunctionAttribute:
        return FunctionAttribute(self.function, self.path)

    @property
    def _setting(self) -> SharedSetting:
        return SharedSetting("attributes", self._attribute)

    async def _write(self, context: StepContext, value: str) -> None:
        """Where it says something else. Checked at once: right after it, another GPU may rightly change it."""
        if await context.kernel.attribute(self.function, self.path) in {None, value}:
            return
        await context.kernel.set_attribute(self.function, self.path, value)
        if (now := await context.kernel.attribute(self.function, self.path)) != value:
            raise StepError(f"{self.path} of {self.function} is {now!r}, though {value!r} was written to it")

    async def _give_back(self, context: StepContext, before: str) -> None:
        """The last one does: it says again what it said before."""
        await context.arbiter.settings.restore(context.gpu, self._setting, partial(self._put, context, before))

    async def _put(self, context: StepContext, value: str) -> None:
        with _if_there():
            await self._write(context, value)


@dataclass(frozen=True)
class ChangeAttribute(_OfAttribute):
    """Have the attribute say `value` until the last GPU that needs it so is home.

    A function that has no such attribute, or that is not there, is left as it is.
    """

    value: str

    @property
    def title(self) -> str:
        return Sentence("set {path} of {function} to {value}", path=self.path, function=self.function, value=self.value)

    async def apply(self, context: StepContext) -> None:
        await context.arbiter.settings.change(context.gpu, self._setting, partial(self._change, context))

    async def _change(self, context: StepContext) -> None:
        with _if_there():
            await self._record_and_write(context)

    async def _record_and_write(self, context: StepContext) -> None:
        now = await context.kernel.attribute(self.function, self.path)
        if now is None:
            return
        settings = context.arbiter.settings
        recorded = settings.recorded(self._setting)
        # What it says now is another GPU's change where one has recorded it.
        change = recorded.attributes[self._attribute] if recorded else AttributeChange(now, self.value)
        if change.needed != self.value:
            others = " and ".join(map(str, settings.recorded_by(self._setting)))
            raise StepError(
                f"{self.path} of {self.function} is to be {self.value!r}, and is kept at {change.needed!r} "
                f"for {others}: bring that to the host first"
            )
        if not settings.has(context.gpu, self._setting):
            context.record_restore(RestoreState(attributes={self._attribute: change}))
            context.changed.add(self._setting)
        await self._write(context, self.value)

    async def revert(self, context: StepContext) -> None:
        # The GPU may need it so since an earlier switch.
        recorded = context.arbiter.settings.recorded(self._setting)
        if recorded is not None and self._setting in context.changed:
            await self._give_back(context, recorded.attributes[self._attribute].before)


@dataclass(frozen=True)
class RestoreAttribute(_OfAttribute):
    """Have the attribute say what it said before, unless another GPU needs the change."""

    change: AttributeChange

    @property
    def title(self) -> str:
        return Sentence("restore {path} of {function}", path=self.path, function=self.function)

    async def apply(self, context: StepContext) -> None:
        await self._give_back(context, self.change.before)

    async def revert(self, context: StepContext) -> None:
        # It is recorded still: a way back waits for no disk.
        await context.arbiter.settings.change(
            context.gpu, self._setting, partial(self._put, context, self.change.needed)
        )


@contextmanager
def _if_there() -> Iterator[None]:
    """A bridge can be pulled with its card, and one that another domain of the bus has is not seen (Intel VMD)."""
    try:
        yield
    except KernelError as error:
        if error.errno != errno.ENODEV:
            raise
