"""gpuswitchctl as the agent sees it, over cards in memory: what is begun takes its time, and ends as it is told to."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from gpuswitch_kubernetes.service import ServiceError

Record = dict[str, Any]


@dataclass
class Card:
    """`ends` is what becomes of the next switch. `refusal` is the kind of error that refuses one, "" for none."""

    address: str
    state: str = "host"
    vendor: str = "nvidia"
    refusal: str = ""
    ends: str = "done"
    switch: Record | None = None
    history: list[Record] = field(default_factory=list)
    origin: str = "host"
    left: int = 0

    @property
    def running(self) -> bool:
        return self.switch is not None and self.switch["result"] is None

    def record(self) -> Record:
        reason = "the kernel has not returned" if self.state == "wedged" else ""
        return {
            "address": self.address,
            "vendor": self.vendor,
            "state": self.state,
            "reason": reason,
            "switch": self.switch,
        }


class FakeService:
    """`begins` is told of each switch that the agent begins, before it does. `fault` is asked at each command.

    A fault is "" (none), `unreachable`, or `lost-before` and `lost-after`: the command ends without an answer, before
    it was done, and after.
    """

    def __init__(self, *cards: Card) -> None:
        self.cards = {card.address: card for card in cards}
        self.fault: Callable[[Sequence[str]], str] = lambda _words: ""
        self.begins: Callable[[Card, str], None] = lambda _card, _target: None
        self._ids = count(1)

    def run(self, words: Sequence[str]) -> tuple[int, str, str]:
        """As gpuswitch_kubernetes.service.run does it."""
        fault = self.fault(words)
        if fault == "lost-before":
            raise ServiceError("gpuswitchctl has not ended")
        told = _error("unreachable", "cannot reach the service") if fault == "unreachable" else self._answer(words[1:])
        if fault == "lost-after":
            raise ServiceError("gpuswitchctl has not ended")
        return 0, json.dumps({"version": 1, **told}), ""

    def _answer(self, words: Sequence[str]) -> Record:
        match list(words):
            case ["list", "--json"]:
                return {"gpus": [card.record() for card in self.cards.values()]}
            case ["history", *_]:
                return {"switches": [entry for card in self.cards.values() for entry in card.history]}
            case ["plan", address, target, "--json"]:
                return self._refused(self.cards[address], target) or {"plans": []}
            case ["to-vfio" | "to-host" as verb, address, "--no-wait", "--json"]:
                return self._begin(self.cards[address], verb.removeprefix("to-"))
        raise AssertionError(words)

    def _refused(self, card: Card, target: str) -> Record | None:
        if card.state in ("wedged", "failed"):
            return _error("wedged", f"{card.address} is {card.state}")
        if card.running and card.switch is not None and card.switch["target"] != target:
            return _error("in_progress", f"{card.address} is on its way elsewhere")
        if card.refusal and card.state != target:
            return _error(card.refusal, f"{card.address} is refused: {card.refusal}")
        return None

    def _begin(self, card: Card, target: str) -> Record:
        if refused := self._refused(card, target):
            return refused
        if card.state == target:
            return {"event": "result", "result": "done"}
        if not card.running:
            self.begins(card, target)
            self.start(card, target)
        return {"event": "begun"}

    def start(self, card: Card, target: str) -> None:
        """Whoever asked."""
        card.origin, card.left = card.state, 3
        card.state = "detaching" if target == "vfio" else "reattaching"
        card.switch = {"id": f"s{next(self._ids)}", "target": target, "result": None, "reason": "", "title": "unbind"}

    def advance(self) -> None:
        """Some time passes."""
        for card in self.cards.values():
            if card.running and card.switch is not None and card.state != "wedged":
                card.left -= 1
                if card.left == 0:
                    self._end(card, card.switch)

    def _end(self, card: Card, switch: Record) -> None:
        if card.ends == "wedged":
            card.state, switch["result"] = "wedged", "wedged"
            return
        switch["result"], switch["reason"] = card.ends, "" if card.ends == "done" else "a step failed"
        card.state = {"done": switch["target"], "failed": "failed"}.get(card.ends, card.origin)
        card.history.insert(0, {**switch, "gpu": card.address})

    def free(self, card: Card) -> None:
        """The kernel returns, or a failed card is recovered."""
        if card.state == "wedged" and card.switch is not None:
            card.ends = "reverted"
            self._end(card, card.switch)
        elif card.state == "failed":
            card.state = "host"

    def restart(self) -> None:
        """The service is killed: what was under way is taken back as the end of the same switch, and the last ones
        are in the history alone.
        """
        for card in self.cards.values():
            if card.running and card.state != "wedged" and card.switch is not None:
                card.ends = "reverted"
                self._end(card, card.switch)
            if card.state != "wedged":
                card.switch = None


def _error(kind: str, text: str) -> Record:
    return {"event": "error", "error": {"kind": kind, "text": text}, "blockers": []}
