"""The HTTP side: what clients ask for, and what they get."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.harness.kubernetes.fields import LIST_KEYS, Conflict, Object, Owners, dotted
from tests.harness.kubernetes.store import Key, StatusError, Store, stamp

APPLY, MERGE, STRATEGIC = (
    "application/apply-patch+yaml",
    "application/merge-patch+json",
    "application/strategic-merge-patch+json",
)


@dataclass(frozen=True)
class Resource:
    """One that is served: its group and version ("v1", "policy/v1"), name, kind, whether it is in namespaces."""

    api: str
    name: str
    kind: str
    namespaced: bool = True
    subresources: tuple[str, ...] = ()


RESOURCES = (
    Resource("v1", "nodes", "Node", False, ("status",)),
    Resource("v1", "namespaces", "Namespace", False),
    Resource("v1", "pods", "Pod", True, ("status", "eviction")),
    Resource("v1", "events", "Event"),
    Resource("v1", "serviceaccounts", "ServiceAccount"),
    Resource("apps/v1", "daemonsets", "DaemonSet"),
    Resource("policy/v1", "poddisruptionbudgets", "PodDisruptionBudget"),
    Resource("rbac.authorization.k8s.io/v1", "clusterroles", "ClusterRole", False),
    Resource("rbac.authorization.k8s.io/v1", "clusterrolebindings", "ClusterRoleBinding", False),
    Resource("rbac.authorization.k8s.io/v1", "roles", "Role"),
    Resource("rbac.authorization.k8s.io/v1", "rolebindings", "RoleBinding"),
    Resource("admissionregistration.k8s.io/v1", "validatingadmissionpolicies", "ValidatingAdmissionPolicy", False),
    Resource(
        "admissionregistration.k8s.io/v1",
        "validatingadmissionpolicybindings",
        "ValidatingAdmissionPolicyBinding",
        False,
    ),
    Resource("resource.k8s.io/v1", "resourceslices", "ResourceSlice", False),
    Resource("resource.k8s.io/v1", "resourceclaims", "ResourceClaim"),
)

_PATH = re.compile(
    r"/(?:api/(?P<core>v1)|apis/(?P<group>[^/]+/[^/]+))(?:/namespaces/(?P<namespace>[^/]+)(?=/[^/]))?"
    r"/(?P<resource>[^/]+)(?:/(?P<name>[^/]+))?(?:/(?P<sub>[^/]+))?"
)


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    query: Mapping[str, str]
    body: Any
    content_type: str = ""
    agent: str = ""


@dataclass
class Answer:
    code: int
    body: Any
    headers: dict[str, str] = field(default_factory=dict)


Fault = Callable[[Request], str]
"""What happens to a request: "" (nothing), a status of HTTP, or `drop-before` and `drop-after`: the connection ends
before it is done, and after.
"""


class ApiServer:
    """`fault` is asked at each request. `ending`: whether pods that are deleted stay until `finish`, as those that a
    kubelet runs.
    """

    def __init__(self, store: Store | None = None) -> None:
        self.store = store or Store()
        self.fault: Fault = lambda _request: ""
        self.ending = True
        self.requests: list[Request] = []

    # What a test does ------------------------------------------------------------------------------------------------

    def add(self, thing: Object) -> Object:
        """Have an object there, as somebody else wrote it."""
        resource = next(each for each in RESOURCES if (each.api, each.kind) == (thing["apiVersion"], thing["kind"]))
        metadata = thing["metadata"]
        namespace = metadata.get("namespace", "default") if resource.namespaced else ""
        return self.store.create((resource.name, namespace, metadata["name"]), thing)

    def change(self, key: Key, change: Callable[[Object], object], manager: str = "somebody") -> Object:
        """Have somebody else write an object."""
        with self.store.lock:
            before = self.store.get(key)
            after = deepcopy(before)
            change(after)
            return self._updated(key, before, after, manager, "")

    def finish(self, namespace: str, name: str) -> None:
        """The kubelet has ended a pod."""
        self.store.delete(("pods", namespace, name))

    # Requests --------------------------------------------------------------------------------------------------------

    def respond(self, request: Request) -> Answer:
        """All but watches."""
        try:
            return self._respond(request)
        except StatusError as error:
            headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
            return Answer(error.code, error.status(), headers)

    def _respond(self, request: Request) -> Answer:
        if request.method == "GET" and (found := _discovery(request.path.rstrip("/"))) is not None:
            return Answer(200, found)
        resource, namespace, name, sub = self.route(request.path)
        key = (resource.name, namespace, name)
        match request.method:
            case "GET" if name:
                return Answer(200, self.store.get(key))
            case "GET":
                with self.store.lock:
                    version = str(self.store.version)
                    items = [
                        each for each in self.store.list(resource.name, namespace) if _selected(each, request.query)
                    ]
                # the entries of a list have no kind of their own
                items = [
                    {name: value for name, value in each.items() if name not in ("kind", "apiVersion")}
                    for each in items
                ]
                return Answer(
                    200,
                    {
                        "kind": f"{resource.kind}List",
                        "apiVersion": resource.api,
                        "metadata": {"resourceVersion": version},
                        "items": items,
                    },
                )
            case "POST" if sub == "eviction":
                return self._evict(key, request)
            case "POST":
                return Answer(201, self._create(resource, namespace, request))
            case "PUT":
                return Answer(200, self._put(key, sub, request))
            case "PATCH":
                return self._patch(resource, key, sub, request)
            case "DELETE":
                self._delete(key, request.body or {})
                return Answer(200, {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"})
        raise StatusError(405, "MethodNotAllowed", "the server does not allow this method on the requested resource")

    def route(self, path: str) -> tuple[Resource, str, str, str]:
        match = _PATH.fullmatch(path)
        if match is not None:
            api = match["core"] or match["group"]
            for resource in RESOURCES:
                if (resource.api, resource.name) == (api, match["resource"]):
                    sub = match["sub"] or ""
                    if sub in ("", *resource.subresources):
                        return resource, unquote(match["namespace"] or ""), unquote(match["name"] or ""), sub
        raise StatusError(404, "NotFound", "the server could not find the requested resource")

    def _create(self, resource: Resource, namespace: str, request: Request) -> Object:
        body = deepcopy(request.body)
        metadata = body.setdefault("metadata", {})
        if resource.name == "events" and body.get("eventTime"):
            _check_event(body)
        body |= {"apiVersion": resource.api, "kind": resource.kind}
        name = metadata.get("name") or ""
        if not name and metadata.get("generateName"):
            name = f"{metadata['generateName']}{self.store.version:x}"
        if not name:
            raise StatusError(
                422,
                "Invalid",
                f"{resource.kind} is invalid: metadata.name: Required value: name or generateName is required",
            )
        return self.store.create((resource.name, namespace, name), body, _manager(request))

    def _put(self, key: Key, sub: str, request: Request) -> Object:
        with self.store.lock:
            before = self.store.get(key)
            after = _of_subresource(before, deepcopy(request.body), sub)
            return self._updated(
                key, before, after, _manager(request), sub, request.body["metadata"].get("resourceVersion")
            )

    def _patch(self, resource: Resource, key: Key, sub: str, request: Request) -> Answer:
        with self.store.lock:
            if request.content_type == APPLY:
                return self._apply(resource, key, sub, request)
            if request.content_type not in (MERGE, STRATEGIC):
                raise StatusError(
                    415,
                    "UnsupportedMediaType",
                    f"the body was in an unknown format - accepted media types include: {MERGE}, {STRATEGIC}, {APPLY}",
                )
            if request.query.get("force"):
                raise StatusError(
                    422,
                    "Invalid",
                    "PatchOptions.meta.k8s.io is invalid: force: Forbidden: may not be specified for non-apply patch",
                )
            before = self.store.get(key)
            patched = _merge(before, request.body, (), strategic=request.content_type == STRATEGIC)
            version = (request.body.get("metadata") or {}).get("resourceVersion")
            return Answer(
                200, self._updated(key, before, _of_subresource(before, patched, sub), _manager(request), sub, version)
            )

    def _apply(self, resource: Resource, key: Key, sub: str, request: Request) -> Answer:
        manager = request.query.get("fieldManager")
        if not manager:
            raise StatusError(
                422,
                "Invalid",
                "PatchOptions.meta.k8s.io is invalid: fieldManager: Required value: is required for apply patch",
            )
        config: Object = deepcopy(request.body)
        if (config.get("apiVersion"), config.get("kind")) != (resource.api, resource.kind):
            raise StatusError(
                400, "BadRequest", f"invalid object type: {config.get('apiVersion')}, Kind={config.get('kind')}"
            )
        metadata = config.setdefault("metadata", {})
        if metadata.get("managedFields"):
            raise StatusError(400, "BadRequest", "metadata.managedFields must be nil")
        if metadata.get("name") not in (None, key[2]):
            raise StatusError(400, "BadRequest", "the name of the object does not match the name on the URL")
        new = key not in self.store.objects
        if new and (sub or metadata.get("uid")):
            raise StatusError(404 if sub else 409, "NotFound" if sub else "Conflict", f'{key[0]} "{key[2]}" not found')
        live: Object = (
            {"apiVersion": resource.api, "kind": resource.kind, "metadata": {}} if new else self.store.get(key)
        )
        before = deepcopy(live)
        config = {
            name: value
            for name, value in config.items()
            if (name == "status") == (sub == "status") or name in ("apiVersion", "kind", "metadata")
        }
        version = metadata.pop("resourceVersion", None)
        owners = Owners(live["metadata"].get("managedFields", ()))
        try:
            owners.apply(live, config, manager, sub, stamp(), force=request.query.get("force") == "true")
        except Conflict as error:
            causes = [
                {"reason": "FieldManagerConflict", "message": f'conflict with "{owner}"', "field": dotted(path)}
                for path, owner in sorted(error.owners.items())
            ]
            raise StatusError(
                409, "Conflict", f"Apply failed with {len(causes)} conflict{'s'[: len(causes) - 1]}: {error}", causes
            ) from None
        live = _of_subresource(before, live, sub)
        live["metadata"]["managedFields"] = owners.written(resource.api)
        if new:
            return Answer(201, self.store.create(key, live))
        return Answer(200, self.store.replace(key, live, version))

    def _updated(
        self, key: Key, before: Object, after: Object, manager: str, sub: str, version: str | None = None
    ) -> Object:
        owners = Owners(before["metadata"].get("managedFields", ()))
        owners.update(before, after, manager, sub, stamp())
        after["metadata"]["managedFields"] = owners.written(before["apiVersion"])
        return self.store.replace(key, after, version)

    # Pods ------------------------------------------------------------------------------------------------------------

    def _delete(self, key: Key, options: Object) -> None:
        with self.store.lock:
            thing = self.store.get(key)
            wanted = (options.get("preconditions") or {}).get("uid")
            if wanted not in (None, thing["metadata"]["uid"]):
                raise StatusError(
                    409,
                    "Conflict",
                    f'Operation cannot be fulfilled on {key[0]} "{key[2]}": Precondition failed: UID in precondition: '
                    f"{wanted}, UID in object meta: {thing['metadata']['uid']}",
                )
            if key[0] != "pods" or not self.ending or options.get("gracePeriodSeconds") == 0:
                self.store.delete(key)
            elif "deletionTimestamp" not in thing["metadata"]:
                thing["metadata"] |= {"deletionTimestamp": stamp(), "deletionGracePeriodSeconds": 30}
                self.store.replace(key, thing, None)

    def _evict(self, key: Key, request: Request) -> Answer:
        """As pkg/registry/core/pod/storage/eviction.go does it."""
        done = Answer(201, {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"})
        if request.body.get("metadata", {}).get("name") != key[2]:
            raise StatusError(400, "BadRequest", "name in URL does not match name in Eviction object")
        options = request.body.get("deleteOptions") or {}
        with self.store.lock:
            pod = self.store.get(key)
            ignores = (
                pod.get("status", {}).get("phase") in ("Succeeded", "Failed", "Pending")
                or "deletionTimestamp" in pod["metadata"]
            )
            budgets = (
                []
                if ignores
                else [each for each in self.store.list("poddisruptionbudgets", key[1]) if _guards(each, pod)]
            )
            if len(budgets) > 1:
                raise StatusError(
                    500,
                    "InternalError",
                    "This pod has more than one PodDisruptionBudget, which the eviction subresource does not support.",
                )
            for budget in budgets:
                status = budget["status"]
                if status.get("observedGeneration", 0) < budget["metadata"].get("generation", 0):
                    text = f"The disruption budget {budget['metadata']['name']} is still being processed by the server."
                    raise _over_budget(text, 10)
                if status["disruptionsAllowed"] < 1:
                    name, needs, has = (budget["metadata"]["name"], status["desiredHealthy"], status["currentHealthy"])
                    text = f"The disruption budget {name} needs {needs} healthy pods and has {has} currently"
                    raise _over_budget(text, 0)
                status["disruptionsAllowed"] -= 1
                self.store.replace(("poddisruptionbudgets", key[1], budget["metadata"]["name"]), budget, None)
            self._delete(key, options)
        return done

    # Watches ---------------------------------------------------------------------------------------------------------

    def watch(self, request: Request) -> Iterator[Object]:
        """Events, until the time of the request is over. Raises StatusError where it cannot be watched."""
        resource, namespace, _name, _sub = self.route(request.path)
        ends = time.monotonic() + float(request.query.get("timeoutSeconds", "1800"))
        bookmarks = request.query.get("allowWatchBookmarks") == "true"
        version = request.query.get("resourceVersion", "")
        if version in ("", "0"):
            with self.store.lock:
                at, present = self.store.version, self.store.list(resource.name, namespace)
            for each in present:
                if _selected(each, request.query):
                    yield {"type": "ADDED", "object": each}
        else:
            at = int(version)
        while True:
            with self.store.lock:
                try:
                    found = list(self.store.since(at, resource.name))
                except StatusError as error:
                    yield {"type": "ERROR", "object": error.status()}
                    return
                left = ends - time.monotonic()
                if not found and left > 0:
                    self.store.lock.wait(left)
                    continue
                at = max([at, *(version for version, _kind, _each in found)]) if found else self.store.version
            for _version, kind, each in found:
                if namespace in ("", each["metadata"].get("namespace")) and _selected(each, request.query):
                    yield {"type": kind, "object": each}
            if bookmarks:
                yield {
                    "type": "BOOKMARK",
                    "object": {
                        "kind": resource.kind,
                        "apiVersion": resource.api,
                        "metadata": {"resourceVersion": str(at)},
                    },
                }
            if left <= 0:
                return


def _check_event(event: Object) -> None:
    """As ValidateEventCreate in pkg/apis/core/validation/events.go: bytes. Raises StatusError."""
    for name, longest in (("message", 1024), ("reason", 128), ("action", 128), ("reportingInstance", 128)):
        if len(str(event.get(name) or "").encode()) > longest:
            raise StatusError(
                422, "Invalid", f"Event is invalid: {name}: Invalid value: can have at most {longest} bytes"
            )


def _manager(request: Request) -> str:
    return request.query.get("fieldManager") or request.agent.partition("/")[0] or "unknown"


def _of_subresource(before: Object, after: Object, sub: str) -> Object:
    """Only a subresource changes the status, and it changes nothing else; who and which it is changes nobody."""
    chosen = {name: value for name, value in before.items() if name != "status"} if sub == "status" else after
    status = after.get("status") if sub == "status" else before.get("status")
    found = {name: value for name, value in chosen.items() if name != "status"}
    if status is not None:
        found["status"] = status
    fixed = ("name", "namespace", "uid", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds")
    metadata = {name: value for name, value in found["metadata"].items() if name not in fixed}
    found["metadata"] = metadata | {name: before["metadata"][name] for name in fixed if name in before["metadata"]}
    return deepcopy(found)


def _merge(old: Any, patch: Any, at: tuple[str, ...], *, strategic: bool) -> Any:
    """RFC 7396; strategic: lists that are maps are merged by their key."""
    if strategic and isinstance(patch, list) and at in LIST_KEYS:
        key = LIST_KEYS[at]
        merged = {entry[key]: entry for entry in old or ()}
        for entry in patch:
            merged[entry[key]] = _merge(merged.get(entry[key]), entry, (*at, "k:"), strategic=strategic)
        return list(merged.values())
    if not isinstance(patch, dict):
        return deepcopy(patch)
    found = dict(old) if isinstance(old, dict) else {}
    for name, value in patch.items():
        if strategic and name.startswith("$"):
            continue
        if value is None:
            found.pop(name, None)
        else:
            found[name] = _merge(found.get(name), value, (*at, f"f:{name}"), strategic=strategic)
    return found


def _selected(thing: Object, query: Mapping[str, str]) -> bool:
    for term in filter(None, query.get("fieldSelector", "").split(",")):
        name, _, wanted = term.partition("=")
        value: Any = thing
        for part in name.split("."):
            value = (value or {}).get(part)
        if (value or "") != wanted.lstrip("="):
            return False
    labels = thing["metadata"].get("labels") or {}
    terms = (term.partition("=") for term in filter(None, query.get("labelSelector", "").split(",")))
    return all(labels.get(name) == wanted.lstrip("=") for name, _, wanted in terms)


def _over_budget(text: str, retry_after: int) -> StatusError:
    message, cause = "Cannot evict pod as it would violate the pod's disruption budget.", "DisruptionBudget"
    return StatusError(429, "TooManyRequests", message, [{"reason": cause, "message": text}], retry_after)


def _guards(budget: Object, pod: Object) -> bool:
    wanted = (budget["spec"].get("selector") or {}).get("matchLabels") or {}
    labels = pod["metadata"].get("labels") or {}
    return bool(wanted) and all(labels.get(name) == value for name, value in wanted.items())


def _discovery(path: str) -> Object | None:
    """What kubectl asks for first: which groups there are, and what is in them."""
    apis = dict.fromkeys(each.api for each in RESOURCES)
    if path == "/version":
        return {"major": "1", "minor": "34", "gitVersion": "v1.34.0"}
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        groups = []
        for api in apis:
            if "/" in api:
                version = {"groupVersion": api, "version": api.partition("/")[2]}
                groups.append({"name": api.partition("/")[0], "versions": [version], "preferredVersion": version})
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
    api = path.removeprefix("/apis/") if path.startswith("/apis/") else path.removeprefix("/api/")
    if api not in apis:
        return None
    verbs = ["create", "delete", "get", "list", "patch", "update", "watch"]
    resources = []
    for each in RESOURCES:
        if each.api == api:
            resources.append(
                {
                    "name": each.name,
                    "singularName": each.kind.lower(),
                    "namespaced": each.namespaced,
                    "kind": each.kind,
                    "verbs": verbs,
                }
            )
            for sub in each.subresources:
                more = (
                    {"group": "policy", "version": "v1", "kind": "Eviction", "verbs": ["create"]}
                    if sub == "eviction"
                    else {"kind": each.kind, "verbs": ["get", "patch", "update"]}
                )
                resources.append(
                    {"name": f"{each.name}/{sub}", "singularName": "", "namespaced": each.namespaced, **more}
                )
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": api, "resources": resources}


# HTTP ----------------------------------------------------------------------------------------------------------------


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    api: ApiServer

    def _serve(self) -> None:
        split = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(split.query).items()}
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content_type = (self.headers.get("Content-Type") or "").partition(";")[0]
        request = Request(
            self.command, split.path, query, _parsed(data), content_type, self.headers.get("User-Agent") or ""
        )
        self.api.requests.append(request)
        fault = self.api.fault(request)
        if fault == "drop-before":
            self.close_connection = True
            return
        if fault.isdigit():
            error = StatusError(
                int(fault), "InternalError", "an error on the server has prevented the request from succeeding"
            )
            self._answer(Answer(error.code, error.status()))
            return
        if query.get("watch") in ("true", "1", "True"):
            self._stream(request)
            return
        answer = self.api.respond(request)
        if fault == "drop-after":
            self.close_connection = True
            return
        self._answer(answer)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _serve  # noqa: N815 -- names of http.server

    def _answer(self, answer: Answer) -> None:
        data = json.dumps(answer.body).encode()
        self.send_response(answer.code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def _stream(self, request: Request) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            for event in self.api.watch(request):
                line = json.dumps(event).encode() + b"\n"
                self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            self.close_connection = True  # they have had enough

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 -- the name of http.server
        """Tests say what they saw."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is no news."""


def _parsed(data: bytes) -> Any:
    """JSON, or YAML, of which it is a part."""
    if not data:
        return None
    try:
        return json.loads(data)
    except ValueError:
        import yaml

        return yaml.safe_load(data)


@contextmanager
def serving(api: ApiServer) -> Iterator[str]:
    """The address that it is served at."""
    handler = type("Handler", (_Handler,), {"api": api})
    with _Server(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
