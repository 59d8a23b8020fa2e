"""What KubeRay and Kubernetes say about a run's RayJob, its cluster and its pods, in the words of all targets. Pure.

A RayJob that waits says little by itself: why it does is with its pods, or in the events about them.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from distlm.launchers.base import JobState, JobStatus
from distlm.launchers.kubernetes_manifests import COMPONENT_LABEL, HEAD, INSTANCE_LABEL, SUBMITTER, WORKER

Object = Mapping[str, Any]

# By status.jobDeploymentStatus. How Complete and Failed are to be taken is told by status.jobStatus and status.reason.
_STATES = {
    "": JobState.SUBMITTED,
    "Initializing": JobState.PENDING,
    "Waiting": JobState.PENDING,
    "Running": JobState.RUNNING,
    "Retrying": JobState.PENDING,
    "Suspending": JobState.PENDING,
    "Suspended": JobState.PENDING,
    "ValidationFailed": JobState.FAILED,
}
_COMPLETE = {"SUCCEEDED": JobState.SUCCEEDED, "STOPPED": JobState.CANCELLED, "FAILED": JobState.FAILED}

_ADVICE_ON_WAITING = {
    "ErrImagePull": "look at kubernetes.image, and at kubernetes.image_pull_secrets if its registry asks for a login",
    "InvalidImageName": "look at kubernetes.image",
    "ErrImageNeverPull": "load the image on the node, or set kubernetes.image_pull_policy to IfNotPresent",
    "CreateContainerConfigError": "look at kubernetes.env_secret and kubernetes.pod_template",
    "CreateContainerError": "look at kubernetes.image and kubernetes.pod_template",
    "RunContainerError": "look at kubernetes.image",
    "CrashLoopBackOff": "see `kubectl logs --previous` of that pod",
}
_SAME_AS = {
    "ImagePullBackOff": "ErrImagePull",
    "ImageInspectError": "ErrImagePull",
    "RegistryUnavailable": "ErrImagePull",
}
_ADVICE_ON_MEMORY = {
    HEAD: "; give it more with kubernetes.head.memory_gib",
    WORKER: "; give it more with kubernetes.worker.memory_gib",
    SUBMITTER: "; give it more with kubernetes.pod_template",
}
"""By container. What KubeRay adds has the memory that KubeRay gives it."""
_LATELY_S = 600.0
_BEING_MADE = ("ContainerCreating", "PodInitializing")
_SOON_S = 20.0
"""In which KubeRay has looked at a new RayJob."""
_EXIT_CODE = re.compile(r"exit code:? (-?\d+)")


@dataclass(frozen=True)
class Found:
    """What the API knows of a run."""

    ray_job: Object
    cluster: Object | None = None
    pods: Sequence[Object] = ()
    events: Sequence[Object] = field(default=())
    """Warnings about them, oldest first."""


def status_of(found: Found) -> JobStatus:
    """How the RayJob stands."""
    status = found.ray_job.get("status") or {}
    word, job_word = status.get("jobDeploymentStatus") or "", status.get("jobStatus") or ""
    if "deletionTimestamp" in found.ray_job["metadata"]:
        return JobStatus(JobState.RUNNING, "deleted", "its pods are ending")
    if word == "Complete":
        return JobStatus(_COMPLETE.get(job_word, JobState.UNKNOWN), _words(word, job_word))
    if word == "Failed":
        return _failed(status, _words(word, job_word), found)
    state = _STATES.get(word, JobState.UNKNOWN)
    if word == "Running" and job_word in ("", "PENDING"):
        state = JobState.PENDING
    problem = "; ".join(problems_of(found)) if word != "ValidationFailed" else ""
    reason = "; ".join(filter(None, (*_why(word, status, found), problem)))
    return JobStatus(state, _words(word, job_word), reason, problem)


def _words(word: str, job_word: str) -> str:
    return "/".join(filter(None, (word, job_word)))


def _failed(status: Object, words: str, found: Found) -> JobStatus:
    reason, message = status.get("reason") or "", _one_line(status.get("message") or "")
    if reason == "DeadlineExceeded":
        text = "kubernetes.active_deadline_s was over; the newest checkpoint can be continued"
        return JobStatus(JobState.PREEMPTED, words, text)
    code = _EXIT_CODE.search(message)
    state = JobState.FAILED.with_exit_code(int(code[1])) if code else JobState.FAILED
    # Ray's message ends with the last output of the job, which is told elsewhere.
    text = ": ".join(filter(None, (reason, message.partition(", last available logs")[0])))
    return JobStatus(state, words, "; ".join(filter(None, (text, *problems_of(found)))))


def _why(word: str, status: Object, found: Found) -> Iterator[str]:
    """It is in that state, as far as the RayJob itself tells."""
    spec = found.ray_job.get("spec") or {}
    failed = status.get("failed") or 0
    match word:
        case "" if not status and _seconds_since(found.ray_job["metadata"].get("creationTimestamp")) > _SOON_S:
            yield "KubeRay's operator has not begun with it; does it run, and does it watch this namespace?"
        case "Suspended" | "Suspending":
            queue = (found.ray_job["metadata"].get("labels") or {}).get("kueue.x-k8s.io/queue-name")
            yield f"it waits in the queue {queue} of Kueue" if queue else "its `suspend` is true: nothing is started"
        case "Retrying":
            limit = spec.get("backoffLimit") or 0
            yield f"it goes on with new pods (retry {failed} of {limit})"
        case "ValidationFailed":
            yield f"KubeRay refuses it: {_one_line(status.get('message') or '')}"
        case "Initializing" if failed:
            yield f"retry {failed} of {spec.get('backoffLimit') or 0}"


def problems_of(found: Found) -> list[str]:
    """What is wrong with the cluster and its pods, a line for each thing, with what to do about it."""
    problems = list(_of_cluster(found.cluster or {}))
    by_text: dict[str, list[Object]] = {}
    for pod in filter(lambda pod: _is_of_now(pod, found.ray_job), found.pods):
        for text in _of_pod(pod, found.events):
            by_text.setdefault(text, []).append(pod)
    problems += [f"{_which(pods)} {text}" for text, pods in by_text.items()]
    if not problems:  # something may be kept from being made
        of_pods = {pod["metadata"].get("uid") for pod in found.pods}
        others = [event for event in found.events if _about(event).get("uid") not in of_pods]
        wanted = [event for event in others if not found.pods or _about(event).get("kind") == "Job"]
        problems += [f"{event.get('reason')}: {_one_line(event.get('message') or '')}" for event in wanted[-1:]]
    return problems


def _about(event: Object) -> Object:
    found: Object = event.get("involvedObject") or {}
    return found


def _is_of_now(pod: Object, ray_job: Object) -> bool:
    """Not of the cluster before a retry, and not about to end."""
    labels, status = pod["metadata"].get("labels") or {}, ray_job.get("status") or {}
    cluster = labels.get("ray.io/cluster")
    return "deletionTimestamp" not in pod["metadata"] and cluster in (None, status.get("rayClusterName"))


def _of_cluster(cluster: Object) -> Iterator[str]:
    for condition in (cluster.get("status") or {}).get("conditions") or ():
        if (condition.get("type"), condition.get("status")) == ("ReplicaFailure", "True"):
            message = _one_line(condition.get("message") or "")
            advice = "; use fewer pods, or have the quota raised" if "exceeded quota" in message else ""
            yield f"KubeRay cannot make the pods: {message}{advice}"


def _of_pod(pod: Object, events: Iterable[Object]) -> Iterator[str]:
    status = pod.get("status") or {}
    conditions = {one.get("type"): one for one in status.get("conditions") or ()}
    placed, disrupted = conditions.get("PodScheduled") or {}, conditions.get("DisruptionTarget") or {}
    if placed.get("status") == "False":
        yield f"cannot be placed: {_one_line(placed.get('message') or placed.get('reason') or '')}"
    if status.get("phase") == "Failed" and status.get("reason"):
        yield f"was ended by Kubernetes ({status['reason']}): {_one_line(status.get('message') or '')}".rstrip(": ")
    elif disrupted.get("status") == "True":
        yield f"is being ended ({disrupted.get('reason')}): {_one_line(disrupted.get('message') or '')}".rstrip(": ")
    inits, mains = status.get("initContainerStatuses") or (), status.get("containerStatuses") or ()
    for container in (*inits, *mains):
        reason, message = _waits(container)
        if advice := _ADVICE_ON_WAITING.get(_SAME_AS.get(reason, reason)):
            yield f"cannot start ({reason}): {message}; {advice}" if message else f"cannot start ({reason}); {advice}"
        yield from _out_of_memory(container)
    is_initializing = any("running" in (container.get("state") or {}) for container in inits)
    is_being_made = any(_waits(container)[0] in _BEING_MADE for container in (*inits, *mains))
    is_placed = status.get("phase") == "Pending" and bool((pod.get("spec") or {}).get("nodeName"))
    if (is_being_made or (is_placed and not mains)) and not is_initializing:
        yield from _newest_warning(pod, events)


def _waits(container: Object) -> tuple[str, str]:
    """Why a container is not started, in a word and in words; empty: it is."""
    waiting = (container.get("state") or {}).get("waiting") or {}
    return waiting.get("reason") or "", _one_line(waiting.get("message") or "")


def _out_of_memory(container: Object) -> Iterator[str]:
    """Now, or in the last minutes: Kubernetes starts a container that was ended anew, and the run goes on."""
    for name in ("state", "lastState"):
        ended = (container.get(name) or {}).get("terminated") or {}
        is_over = name == "lastState" and ended.get("finishedAt") and _seconds_since(ended["finishedAt"]) > _LATELY_S
        if ended.get("reason") == "OOMKilled" and not is_over:
            advice = _ADVICE_ON_MEMORY.get(str(container.get("name")), "")
            yield f"ran out of memory (OOMKilled){advice}"
            return


def _newest_warning(pod: Object, events: Iterable[Object]) -> Iterator[str]:
    """For a pod whose containers are being made: volumes that do not come are told by events alone."""
    uid = pod["metadata"].get("uid")
    warnings = [one for one in events if _about(one).get("uid") == uid and one.get("reason") != "FailedScheduling"]
    if warnings:
        yield f"does not start ({warnings[-1].get('reason')}): {_one_line(warnings[-1].get('message') or '')}"


def _which(pods: Sequence[Object]) -> str:
    """Such as "worker pod NAME" or "2 worker pods"."""
    kinds = {(pod["metadata"].get("labels") or {}).get(COMPONENT_LABEL, "") for pod in pods}
    kind = f"{kinds.pop()} " if len(kinds) == 1 else ""
    if len(pods) == 1:
        return f"{kind}pod {pods[0]['metadata']['name']}".strip()
    return f"{len(pods)} {kind}pods".replace("  ", " ")


def of_run(name: str) -> str:
    """The label selector of all that belongs to a run."""
    return f"{INSTANCE_LABEL}={name}"


def _seconds_since(moment: str | None) -> float:
    """Of a time that the API gives; infinite of none."""
    return time.time() - datetime.fromisoformat(moment).timestamp() if moment else math.inf


def _one_line(text: str) -> str:
    return " ".join(text.split())
