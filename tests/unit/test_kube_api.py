"""The API server that tests are made with answers the official client as a real one does."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydantic
import pytest
import urllib3
from kube_api import NAMESPACE, ApiError, KubeApi
from kubernetes import client, config, stream, watch
from kubernetes.client.exceptions import ApiException

RAY = ("ray.io", "v1", NAMESPACE)
JOBS = (*RAY, "rayjobs")
JSON_PATCH = {"_content_type": "application/json-patch+json"}


def ray_job(name: str = "train", **spec: Any) -> dict[str, Any]:
    pod = {"spec": {"containers": [{"name": "ray-head", "image": "ray"}]}}
    cluster = {"headGroupSpec": {"rayStartParams": {}, "template": pod}}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name},
        "spec": {"entrypoint": "train", "rayClusterSpec": cluster, **spec},
    }


def pod(name: str = "head", *containers: str, node: str = "", **metadata: Any) -> dict[str, Any]:
    spec: dict[str, Any] = {"containers": [{"name": name, "image": "ray"} for name in containers or ("ray-head",)]}
    return {"metadata": {"name": name, **metadata}, "spec": spec | ({"nodeName": node} if node else {})}


def config_map(name: str, **metadata: Any) -> dict[str, Any]:
    return {"metadata": {"name": name, **metadata}, "data": {"a": "1"}}


def connect(api: KubeApi, folder: Path) -> client.ApiClient:
    return config.new_client_from_config(str(api.kubeconfig(folder / "kubeconfig")))


@pytest.fixture
def api() -> Iterator[KubeApi]:
    with KubeApi() as api:
        yield api


@pytest.fixture
def core(api: KubeApi, tmp_path: Path) -> client.CoreV1Api:
    return client.CoreV1Api(connect(api, tmp_path))


@pytest.fixture
def custom(core: client.CoreV1Api) -> client.CustomObjectsApi:
    return client.CustomObjectsApi(core.api_client)


def refusal(error: pytest.ExceptionInfo[ApiException]) -> tuple[int, str, str]:
    """(code, reason, message) of an answer, whose HTTP code is the same."""
    status = json.loads(error.value.body)
    assert (status["kind"], status["status"], status["code"]) == ("Status", "Failure", error.value.status)
    return status["code"], status["reason"], status["message"]


def names(objects: Any) -> list[str]:
    return [item.metadata.name for item in objects.items]


# Objects


def test_an_object_gets_what_the_server_owns(api: KubeApi, custom: client.CustomObjectsApi) -> None:
    made = custom.create_namespaced_custom_object(*JOBS, ray_job() | {"status": {"jobStatus": "RUNNING"}})
    assert {"uid", "creationTimestamp", "resourceVersion"} <= {*made["metadata"]}
    assert (made["metadata"]["namespace"], made["metadata"]["generation"]) == (NAMESPACE, 1)
    assert "status" not in made
    assert custom.get_namespaced_custom_object(*JOBS, "train") == made == api.object("rayjobs", "train")
    assert custom.list_namespaced_custom_object(*JOBS)["items"] == [made]
    assert [(request.method, request.path) for request in api.requests] == [
        ("POST", "/apis/ray.io/v1/namespaces/distlm/rayjobs"),
        ("GET", "/apis/ray.io/v1/namespaces/distlm/rayjobs/train"),
        ("GET", "/apis/ray.io/v1/namespaces/distlm/rayjobs"),
    ]


def test_a_generated_name(core: client.CoreV1Api) -> None:
    made = core.create_namespaced_config_map(NAMESPACE, {"metadata": {"generateName": "run-"}})
    assert made.metadata.name.startswith("run-") and len(made.metadata.name) == len("run-") + 5


def test_every_kind_is_kept(api: KubeApi, core: client.CoreV1Api) -> None:
    network, batch = client.NetworkingV1Api(core.api_client), client.BatchV1Api(core.api_client)
    network.create_namespaced_network_policy(NAMESPACE, {"metadata": {"name": "n"}, "spec": {"podSelector": {}}})
    template = pod()["spec"] | {"restartPolicy": "Never"}
    batch.create_namespaced_job(NAMESPACE, {"metadata": {"name": "j"}, "spec": {"template": {"spec": template}}})
    core.create_namespaced_service(NAMESPACE, {"metadata": {"name": "s"}, "spec": {"ports": [{"port": 1}]}})
    core.create_namespaced_service_account(NAMESPACE, {"metadata": {"name": "a"}})
    core.create_namespaced_secret(NAMESPACE, client.V1Secret(metadata={"name": "k"}, string_data={"a": "b"}))
    assert core.read_namespaced_secret("k", NAMESPACE).data == {"a": "Yg=="}
    assert core.create_namespaced_pod(NAMESPACE, pod()).status.phase == "Pending"
    assert names(core.list_namespace()) == ["default", NAMESPACE]
    for resource in ("networkpolicies", "jobs", "services", "serviceaccounts", "secrets", "pods"):
        assert len(api.objects(resource)) == 1


def test_selectors(api: KubeApi, core: client.CoreV1Api) -> None:
    for name, role in (("a", "head"), ("b", "worker"), ("c", "")):
        core.create_namespaced_pod(NAMESPACE, pod(name, labels={"role": role, "run": "1"} if role else {}))
    for selector, found in (
        ("role=head", "a"),
        ("role in (head, worker),run=1", "ab"),
        ("role notin (head)", "bc"),
        ("run!=1", "c"),
        ("role=head,run=2", ""),
    ):
        assert "".join(names(core.list_namespaced_pod(NAMESPACE, label_selector=selector))) == found
    assert names(core.list_namespaced_pod(NAMESPACE, field_selector="metadata.name=b")) == ["b"]
    with pytest.raises(ApiException) as error:
        core.list_namespaced_pod(NAMESPACE, field_selector="spec.priority=1")
    assert refusal(error) == (400, "BadRequest", "field label not supported: spec.priority")
    for name, about in (("one", "a"), ("two", "b")):
        api.create("events", {"metadata": {"name": name}, "involvedObject": {"name": about, "uid": f"uid-{about}"}})
    by_uid = core.list_namespaced_event(NAMESPACE, field_selector="involvedObject.name=a,involvedObject.uid=uid-a")
    assert names(by_uid) == ["one"]


def test_a_dry_run_stores_nothing(api: KubeApi, custom: client.CustomObjectsApi) -> None:
    custom.create_namespaced_custom_object(*JOBS, ray_job(), dry_run="All")
    assert api.objects("rayjobs") == []


# Changes


def test_an_update_of_an_old_version_is_a_conflict(custom: client.CustomObjectsApi) -> None:
    made = custom.create_namespaced_custom_object(*JOBS, ray_job())
    made["spec"]["suspend"] = True
    changed = custom.replace_namespaced_custom_object(*JOBS, "train", made)
    assert changed["metadata"]["generation"] == 2
    with pytest.raises(ApiException) as error:
        custom.replace_namespaced_custom_object(*JOBS, "train", made)
    assert refusal(error) == (
        409,
        "Conflict",
        'Operation cannot be fulfilled on rayjobs.ray.io "train": the object has been modified; please apply your'
        " changes to the latest version and try again",
    )
    del made["metadata"]["resourceVersion"]
    with pytest.raises(ApiException, match="resourceVersion: Invalid value: 0x0: must be specified for an update"):
        custom.replace_namespaced_custom_object(*JOBS, "train", made)


def test_a_merge_patch(custom: client.CustomObjectsApi) -> None:
    custom.create_namespaced_custom_object(*JOBS, ray_job(backoffLimit=2))
    patch = {"spec": {"suspend": True, "backoffLimit": None}}
    merged = custom.patch_namespaced_custom_object(*JOBS, "train", patch)
    assert merged["spec"]["suspend"] is True and "backoffLimit" not in merged["spec"]
    assert custom.patch_namespaced_custom_object(*JOBS, "train", patch) == merged  # no change, so the same version
    with pytest.raises(ApiException, match="the object has been modified"):
        custom.patch_namespaced_custom_object(*JOBS, "train", {"metadata": {"resourceVersion": "1"}})


def test_a_json_patch(custom: client.CustomObjectsApi) -> None:
    custom.create_namespaced_custom_object(*JOBS, ray_job(backoffLimit=2))
    steps = [
        {"op": "add", "path": "/metadata/finalizers", "value": ["a"]},
        {"op": "add", "path": "/metadata/finalizers/-", "value": "b"},
        {"op": "remove", "path": "/metadata/finalizers/0"},
        {"op": "replace", "path": "/spec/entrypoint", "value": "other"},
    ]
    changed = custom.patch_namespaced_custom_object(*JOBS, "train", steps, **JSON_PATCH)
    assert (changed["metadata"]["finalizers"], changed["spec"]["entrypoint"]) == (["b"], "other")
    for wrong in ("remove", "replace"):
        with pytest.raises(ApiException) as error:
            steps = [{"op": wrong, "path": "/spec/nothing", "value": 1}]
            custom.patch_namespaced_custom_object(*JOBS, "train", steps, **JSON_PATCH)
        assert refusal(error)[:2] == (422, "Invalid")
    with pytest.raises(
        ApiException, match="error decoding patch"
    ):  # the client calls it a merge patch if it is not told
        custom.patch_namespaced_custom_object(*JOBS, "train", steps)


def test_a_strategic_merge_patch_is_for_built_in_kinds(core: client.CoreV1Api, custom: client.CustomObjectsApi) -> None:
    owners = [{"apiVersion": "v1", "kind": "Pod", "name": name, "uid": name} for name in "ab"]
    core.create_namespaced_config_map(NAMESPACE, config_map("c", ownerReferences=owners[:1]))
    patched = core.patch_namespaced_config_map("c", NAMESPACE, {"metadata": {"ownerReferences": owners[1:]}})
    assert [owner.uid for owner in patched.metadata.owner_references] == ["a", "b"]
    custom.create_namespaced_custom_object(*JOBS, ray_job())
    with pytest.raises(ApiException) as error:
        custom.patch_namespaced_custom_object(
            *JOBS, "train", {"spec": {"suspend": True}}, _content_type="application/strategic-merge-patch+json"
        )
    assert refusal(error)[:2] == (415, "UnsupportedMediaType")


def test_status_and_spec_are_written_apart(api: KubeApi, custom: client.CustomObjectsApi) -> None:
    custom.create_namespaced_custom_object(*JOBS, ray_job())
    both = {"spec": {"entrypoint": "other"}, "status": {"jobStatus": "RUNNING"}}
    written = custom.patch_namespaced_custom_object_status(*JOBS, "train", both)
    assert (written["spec"]["entrypoint"], written["status"]) == ("train", {"jobStatus": "RUNNING"})
    assert written["metadata"]["generation"] == 1
    written = custom.patch_namespaced_custom_object(*JOBS, "train", both | {"status": {"jobStatus": "FAILED"}})
    assert (written["spec"]["entrypoint"], written["status"]) == ("other", {"jobStatus": "RUNNING"})
    api.set_status("rayjobs", "train", {"jobId": "train-1", "jobStatus": None})
    assert custom.get_namespaced_custom_object_status(*JOBS, "train")["status"] == {"jobId": "train-1"}
    with pytest.raises(ApiError, match=r'unknown field "status\.jobstatus"'):
        api.set_status("rayjobs", "train", {"jobstatus": "RUNNING"})


# Ends


def test_a_deletion_and_what_was_owned(api: KubeApi, core: client.CoreV1Api, custom: client.CustomObjectsApi) -> None:
    job = custom.create_namespaced_custom_object(*JOBS, ray_job())
    owner = {"apiVersion": "ray.io/v1", "kind": "RayJob", "name": "train", "uid": job["metadata"]["uid"]}
    core.create_namespaced_config_map(NAMESPACE, config_map("run", ownerReferences=[owner]))
    cluster = api.create("rayclusters", {"metadata": {"name": "c", "ownerReferences": [owner]}})
    owner = {"apiVersion": "ray.io/v1", "kind": "RayCluster", "name": "c", "uid": cluster["metadata"]["uid"]}
    api.create("pods", pod(ownerReferences=[owner]))
    deleted = custom.delete_namespaced_custom_object(*JOBS, "train")
    assert (deleted["status"], deleted["details"]["uid"]) == ("Success", job["metadata"]["uid"])
    assert not any(api.objects(resource) for resource in ("rayjobs", "rayclusters", "pods", "configmaps"))


def test_finalizers_keep_an_object(api: KubeApi, custom: client.CustomObjectsApi) -> None:
    api.create("rayjobs", ray_job() | {"metadata": {"name": "train", "finalizers": ["ray.io/f"]}})
    for _ in range(2):
        assert "deletionTimestamp" in custom.delete_namespaced_custom_object(*JOBS, "train")["metadata"]
    custom.patch_namespaced_custom_object(*JOBS, "train", {"metadata": {"finalizers": []}})
    assert api.objects("rayjobs") == []


@pytest.mark.parametrize(("options", "left"), [({}, 1), ({"propagation_policy": "Background"}, 0)])
def test_a_job_leaves_its_pods_unless_told_otherwise(
    api: KubeApi, core: client.CoreV1Api, options: dict[str, str], left: int
) -> None:
    job = api.create("jobs", {"metadata": {"name": "j"}, "spec": {"template": pod()}})
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": "j", "uid": job["metadata"]["uid"]}
    api.create("pods", pod(ownerReferences=[owner]))
    client.BatchV1Api(core.api_client).delete_namespaced_job("j", NAMESPACE, **options)
    assert len(api.objects("pods")) == left


def test_a_deletion_only_of_the_object_that_is_meant(api: KubeApi, core: client.CoreV1Api) -> None:
    api.create("configmaps", config_map("c"))
    meant = client.V1DeleteOptions(preconditions=client.V1Preconditions(uid="another"))
    with pytest.raises(ApiException) as error:
        core.delete_namespaced_config_map("c", NAMESPACE, body=meant)
    assert refusal(error)[1] == "Conflict" and "UID in the precondition (another)" in refusal(error)[2]
    api.delete("configmaps", "c")
    assert api.objects("configmaps") == []


# Watches


def test_a_watch_tells_changes_from_a_version_on(api: KubeApi, custom: client.CustomObjectsApi) -> None:
    api.create("rayjobs", ray_job("first"))
    version = custom.list_namespaced_custom_object(*JOBS)["metadata"]["resourceVersion"]
    seen: queue.Queue[tuple[str, str]] = queue.Queue()

    def follow() -> None:
        options = {"resource_version": version, "field_selector": "metadata.name=train"}
        for event in watch.Watch().stream(custom.list_namespaced_custom_object, *JOBS, **options):
            seen.put((event["type"], event["object"].get("status", {}).get("jobStatus", "")))
            if event["type"] == "DELETED":
                break

    follower = threading.Thread(target=follow)
    follower.start()
    api.create("rayjobs", ray_job())
    assert seen.get(timeout=5) == ("ADDED", "")
    api.create("rayjobs", ray_job("another"))
    api.set_status("rayjobs", "train", {"jobStatus": "RUNNING"})
    assert seen.get(timeout=5) == ("MODIFIED", "RUNNING")
    api.delete("rayjobs", "train")
    assert seen.get(timeout=5) == ("DELETED", "RUNNING")
    follower.join(5)
    assert not follower.is_alive()


def test_a_watch_without_a_version_begins_with_what_is_there(api: KubeApi, core: client.CoreV1Api) -> None:
    api.create("pods", pod("a"))
    events = watch.Watch().stream(core.list_namespaced_pod, NAMESPACE, timeout_seconds=1)
    event = next(events)
    assert (event["type"], event["object"].metadata.name) == ("ADDED", "a")
    assert [*events] == []


def test_what_a_selector_no_longer_finds_is_deleted_to_a_watch(api: KubeApi, core: client.CoreV1Api) -> None:
    version = api.create("pods", pod("a", labels={"role": "head"}))["metadata"]["resourceVersion"]
    core.patch_namespaced_pod("a", NAMESPACE, {"metadata": {"labels": {"role": "worker"}}})
    options = {"resource_version": version, "label_selector": "role=head"}
    events = watch.Watch().stream(core.list_namespaced_pod, NAMESPACE, timeout_seconds=1, **options)
    assert next(events)["type"] == "DELETED"


def test_a_watch_from_a_forgotten_version_is_told_so(api: KubeApi, core: client.CoreV1Api) -> None:
    version = api.create("pods", pod("a"))["metadata"]["resourceVersion"]
    api.create("pods", pod("b"))
    api.compact()
    with pytest.raises(ApiException, match=f"Expired: too old resource version: {version}") as error:
        next(watch.Watch().stream(core.list_namespaced_pod, NAMESPACE, resource_version=version, timeout_seconds=1))
    assert error.value.status == 410


# Logs and commands


def test_a_log(api: KubeApi, core: client.CoreV1Api) -> None:
    api.create("pods", pod())
    api.set_log(NAMESPACE, "head", "1\n2\n", age_s=100)
    api.append_log(NAMESPACE, "head", "3\n")
    assert core.read_namespaced_pod_log("head", NAMESPACE) == "1\n2\n3\n"
    assert core.read_namespaced_pod_log("head", NAMESPACE, tail_lines=2) == "2\n3\n"
    api.append_log(NAMESPACE, "head", "10%\r20%\n")
    assert core.read_namespaced_pod_log("head", NAMESPACE, tail_lines=1) == "10%\r20%\n"
    assert core.read_namespaced_pod_log("head", NAMESPACE, since_seconds=50) == "3\n10%\r20%\n"
    stamp, text = core.read_namespaced_pod_log("head", NAMESPACE, tail_lines=2, timestamps=True).split()[:2]
    assert stamp.endswith("Z") and text == "3"


def test_a_followed_log(api: KubeApi, core: client.CoreV1Api) -> None:
    api.create("pods", pod())
    api.set_log(NAMESPACE, "head", "1\n2\n")
    lines = watch.Watch().stream(core.read_namespaced_pod_log, "head", NAMESPACE, tail_lines=1)
    assert next(lines) == "2"
    api.append_log(NAMESPACE, "head", "3\n")
    assert next(lines) == "3"
    api.append_log(NAMESPACE, "head", "4\n")
    api.end_log(NAMESPACE, "head")
    assert [*lines] == ["4"]
    api.set_log(NAMESPACE, "head", "5\n")
    lines = watch.Watch().stream(core.read_namespaced_pod_log, "head", NAMESPACE)
    assert next(lines) == "5"
    api.delete("pods", "head")
    assert [*lines] == []


def test_which_container(api: KubeApi, core: client.CoreV1Api) -> None:
    api.create("pods", pod("head", "ray-head", "autoscaler"))
    api.set_log(NAMESPACE, "head", "of the head", container="ray-head")
    assert core.read_namespaced_pod_log("head", NAMESPACE, container="ray-head") == "of the head"
    for container, words in (
        (None, "a container name must be specified for pod head, choose one of: [ray-head autoscaler]"),
        ("other", "container other is not valid for pod head"),
    ):
        with pytest.raises(ApiException) as error:
            core.read_namespaced_pod_log("head", NAMESPACE, container=container)
        assert refusal(error) == (400, "BadRequest", words)


def test_pods_without_a_kubelet(api: KubeApi, core: client.CoreV1Api) -> None:
    with pytest.raises(ApiException) as error:
        core.read_namespaced_pod_log("head", NAMESPACE)
    assert refusal(error) == (404, "NotFound", 'pods "head" not found')
    api.create("pods", pod("pending"))
    assert not core.read_namespaced_pod_log("pending", NAMESPACE)
    api.create("pods", pod("head", node="node1"))
    with pytest.raises(ApiException, match="dial tcp node1:10250: connect: connection refused") as error:
        core.read_namespaced_pod_log("head", NAMESPACE)
    assert error.value.status == 500
    waiting = {"name": "ray-head", "state": {"waiting": {"reason": "ImagePullBackOff"}}}
    waiting |= {"image": "ray", "imageID": "", "ready": False, "restartCount": 0}
    api.set_status("pods", "head", {"containerStatuses": [waiting]})
    with pytest.raises(ApiException) as error:
        core.read_namespaced_pod_log("head", NAMESPACE)
    assert refusal(error)[2] == 'container "ray-head" in pod "head" is waiting to start: ImagePullBackOff'


@pytest.mark.parametrize("code", [0, 3])
def test_exec(api: KubeApi, core: client.CoreV1Api, code: int) -> None:
    api.create("pods", pod())
    api.on_exec(lambda pod, command: (f"{pod}: {' '.join(command)}\n" + 1000 * "ü", code))
    asked = {"command": ["ls", "-l"], "stdout": True, "stderr": True, "_preload_content": False}
    running = stream.stream(core.connect_get_namespaced_pod_exec, "head", NAMESPACE, **asked)
    running.run_forever(timeout=5)
    assert running.read_stdout() == "head: ls -l\n" + 1000 * "ü"
    assert running.returncode == code
    running.close()


def test_exec_without_a_kubelet(api: KubeApi, core: client.CoreV1Api) -> None:
    api.create("pods", pod(node="node1"))
    with pytest.raises(ApiException, match=r"500 Internal Server Error.*error dialing backend") as error:
        stream.stream(core.connect_get_namespaced_pod_exec, "head", NAMESPACE, command=["ls"], stdout=True)
    assert error.value.status == 0


# Refusals


def test_a_token_is_wanted(tmp_path: Path) -> None:
    with KubeApi(token="secret") as api:
        api.on_exec(lambda pod, command: ("yes", 0))
        api.create("pods", pod())
        connected = connect(api, tmp_path)
        core = client.CoreV1Api(connected)
        assert names(core.list_namespaced_pod(NAMESPACE)) == ["head"]
        asked = {"command": ["ls"], "stdout": True}
        assert stream.stream(core.connect_get_namespaced_pod_exec, "head", NAMESPACE, **asked) == "yes"
        api.token = "another"
        with pytest.raises(ApiException) as error:
            core.list_namespaced_pod(NAMESPACE)
        assert refusal(error) == (401, "Unauthorized", "Unauthorized")


def test_what_is_not_there(api: KubeApi, custom: client.CustomObjectsApi) -> None:
    with pytest.raises(ApiException) as error:
        custom.get_namespaced_custom_object(*JOBS, "x")
    assert refusal(error) == (404, "NotFound", 'rayjobs.ray.io "x" not found')
    assert json.loads(error.value.body)["details"] == {"name": "x", "group": "ray.io", "kind": "rayjobs"}
    with pytest.raises(ApiException, match=r"does not match the expected API version \(ray\.io/v1, Kind=RayJob\)"):
        custom.create_namespaced_custom_object(*JOBS, ray_job() | {"apiVersion": "ray.io/v1alpha1"})
    with pytest.raises(ApiException) as error:
        custom.create_namespaced_custom_object("ray.io", "v1", "x", "rayjobs", ray_job())
    assert refusal(error) == (404, "NotFound", 'namespaces "x" not found')
    with pytest.raises(ApiException) as error:
        custom.list_namespaced_custom_object("ray.io", "v1", NAMESPACE, "rayservices")
    assert refusal(error) == (404, "NotFound", "the server could not find the requested resource")
    api.without_kuberay()
    with pytest.raises(ApiException) as error:
        custom.list_namespaced_custom_object(*JOBS)
    assert (error.value.status, error.value.body) == (404, "404 page not found\n")


def test_rbac(api: KubeApi, core: client.CoreV1Api, custom: client.CustomObjectsApi) -> None:
    api.create("pods", pod())
    for verb, resource in (("create", "rayjobs"), ("get", "pods/log")):
        api.forbid(verb, resource)
    user = 'User "system:serviceaccount:distlm:default" cannot'
    with pytest.raises(ApiException) as error:
        custom.create_namespaced_custom_object(*JOBS, ray_job())
    words = f'{user} create resource "rayjobs" in API group "ray.io" in the namespace "distlm"'
    assert refusal(error) == (403, "Forbidden", f"rayjobs.ray.io is forbidden: {words}")
    with pytest.raises(ApiException) as error:
        core.read_namespaced_pod_log("head", NAMESPACE)
    words = f'{user} get resource "pods/log" in API group "" in the namespace "distlm"'
    assert refusal(error) == (403, "Forbidden", f'pods "head" is forbidden: {words}')
    api.lift()
    custom.create_namespaced_custom_object(*JOBS, ray_job())


def test_a_quota(api: KubeApi, custom: client.CustomObjectsApi) -> None:
    api.create("rayjobs", ray_job("first"))
    api.exceed_quota("rayjobs")
    with pytest.raises(ApiException) as error:
        custom.create_namespaced_custom_object(*JOBS, ray_job())
    count = "count/rayjobs.ray.io=1"
    words = f"exceeded quota: quota, requested: {count}, used: {count}, limited: {count}"
    assert refusal(error) == (403, "Forbidden", f'rayjobs.ray.io "train" is forbidden: {words}')


def test_a_name_that_is_taken(custom: client.CustomObjectsApi) -> None:
    custom.create_namespaced_custom_object(*JOBS, ray_job())
    with pytest.raises(ApiException) as error:
        custom.create_namespaced_custom_object(*JOBS, ray_job())
    assert refusal(error) == (409, "AlreadyExists", 'rayjobs.ray.io "train" already exists')


def test_what_a_schema_does_not_allow(custom: client.CustomObjectsApi) -> None:
    with pytest.raises(ApiException) as error:
        custom.create_namespaced_custom_object(*JOBS, ray_job(entrypoint=3))
    words = 'Invalid value: "integer": spec.entrypoint in body must be of type string: "integer"'
    assert refusal(error) == (422, "Invalid", f'RayJob.ray.io "train" is invalid: spec.entrypoint: {words}')
    cause = {"reason": "FieldValueInvalid", "message": words, "field": "spec.entrypoint"}
    assert json.loads(error.value.body)["details"]["causes"] == [cause]
    with pytest.raises(ApiException) as error:
        custom.create_namespaced_custom_object(*JOBS, ray_job(rayClusterSpec={}))
    assert refusal(error)[2].endswith("is invalid: spec.rayClusterSpec.headGroupSpec: Required value")


def test_unknown_fields(api: KubeApi, core: client.CoreV1Api, custom: client.CustomObjectsApi) -> None:
    with pytest.raises(ApiException) as error:
        custom.create_namespaced_custom_object(*JOBS, ray_job(entrypoin="a"), field_validation="Strict")
    words = 'RayJob in version "v1" cannot be handled as a RayJob: strict decoding error: '
    assert refusal(error) == (400, "BadRequest", f'{words}unknown field "spec.entrypoin"')
    assert "entrypoin" not in custom.create_namespaced_custom_object(*JOBS, ray_job(entrypoin="a"))["spec"]
    # The client itself refuses unknown fields of a built-in kind, unless it is made to send what it is given.
    strange = pod()
    strange["spec"]["containers"][0]["imag"] = "ray"
    with pytest.raises(pydantic.ValidationError, match=r"spec\.containers\.0\.imag"):
        core.create_namespaced_pod(NAMESPACE, strange)
    sent = urllib3.request(
        "POST", f"{api.url}/api/v1/namespaces/{NAMESPACE}/pods?fieldValidation=Strict", json=strange, retries=False
    )
    assert 'unknown field "spec.containers[0].imag"' in sent.json()["message"]


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"name": "Train_1"}, 'metadata.name: Invalid value: "Train_1": a lowercase RFC 1123 subdomain must'),
        ({}, "metadata.name: Required value: name or generateName is required"),
        ({"name": "c", "labels": {"run": 64 * "a"}}, "must be no more than 63 bytes"),
        ({"name": "c", "labels": {"run": "a b"}}, "a valid label must be an empty string or consist of"),
    ],
)
def test_names_and_labels(core: client.CoreV1Api, metadata: dict[str, Any], words: str) -> None:
    with pytest.raises(ApiException) as error:
        core.create_namespaced_config_map(NAMESPACE, {"metadata": metadata})
    assert refusal(error)[0] == 422 and words in refusal(error)[2]


# Trouble on the way


def with_retries(core: client.CoreV1Api, retries: urllib3.Retry | bool) -> client.CoreV1Api:
    configuration = core.api_client.configuration
    configuration.retries = retries
    return client.CoreV1Api(client.ApiClient(configuration))


def test_throttling(api: KubeApi, core: client.CoreV1Api) -> None:
    api.throttle(1, method="POST")
    core.list_namespaced_pod(NAMESPACE)
    with pytest.raises(ApiException) as error:
        with_retries(core, False).create_namespaced_pod(NAMESPACE, pod())
    assert (error.value.status, error.value.headers["Retry-After"]) == (429, "1")
    assert error.value.body == "Too many requests, please try again later.\n"
    core.create_namespaced_pod(NAMESPACE, pod())


def test_a_dropped_request_is_not_carried_out(api: KubeApi, core: client.CoreV1Api) -> None:
    api.drop(1)
    with pytest.raises(urllib3.exceptions.ProtocolError, match="Connection aborted"):
        core.create_namespaced_pod(NAMESPACE, pod())
    assert api.objects("pods") == []
    api.drop(1)
    assert names(core.list_namespaced_pod(NAMESPACE)) == []  # the client reads again by itself
    assert [request.method for request in api.requests] == ["POST", "GET", "GET"]


def test_an_answer_that_is_lost(api: KubeApi, core: client.CoreV1Api) -> None:
    api.drop_after(1)
    again = with_retries(core, urllib3.Retry(3, allowed_methods=None, backoff_factor=0))
    with pytest.raises(ApiException) as error:
        again.create_namespaced_pod(NAMESPACE, pod())
    assert refusal(error) == (409, "AlreadyExists", 'pods "head" already exists')


def test_every_connection_is_closed(api: KubeApi, core: client.CoreV1Api) -> None:
    api.create("pods", pod())
    api.set_log(NAMESPACE, "head", "1\n")
    lines = watch.Watch().stream(core.read_namespaced_pod_log, "head", NAMESPACE)
    assert next(lines) == "1"
    api.disconnect()
    with pytest.raises(urllib3.exceptions.ProtocolError):
        next(lines)


def test_a_server_that_is_gone(tmp_path: Path) -> None:
    with KubeApi() as api:
        core = client.CoreV1Api(connect(api, tmp_path))
        core.list_namespace()
    with pytest.raises(urllib3.exceptions.MaxRetryError, match="Connection refused"):
        core.list_namespace()


def test_waiting_for_the_client(api: KubeApi, core: client.CoreV1Api) -> None:
    threading.Thread(target=core.create_namespaced_pod, args=(NAMESPACE, pod())).start()
    assert [found["metadata"]["name"] for found in api.wait_for(lambda: api.objects("pods"))] == ["head"]
    with pytest.raises(TimeoutError, match="/api/v1/namespaces/distlm/pods"):
        api.wait_for(lambda: api.objects("secrets"), timeout_s=0.01)
