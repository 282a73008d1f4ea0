"""What is to be done for a node, from what was seen of it: pure, and anew each time.

A GPU is moved once for each desire. Before: nobody else moves it, the service would do it, the node is tainted, and
the pods that use it are gone. All that has to outlive the agent stands in annotations of the node.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gpuswitch_kubernetes.desires import Desire, Fault, Note, desires, note_of
from gpuswitch_kubernetes.gpus import LOST, Gpu, Refusal
from gpuswitch_kubernetes.names import HANDLED, REASON, STATE, TAINT, part_of
from gpuswitch_kubernetes.owners import called, other_owner
from gpuswitch_kubernetes.users import Rules, static, users

Object = Mapping[str, Any]

LONGEST_TEXT = 1000
"""Characters of one reason: all annotations of an object together may have 256 KiB."""


@dataclass(frozen=True)
class Limits:
    """`deadline_seconds`: how long pods and the service are waited for, before a desire is given up.

    More than `switches` of one GPU within `window_seconds` are not begun: two controllers want opposite things.
    """

    deadline_seconds: float = 600.0
    switches: int = 4
    window_seconds: float = 600.0


@dataclass(frozen=True)
class Facts:
    """What was seen, all of it after the last thing that was done.

    `gpus` is None where the service gave no answer, `unreachable` says why. `refusals` are what the service says
    before anything is done to pods, by address. `now` is in seconds of a monotonic clock.
    """

    node: Object
    gpus: tuple[Gpu, ...] | None
    now: float
    unreachable: str = ""
    pods: Sequence[Object] = ()
    slices: Sequence[Object] = ()
    claims: Sequence[Object] = ()
    refusals: Mapping[str, Refusal] = field(default_factory=dict)


@dataclass
class Memory:
    """What is only known as long as the agent runs; points in time are those of `Facts.now`.

    `since`: when each desire, by address and text, was begun to be worked on. `begun`: when switches of a GPU were
    asked for. `pauses`: until when the service is not asked again to begin, with what it said. `pods`: the same for
    evictions, by uid.
    """

    since: dict[tuple[str, str], float] = field(default_factory=dict)
    begun: dict[str, list[float]] = field(default_factory=dict)
    pauses: dict[str, tuple[float, str]] = field(default_factory=dict)
    pods: dict[str, tuple[float, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """On one GPU. `word` is for programs, in the style of reasons of conditions; `text` is for people, "" where all
    is as desired.

    `taint`: the node has to have it. `works`: the desire that is worked on, whose time runs. `begins`: the switch to
    ask for, once the note is written.
    """

    address: str
    word: str = "AsDesired"
    text: str = ""
    healthy: bool = True
    taint: bool = False
    note: Note | None = None
    works: str = ""
    evicts: tuple[Object, ...] = ()
    begins: str = ""


@dataclass(frozen=True)
class Decision:
    """`annotations` are all that the agent has on the node; None: leave them. `tainted`: whether the node is to be;
    None: leave it.

    `status`, `word` and `text` are for the condition.
    """

    verdicts: tuple[Verdict, ...]
    status: str
    word: str
    text: str
    annotations: Mapping[str, str] | None = None
    tainted: bool | None = None


_WORST = (
    *("Wedged", "Lost", "Failed", "GivenUp", "MovedElsewhere", "Invalid", "NoSuchGpu", "OwnedElsewhere", "Refused"),
    *("TooManySwitches", "Absent", "Draining", "Beginning", "Switching"),
)
"""The word of the condition is the first of these that is that of a GPU."""


def tainted(node: Object) -> bool:
    return any(taint["key"] == TAINT for taint in node["spec"].get("taints") or ())


def wanting(node: Object, gpus: Sequence[Gpu]) -> list[tuple[Gpu, str]]:
    """GPUs that may have to move, and where to: the service is asked about these."""
    annotations = node["metadata"].get("annotations") or {}
    wanted, _faults = desires(annotations)
    return [
        (gpu, wanted[gpu.address].target)
        for gpu in gpus
        if gpu.address in wanted
        and gpu.state not in (wanted[gpu.address].target, "absent", *LOST)
        and not gpu.moving
        and not _handled(note_of(annotations, gpu.address), wanted[gpu.address])
    ]


def _handled(note: Note | Fault | None, desire: Desire) -> bool:
    return isinstance(note, Note) and note.desire == desire.text and note.stage != "begun"


def decide(facts: Facts, memory: Memory, rules: Rules = Rules(), limits: Limits = Limits()) -> Decision:  # noqa: B008 -- both are frozen
    """The verdict on each GPU, and what follows for the node."""
    if facts.gpus is None:
        text = f"cannot reach gpuswitchd on this node, so no GPU is moved: {facts.unreachable}"
        return Decision((), "Unknown", "ServiceUnreachable", text[:LONGEST_TEXT])
    annotations = facts.node["metadata"].get("annotations") or {}
    wanted, faults = desires(annotations)
    judge = _Judge(facts, memory, rules, limits)
    verdicts = [judge.of(gpu, wanted.get(gpu.address), note_of(annotations, gpu.address)) for gpu in facts.gpus]
    there = {gpu.address for gpu in facts.gpus}
    verdicts = [_with_fault(verdict, faults) for verdict in verdicts]
    verdicts += [
        Verdict(fault.address, "Invalid", fault.text, healthy=False) for fault in faults if fault.address not in there
    ]
    for address in wanted.keys() - there:
        has = ", ".join(sorted(there)) or "none"
        text = f"is no GPU of this node, which has {has}: correct the annotation, or remove it"
        verdicts.append(Verdict(address, "NoSuchGpu", text, healthy=False))
    return Decision(
        tuple(verdicts),
        "True" if all(verdict.healthy for verdict in verdicts) else "False",
        min((verdict.word for verdict in verdicts if verdict.text), key=_WORST.index, default="AsDesired"),
        "; ".join(f"{each.address}: {each.text}" if each.address else each.text for each in verdicts if each.text)
        or "every GPU is where it is wanted",
        dict(sorted(_annotations(facts.gpus, verdicts))),
        any(verdict.taint for verdict in verdicts),
    )


def _with_fault(verdict: Verdict, faults: Sequence[Fault]) -> Verdict:
    """What cannot be read is said where nothing worse is; the GPU is as if nothing was wanted."""
    text = next((fault.text for fault in faults if fault.address == verdict.address), "")
    if not text or verdict.text:
        return verdict
    return Verdict(verdict.address, "Invalid", text, healthy=False, taint=verdict.taint, note=verdict.note)


def _annotations(gpus: Sequence[Gpu], verdicts: Sequence[Verdict]) -> Sequence[tuple[str, str]]:
    by_address = {verdict.address: verdict for verdict in verdicts}
    found = []
    for gpu in gpus:
        part, verdict = part_of(gpu.address), by_address[gpu.address]
        found.append((STATE + part, gpu.state))
        if verdict.text:
            found.append((REASON + part, verdict.text[:LONGEST_TEXT]))
        if verdict.note is not None:
            found.append((HANDLED + part, verdict.note.write()))
    return found


class _Judge:
    """One look at the node, GPU by GPU."""

    def __init__(self, facts: Facts, memory: Memory, rules: Rules, limits: Limits) -> None:
        self._facts, self._memory, self._rules, self._limits = facts, memory, rules, limits
        self._annotations = facts.node["metadata"].get("annotations") or {}

    def of(self, gpu: Gpu, desire: Desire | None, noted: Note | Fault | None) -> Verdict:
        note = noted if isinstance(noted, Note) else None
        if gpu.state in LOST:
            return self._lost(gpu, desire, note)
        if gpu.state == "absent":
            return Verdict(gpu.address, "Absent", "is not on the bus of this node", note=note)
        if gpu.moving:
            return self._moving(gpu, desire, note)
        if desire is None:
            return Verdict(gpu.address)
        if note is not None and note.desire == desire.text:
            note = self._outcome(gpu, desire, note)
            if note.stage != "begun":
                return self._over(gpu, desire, note)
        elif gpu.state == desire.target and not isinstance(noted, Fault):
            return Verdict(gpu.address, note=Note(desire.text, "done"))
        if isinstance(noted, Fault):
            return Verdict(gpu.address, "Invalid", noted.text, healthy=False)
        return self._to_move(gpu, desire, note)

    def _lost(self, gpu: Gpu, desire: Desire | None, note: Note | None) -> Verdict:
        """A switch that ended there is not begun once more; one in the midst of which the kernel hangs is not over."""
        if desire is not None and note is not None and note.stage == "begun" and note.desire == desire.text:
            note = self._outcome(gpu, desire, note)
        word = "Wedged" if gpu.state == "wedged" else "Lost"
        text = f"is {gpu.state}, so the node keeps its taint: {gpu.reason or 'gpuswitchctl status says more'}"
        return Verdict(gpu.address, word, text, healthy=False, taint=True, note=note)

    def _moving(self, gpu: Gpu, desire: Desire | None, note: Note | None) -> Verdict:
        # Not the step: each would be a write to the node and an event.
        text = f"is on its way to {gpu.switch.target}" if gpu.switch and not gpu.switch.result else "is on its way"
        ours = (note is not None and note.stage == "begun") or (desire is not None and not _handled(note, desire))
        return Verdict(gpu.address, "Switching", text, taint=ours, note=note)

    def _outcome(self, gpu: Gpu, desire: Desire, note: Note) -> Note:
        """What became of a switch that may have been begun: the service was asked, and the answer may have been
        lost.
        """
        if note.stage != "begun":
            return note
        if gpu.state == desire.target:
            return Note(desire.text, "done")
        ended = gpu.since(note.known, desire.target)
        if ended is None:
            return note  # it never was
        return Note(desire.text, "done" if ended.result == "done" else "failed")

    def _over(self, gpu: Gpu, desire: Desire, note: Note) -> Verdict:
        again = _again(desire)
        if note.stage == "done":
            if gpu.state == desire.target:
                return Verdict(gpu.address, note=note)
            text = f"was moved to {gpu.state} by somebody else after {desire.text!r} was done, and stays there: {again}"
            return Verdict(gpu.address, "MovedElsewhere", text, healthy=False, note=note)
        before = self._annotations.get(REASON + part_of(gpu.address), "")
        if note.stage == "failed":
            ended = gpu.since((), desire.target)
            text = (
                f"did not go to {desire.target} ({ended.result}: {ended.reason}): {again}"
                if ended
                else before or f"did not go to {desire.target}: {again}"
            )
            return Verdict(gpu.address, "Failed", text, healthy=False, note=note)
        return Verdict(gpu.address, "GivenUp", before or f"was given up: {again}", healthy=False, note=note)

    def _to_move(self, gpu: Gpu, desire: Desire, note: Note | None) -> Verdict:
        facts, memory, limits = self._facts, self._memory, self._limits
        if owner := other_owner(gpu, facts.node, facts.pods, facts.slices, facts.claims):
            return Verdict(gpu.address, "OwnedElsewhere", f"is not moved: {owner}", healthy=False, note=note)
        refusal = facts.refusals.get(gpu.address)
        refused = "" if refusal is None or refusal.for_use else f"cannot go to {desire.target}: {refusal.text}"
        # What is worked on already keeps its taint and its time while the service gives no plan.
        at_work = refusal is not None and refusal.unanswered and (gpu.address, desire.text) in memory.since
        if refused and not at_work:
            return Verdict(gpu.address, "Refused", refused, healthy=False, note=note)
        recent = [at for at in memory.begun.get(gpu.address, ()) if facts.now - at < limits.window_seconds]
        new = note is None or note.desire != desire.text
        if new and len(recent) >= limits.switches:
            text = (
                f"waits: it was moved {len(recent)} times within {limits.window_seconds:g} s, and is wanted elsewhere "
                f"again ({desire.text}): see to it that one controller alone writes the annotation"
            )
            return Verdict(gpu.address, "TooManySwitches", text, healthy=False)
        since = memory.since.get((gpu.address, desire.text), facts.now)
        using = users(gpu.vendor, desire.target, facts.pods, self._rules)
        waits = refused or (self._waits(using) if using else memory.pauses.get(gpu.address, (0.0, ""))[1])
        if facts.now - since > limits.deadline_seconds:
            text = f"was given up after {limits.deadline_seconds:g} s ({waits or 'it was not begun'}): {_again(desire)}"
            return Verdict(gpu.address, "GivenUp", text, healthy=False, note=Note(desire.text, "given-up"))
        works: dict[str, Any] = {"taint": True, "note": note, "works": desire.text}
        if not tainted(facts.node):
            return Verdict(gpu.address, "Draining", "waits for the taint of its node", **works)
        if refused:
            return Verdict(gpu.address, "Refused", refused, healthy=False, **works)
        if using:
            ready = tuple(pod for pod in using if self._may_be_evicted(pod))
            return Verdict(gpu.address, "Draining", f"waits for {waits}", evicts=ready, **works)
        until, said = memory.pauses.get(gpu.address, (0.0, ""))
        if facts.now < until:
            return Verdict(gpu.address, "Beginning", f"waits, and asks the service again: {said}", **works)
        works["note"] = Note(desire.text, "begun", note.known if note and note.desire == desire.text else gpu.known)
        return Verdict(gpu.address, "Beginning", f"goes to {desire.target}", begins=desire.target, **works)

    def _may_be_evicted(self, pod: Object) -> bool:
        metadata = pod["metadata"]
        until, _said = self._memory.pods.get(metadata["uid"], (0.0, ""))
        return "deletionTimestamp" not in metadata and not static(pod) and self._facts.now >= until

    def _waits(self, using: Sequence[Object]) -> str:
        """For whom, and what the API server says of them."""
        named = []
        for pod in using:
            _until, said = self._memory.pods.get(pod["metadata"]["uid"], (0.0, ""))
            if static(pod):
                said = "it is static: take its file away from the node"
            elif "deletionTimestamp" in pod["metadata"]:
                said = "it is ending"
            named.append(f"{called(pod)} ({said})" if said else called(pod))
        return f"pods that use it: {', '.join(named)}"


def _again(desire: Desire) -> str:
    return f"to ask once more, write {desire.target}/TOKEN with a TOKEN of your own into the annotation"
