"""What a run is on Kubernetes: its config, who may connect to its pods, and a RayJob of KubeRay. Pure: a config in,
manifests out.

The RayJob makes a Ray cluster of a head pod, where the controller runs, and pods for the workers, and ends it with the
run. Each of its retries is a new cluster, on which the run goes on from its newest checkpoint.
"""

from __future__ import annotations

import hashlib
import math
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import yaml

from distlm import __version__
from distlm.config.schema import KubernetesConfig, PodResources, RunConfig
from distlm.launchers.carried import ATTEMPT_FILES, JOB
from distlm.ray_settings import OBJECT_STORE_BYTES, OF_EVERY_NODE
from distlm.run_folder import NUM_OWN_NODES, REPLACES_NODES

Manifest = dict[str, Any]

NAME_LABEL, INSTANCE_LABEL = "app.kubernetes.io/name", "app.kubernetes.io/instance"
COMPONENT_LABEL, PART_LABEL = "app.kubernetes.io/component", "app.kubernetes.io/part-of"
RUN_NAME, MLFLOW_CLIENT_LABEL = "distlm-run", "distlm-mlflow-client"
FOLDER_ANNOTATION = "distlm/run-folder"
"""Of the RayJob: the run's folder as the pods see it."""
RAY_VERSION = "2.60.0"
HEAD, WORKER, SUBMITTER = "ray-head", "ray-worker", "ray-job-submitter"
"""Names of containers; those of the submitter and of the pods' kinds are KubeRay's."""
CONFIG_FOLDER = "/etc/distlm"
MAX_NAME = 47
"""Characters of a RayJob's name, which KubeRay makes longer names of."""
SAFETY_S = 30
"""For a pod to end, beyond the time that its workers have to save."""
USER_ID = 1000
"""Of the image's user."""

_GCS_PORT, _DASHBOARD_PORT = 6379, 8265
_SUBMITTER_RETRIES = 6
"""A submitter may be evicted, which is no fault of the run; when it has lost the head it ends without a failure."""
_NODE_AWAY_S = 30
"""On a node that does not answer, head and submitter are given up after that time, in place of Kubernetes' 300 s, after
which KubeRay would end the run for good."""
_PRE_STOP = ["python", "-m", "distlm.kubernetes.pre_stop"]


def name_of(text: str) -> str:
    """A name for a RayJob, for whatever text."""
    name = "distlm-" + re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if len(name) <= MAX_NAME:
        return name.rstrip("-")
    return f"{name[: MAX_NAME - 7].rstrip('-')}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def folder_in_pods(config: RunConfig, run_id: str, working_directory: str) -> str:
    """The run's folder, as the pods see it."""
    return str(PurePosixPath(working_directory, config.runs_dir, run_id))


def working_directory_in_pods(config: RunConfig, here: str) -> str:
    """Where relative paths are seen from there: from the same folder, where that is on the shared storage."""
    mount_path = config.kubernetes.storage.mount_path
    return here if PurePosixPath(here).is_relative_to(mount_path) else mount_path


def manifests(
    config: RunConfig, name: str, what: Sequence[str], files: Mapping[str, str], folder: str = ""
) -> list[Manifest]:
    """All objects of a run, in the order in which they are made; the last one is the RayJob, which owns the others.

    Args:
        name: of the RayJob, and of the others.
        what: the arguments of `python -m distlm.ray_job`: a run's folder, or a config file and overrides.
        files: what the job finds in CONFIG_FOLDER.
        folder: the run's folder as the pods see it; empty: not known yet.
    """
    return list(_Run(config, name, what, folder).objects(files))


def to_yaml(objects: Iterable[Manifest]) -> str:
    documents = (yaml.dump(one, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120) for one in objects)
    return "---\n".join(documents)


