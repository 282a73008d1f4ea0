"""The agent, the real client and the stand-in over HTTP, with something wrong at any request and at any step, by a
seed.

What has to hold is looked at where it could break: when a switch is begun, when the node is written, after each look
of the agent.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from gpuswitch_kubernetes.agent import Agent
from gpuswitch_kubernetes.cluster import Cluster, condition_of
from gpuswitch_kubernetes.decide import Limits, tainted
from gpuswitch_kubernetes.desires import Note
from gpuswitch_kubernetes.names import DESIRED, HANDLED, part_of
from gpuswitch_kubernetes.service import Service
from kubernetes import client

from tests.harness.kubernetes.fake_service import Card, FakeService
from tests.harness.kubernetes.fields import Object
from tests.harness.kubernetes.server import ApiServer, Request, serving
from tests.harness.kubernetes.store import Key

NODE = "gpu1"
ADDRESSES = ("0000:01:00.0", "0000:41:00.0")
FAULTS_EACH = 40
"""So many in one world; then all is well again, and it has to come to rest."""
CALM_LOOKS = 200
_SECOND: Key = ("poddisruptionbudgets", "default", "second")
"""A budget for the same pods: none of them can be evicted while there are two."""
_AT_REQUEST = (
    "500",
    "503",
    "429",
    "403",
    "drop-before",
    "drop-after",
    "conflict",
    "event",
    "crash-before",
    "crash-after",
)
_AT_COMMAND = ("unreachable", "lost-before", "lost-after", "event", "restart", "crash-before", "crash-after")


class Crash(BaseException):
    """The agent is killed here."""


class Violation(AssertionError):  # noqa: N818 -- what a campaign looks for
    """Of what has to hold always."""


def node(name: str = NODE, **more: Any) -> Object:
    metadata = {"name": name, "labels": {"kubernetes.io/hostname": name}, **more}
    other = {"key": "node.kubernetes.io/unreachable", "effect": "NoExecute"}
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": metadata,
        "spec": {"taints": [other]},
        "status": {"conditions": [{"type": "Ready", "status": "True"}]},
    }


def pod(name: str, resource: str = "nvidia.com/gpu", **metadata: Any) -> Object:
    container = {"name": "main", "image": "work", "resources": {"limits": {resource: "1"}}}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "default", "uid": f"uid of {name}", **metadata},
        "spec": {"nodeName": NODE, "containers": [container]},
        "status": {"phase": "Running"},
    }


def budget(allowed: int, name: str = "guard") -> Object:
    """Of all pods with the label app=guarded."""
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"selector": {"matchLabels": {"app": "guarded"}}},
        "status": {"disruptionsAllowed": allowed, "desiredHealthy": 1, "currentHealthy": 1, "expectedPods": 1},
    }


def api_client(address: str) -> client.ApiClient:
    settings = client.Configuration(host=address)
    settings.retries = 0
    return client.ApiClient(settings)


class CrashingCluster(Cluster):
    """`crash` is asked before and after each request: it may raise Crash."""

    crash: Callable[[str], None]

    def _asked(self, call: Callable[..., Any], what: str, *args: Any, **more: Any) -> Any:
        self.crash("before")
        answer = super()._asked(call, what, *args, **more)
        self.crash("after")
        return answer


class World:
    """A node with its pods, its GPUs, those who want something of them, and the agent."""

    def __init__(self, seed: int, api: ApiServer, address: str, faults: float = 0.12) -> None:
        self.chance = random.Random(seed)  # noqa: S311 -- a schedule that can be had again
        self.api = api
        self._client = api_client(address)
        self._rate = faults
        self.faults = 0
        self.now = 1000.0
        self._wall = timedelta()
        self._crash = ""
        self._tokens = 0
        self._began: dict[tuple[str, str], int] = {}
        self._was_tainted = False
        self.broken = ""
        """What was found in a thread of the server, where nobody would hear of it."""
        self.service = FakeService(*(Card(each) for each in ADDRESSES))
        self.service.begins = self._begins
        api.add(node())
        api.add(budget(1))
        api.fault = self._at_request
        api.store.written = self._written
        self.service.fault = self._at_command
        self.agent = self._new_agent()

    # What has to hold ------------------------------------------------------------------------------------------------

    def _begins(self, card: Card, target: str) -> None:
        node = self.api.store.objects["nodes", "", NODE]
        if not tainted(node):
            raise Violation(f"{card.address} moves without the taint")
        if target == "vfio" and (left := [each["metadata"]["name"] for each in self._pods() if _runs(each)]):
            raise Violation(f"{card.address} moves away from {left}")
        text = (node["metadata"].get("annotations") or {}).get(HANDLED + part_of(card.address), "")
        note = Note.read(text)
        if note is None or note.stage != "begun" or note.desire.partition("/")[0] != target:
            raise Violation(f"{card.address} moves to {target} with the note {text!r}")
        key = (card.address, note.desire)
        self._began[key] = self._began.get(key, 0) + 1
        if self._began[key] > 1:
            raise Violation(f"{card.address} moves once more for {note.desire}")

    def _written(self, key: Key, new: Object | None) -> None:
        if key[0] != "nodes" or new is None:
            return
        now = tainted(new)
        wedged = any(card.state == "wedged" for card in self.service.cards.values())
        if self._was_tainted and not now and wedged:
            self.broken = "the taint goes while a GPU is wedged"
        self._was_tainted = now
        if not any(taint["key"].startswith("node.kubernetes.io") for taint in new["spec"]["taints"]):
            self.broken = "somebody else's taint is gone"

    def _look(self) -> None:
        """The agent has seen all, and nothing was in its way: who waits has a reason."""
        node = self.api.store.get(("nodes", "", NODE))
        condition = condition_of(node)
        if condition is None:
            raise Violation("there is no condition")
        for address, desire in self._desires(node).items():
            card = self.service.cards[address]
            if (
                card.state != desire.partition("/")[0]
                and condition["status"] != "Unknown"
                and f"{address}: " not in condition["message"]
            ):
                raise Violation(
                    f"{address} is {card.state} and wanted {desire}, and the condition says: {condition['message']}"
                )

    def rest(self) -> None:
        """All is well again: every desire has to come to an end, and the node to be free."""
        self._rate = 0.0
        self.api.change(
            ("poddisruptionbudgets", "default", "guard"), lambda each: each["status"].update(disruptionsAllowed=100)
        )
        self.api.change(
            ("nodes", "", NODE), lambda each: each["metadata"]["labels"].pop("nvidia.com/gpu.workload.config", None)
        )
        if _SECOND in self.api.store.objects:
            self.api.store.delete(_SECOND)
        for card in self.service.cards.values():
            card.refusal = ""
        for _ in range(CALM_LOOKS):
            for card in self.service.cards.values():
                card.ends = "done"
                self.service.free(card)
            self.turn()
            for each in self._pods():
                if "deletionTimestamp" in each["metadata"]:
                    self.api.finish("default", each["metadata"]["name"])
            self.service.advance()
            if self._rests():
                return
        node = self.api.store.get(("nodes", "", NODE))
        raise Violation(f"no rest: {[card.record() for card in self.service.cards.values()]}, {node}")

    def _rests(self) -> bool:
        node = self.api.store.get(("nodes", "", NODE))
        annotations = node["metadata"].get("annotations") or {}
        for address, desire in self._desires(node).items():
            note = Note.read(annotations.get(HANDLED + part_of(address), ""))
            if note is None or note.desire != desire or note.stage == "begun":
                return False
            if note.stage == "done" and (address, desire) in self._began and self.service.cards[address].running:
                return False
        return not tainted(node)

    # What happens ----------------------------------------------------------------------------------------------------

    def turn(self) -> None:
        """One look of the agent, with whatever comes in between."""
        before = self._desires(self.api.store.get(("nodes", "", NODE)))
        faults = self.faults
        try:
            seconds = self.agent.once()
        except Crash:
            self.agent = self._new_agent()
            return
        finally:
            if self.broken:
                raise Violation(self.broken)
        if (
            faults == self.faults
            and not self.agent._failures
            and self._desires(self.api.store.get(("nodes", "", NODE))) == before
        ):
            self._look()
        self.now += min(seconds, 30.0) + 0.1
        if self._rate:
            self.service.advance()
            if self.chance.random() < 0.5:
                self.event()

    def event(self) -> None:
        """Something that others do."""
        chance, cards = self.chance, list(self.service.cards.values())
        card = chance.choice(cards)
        match chance.randrange(14):
            case 0 | 1 | 2:
                self._tokens += 1
                desire = f"{chance.choice(('vfio', 'host'))}/{self._tokens}"
                self.api.change(("nodes", "", NODE), lambda each: annotate(each, card.address, desire))
            case 3:
                self.api.change(("nodes", "", NODE), lambda each: annotate(each, card.address, None))
            case 4 | 5 if not tainted(self.api.store.objects["nodes", "", NODE]):
                labels = {"app": "guarded"} if chance.random() < 0.5 else {}
                self._tokens += 1
                self.api.add(pod(f"work-{self._tokens}", labels=labels))
            case 6 | 7:
                for each in self._pods():
                    if "deletionTimestamp" in each["metadata"] and chance.random() < 0.7:
                        self.api.finish("default", each["metadata"]["name"])
            case 8:
                allowed = chance.randrange(3)
                self.api.change(
                    ("poddisruptionbudgets", "default", "guard"),
                    lambda each: each["status"].update(disruptionsAllowed=allowed),
                )
            case 9:
                card.refusal = chance.choice(("", "", "busy", "not_viable"))
            case 10:
                card.ends = chance.choice(("done", "done", "done", "reverted", "wedged", "failed"))
            case 11:
                self.service.free(card)
            case 12 if _SECOND in self.api.store.objects:
                self.api.store.delete(_SECOND)
            case 12:
                self.api.add(budget(1, _SECOND[2]))
            case 13 if not card.running and card.state in ("host", "vfio"):
                # by hand, on the node
                card.ends = "done"
                self.service.start(card, "vfio" if card.state == "host" else "host")

    def _at_request(self, _request: Request) -> str:
        if self.chance.random() >= self._rate:
            return ""
        self.faults += 1
        fault = self.chance.choice(_AT_REQUEST)
        match fault:
            case "conflict":
                self.api.change(
                    ("nodes", "", NODE), lambda each: each["metadata"]["labels"].update(touched=str(self.faults))
                )
            case "event":
                self.event()
                self.service.advance()
            case "crash-before" | "crash-after":
                self._crash = fault.removeprefix("crash-")
                # the request is done, and the agent killed at the next point
            case _:
                return fault
        return ""

    def _at_command(self, _words: Sequence[str]) -> str:
        if self.chance.random() >= self._rate:
            return ""
        self.faults += 1
        fault = self.chance.choice(_AT_COMMAND)
        match fault:
            case "event":
                self.event()
            case "restart":
                self.service.restart()
            case "crash-before":
                raise Crash
            case "crash-after":
                self._crash = "after"
            case _:
                return fault
        return ""

    def _new_agent(self) -> Agent:
        self._crash = ""
        self._wall += timedelta(hours=self.chance.uniform(-5, 5))
        cluster = CrashingCluster(self._client, NODE)
        cluster.crash = self._maybe_crash
        cluster._wall = lambda: datetime.now(UTC) + self._wall
        return Agent(
            cluster,
            Service(command=self.service.run),
            limits=Limits(switches=6),
            clock=lambda: self.now,
            chance=self.chance,
        )

    def _maybe_crash(self, where: str) -> None:
        if self._crash == where:
            raise Crash

    def _pods(self) -> list[Object]:
        return self.api.store.list("pods")

    def _desires(self, node: Object) -> dict[str, str]:
        annotations = node["metadata"].get("annotations") or {}
        return {
            each: annotations[DESIRED + part_of(each)] for each in ADDRESSES if DESIRED + part_of(each) in annotations
        }


def annotate(node: Object, address: str, desire: str | None) -> None:
    annotations = node["metadata"].setdefault("annotations", {})
    if desire is None:
        annotations.pop(DESIRED + part_of(address), None)
    else:
        annotations[DESIRED + part_of(address)] = desire


def _runs(pod: Object) -> bool:
    return str(pod["status"]["phase"]) == "Running"


def one_world(seed: int) -> int:
    """How many faults there were. Raises Violation."""
    api = ApiServer()
    with serving(api) as address:
        world = World(seed, api, address)
        while world.faults < FAULTS_EACH:
            world.turn()
        world.rest()
        return world.faults


def campaign(faults: int, seed: int = 0) -> Iterator[tuple[int, int]]:
    """Worlds, until there were so many faults: each seed, and how many there were so far."""
    done = 0
    while done < faults:
        try:
            done += one_world(seed)
        except Violation as error:
            raise Violation(f"seed {seed}: {error}") from error
        yield seed, done
        seed += 1
