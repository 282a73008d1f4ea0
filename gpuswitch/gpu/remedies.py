"""What else there is to do about a GPU that is in no known-good state, or did not come home, as data and in words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gpuswitch.gpu.gpu_record import GpuRecord
from gpuswitch.gpu.strategies import more_to_allow
from gpuswitch.model.states import State
from gpuswitch.sentence import Sentence, template
from gpuswitch.switch.planning.remedies import to_set

_ONCE_MORE = {
    "recover": template("to bring it to a known-good state: {command}"),
    "to_host": template("to bring it home: {command}"),
}
_ALLOWED = {
    "reset_on_failure": template("to have it reset on its way home by {command}, {set}"),
    "rescan_on_failure": template(
        "to have it removed from the PCI bus and found again on its way home by {command}, {set}"
    ),
}


@dataclass(frozen=True, slots=True)
class Remedy:
    """One thing to do: its `kind` in a word, the `sentence` for a person."""

    kind: str
    sentence: Sentence


def remedies(record: GpuRecord) -> tuple[Remedy, ...]:
    """What may help, the least rough first; none where nothing is wrong.

    `recover` or `to_host`: once more, unless that has failed twice at the same steps, and no more is allowed since.
    `reset_on_failure` or `rescan_on_failure`: to let it try more. `reboot`: the last one; both where it is failed, or
    steps of its way home did not work.
    """
    if record.state in {State.FAILED, State.UNKNOWN}:
        return tuple(_remedies(record, "recover"))
    return tuple(_remedies(record, "to_host")) if record.stays_out else ()


def _remedies(record: GpuRecord, kind: str) -> Iterator[Remedy]:
    command = f"gpuswitchctl {kind.replace('_', '-')} {record.own_config.name or record.gpu.address}"
    if not record.failed_alike:
        yield Remedy(kind, Sentence(_ONCE_MORE[kind], command=command))
    if record.state is not State.FAILED and not record.failed_at:
        return
    # One after the other: whoever has allowed the milder one tries that first.
    for key, value in more_to_allow(record.gpu, record.facts, record.rules):
        allow = to_set(record.config, record.gpu, key, value)
        yield Remedy(key, Sentence(_ALLOWED[key], set=allow, command=command))
        break
    yield Remedy(
        "reboot",
        Sentence(
            "the last way is to restart the machine: {command}; where that is not enough, switch it off for a minute",
            command="systemctl reboot",
        ),
    )
