"""The API server, as the agent of one node needs it: by the client of the Kubernetes project, with objects as plain
JSON.

Annotations and the condition are applied (server-side apply), so each field is owned by who wrote it. The list of
taints is atomic (`Taints` in staging/src/k8s.io/api/core/v1/types.go: +listType=atomic), and to apply it would take
everybody's taints away: it is patched, on the condition that the node is still of the resourceVersion that was read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, cast

import urllib3
from kubernetes import client, config, watch
from kubernetes.client.exceptions import ApiException

from gpuswitch_kubernetes.names import CONDITION, EFFECT, MANAGER, TAINT

Object = Mapping[str, Any]

CONNECT_SECONDS, READ_SECONDS = 5, 30
WATCH_SECONDS = 300
"""After so long the server ends a watch, and the next one begins."""
APPLY = "application/apply-patch+yaml"
MERGE = "application/merge-patch+json"
DRA = "resource.k8s.io"
DRA_VERSIONS = ("v1", "v1beta2", "v1beta1")
"""Kubernetes 1.34, 1.33, 1.32; older ones had another form, and no driver for it is left."""
_EVICTION_PAUSE = 5.0
"""Seconds until an eviction is tried again where the server does not say how many."""
_LONGEST_NOTE, _LONGEST_REPORTER = 1024, 128
"""Bytes of the message and of the reporting instance of an event: pkg/apis/core/validation/events.go."""


class ClusterError(Exception):
    """The API server does not do it; one sentence. `status` is that of HTTP, 0 where there was no answer."""

    def __init__(self, text: str, status: int = 0) -> None:
        super().__init__(text)
        self.status = status


class ConflictError(ClusterError):
    """The object has changed since it was read: look again."""


def connect(kubeconfig: str | None) -> client.ApiClient:
    """By the service account of the pod that this runs in, or by a file. Raises ClusterError."""
    try:
        if kubeconfig is None:
            config.load_incluster_config()
        else:
            config.load_kube_config(kubeconfig)
    except (config.ConfigException, OSError, ValueError) as error:
        raise ClusterError(f"cannot tell where the API server is: {error}") from error
    settings = client.Configuration.get_default_copy()
    # What is tried again, and when, is decided here, and once.
    settings.retries = 0
    return client.ApiClient(settings)


class Cluster:
    """Every method raises ClusterError."""

    def __init__(self, api: client.ApiClient, node: str) -> None:
        self._core = client.CoreV1Api(api)
        self._groups = client.ApisApi(api)
        self._custom = client.CustomObjectsApi(api)
        self._name = node
        self._wall: Callable[[], datetime] = lambda: datetime.now(UTC)

    def node(self) -> Object:
        return cast("Object", self._asked(self._core.read_node, f"read node {self._name}", self._name))

    def pods(self) -> list[Object]:
        """Those of this node, of all namespaces."""
        listed = self._asked(
            self._core.list_pod_for_all_namespaces,
            f"list the pods of node {self._name}",
            field_selector=f"spec.nodeName={self._name}",
        )
        return list(listed["items"])

    def allocations(self) -> tuple[list[Object], list[Object]]:
        """ResourceSlices of this node, and all ResourceClaims; none where the cluster knows no dynamic resource
        allocation.
        """
        groups = self._asked(self._groups.get_api_versions, "list the groups of its API")["groups"]
        served = {each["version"] for group in groups if group["name"] == DRA for each in group["versions"]}
        version = next((version for version in DRA_VERSIONS if version in served), None)
        if version is None:
            return [], []

        def listed(plural: str, **more: str) -> list[Object]:
            found = self._asked(self._custom.list_cluster_custom_object, f"list {plural}", DRA, version, plural, **more)
            return list(found["items"])

        return listed("resourceslices", field_selector=f"spec.nodeName={self._name}"), listed("resourceclaims")

    def publish(self, node: Object, annotations: Mapping[str, str]) -> Object:
        """All annotations that the agent has: those that it had and are none of these go. The node as it is then.

        Raises ConflictError: the node is no longer as it was read, and nothing is written.
        """
        metadata = {
            "name": self._name,
            "resourceVersion": node["metadata"]["resourceVersion"],
            "annotations": dict(annotations),
        }
        body = {"apiVersion": "v1", "kind": "Node", "metadata": metadata}
        return self._patch(f"annotate node {self._name}", body, _APPLIED)

    def taint(self, node: Object, *, on: bool) -> Object:
        """Put the taint there or take it away; those of others stay. The node as it is then. Raises ConflictError, as
        above.
        """
        others = [taint for taint in node["spec"].get("taints") or () if taint["key"] != TAINT]
        taints = [*others, {"key": TAINT, "effect": EFFECT}] if on else others
        body = {"metadata": {"resourceVersion": node["metadata"]["resourceVersion"]}, "spec": {"taints": taints}}
        more = {"field_manager": MANAGER, "_content_type": MERGE}
        return self._patch(f"taint node {self._name}", body, more)

    def _patch(self, what: str, body: Object, more: Mapping[str, Any]) -> Object:
        return cast("Object", self._asked(self._core.patch_node, what, self._name, body, **more))

    def condition(self, node: Object, status: str, reason: str, message: str) -> None:
        """Set the condition of the node; since when it is so stays as it is where the status does."""
        now = self._wall().strftime("%Y-%m-%dT%H:%M:%SZ")
        before = condition_of(node)
        since = before["lastTransitionTime"] if before and before["status"] == status else now
        condition = {
            "type": CONDITION,
            "status": status,
            "reason": reason,
            "message": message,
            "lastHeartbeatTime": now,
            "lastTransitionTime": since,
        }
        self._apply_status({"conditions": [condition]})

    def clear(self) -> None:
        """Take the annotations, the condition and the taint of the agent away."""
        node = self.node()
        self.taint(self.publish(node, {}), on=False)
        self._apply_status({})

    def _apply_status(self, status: Object) -> None:
        body = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": self._name}, "status": status}
        self._asked(
            self._core.patch_node_status, f"set the condition of node {self._name}", self._name, body, **_APPLIED
        )

    def evict(self, pod: Object) -> tuple[float, str]:
        """By policy/v1, which heeds disruption budgets. When to try again, in seconds, and why it is not evicted; "":
        it is. Raises ClusterError only where there is no answer: what the server says to one pod (two budgets: 500; a
        webhook: 400, 403) is in nobody else's way.
        """
        metadata = pod["metadata"]
        body = {
            "apiVersion": "policy/v1",
            "kind": "Eviction",
            "metadata": {"name": metadata["name"], "namespace": metadata["namespace"]},
            # no other one that has its name by now
            "deleteOptions": {"preconditions": {"uid": metadata["uid"]}},
        }
        what = f"evict pod {metadata['namespace']}/{metadata['name']}"
        try:
            self._asked(self._core.create_namespaced_pod_eviction, what, metadata["name"], metadata["namespace"], body)
        except ClusterError as error:
            if error.status in (404, 409):
                return 0.0, ""  # it is gone, and the next look says what is there
            if error.status and isinstance(error.__cause__, ApiException):
                return _retry_after(error.__cause__), str(error)
            raise
        return 0.0, ""

    def event(self, kind: str, reason: str, message: str, node: Object) -> None:
        """Say it to who looks at the events of the node. `kind` is Normal or Warning."""
        now = self._wall().strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        body = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"generateName": f"{self._name}.", "namespace": "default"},
            "involvedObject": {"apiVersion": "v1", "kind": "Node", "name": self._name, "uid": node["metadata"]["uid"]},
            "type": kind,
            "reason": reason,
            "message": _cut(message, _LONGEST_NOTE),
            "action": "Switch",
            "eventTime": now,
            "reportingComponent": MANAGER,
            "reportingInstance": _cut(self._name, _LONGEST_REPORTER),
        }
        self._asked(self._core.create_namespaced_event, "write an event", "default", body)

    def changes(self, what: str) -> Iterator[None]:
        """Something of the node, or of its `pods`, has changed. Ends when the server ends it; then look, and watch
        again.
        """
        if what == "node":
            listing, selector = self._core.list_node, f"metadata.name={self._name}"
        else:
            listing, selector = self._core.list_pod_for_all_namespaces, f"spec.nodeName={self._name}"
        try:
            # Where it begins does not matter: after it has begun, all is looked at. Objects stay as they are by the
            # return type: with deserialize=False, client 37 raises KeyError at an event ERROR.
            for _event in watch.Watch(return_type=object).stream(
                listing,
                field_selector=selector,
                allow_watch_bookmarks=True,
                timeout_seconds=WATCH_SECONDS,
                _request_timeout=(CONNECT_SECONDS, WATCH_SECONDS + READ_SECONDS),
            ):
                yield
        except (ApiException, *_NO_ANSWER) as error:
            raise ClusterError(f"cannot watch {what}: {_sentence(error)}") from error

    def _asked(self, call: Callable[..., Any], what: str, *args: Any, **more: Any) -> Any:
        try:
            answer = call(*args, **more, _preload_content=False, _request_timeout=(CONNECT_SECONDS, READ_SECONDS))
            body = answer.data if hasattr(answer, "data") and answer.data else answer.read()
            if not 200 <= answer.status <= 299:
                raise ApiException(status=answer.status, reason=answer.reason, body=body)
            return json.loads(body)
        except ApiException as error:
            kind = ConflictError if error.status == 409 else ClusterError
            raise kind(f"cannot {what}: {_sentence(error)}", error.status or 0) from error
        except _NO_ANSWER as error:
            raise ClusterError(f"cannot {what}: {_sentence(error)}") from error


_NO_ANSWER = (urllib3.exceptions.HTTPError, config.ConfigException, OSError, ValueError)
"""ConfigException: the token is read anew every minute, and its file may be empty just then."""
_APPLIED: dict[str, Any] = {"field_manager": MANAGER, "force": True, "_content_type": APPLY}
"""What nobody else has a business to write is taken over from whoever did."""


def condition_of(node: Object) -> Object | None:
    conditions = node.get("status", {}).get("conditions") or ()
    return next((each for each in conditions if each["type"] == CONDITION), None)


def _retry_after(error: ApiException) -> float:
    told = (error.headers or {}).get("Retry-After", "")
    return float(told) if told.isdigit() and told != "0" else _EVICTION_PAUSE


def _cut(text: str, longest: int) -> str:
    """To so many bytes, in whole characters."""
    return text.encode()[:longest].decode(errors="ignore")


def _sentence(error: Exception) -> str:
    """What the server says in its Status, and why it says so (the budget of an eviction)."""
    if not isinstance(error, ApiException):
        return str(error) or type(error).__name__
    try:
        status = json.loads(error.body)
        causes = [cause["message"] for cause in (status.get("details") or {}).get("causes") or ()]
        return " ".join([status["message"], *causes])
    except (TypeError, ValueError, KeyError, AttributeError):
        return f"the server answers {error.status} {error.reason}"
