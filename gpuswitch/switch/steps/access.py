"""The step that takes back what users were let open, where whoever gave it has not done so."""

from __future__ import annotations

from dataclasses import dataclass

from gpuswitch.model.access import UserAccess
from gpuswitch.sentence import Sentence
from gpuswitch.switch.shared.access import take_back
from gpuswitch.switch.steps.step import Step, StepContext


@dataclass(frozen=True)
class TakeAccessBack(Step):
    """The user may open the node no longer. Not taken back: what it was given for is over."""

    kind = "group"
    access: UserAccess

    @property
    def title(self) -> str:
        return Sentence("take from uid {uid} the access to {node}", uid=self.access.uid, node=self.access.node)

    async def apply(self, context: StepContext) -> None:
        await take_back(context.gpu, self.access, context.host.device_nodes, context.arbiter)
