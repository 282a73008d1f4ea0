"""The agent of one node: looks at everything, decides, does it, and looks again.

Nothing that it knows by itself is needed to go on: it may be killed at any point, as may the API server and the
service.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from gpuswitch_kubernetes.cluster import Cluster, ClusterError, ConflictError, condition_of
from gpuswitch_kubernetes.decide import (
    Decision,
    Facts,
    Limits,
    Memory,
    Object,
    Verdict,
    decide,
    tainted,
    wanting,
)
from gpuswitch_kubernetes.gpus import Gpu, Refusal
from gpuswitch_kubernetes.names import DESIRED, PREFIX
from gpuswitch_kubernetes.service import Service, ServiceError
from gpuswitch_kubernetes.users import Rules

log = logging.getLogger("gpuswitch_kubernetes")

RESYNC_SECONDS = 30.0
"""How long nobody has to say that anything has changed."""
BUSY_SECONDS = 5.0
"""The same while something is under way."""
FIRST_BACKOFF, LONGEST_BACKOFF = 1.0, 60.0
ASK_AGAIN_SECONDS = 10.0
"""After the service has refused to begin."""
HEARTBEAT_SECONDS = 300.0
"""How old the condition may grow: the kubelet writes the node as rarely where nothing changes."""


class Agent:
    """`clock` is monotonic. `chance` spreads the agents of many nodes that have all lost the same API server."""

    def __init__(
        self,
        cluster: Cluster,
        service: Service,
        rules: Rules | None = None,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
        chance: random.Random | None = None,
    ) -> None:
        self._cluster, self._service = cluster, service
        self._rules, self._limits = rules or Rules(), limits or Limits()
        self._clock, self._chance = clock, chance or random.Random()  # noqa: S311 -- spreads load, guards nothing
        self._memory = Memory()
        self._told: dict[str, tuple[str, str]] = {}
        self._heartbeat: float | None = None
        self._failures = 0
        self._changed = threading.Event()

    def run(self) -> NoReturn:
        """Until the process ends."""
        for name, changes in (
            ("node", lambda: self._cluster.changes("node")),
            ("pods", lambda: self._cluster.changes("pods")),
            ("service", self._service.changes),
        ):
            threading.Thread(target=self._listen, args=(changes,), name=f"changes of {name}", daemon=True).start()
        while True:
            seconds = self.once()
            self._changed.wait(seconds)
            self._changed.clear()

    def _listen(self, changes: Callable[[], Iterator[None]]) -> None:
        """What is missed while nobody listens, the next look sees."""
        while True:
            try:
                for _ in changes():
                    self._changed.set()
            except (ClusterError, ServiceError) as error:
                log.info("%s", error)
            time.sleep(self._chance.uniform(FIRST_BACKOFF, 2 * FIRST_BACKOFF))

    def once(self) -> float:
        """One look, and what follows from it. In how many seconds to look again, if nothing changes before."""
        try:
            seconds = self._reconcile()
        except ConflictError as error:
            log.debug("%s", error)
            return self._later()
        except ClusterError as error:
            log.warning("%s; no GPU is moved meanwhile", error)
            return self._later()
        self._failures = 0
        return seconds

    def _later(self) -> float:
        self._failures += 1
        longest = min(LONGEST_BACKOFF, FIRST_BACKOFF * 2 ** min(self._failures - 1, 10))
        return self._chance.uniform(longest / 2, longest)

    def look(self) -> tuple[Facts, Decision]:
        """All that is seen, and what would be done. Changes nothing. Raises ClusterError."""
        node = self._cluster.node()
        try:
            gpus = self._service.gpus()
        except ServiceError as error:
            facts = Facts(node, None, self._clock(), str(error))
        else:
            pods: list[Object] = []
            slices: list[Object] = []
            claims: list[Object] = []
            moves = wanting(node, gpus)
            refusals = self._refusals(moves)
            if moves:
                pods = self._cluster.pods()
                slices, claims = self._cluster.allocations()
            facts = Facts(node, gpus, self._clock(), "", pods, slices, claims, refusals)
        return facts, decide(facts, self._memory, self._rules, self._limits)

    def _refusals(self, moves: Sequence[tuple[Gpu, str]]) -> dict[str, Refusal]:
        asked = ((gpu.address, self._refusal(gpu.address, target)) for gpu, target in moves)
        return {address: refusal for address, refusal in asked if refusal is not None}

    def _refusal(self, address: str, target: str) -> Refusal | None:
        try:
            return self._service.refusal(address, target)
        except ServiceError as error:
            # The service has just told its GPUs: it is this one that it does not get done with.
            return Refusal(str(error), unanswered=True)

    def _reconcile(self) -> float:
        facts, decision = self.look()
        node = facts.node
        self._remember(facts, decision)
        if decision.tainted and not tainted(node):
            # Whatever follows is decided by another look: a pod may have come before the taint.
            node = self._cluster.taint(node, on=True)
            self._say(node, decision)
            return 0.0
        begun = [verdict for verdict in decision.verdicts if verdict.begins]
        # Before a switch is asked for, even where nothing is new: that the node is as it was looked at, taint and all.
        if decision.annotations is not None and (begun or decision.annotations != _ours(node)):
            node = self._cluster.publish(node, decision.annotations)
        if decision.tainted is False and tainted(node):
            node = self._cluster.taint(node, on=False)
        self._say(node, decision)
        for verdict in decision.verdicts:
            self._evict(verdict)
        for verdict in begun:
            self._begin(verdict)
        if begun:
            return 0.0 if not self._memory.pauses else BUSY_SECONDS
        return BUSY_SECONDS if any(verdict.taint for verdict in decision.verdicts) else RESYNC_SECONDS

    def _remember(self, facts: Facts, decision: Decision) -> None:
        memory, now = self._memory, facts.now
        if facts.gpus is None:
            return  # what was worked on is still to be
        working = {(verdict.address, verdict.works) for verdict in decision.verdicts if verdict.works}
        memory.since = {key: memory.since.get(key, now) for key in working}
        there = {pod["metadata"]["uid"] for pod in facts.pods}
        memory.pods = {uid: told for uid, told in memory.pods.items() if uid in there}
        at_work = {address for address, _desire in working}
        memory.pauses = {address: told for address, told in memory.pauses.items() if address in at_work}
        for times in memory.begun.values():
            times[:] = [at for at in times if now - at < self._limits.window_seconds]

    def _evict(self, verdict: Verdict) -> None:
        for pod in verdict.evicts:
            seconds, said = self._cluster.evict(pod)
            if said:
                self._memory.pods[pod["metadata"]["uid"]] = (self._clock() + seconds, said)
            else:
                self._memory.pods.pop(pod["metadata"]["uid"], None)

    def _begin(self, verdict: Verdict) -> None:
        memory = self._memory
        times = memory.begun.setdefault(verdict.address, [])
        if verdict.address not in memory.pauses:
            times.append(self._clock())
        try:
            refusal = self._service.begin(verdict.address, verdict.begins)
            said = "" if refusal is None else refusal.text
        except ServiceError as error:
            said = str(error)  # it may have begun: the next look tells
        if said:
            log.warning("%s: %s", verdict.address, said)
            memory.pauses[verdict.address] = (self._clock() + ASK_AGAIN_SECONDS, said)
        else:
            memory.pauses.pop(verdict.address, None)

    def _say(self, node: Object, decision: Decision) -> None:
        """In the condition, in events and in the log: each thing once, and the condition now and then, as a sign of
        life.
        """
        now, before = self._clock(), condition_of(node)
        told = (decision.status, decision.word, decision.text)
        if (
            before is None
            or (before["status"], before["reason"], before["message"]) != told
            or self._heartbeat is None
            or now - self._heartbeat >= HEARTBEAT_SECONDS
        ):
            self._cluster.condition(node, *told)
            self._heartbeat = now
        for verdict in decision.verdicts:
            saying = (verdict.word, verdict.text)
            if self._told.get(verdict.address, ("AsDesired", "")) == saying:
                continue
            self._told[verdict.address] = saying
            text = f"{verdict.address}: {verdict.text or 'is where it is wanted'}"
            log.log(logging.INFO if verdict.healthy else logging.WARNING, "%s: %s", verdict.word, text)
            try:
                self._cluster.event("Normal" if verdict.healthy else "Warning", verdict.word, text, node)
            except ClusterError as error:
                log.info("%s", error)  # the condition says the same


def _ours(node: Object) -> dict[str, str]:
    annotations = node["metadata"].get("annotations") or {}
    return {key: value for key, value in annotations.items() if key.startswith(PREFIX) and not key.startswith(DESIRED)}
