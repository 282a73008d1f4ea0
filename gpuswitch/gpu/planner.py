"""Plans for one GPU, made of what is known of it now, with what went wrong in words for whoever asked."""

from __future__ import annotations

from collections.abc import Sequence

from gpuswitch.errors import Failed, KernelError
from gpuswitch.gpu.gpu_record import GpuRecord
from gpuswitch.host.port import Host
from gpuswitch.model.policy import Options
from gpuswitch.model.states import State
from gpuswitch.runtime.pause import LateError
from gpuswitch.sentence import Sentence
from gpuswitch.switch.engine import StuckError
from gpuswitch.switch.planning.plan import Plan
from gpuswitch.switch.planning.preparation import Preparation
from gpuswitch.switch.shared.arbiter import Arbiter
from gpuswitch.switch.steps.step import Step


class Planner:
    """Of one GPU."""

    def __init__(self, record: GpuRecord, host: Host, arbiter: Arbiter) -> None:
        self._record = record
        self._host = host
        self._arbiter = arbiter

    def preparation(
        self,
        state: State,
        options: Options,
        *,
        starting: bool = False,
        asking: bool = False,
        machine: str = "",
        at_boot: bool = False,
    ) -> Preparation:
        """Everything that a plan is computed from, as it is known now; the arguments are those of `Preparation`."""
        record = self._record
        return Preparation(
            record.gpu,
            state,
            record.facts,
            record.restore_state,
            record.config,
            options,
            self._host,
            self._arbiter,
            starting=starting,
            along=record.along,
            asking=asking,
            machine=machine,
            at_boot=at_boot,
        )

    async def plan(
        self, preparation: Preparation, target: State, *, destructive_steps: Sequence[Step] | None = None
    ) -> Plan:
        """What `Preparation.plan` says; of `destructive_steps`, what `plan_destructive` does.

        Raises:
            GpuswitchError: refused, or the kernel said no; nothing was changed.
            StuckError: the kernel did not return.
        """
        try:
            if destructive_steps is not None:
                return await preparation.plan_destructive(destructive_steps)
            return await preparation.plan(target)
        except LateError as late:
            pending = preparation.kernel.pending
            if pending is not None and not preparation.asking:
                raise StuckError(pending, late.seconds) from None
            gpu, seconds = self._record.gpu.address, f"{late.seconds:g}"
            if pending is None:
                text = Sentence(
                    "{gpu} did not answer within {seconds} s; nothing was changed", gpu=gpu, seconds=seconds
                )
            else:
                text = Sentence(
                    "{gpu} did not answer within {seconds} s ('{operation}'); nothing was changed",
                    gpu=gpu,
                    seconds=seconds,
                    operation=pending.what,
                )
            raise Failed(text) from None
        except KernelError as error:
            raise Failed(Sentence("{error}; nothing was changed", error=error)) from error
