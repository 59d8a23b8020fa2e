"""What is made of the words of KubeRay and Kubernetes about a run."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from distlm.launchers.base import JobState
from distlm.launchers.kubernetes_states import Found, status_of

IMAGE_ERROR = 'Back-off pulling image "registry.example/distlm:1": not found'


def job(word: str = "", job_word: str = "", **others: Any) -> dict[str, Any]:
    status = {"jobDeploymentStatus": word, "jobStatus": job_word, **others}
    return {"metadata": {"name": "distlm-a", "uid": "u-job"}, "spec": {"backoffLimit": 3}, "status": status}


def pod(name: str, component: str = "worker", **status: Any) -> dict[str, Any]:
    labels = {"app.kubernetes.io/component": component}
    return {"metadata": {"name": name, "uid": f"u-{name}", "labels": labels}, "status": status}


def waiting(reason: str, message: str = "") -> dict[str, Any]:
    state = {"waiting": {"reason": reason, "message": message}}
    return {"phase": "Pending", "containerStatuses": [{"name": "ray-worker", "state": state}]}


def ended(reason: str, container: str = "ray-worker", state: str = "lastState") -> dict[str, Any]:
    terminated = {"reason": reason, "finishedAt": datetime.now(UTC).isoformat(timespec="seconds")}
    return {"phase": "Running", "containerStatuses": [{"name": container, state: {"terminated": terminated}}]}


def unschedulable(message: str) -> dict[str, Any]:
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
    return {"phase": "Pending", "conditions": [condition]}


def warning(uid: str, reason: str, message: str) -> dict[str, Any]:
    return {"involvedObject": {"uid": uid}, "reason": reason, "message": message, "metadata": {}}


@pytest.mark.parametrize(
    ("ray_job", "state", "words", "reason"),
    [
        ({"metadata": {}}, JobState.SUBMITTED, "", "KubeRay's operator has not begun with it"),
        ({"metadata": {}, "status": {}}, JobState.SUBMITTED, "", "KubeRay's operator has not begun with it"),
        (job("Initializing"), JobState.PENDING, "Initializing", ""),
        (job("Initializing", failed=1), JobState.PENDING, "Initializing", "retry 1 of 3"),
        (job("Waiting"), JobState.PENDING, "Waiting", ""),
        (job("Running"), JobState.PENDING, "Running", ""),
        (job("Running", "PENDING"), JobState.PENDING, "Running/PENDING", ""),
        (job("Running", "RUNNING"), JobState.RUNNING, "Running/RUNNING", ""),
        (job("Running", "FAILED"), JobState.RUNNING, "Running/FAILED", ""),
        (job("Retrying", failed=2), JobState.PENDING, "Retrying", "it goes on with new pods (retry 2 of 3)"),
        (job("Suspending"), JobState.PENDING, "Suspending", "its `suspend` is true"),
        (job("Suspended"), JobState.PENDING, "Suspended", "its `suspend` is true"),
        (job("Complete", "SUCCEEDED"), JobState.SUCCEEDED, "Complete/SUCCEEDED", ""),
        (job("Complete", "STOPPED"), JobState.CANCELLED, "Complete/STOPPED", ""),
        (job("Complete", "FAILED"), JobState.FAILED, "Complete/FAILED", ""),
        (job("Complete", "NEW"), JobState.UNKNOWN, "Complete/NEW", ""),
        (job("Failed", "FAILED", reason="AppFailed", message="Job entrypoint command failed with exit code 1, last "
             "available logs (truncated to 20,000 chars):\nstep 1"), JobState.FAILED, "Failed/FAILED",
         "AppFailed: Job entrypoint command failed with exit code 1"),
        (job("Failed", "FAILED", reason="AppFailed", message="... failed with exit code 75, last available logs"),
         JobState.PREEMPTED, "Failed/FAILED", "AppFailed"),
        (job("Failed", "FAILED", reason="AppFailed", message="... failed with exit code 130, last available logs"),
         JobState.CANCELLED, "Failed/FAILED", "AppFailed"),
        (job("Failed", reason="SubmissionFailed", message="Job has reached the specified backoff limit"),
         JobState.FAILED, "Failed", "SubmissionFailed: Job has reached the specified backoff limit"),
        (job("Failed", "RUNNING", reason="DeadlineExceeded"), JobState.PREEMPTED, "Failed/RUNNING",
         "kubernetes.active_deadline_s was over"),
        (job("ValidationFailed", message="The RayJob spec is invalid:\nbackoffLimit must be a positive integer"),
         JobState.FAILED, "ValidationFailed", "KubeRay refuses it: The RayJob spec is invalid: backoffLimit must"),
        (job("SomethingNew"), JobState.UNKNOWN, "SomethingNew", ""),
    ],
)  # fmt: skip
def test_what_the_words_of_kuberay_mean(ray_job: dict[str, Any], state: JobState, words: str, reason: str) -> None:
    status = status_of(Found(ray_job))
    assert (status.state, status.target_state) == (state, words)
    assert status.reason.startswith(reason) and bool(status.reason) == bool(reason)


def test_a_new_job_is_given_time() -> None:
    ray_job: dict[str, Any] = {"metadata": {}}
    ray_job["metadata"]["creationTimestamp"] = datetime.now(UTC).isoformat(timespec="seconds")
    assert status_of(Found(ray_job)).reason == ""
    ray_job["metadata"]["creationTimestamp"] = "2026-01-31T00:00:00Z"
    assert status_of(Found(ray_job)).reason


def test_a_job_that_is_deleted_is_alive_until_it_is_gone() -> None:
    ray_job = job("Running", "RUNNING")
    ray_job["metadata"]["deletionTimestamp"] = "2026-01-31T00:00:00Z"
    status = status_of(Found(ray_job))
    assert status.state.is_alive and status.target_state == "deleted"


def test_a_queue_of_kueue_is_named() -> None:
    ray_job = job("Suspended")
    ray_job["metadata"]["labels"] = {"kueue.x-k8s.io/queue-name": "research"}
    assert status_of(Found(ray_job)).reason == "it waits in the queue research of Kueue"


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (waiting("ImagePullBackOff", IMAGE_ERROR),
         f"worker pod w-1 cannot start (ImagePullBackOff): {IMAGE_ERROR}; look at kubernetes.image, and"),
        (waiting("ErrImagePull"), "worker pod w-1 cannot start (ErrImagePull); look at kubernetes.image, and"),
        (waiting("InvalidImageName", "invalid reference format"),
         "worker pod w-1 cannot start (InvalidImageName): invalid reference format; look at kubernetes.image"),
        (waiting("CreateContainerConfigError", 'secret "x" not found'),
         'worker pod w-1 cannot start (CreateContainerConfigError): secret "x" not found; look at kubernetes.env'),
        (waiting("CrashLoopBackOff", "back-off"), "worker pod w-1 cannot start (CrashLoopBackOff): back-off; see"),
        (unschedulable("0/3 nodes are available: 3 Insufficient nvidia.com/gpu."),
         "worker pod w-1 cannot be placed: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu."),
        (ended("OOMKilled"),
         "worker pod w-1 ran out of memory (OOMKilled); give it more with kubernetes.worker.memory_gib"),
        (ended("OOMKilled", "ray-head", "state"),
         "worker pod w-1 ran out of memory (OOMKilled); give it more with kubernetes.head.memory_gib"),
        (ended("OOMKilled", "ray-job-submitter"),
         "worker pod w-1 ran out of memory (OOMKilled); give it more with kubernetes.pod_template"),
        (ended("OOMKilled", "wait-gcs-ready"), "worker pod w-1 ran out of memory (OOMKilled)"),
        ({"phase": "Failed", "reason": "UnexpectedAdmissionError", "message": "Allocate failed: no GPU"},
         "worker pod w-1 was ended by Kubernetes (UnexpectedAdmissionError): Allocate failed: no GPU"),
        ({"phase": "Running", "conditions": [{"type": "DisruptionTarget", "status": "True",
          "reason": "DeletionByTaintManager", "message": "Taint manager: deleting due to NoExecute taint"}]},
         "worker pod w-1 is being ended (DeletionByTaintManager): Taint manager: deleting due to NoExecute taint"),
        ({"phase": "Failed", "reason": "Evicted", "message": "The node was low on resource: memory."},
         "worker pod w-1 was ended by Kubernetes (Evicted): The node was low on resource: memory."),
        ({"phase": "Failed", "reason": "Preempted"}, "worker pod w-1 was ended by Kubernetes (Preempted)"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("ray_job", [job("Initializing"), job("Running", "RUNNING")])
def test_what_is_wrong_with_a_pod_is_one_line(ray_job: dict[str, Any], status: dict[str, Any], text: str) -> None:
    found = status_of(Found(ray_job, pods=[pod("w-1", **status)]))
    assert found.state in (JobState.PENDING, JobState.RUNNING), "Kubernetes goes on trying"
    assert found.reason.startswith(text) and "\n" not in found.reason


@pytest.mark.parametrize(
    "status", [{"phase": "Running"}, waiting("ContainerCreating"), ended("Completed"), ended("Error"), {}]
)
def test_a_pod_that_is_well_is_not_told(status: dict[str, Any]) -> None:
    assert status_of(Found(job("Running", "RUNNING"), pods=[pod("w-1", **status)])).reason == ""


def test_what_is_wrong_with_several_pods_is_told_once() -> None:
    pods = [pod(f"w-{number}", **unschedulable("no room")) for number in range(3)]
    pods.append(pod("h", "head", **waiting("ImagePullBackOff", "gone")))
    reason = status_of(Found(job("Initializing"), pods=pods)).reason
    assert reason.startswith(
        "3 worker pods cannot be placed: no room; head pod h cannot start (ImagePullBackOff): gone"
    )


def test_what_is_over_is_not_told() -> None:
    """Pods of the cluster before a retry, those that end, and a worker that ran out of memory an hour ago."""
    old = pod("w-0", **unschedulable("no room"))
    old["metadata"]["labels"]["ray.io/cluster"] = "distlm-a-1"
    going = pod("w-1", **unschedulable("no room"))
    going["metadata"]["deletionTimestamp"] = "2026-01-31T00:00:00Z"
    late = pod("w-2", **ended("OOMKilled"))
    late["status"]["containerStatuses"][0]["lastState"]["terminated"]["finishedAt"] = "2026-01-31T00:00:00Z"
    found = Found(job("Initializing", rayClusterName="distlm-a-2"), pods=[old, going, late])
    assert status_of(found).reason == ""


def test_why_a_container_is_not_made_is_told_by_events() -> None:
    events = [
        warning("u-w-1", "FailedMount", "an older one"),
        warning("u-w-1", "FailedMount", 'MountVolume.SetUp failed: configmap "distlm-a" not found'),
        warning("u-w-1", "FailedScheduling", "which is over"),
        warning("u-w-2", "FailedMount", "of another pod"),
    ]
    found = Found(job("Initializing"), pods=[pod("w-1", **waiting("ContainerCreating"))], events=events)
    text = 'worker pod w-1 does not start (FailedMount): MountVolume.SetUp failed: configmap "distlm-a" not found'
    assert status_of(found).reason == text


def test_a_worker_that_waits_for_the_head_is_well() -> None:
    status = waiting("PodInitializing")
    status["initContainerStatuses"] = [{"name": "wait-gcs-ready", "state": {"running": {}}}]
    events = [warning("u-w-1", "Unhealthy", "of before")]
    assert status_of(Found(job("Initializing"), pods=[pod("w-1", **status)], events=events)).reason == ""


def test_what_keeps_the_submitter_from_being_made_is_told() -> None:
    event = warning("u-of-the-job", "FailedCreate", "pods is forbidden: exceeded quota")
    event["involvedObject"]["kind"] = "Job"
    pods = [pod("h", "head", phase="Running"), pod("w-1", phase="Running")]
    reason = status_of(Found(job("Running"), pods=pods, events=[event])).reason
    assert reason == "FailedCreate: pods is forbidden: exceeded quota"


def test_a_retry_is_not_taken_for_a_new_job() -> None:
    assert status_of(Found(job("", failed=1))).reason == ""


def test_a_quota_that_keeps_the_pods_from_being_made_is_told() -> None:
    message = 'pods "a" is forbidden: exceeded quota: gpus, requested: requests.nvidia.com/gpu=8, used: 0, limited: 4'
    condition = {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreateWorkerPod", "message": message}
    cluster = {"status": {"conditions": [condition]}}
    assert status_of(Found(job("Initializing"), cluster)).reason == (
        f"KubeRay cannot make the pods: {message}; use fewer pods, or have the quota raised"
    )
    condition["status"] = "False"
    assert status_of(Found(job("Initializing"), cluster)).reason == ""


def test_without_any_pod_the_newest_warning_is_told() -> None:
    events = [warning("u-job", "FailedToCreateRayCluster", "exceeded quota: clusters")]
    reason = status_of(Found(job("Initializing"), events=events)).reason
    assert reason == "FailedToCreateRayCluster: exceeded quota: clusters"
