"""A wedged GPU in words: what has not returned, who could make it return, and what is left where nobody can."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gpuswitch.model.address import PciAddress
from gpuswitch.model.drivers import NVIDIA, waits_for_ever
from gpuswitch.model.holders import Holder, Unit
from gpuswitch.sentence import Sentence
from gpuswitch.switch.engine import StuckError
from gpuswitch.switch.holder_policy import sentences

_REBOOT = Sentence(
    "only a reboot frees it, and an ordinary one will hang: as root, echo s > /proc/sysrq-trigger, then u, then b "
    "(sync the disks, remount them read-only, reboot)"
)


def first_words(gpu: PciAddress, stuck: StuckError) -> Sentence:
    """What is known at once, a sentence a line."""
    return _lines(Sentence.of(stuck), Sentence("nothing more is written to {gpu} until it does", gpu=gpu))


def report(
    gpu: PciAddress, stuck: StuckError, holders: Iterable[Holder] | None, nvidia: str, stopped: Sequence[Unit] = ()
) -> Sentence:
    """The whole story, which begins as `first_words`. `holders`: who has it open now, None where that cannot be told;
    `nvidia`: its version, or ""; `stopped`: the units that were stopped for its sake.
    """
    words = first_words(gpu, stuck)
    if stopped:
        words = _lines(words, Sentence("stopped until then: {units}", units=", ".join(map(str, stopped))))
    if stuck.pending.what.endswith(" from nvidia") and waits_for_ever(NVIDIA, nvidia):
        never = Sentence(
            "nvidia {version} never returns from this, whoever lets go: {reboot}", version=nvidia, reboot=_REBOOT
        )
        return _lines(words, never)
    if holders:
        return _lines(words, Sentence("it recovers by itself once these let go:"), *sentences(gpu, holders))
    return _lines(
        words,
        Sentence("it recovers by itself should the kernel return"),
        Sentence("nobody is seen to have it open, so most likely {reboot}", reboot=_REBOOT),
    )


def _lines(*sentences: Sentence) -> Sentence:
    return Sentence.joined("\n", sentences)