class _Dumper(yaml.SafeDumper):
    """Files in a ConfigMap as they are."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


class _Run:
    def __init__(self, config: RunConfig, name: str, what: Sequence[str], folder: str) -> None:
        self._config, self._name, self._what, self._folder = config, name, what, folder
        self._settings: KubernetesConfig = config.kubernetes

    def objects(self, files: Mapping[str, str]) -> Iterator[Manifest]:
        yield {"apiVersion": "v1", "kind": "ConfigMap", "metadata": self._metadata(), "data": dict(files)}
        if self._config.env and self._settings.env_secret is None:
            values = {name: f"${{{name}}}" for name in self._config.env}
            yield {"apiVersion": "v1", "kind": "Secret", "metadata": self._metadata(), "stringData": values}
        if self._settings.network_policy:
            yield self._network_policy()
        yield self._ray_job()

    def _metadata(self, **annotations: str) -> Manifest:
        metadata: Manifest = {"name": self._name}
        if self._settings.namespace:
            metadata["namespace"] = self._settings.namespace
        metadata["labels"] = {**self._labels(), "app.kubernetes.io/version": __version__}
        if annotations:
            metadata["annotations"] = annotations
        return metadata

    def _labels(self, component: str = "") -> dict[str, str]:
        labels = {NAME_LABEL: RUN_NAME, INSTANCE_LABEL: self._name, PART_LABEL: "distlm"}
        return {**labels, COMPONENT_LABEL: component} if component else labels

    # --- who may connect to the pods ---------------------------------------------------------------------------------

    def _network_policy(self) -> Manifest:
        own = {NAME_LABEL: RUN_NAME, INSTANCE_LABEL: self._name}
        operator = {"matchLabels": {COMPONENT_LABEL: "kuberay-operator"}}
        return {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": self._metadata(),
            "spec": {
                "podSelector": {"matchLabels": own},
                "policyTypes": ["Ingress"],
                "ingress": [
                    {"from": [{"podSelector": {"matchLabels": own}}]},
                    {
                        "from": [{"namespaceSelector": {}, "podSelector": operator}],
                        "ports": [{"protocol": "TCP", "port": _DASHBOARD_PORT}],
                    },
                ],
            },
        }

    # --- the job -----------------------------------------------------------------------------------------------------

    def _ray_job(self) -> Manifest:
        settings = self._settings
        metadata = self._metadata(**({FOLDER_ANNOTATION: self._folder} if self._folder else {}))
        if settings.queue:
            metadata["labels"]["kueue.x-k8s.io/queue-name"] = settings.queue
        entrypoint = ["python", "-m", "distlm.ray_job", *self._what]
        spec: Manifest = {
            "submissionMode": "K8sJobMode",
            "entrypoint": shlex.join(entrypoint),
            "backoffLimit": settings.max_retries,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": settings.ttl_s,
        }
        if settings.active_deadline_s is not None:
            spec["activeDeadlineSeconds"] = settings.active_deadline_s
        if settings.suspend or settings.queue:  # Kueue starts it
            spec["suspend"] = True
        spec["submitterConfig"] = {"backoffLimit": _SUBMITTER_RETRIES}
        spec["submitterPodTemplate"] = self._submitter(entrypoint)
        spec["rayClusterSpec"] = {
            "rayVersion": RAY_VERSION,
            "authOptions": {"mode": "token"},
            "headGroupSpec": {"rayStartParams": self._start_params(is_head=True), "template": self._head()},
            "workerGroupSpecs": [
                {
                    "groupName": "workers",
                    "replicas": settings.worker_pods,
                    "minReplicas": settings.worker_pods,
                    "maxReplicas": settings.worker_pods,
                    "rayStartParams": self._start_params(is_head=False),
                    "template": self._workers(),
                }
            ],
        }
        return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": metadata, "spec": spec}

    def _start_params(self, *, is_head: bool) -> dict[str, str]:
        """Of `ray start`. The head has no CPUs and GPUs for workers."""
        ours = {"object-store-memory": str(OBJECT_STORE_BYTES), "disable-usage-stats": "true"}
        return {**ours, "num-cpus": "0", "num-gpus": "0"} if is_head else ours

    # --- pods --------------------------------------------------------------------------------------------------------

    def _head(self) -> Manifest:
        save_s = math.ceil(self._config.resources.time_to_save_s)
        env = {
            **self._ray_environment(),
            "RAY_JOB_STOP_WAIT_TIME_S": str(save_s),
            NUM_OWN_NODES: str(self._settings.worker_pods + 1),
            ATTEMPT_FILES: CONFIG_FOLDER,
            JOB: f"kubernetes:$(POD_NAMESPACE)/{self._name}",
        }
        container = self._ray_container(HEAD, self._settings.head, env)
        container["env"].insert(0, _field("POD_NAMESPACE", "metadata.namespace"))
        container["ports"] = [
            {"name": "gcs-server", "containerPort": _GCS_PORT},
            {"name": "dashboard", "containerPort": _DASHBOARD_PORT},
        ]
        container["volumeMounts"].append({"name": "config", "mountPath": CONFIG_FOLDER, "readOnly": True})
        template = self._pod("head", container, self._ray_volumes(self._settings.head))
        template["spec"]["volumes"].append({"name": "config", "configMap": {"name": self._name}})
        template["spec"]["tolerations"] = _away_tolerations()
        return self._patched(template, HEAD, self._settings.head_template)

    def _workers(self) -> Manifest:
        settings, worker = self._settings, self._settings.worker
        container = self._ray_container(WORKER, worker, self._ray_environment())
        tolerations = list(settings.tolerations)
        if worker.gpus:
            for amounts in container["resources"].values():
                amounts[worker.gpu_resource] = worker.gpus
            tolerations.append({"key": worker.gpu_resource, "operator": "Exists", "effect": "NoSchedule"})
        template = self._pod("worker", container, self._ray_volumes(worker))
        spec = template["spec"]
        if settings.node_selector:
            spec["nodeSelector"] = settings.node_selector
        if tolerations:
            spec["tolerations"] = tolerations
        spec["topologySpreadConstraints"] = [
            {
                "maxSkew": 1,
                "topologyKey": "kubernetes.io/hostname",
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": self._labels("worker")},
            }
        ]
        return self._patched(template, WORKER, settings.worker_template)

    def _submitter(self, entrypoint: Sequence[str]) -> Manifest:
        container = {
            "name": SUBMITTER,
            **self._image(),
            "command": ["python", "-m", "distlm.kubernetes.submit_job"],
            "args": list(entrypoint),
            "env": [{"name": "HOME", "value": "/tmp"}],
            "resources": _same_amounts(cpu="500m", memory="512Mi"),
            "securityContext": _container_security(),
            "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
        }
        template = self._pod("submitter", container, [{"name": "tmp", "emptyDir": {}}])
        template["spec"]["restartPolicy"] = "Never"
        template["spec"]["tolerations"] = _away_tolerations()
        return self._patched(template, SUBMITTER, {})

    def _patched(self, template: Manifest, container: str, own_patch: Manifest) -> Manifest:
        """With the user's patches; what they say of the containers of other pods is not for this one."""
        patched: Manifest = merged(merged(template, self._settings.pod_template), own_patch)
        spec = patched["spec"]
        others = {HEAD, WORKER, SUBMITTER} - {container}
        spec["containers"] = [one for one in spec["containers"] if one.get("name") not in others]
        return patched

    def _pod(self, component: str, container: Manifest, volumes: list[Manifest]) -> Manifest:
        settings = self._settings
        spec: Manifest = {
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": USER_ID,
                "runAsGroup": USER_ID,
                "fsGroup": USER_ID,
                "fsGroupChangePolicy": "OnRootMismatch",
                "seccompProfile": {"type": "RuntimeDefault"},
            },
        }
        if settings.service_account:
            spec["serviceAccountName"] = settings.service_account
        if settings.priority_class:
            spec["priorityClassName"] = settings.priority_class
        if settings.image_pull_secrets:
            spec["imagePullSecrets"] = [{"name": name} for name in settings.image_pull_secrets]
        if component != "submitter":
            spec["terminationGracePeriodSeconds"] = self._grace_s()
        spec["containers"] = [container]
        spec["volumes"] = volumes
        labels = {**self._labels(component), MLFLOW_CLIENT_LABEL: "true"} if component == "head" else None
        return {"metadata": {"labels": labels or self._labels(component)}, "spec": spec}

    def _grace_s(self) -> int:
        return math.ceil(self._config.resources.time_to_save_s) + SAFETY_S

    def _ray_container(self, name: str, resources: PodResources, env: Mapping[str, str]) -> Manifest:
        memory = _gib(resources.memory_gib)
        return {
            "name": name,
            **self._image(),
            "workingDir": self._settings.storage.mount_path,
            "env": [
                *({"name": variable, "value": value} for variable, value in {**env, **self._settings.env}.items()),
                *map(self._secret, self._config.env),
            ],
            "resources": _same_amounts(cpu=resources.cpus, memory=memory),
            "securityContext": _container_security(),
            "lifecycle": {"preStop": {"exec": {"command": [*_PRE_STOP, str(self._grace_s())]}}},
            "volumeMounts": [
                {"name": "storage", "mountPath": self._settings.storage.mount_path},
                {"name": "tmp", "mountPath": "/tmp"},
                {"name": "shared-memory", "mountPath": "/dev/shm"},
            ],
        }

    def _ray_environment(self) -> dict[str, str]:
        models = f"{self._settings.storage.mount_path}/huggingface"
        return {**OF_EVERY_NODE, "HOME": "/tmp", "HF_HOME": models, REPLACES_NODES: "1"}

    def _secret(self, variable: str) -> Manifest:
        secret = {"name": self._settings.env_secret or self._name, "key": variable, "optional": True}
        return {"name": variable, "valueFrom": {"secretKeyRef": secret}}

    def _ray_volumes(self, resources: PodResources) -> list[Manifest]:
        shared_memory = _gib(resources.shared_memory_gib)
        return [
            {"name": "storage", "persistentVolumeClaim": {"claimName": self._settings.storage.claim}},
            {"name": "tmp", "emptyDir": {}},
            {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": shared_memory}},
        ]

    def _image(self) -> Manifest:
        policy = self._settings.image_pull_policy
        return {"image": self._settings.image, **({"imagePullPolicy": policy} if policy else {})}


def _gib(amount: float) -> str:
    """As Kubernetes writes it."""
    return f"{amount:g}Gi" if amount == int(amount) else f"{math.ceil(amount * 1024)}Mi"


def _field(name: str, path: str) -> Manifest:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def _away_tolerations() -> list[Manifest]:
    keys = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")
    always = {"operator": "Exists", "effect": "NoExecute", "tolerationSeconds": _NODE_AWAY_S}
    return [{"key": key, **always} for key in keys]


def _same_amounts(**amounts: int | str) -> Manifest:
    """Requests and limits: what is promised is all that is used, so that no pod is the first to be evicted."""
    return {"requests": dict(amounts), "limits": dict(amounts)}


def _container_security() -> Manifest:
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


OWN_VARIABLES = frozenset(
    ("POD_NAMESPACE", ATTEMPT_FILES, JOB, NUM_OWN_NODES, REPLACES_NODES, "RAY_JOB_STOP_WAIT_TIME_S", *OF_EVERY_NODE)
)
"""Environment variables that a run's pods need as they are."""


def merged(base: Any, patch: Any) -> Any:
    """`base` with what a patch says: mappings key by key, lists of named things by name, all else replaced."""
    if isinstance(base, Mapping) and isinstance(patch, Mapping):
        return {**base, **{key: merged(base[key], value) if key in base else value for key, value in patch.items()}}
    if _are_named(base) and _are_named(patch):
        by_name = {one["name"]: one for one in base}
        for one in patch:
            by_name[one["name"]] = merged(by_name.get(one["name"], {}), one)
        return list(by_name.values())
    return patch


def _are_named(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, Mapping) and "name" in one for one in value)
