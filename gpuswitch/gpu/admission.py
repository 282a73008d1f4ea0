"""Which request of one GPU is let in: it is refused, joins the switch that runs, or has nothing to do."""

from __future__ import annotations

import shlex

from gpuswitch.errors import Failed, InProgress, Owned
from gpuswitch.gpu.gpu_record import GpuRecord
from gpuswitch.model.address import PciAddress
from gpuswitch.model.owner import Owner
from gpuswitch.model.policy import Options
from gpuswitch.model.states import State
from gpuswitch.sentence import Sentence
from gpuswitch.switch.planning.guards import blockers, refusal
from gpuswitch.switch.planning.requirements import boot_framebuffers
from gpuswitch.switch.record import Requester, Switch


def belongs(gpu: PciAddress, owner: Owner) -> Sentence:
    """That somebody else has it, and how to have it."""
    if owner.process is not None:
        return Sentence("{gpu} belongs to {owner}: end that first", gpu=gpu, owner=owner)
    return Sentence("{gpu} belongs to {owner}: shut that down first", gpu=gpu, owner=owner)


class Admission:
    """Of one GPU."""

    def __init__(self, record: GpuRecord) -> None:
        self._record = record

    def running(self) -> Switch | None:
        """The switch that is under way, which others join or wait for."""
        record = self._record
        if record.state.moving and record.switch is not None and record.switch.result is None:
            return record.switch
        return None

    def is_at(self, target: State) -> bool:
        """Whether there is nothing to do."""
        record = self._record
        # On its host drivers, and what was changed besides is still to be undone: not home yet. On vfio, with the
        # firmware's frame buffer in its memory: no machine can use it yet.
        short = record.restore_state if target is State.HOST else boot_framebuffers(record.gpu, record.facts)
        return record.state is target and not short

    def refuse_retired(self) -> None:
        """Raises `Failed` where nothing new begins here."""
        if self._record.retired:
            raise Failed(Sentence("cannot switch {gpu}: {why}", gpu=self._record.gpu.address, why=self._record.retired))

    def refuse_owned(self, target: State) -> None:
        """Who waits for it is not left without it at the last moment: that raises `Owned`."""
        record = self._record
        if target is State.HOST and record.awaited and record.owner is not None:
            if record.owner.process is not None:
                if record.state is not State.VFIO:
                    return
                raise Owned(
                    Sentence(
                        "{gpu} belongs to {owner}, with whose end it comes home: end that first: kill {pid}",
                        gpu=record.gpu.address,
                        owner=record.owner,
                        pid=record.owner.process.pid,
                    )
                )
            raise Owned(
                Sentence(
                    "{gpu} belongs to {owner}, which is about to open it: shut that down first: virsh shutdown {name}; "
                    "not opened within {seconds} s, it comes home by itself",
                    gpu=record.gpu.address,
                    owner=record.owner,
                    name=shlex.quote(record.owner.name),
                    seconds=f"{record.rules.start_grace:g}",
                )
            )

    def refuse_trial(self, options: Options) -> None:
        """What belongs to a machine is not tried, and does not go home by the clock: raises `Owned`."""
        record = self._record
        if options.trial_seconds is not None and record.owner is not None:
            raise Owned(belongs(record.gpu.address, record.owner))

    def refuse_kept(self, requester: Requester) -> None:
        """Raises `Failed` where the end of a trial asks for it, and somebody has kept it, or given it more time."""
        if requester.trial and not self._record.trial_is_over:
            raise Failed(f"{self._record.gpu.address} does not go home by itself: somebody keeps it where it is")

    def refuse_unusable(self, target: State) -> None:
        """On vfio, and of no use to a machine: raises with every reason. At home, nothing is in its way."""
        record = self._record
        if target is not State.VFIO:
            return
        if found := blockers(record.gpu, target, record.state, record.facts, record.config, along=record.along):
            raise refusal(found)

    def join(self, running: Switch, options: Options) -> Switch:
        """The one that goes there already, where that does all that is asked for.

        Raises:
            InProgress: it does not.
        """
        rules = self._record.rules
        configured = Options(rules.busy, rules.wait_seconds, tuple(map(str, rules.stop_units)))
        if more := options.beyond(running.options_in_force, configured):
            raise InProgress(
                Sentence(
                    "{gpu} is on its way to {target} already (switch {id}), and not with {options}: ask without, wait "
                    "for its end, or cancel it and ask again: gpuswitchctl cancel {gpu}",
                    gpu=self._record.gpu.address,
                    target=running.target,
                    id=running.id,
                    options=" ".join(more),
                )
            )
        return running
