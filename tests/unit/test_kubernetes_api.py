"""The stand-in for an API server keeps the rules of a real one, and kubectl and the real client get along with it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from gpuswitch_kubernetes.cluster import Cluster, ClusterError, ConflictError, condition_of
from gpuswitch_kubernetes.names import STATE, TAINT
from kubernetes import client, config, watch

from tests.harness.kubernetes.campaign import NODE, api_client, budget, node, pod
from tests.harness.kubernetes.server import ApiServer, serving
from tests.harness.kubernetes.store import StatusError
from tests.unit.test_house import ROOT

KEY = ("nodes", "", NODE)
OTHERS = {"key": "node.kubernetes.io/unreachable", "effect": "NoExecute"}


@pytest.fixture
def api() -> ApiServer:
    api = ApiServer()
    api.add(node())
    return api


@pytest.fixture
def address(api: ApiServer) -> Iterator[str]:
    with serving(api) as address:
        yield address


@pytest.fixture
def core(address: str) -> client.CoreV1Api:
    return client.CoreV1Api(api_client(address))


@pytest.fixture
def cluster(address: str) -> Cluster:
    return Cluster(api_client(address), NODE)


def apply(core: client.CoreV1Api, manager: str, annotations: dict[str, str], **more: Any) -> Any:
    body = {"apiVersion": "v1", "kind": "Node", "metadata": {"annotations": annotations}}
    return core.patch_node(NODE, body, field_manager=manager, _content_type="application/apply-patch+yaml", **more)


def test_a_field_that_another_has_applied_is_a_conflict_until_it_is_forced(core: client.CoreV1Api) -> None:
    apply(core, "one", {"x": "1"})
    apply(core, "two", {"x": "1"})
    with pytest.raises(client.ApiException) as refused:
        apply(core, "two", {"x": "2"})
    status = json.loads(refused.value.body)
    assert (status["code"], status["reason"]) == (409, "Conflict")
    assert status["details"]["causes"][0] == {
        "reason": "FieldManagerConflict",
        "message": 'conflict with "one"',
        "field": ".metadata.annotations.x",
    }
    assert apply(core, "two", {"x": "2"}, force=True).metadata.annotations["x"] == "2"


def test_what_is_applied_no_longer_goes_unless_another_has_it(core: client.CoreV1Api) -> None:
    apply(core, "one", {"mine": "1", "ours": "1"})
    apply(core, "two", {"ours": "1"})
    left = apply(core, "one", {})
    assert left.metadata.annotations == {"ours": "1"}
    assert [entry.manager for entry in left.metadata.managed_fields if entry.operation == "Apply"] == ["two"]


def test_an_apply_that_changes_nothing_makes_no_version(core: client.CoreV1Api) -> None:
    first = apply(core, "one", {"x": "1"}).metadata.resource_version
    assert apply(core, "one", {"x": "1"}).metadata.resource_version == first


def test_a_write_of_an_old_version_is_a_conflict(core: client.CoreV1Api, api: ApiServer) -> None:
    old = core.read_node(NODE)
    api.change(KEY, lambda each: each["metadata"]["labels"].update(a="b"))
    with pytest.raises(client.ApiException) as refused:
        core.replace_node(NODE, old)
    assert refused.value.status == 409


def test_a_watch_tells_what_follows_and_ends_with_a_bookmark(core: client.CoreV1Api, api: ApiServer) -> None:
    version = core.list_node().metadata.resource_version
    api.change(KEY, lambda each: each["metadata"]["labels"].update(a="b"))
    events = watch.Watch().stream(
        core.list_node, resource_version=version, allow_watch_bookmarks=True, timeout_seconds=1
    )
    told = [(event["type"], event["raw_object"]["metadata"]["resourceVersion"]) for event in events]
    latest = str(api.store.version)
    assert told == [("MODIFIED", latest), ("BOOKMARK", latest), ("BOOKMARK", latest)]


def test_a_watch_of_what_is_forgotten_is_gone(core: client.CoreV1Api, api: ApiServer) -> None:
    version = core.list_node().metadata.resource_version
    api.change(KEY, lambda each: each["metadata"]["labels"].update(a="b"))
    api.store.forget()
    with pytest.raises(client.ApiException) as gone:
        list(watch.Watch().stream(core.list_node, resource_version=version, timeout_seconds=1))
    assert gone.value.status == 410


def test_an_eviction_heeds_the_budget_and_who_is_meant(cluster: Cluster, api: ApiServer) -> None:
    guarded = api.add(pod("work", labels={"app": "guarded"}))
    api.add(budget(0))
    seconds, said = cluster.evict(guarded)
    assert seconds > 0
    assert said.endswith("The disruption budget guard needs 1 healthy pods and has 1 currently")
    api.change(("poddisruptionbudgets", "default", "guard"), lambda each: each["status"].update(disruptionsAllowed=1))
    assert cluster.evict(guarded | {"metadata": guarded["metadata"] | {"uid": "another"}}) == (0.0, "")
    assert "deletionTimestamp" not in api.store.get(("pods", "default", "work"))["metadata"]
    api.change(("poddisruptionbudgets", "default", "guard"), lambda each: each["status"].update(disruptionsAllowed=1))
    assert cluster.evict(guarded) == (0.0, "")
    assert "deletionTimestamp" in api.store.get(("pods", "default", "work"))["metadata"]
    api.finish("default", "work")
    assert cluster.evict(guarded) == (0.0, "")


def test_two_budgets_are_in_the_way_of_their_pod_alone(cluster: Cluster, api: ApiServer) -> None:
    guarded = api.add(pod("work", labels={"app": "guarded"}))
    api.add(budget(1))
    api.add(budget(1, "second"))
    seconds, said = cluster.evict(guarded)
    assert seconds > 0
    assert "more than one PodDisruptionBudget" in said


@pytest.mark.parametrize("status", ["400", "403"])
def test_what_a_webhook_says_to_one_eviction_is_kept(cluster: Cluster, api: ApiServer, status: str) -> None:
    work = api.add(pod("work"))
    api.fault = lambda _request: status
    seconds, said = cluster.evict(work)
    assert seconds > 0
    assert said.startswith("cannot evict pod default/work: ")


def test_an_eviction_without_an_answer_is_no_answer(cluster: Cluster, api: ApiServer) -> None:
    work = api.add(pod("work"))
    api.fault = lambda _request: "drop-before"
    with pytest.raises(ClusterError, match=r"^cannot evict pod default/work: "):
        cluster.evict(work)


def test_an_eviction_is_tried_again_when_the_server_says(cluster: Cluster, api: ApiServer) -> None:
    guarded = api.add(pod("work", labels={"app": "guarded"}))
    fresh = budget(1)
    fresh["metadata"]["generation"] = 2
    api.add(fresh)
    seconds, said = cluster.evict(guarded)
    assert (seconds, said.rpartition(" The ")[2]) == (
        10.0,
        "disruption budget guard is still being processed by the server.",
    )


def test_the_taint_leaves_those_of_others(cluster: Cluster) -> None:
    tainted = cluster.taint(cluster.node(), on=True)
    assert tainted["spec"]["taints"] == [OTHERS, {"key": TAINT, "effect": "NoSchedule"}]
    assert cluster.taint(tainted, on=False)["spec"]["taints"] == [OTHERS]


def test_nothing_is_written_onto_a_node_that_has_changed(cluster: Cluster, api: ApiServer) -> None:
    seen = cluster.node()
    api.change(KEY, lambda each: each["metadata"]["labels"].update(a="b"))
    with pytest.raises(ConflictError):
        cluster.taint(seen, on=True)
    with pytest.raises(ConflictError):
        cluster.publish(seen, {STATE + "0000_01_00_0": "host"})


def test_what_the_agent_wrote_can_be_taken_away(cluster: Cluster, api: ApiServer) -> None:
    seen = cluster.publish(cluster.taint(cluster.node(), on=True), {STATE + "0000_01_00_0": "host"})
    cluster.condition(seen, "False", "Wedged", "it hangs")
    first = condition_of(cluster.node())
    assert first is not None
    cluster.condition(cluster.node(), "False", "Lost", "it is lost")
    second = condition_of(cluster.node())
    assert second is not None
    assert (second["reason"], second["lastTransitionTime"]) == ("Lost", first["lastTransitionTime"])
    cluster.clear()
    left = api.store.get(KEY)
    assert (left["spec"]["taints"], left["metadata"].get("annotations"), condition_of(left)) == ([OTHERS], None, None)
    assert left["status"]["conditions"] == [{"type": "Ready", "status": "True"}]


def test_an_event_names_the_node(cluster: Cluster, core: client.CoreV1Api) -> None:
    cluster.event("Warning", "Wedged", "0000:01:00.0: it hangs", cluster.node())
    [event] = core.list_namespaced_event("default").items
    assert (event.involved_object.name, event.type, event.reason) == (NODE, "Warning", "Wedged")


def test_an_event_is_no_longer_than_the_server_takes(address: str, api: ApiServer, core: client.CoreV1Api) -> None:
    name = "n" * 253
    api.add(node(name))
    long = Cluster(api_client(address), name)
    long.event("Warning", "Refused", "x" + "\N{LATIN SMALL LETTER E WITH ACUTE}" * 1000, long.node())
    [event] = core.list_namespaced_event("default").items
    assert (len(event.message.encode()), len(event.reporting_component)) == (1023, len("gpuswitch-agent"))


def test_an_event_that_is_too_long_is_refused(core: client.CoreV1Api) -> None:
    event = {
        "metadata": {"generateName": "x."},
        "involvedObject": {"kind": "Node", "name": NODE},
        "message": "x" * 1025,
        "eventTime": "2026-01-01T00:00:00.000000Z",
    }
    with pytest.raises(client.ApiException) as refused:
        core.create_namespaced_event("default", event)
    assert refused.value.status == 422


@pytest.mark.parametrize("fault", ["500", "drop-before", "drop-after"])
def test_what_goes_wrong_on_the_way_is_one_sentence(cluster: Cluster, api: ApiServer, fault: str) -> None:
    api.fault = lambda _request: fault
    with pytest.raises(ClusterError, match=f"^cannot read node {NODE}: "):
        cluster.node()


@pytest.mark.parametrize("what", ["node", "pods"])
def test_a_watch_tells_that_something_has_changed(cluster: Cluster, api: ApiServer, what: str) -> None:
    api.add(pod("work"))
    next(cluster.changes(what))


def test_an_error_that_a_watch_ends_with_is_one_sentence(
    cluster: Cluster, api: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = cluster.changes("node")
    gone = StatusError(410, "Expired", "too old resource version: 1 (1001)")
    monkeypatch.setattr(api, "watch", lambda _request: iter([{"type": "ERROR", "object": gone.status()}]))
    with pytest.raises(ClusterError, match=r"^cannot watch node: .*410 Expired: too old resource version"):
        list(changes)


def test_a_watch_that_is_refused_is_one_sentence(cluster: Cluster, api: ApiServer) -> None:
    api.fault = lambda _request: "410"
    with pytest.raises(ClusterError, match=r"^cannot watch pods: "):
        list(cluster.changes("pods"))


def test_a_token_that_is_just_being_written_is_one_sentence(address: str) -> None:
    def read_anew(_settings: client.Configuration) -> None:
        raise config.ConfigException("Token file exists but empty.")

    api = api_client(address)
    api.configuration.api_key["BearerToken"] = "bearer of before"
    api.configuration.refresh_api_key_hook = read_anew
    cluster = Cluster(api, NODE)
    with pytest.raises(ClusterError, match=f"^cannot read node {NODE}: Token file exists but empty"):
        cluster.node()
    with pytest.raises(ClusterError, match=r"^cannot watch node: Token file exists but empty"):
        list(cluster.changes("node"))


def kubectl(address: str, home: Path, *words: str) -> str:
    done = subprocess.run(
        ["kubectl", "--server", address, *words],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", "HOME": str(home)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_kubectl_gets_along_with_it(address: str, api: ApiServer, tmp_path: Path) -> None:
    kubectl(address, tmp_path, "annotate", "node", NODE, "gpuswitch.io/desired.0000_01_00_0=vfio")
    kubectl(address, tmp_path, "taint", "node", NODE, "lab=yes:NoSchedule")
    shown = json.loads(kubectl(address, tmp_path, "get", "node", NODE, "-o", "json"))
    assert shown["metadata"]["annotations"] == {"gpuswitch.io/desired.0000_01_00_0": "vfio"}
    assert {"key": "lab", "value": "yes", "effect": "NoSchedule"} in shown["spec"]["taints"]
    assert "kubectl-annotate" in [entry["manager"] for entry in api.store.get(KEY)["metadata"]["managedFields"]]
    manifests = ROOT / "contrib/kubernetes/manifests"
    kubectl(address, tmp_path, "apply", "--server-side", "--validate=false", "-k", str(manifests))
    assert (
        kubectl(address, tmp_path, "get", "daemonset", "-n", "gpuswitch", "-o", "name")
        == "daemonset.apps/gpuswitch-agent\n"
    )
    api.add(pod("work"))
    api.ending = False
    kubectl(address, tmp_path, "drain", NODE, "--force", "--timeout=20s")
    assert api.store.list("pods") == []


MANIFESTS = sorted(
    (file.name, document["kind"], document)
    for file in (ROOT / "contrib/kubernetes/manifests").glob("*.yaml")
    for document in yaml.safe_load_all(file.read_text())
    if document["kind"] != "Kustomization"
)


@pytest.mark.parametrize("version", ["1.32", "1.34"])
@pytest.mark.parametrize(
    "document",
    [document for _file, _kind, document in MANIFESTS],
    ids=[f"{kind}" for _file, kind, _document in MANIFESTS],
)
def test_a_manifest_is_what_the_schemas_of_kubernetes_know(document: dict[str, Any], version: str) -> None:
    import kubernetes_validate

    kubernetes_validate.validate(document, version, strict=True)


def test_nobody_in_the_pod_can_put_another_socket_in_the_place_of_the_bus() -> None:
    [document] = [document for _file, kind, document in MANIFESTS if kind == "DaemonSet"]
    [container] = document["spec"]["template"]["spec"]["containers"]
    [mount] = container["volumeMounts"]
    assert (mount["mountPath"], mount["readOnly"]) == ("/run/dbus", True)


def test_a_manifest_that_is_wrong_is_found() -> None:
    import kubernetes_validate

    [document] = [document for _file, kind, document in MANIFESTS if kind == "DaemonSet"]
    document = json.loads(json.dumps(document))
    document["spec"]["template"]["spec"]["containers"][0]["argument"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(document, "1.34", strict=True)


def test_the_objects_that_the_tests_make_are_real_ones() -> None:
    import kubernetes_validate

    for thing in (node(), pod("work"), budget(1)):
        kubernetes_validate.validate(thing, "1.34", strict=True)


def test_the_agent_may_do_what_it_does_and_no_more(cluster: Cluster, api: ApiServer) -> None:
    """The rules of the ClusterRole, against the requests that there were."""
    seen = cluster.taint(cluster.node(), on=True)
    cluster.publish(seen, {})
    cluster.condition(seen, "True", "AsDesired", "well")
    cluster.pods()
    cluster.allocations()
    cluster.evict(api.add(pod("work")))
    cluster.event("Normal", "AsDesired", "well", seen)
    verbs = {"GET": "get", "PATCH": "patch", "POST": "create"}
    asked = set()
    for request in api.requests:
        if request.path.rstrip("/") == "/apis":
            continue  # system:discovery
        resource, _namespace, name, sub = api.route(request.path)
        verb = verbs[request.method] if name or request.method != "GET" else "list"
        asked.add((f"{resource.name}/{sub}" if sub else resource.name, verb))
    [role] = [document for _file, kind, document in MANIFESTS if kind == "ClusterRole"]
    allowed = {(resource, verb) for rule in role["rules"] for resource in rule["resources"] for verb in rule["verbs"]}
    assert allowed - asked == {("nodes", "list"), ("nodes", "watch"), ("pods", "watch")}, "what only watches need"
    assert asked <= allowed
