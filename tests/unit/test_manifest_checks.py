"""Each rule finds its mistake in manifests that are right but for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import manifest_checks
import pytest
import yaml
from manifest_checks import Manifest, problems, quantity, read_manifests

OTHERS = """
apiVersion: v1
kind: Namespace
metadata: {name: training, labels: {team: a, example.org/owner: B.c_d}}
---
apiVersion: scheduling.k8s.io/v1
kind: PriorityClass
metadata: {name: low}
value: 1
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: runner, namespace: training}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: reader, namespace: training}
rules: [{apiGroups: [""], resources: [pods], verbs: [get]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: reader, namespace: training}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: reader}
subjects: [{kind: ServiceAccount, name: runner, namespace: training}]
---
apiVersion: v1
kind: ConfigMap
metadata: {name: settings, namespace: training}
data: {b: "2"}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: data, namespace: training}
spec: {accessModes: [ReadWriteMany], resources: {requests: {storage: 1Gi}}}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: training}
spec: {selector: {app: web}, ports: [{name: http, port: 8080, targetPort: http}, {name: metrics, port: 81}]}
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata: {name: web, namespace: training}
spec: {minAvailable: 1, selector: {matchLabels: {app: web}}}
"""
CONTAINER = """
name: web
image: registry:5000/web:1.2
env: [{name: A, value: "1"}, {name: B, valueFrom: {configMapKeyRef: {name: settings, key: b}}}]
envFrom: [{configMapRef: {name: settings}}, {secretRef: {name: keys, optional: true}}]
ports: [{name: http, containerPort: 80}, {name: metrics, containerPort: 81}]
resources: {requests: {cpu: 250m, memory: 1Gi}, limits: {cpu: 1, memory: 1.5Gi, nvidia.com/gpu: 1}}
securityContext: {allowPrivilegeEscalation: false, readOnlyRootFilesystem: true, capabilities: {drop: [ALL]}}
volumeMounts: [{name: data, mountPath: /data}]
readinessProbe: {httpGet: {path: /, port: http}}
livenessProbe: {tcpSocket: {port: 80}}
"""
JOB = """
entrypoint: python train.py
submissionMode: K8sJobMode
shutdownAfterJobFinishes: true
ttlSecondsAfterFinished: 60
activeDeadlineSeconds: 3600
backoffLimit: 2
runtimeEnvYAML: "env_vars: {A: b}"
"""


def pod(**more: Any) -> Manifest:
    user = {"runAsNonRoot": True, "runAsUser": 1000, "runAsGroup": 1000, "seccompProfile": {"type": "RuntimeDefault"}}
    spec = {
        "automountServiceAccountToken": False,
        "serviceAccountName": "runner",
        "priorityClassName": "low",
        "terminationGracePeriodSeconds": 60,
        "securityContext": user,
        "containers": [yaml.safe_load(CONTAINER)],
        "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": "data"}}],
    }
    return {"metadata": {"labels": {"app": "web", "tier": "a"}}, "spec": {**spec, **more}}


def group(**more: Any) -> Manifest:
    return {"rayStartParams": {"num-cpus": "0"}, "template": pod(), **more}


def good() -> dict[str, Manifest]:
    """By kind."""
    cluster = {
        "rayVersion": "2.60.0",
        "authOptions": {"mode": "token"},
        "headGroupSpec": group(),
        "workerGroupSpecs": [group(groupName="workers", minReplicas=1, replicas=2, maxReplicas=4)],
    }
    job = {**yaml.safe_load(JOB), "submitterPodTemplate": pod(restartPolicy="Never"), "rayClusterSpec": cluster}
    cron = {"schedule": "*/15 0-6,12 1 jan,3-5 MON-FRI", "jobTemplate": {"spec": {}}}
    cron["jobTemplate"]["spec"]["template"] = pod(restartPolicy="OnFailure")
    with_pods = [
        ("apps/v1", "Deployment", {"selector": {"matchLabels": {"app": "web"}}, "template": pod()}),
        ("batch/v1", "CronJob", cron),
        ("ray.io/v1", "RayJob", job),
    ]
    metadata = {"name": "web", "namespace": "training"}
    others = {one["kind"]: one for one in read_manifests(OTHERS)}
    return others | {
        kind: {"apiVersion": version, "kind": kind, "metadata": dict(metadata), "spec": spec}
        for version, kind, spec in with_pods
    }


def test_what_is_right_has_no_problems() -> None:
    assert problems(good().values()) == []


GONE = object()
POD = "spec.template.spec"
FIRST = f"{POD}.containers.0"
RAY = "spec.rayClusterSpec"
LONG = "a" * 64

SERVER = [
    # kind, path of what is changed, its value, what is found
    ("ConfigMap", "metadata.name", "Settings", "metadata.name: 'Settings' is no name"),
    ("ConfigMap", "metadata.name", "-a", "metadata.name: '-a' is no name"),
    ("Service", "metadata.name", "1st", "metadata.name: '1st' is no name"),
    ("Namespace", "metadata.name", "a.b", "metadata.name: 'a.b' is no name"),
    ("Namespace", "metadata.labels.team", LONG, f"metadata.labels.team: {LONG!r} is no value of a label"),
    ("Namespace", "metadata.labels.team", "a b", "metadata.labels.team: 'a b' is no value of a label"),
    ("Namespace", "metadata.labels", {"a/b/c": ""}, "metadata.labels: 'a/b/c' is no label"),
    ("Deployment", f"{FIRST}.name", "Web", f"{FIRST}.name: 'Web' is no name"),
    ("Deployment", f"{FIRST}.ports.1.name", "a-much-too-long-name", f"{FIRST}.ports.1.name: 'a-much-too-long-name' is"),
    ("Deployment", f"{FIRST}.ports.1.name", "80", f"{FIRST}.ports.1.name: '80' is no name of a port"),
    ("Deployment", f"{FIRST}.ports.1.name", "http", f"{FIRST}.ports: name 'http' is there twice"),
    ("Deployment", f"{FIRST}.env.1.name", "A", f"{FIRST}.env: name 'A' is there twice"),
    ("Deployment", f"{POD}.volumes", [{"name": "data", "emptyDir": {}}] * 2, f"{POD}.volumes: name 'data' is there"),
    ("Deployment", f"{FIRST}.volumeMounts.0.name", "tmp", f"{FIRST}.volumeMounts: no volume is named 'tmp'"),
    (
        "Deployment",
        f"{FIRST}.resources.requests.cpu",
        "1001m",
        f"{FIRST}.resources.requests.cpu: 1001m is more than the limit, 1",
    ),
    (
        "Deployment",
        f"{FIRST}.resources.requests.memory",
        "1600Mi",
        f"{FIRST}.resources.requests.memory: 1600Mi is more than the limit, 1.5Gi",
    ),
    (
        "Deployment",
        f"{FIRST}.resources.requests",
        {"cpu": 1, "memory": 1, "nvidia.com/gpu": 0},
        f"{FIRST}.resources.requests.nvidia.com/gpu: 0 is not the limit, 1",
    ),
    ("Deployment", f"{FIRST}.resources.limits.cpu", "1Kb", "spec.template.spec.containers.0.resources.limits.cpu: not"),
    ("Deployment", f"{FIRST}.readinessProbe.httpGet.port", "web", f"{FIRST}.readinessProbe: no port of the container"),
    ("Deployment", f"{FIRST}.livenessProbe", {"periodSeconds": 5}, f"{FIRST}.livenessProbe: needs one of httpGet"),
    ("Deployment", f"{POD}.restartPolicy", "Never", f"{POD}.restartPolicy: Never is refused in a Deployment"),
    ("Deployment", f"{POD}.terminationGracePeriodSeconds", -1, f"{POD}.terminationGracePeriodSeconds: -1 is no"),
    ("Deployment", "spec.selector.matchLabels.app", "other", "spec.selector: the template has no label app=other"),
    ("CronJob", "spec.schedule", "* * * *", "spec.schedule: '* * * *' has not five fields"),
    ("CronJob", "spec.schedule", "60 * * * *", "spec.schedule: '60' is no minute"),
    ("CronJob", "spec.schedule", "0 6-2 * * *", "spec.schedule: '6-2' is no hour"),
    ("CronJob", "spec.schedule", "0 */0 * * *", "spec.schedule: '*/0' is no hour"),
    ("CronJob", "spec.schedule", "0 0 0 * *", "spec.schedule: '0' is no day of the month"),
    ("CronJob", "spec.schedule", "0 0 * mon *", "spec.schedule: 'mon' is no month"),
    ("CronJob", "spec.schedule", "0 0 * * 7", "spec.schedule: '7' is no day of the week"),
    (
        "CronJob",
        "spec.jobTemplate.spec.template.spec.restartPolicy",
        "Always",
        "spec.jobTemplate.spec.template.spec.restartPolicy: Always is refused in a CronJob",
    ),
    ("PodDisruptionBudget", "spec.maxUnavailable", 1, "spec: has both minAvailable and maxUnavailable"),
    ("PersistentVolumeClaim", "spec.accessModes", ["ReadWrite"], "spec.accessModes: 'ReadWrite' is none"),
    ("PersistentVolumeClaim", "spec.accessModes", [], "spec.accessModes: [] cannot be asked for"),
    ("PersistentVolumeClaim", "spec.resources.requests.storage", "0", "spec.resources.requests.storage: asks for"),
    ("Service", "spec.ports.0.name", "HTTP", "spec.ports.0.name: 'HTTP' is no name"),
    ("Service", "spec.ports.0.name", GONE, "spec.ports.0.name: '' is no name"),
    ("Service", "spec.ports.0.name", "metrics", "spec.ports: name 'metrics' is there twice"),
    ("Service", "spec.ports.0.port", 70000, "spec.ports.0.port: 70000 is no port"),
    ("Service", "spec.ports.0.targetPort", "_", "spec.ports.0.targetPort: '_' is no name of a port"),
]

OPERATOR = [
    ("RayJob", "metadata.name", "a" * 48, "metadata.name: has 48 characters, and may have 47"),
    ("RayJob", "metadata.name", "1st", "metadata.name: '1st' is no DNS-1035 label"),
    ("RayJob", "spec.submissionMode", "K8SJobMode", "spec.submissionMode: 'K8SJobMode' is waited for for ever"),
    ("RayJob", "spec.activeDeadlineSeconds", 0, "spec.activeDeadlineSeconds: 0 is less than 1"),
    ("RayJob", "spec.activeDeadlineSeconds", -1, "spec.activeDeadlineSeconds: -1 is less than 1"),
    ("RayJob", "spec.preRunningDeadlineSeconds", 0, "spec.preRunningDeadlineSeconds: 0 is less than 1"),
    ("RayJob", "spec.ttlSecondsAfterFinished", -1, "spec.ttlSecondsAfterFinished: -1 is less than 0"),
    ("RayJob", "spec.backoffLimit", -1, "spec.backoffLimit: -1 is less than 0"),
    ("RayJob", "spec.shutdownAfterJobFinishes", GONE, "spec: ttlSecondsAfterFinished needs shutdownAfterJobFinishes"),
    ("RayJob", "spec.rayClusterSpec", GONE, "spec: needs rayClusterSpec or clusterSelector"),
    ("RayJob", "spec.clusterSelector", {"ray.io/cluster": "a"}, "spec: clusterSelector excludes backoffLimit"),
    ("RayJob", "spec.submissionMode", "InteractiveMode", "spec: InteractiveMode excludes backoffLimit"),
    ("RayJob", "spec.submissionMode", "SidecarMode", "spec: SidecarMode has no pod to submit from"),
    ("RayJob", "spec.runtimeEnvYAML", "a: [", "spec.runtimeEnvYAML: is no YAML"),
    (
        "RayJob",
        "spec.submitterPodTemplate.spec.restartPolicy",
        "Always",
        "spec.submitterPodTemplate.spec.restartPolicy: Always is refused in a Job",
    ),
    (
        "RayJob",
        "spec.deletionStrategy",
        {"deletionRules": [{"policy": "DeleteCluster", "condition": {"jobStatus": "FAILED", "ttlSeconds": 1}}]},
        "spec: deletionRules exclude shutdownAfterJobFinishes",
    ),
    ("RayJob", f"{RAY}.authOptions.enableK8sTokenAuth", True, "spec: enableK8sTokenAuth is for clusters without a job"),
    ("RayJob", f"{RAY}.rayVersion", "2.51.1", f"{RAY}.rayVersion: 2.51.1 knows no tokens"),
    ("RayJob", f"{RAY}.rayVersion", GONE, f"{RAY}.rayVersion: None knows no tokens"),
    ("RayJob", f"{RAY}.headGroupSpec.rayStartParams.labels", "a=b", f"{RAY}.headGroupSpec.rayStartParams: labels are"),
    ("RayJob", f"{RAY}.headGroupSpec.resources", {"CPU": "1"}, f"{RAY}.headGroupSpec: has resources, and in"),
    ("RayJob", f"{RAY}.workerGroupSpecs.0.minReplicas", GONE, f"{RAY}.workerGroupSpecs.0: needs minReplicas and max"),
    ("RayJob", f"{RAY}.workerGroupSpecs.0.maxReplicas", GONE, f"{RAY}.workerGroupSpecs.0: needs minReplicas and max"),
    (
        "RayJob",
        f"{RAY}.workerGroupSpecs.0.replicas",
        0,
        f"{RAY}.workerGroupSpecs.0: minReplicas 1, replicas 0 and maxReplicas 4 contradict",
    ),
    (
        "RayJob",
        f"{RAY}.workerGroupSpecs.0.replicas",
        5,
        f"{RAY}.workerGroupSpecs.0: minReplicas 1, replicas 5 and maxReplicas 4 contradict",
    ),
    ("RayJob", f"{RAY}.networkPolicy", {"mode": "DenyAll"}, f"{RAY}.networkPolicy: needs a feature of the operator"),
]

WORKER = f"{RAY}.workerGroupSpecs.0.template.spec"
POLICY = [
    ("Deployment", f"{POD}.hostNetwork", True, f"{POD}.hostNetwork: must not be"),
    ("Deployment", f"{POD}.volumes.1", {"name": "a", "hostPath": {"path": "/"}}, f"{POD}.volumes.1: hostPath must not"),
    ("Deployment", f"{POD}.automountServiceAccountToken", GONE, f"{POD}.automountServiceAccountToken: must be false"),
    ("Deployment", f"{POD}.securityContext.runAsNonRoot", GONE, f"{FIRST}.securityContext.runAsNonRoot: must be True"),
    ("Deployment", f"{FIRST}.securityContext.runAsNonRoot", False, f"{FIRST}.securityContext.runAsNonRoot: must be"),
    ("Deployment", f"{FIRST}.securityContext.runAsUser", 0, f"{FIRST}.securityContext.runAsUser: must be a number"),
    ("Deployment", f"{POD}.securityContext.runAsGroup", GONE, f"{FIRST}.securityContext.runAsGroup: must be a number"),
    ("Deployment", f"{POD}.securityContext.seccompProfile", GONE, f"{FIRST}.securityContext.seccompProfile: must be"),
    ("Deployment", f"{FIRST}.securityContext.privileged", True, f"{FIRST}.securityContext.privileged: must not be"),
    (
        "Deployment",
        f"{FIRST}.securityContext.capabilities.add",
        ["KILL"],
        f"{FIRST}.securityContext.capabilities: must",
    ),
    ("Deployment", f"{FIRST}.securityContext.capabilities", GONE, f"{FIRST}.securityContext.capabilities: must drop"),
    ("Deployment", f"{FIRST}.resources.limits.memory", GONE, f"{FIRST}.resources.limits.memory: must be set"),
    ("Deployment", f"{FIRST}.resources.requests.cpu", GONE, f"{FIRST}.resources.requests.cpu: must be set"),
    ("Deployment", f"{FIRST}.image", "registry:5000/web", f"{FIRST}.image: 'registry:5000/web' has no tag, or latest"),
    ("Deployment", f"{FIRST}.image", "web:latest", f"{FIRST}.image: 'web:latest' has no tag, or latest"),
    ("Deployment", f"{FIRST}.ports.0.hostPort", 80, f"{FIRST}.ports: hostPort must not be"),
    ("Deployment", f"{FIRST}.livenessProbe", GONE, f"{FIRST}.livenessProbe: must be set"),
    ("Deployment", f"{POD}.initContainers", [{"name": "a", "image": "a:1"}], f"{POD}.initContainers.0.resources"),
    ("RayJob", f"{WORKER}.containers.0.securityContext", GONE, f"{WORKER}.containers.0.securityContext.allowPrivilege"),
    (
        "RayJob",
        f"{RAY}.headGroupSpec.template.spec.containers.0.securityContext.readOnlyRootFilesystem",
        False,
        f"{RAY}.headGroupSpec.template.spec.containers.0.securityContext.readOnlyRootFilesystem: must be True",
    ),
    (
        "RayJob",
        "spec.submitterPodTemplate.spec.securityContext.runAsUser",
        GONE,
        "spec.submitterPodTemplate.spec.containers.0.securityContext.runAsUser: must be a number",
    ),
]

TOGETHER = [
    ("ConfigMap", "metadata.namespace", GONE, ""),  # `default` is there
    ("ConfigMap", "metadata.namespace", "other", "metadata.namespace: there is no Namespace other"),
    ("RoleBinding", "roleRef.name", "writer", "roleRef: there is no Role writer"),
    ("RoleBinding", "subjects.0.name", "nobody", "subjects.0: there is no ServiceAccount nobody"),
    ("CronJob", "spec.jobTemplate.spec.template.spec.serviceAccountName", "x", "there is no ServiceAccount x"),
    ("RayJob", f"{WORKER}.priorityClassName", "high", f"{WORKER}.priorityClassName: there is no PriorityClass high"),
    ("RayJob", f"{WORKER}.priorityClassName", "system-node-critical", ""),
    ("Deployment", f"{POD}.imagePullSecrets", [{"name": "pull"}], "imagePullSecrets.0: there is no Secret pull"),
    ("Deployment", f"{POD}.volumes.0.persistentVolumeClaim.claimName", "x", "there is no PersistentVolumeClaim x"),
    ("Deployment", f"{POD}.volumes.0", {"name": "data", "configMap": {"name": "x"}}, "there is no ConfigMap x"),
    ("Deployment", f"{POD}.volumes.0", {"name": "data", "secret": {"secretName": "x"}}, "there is no Secret x"),
    ("Deployment", f"{POD}.volumes.0", {"name": "data", "secret": {"secretName": "x", "optional": True}}, ""),
    (
        "Deployment",
        f"{POD}.volumes.0",
        {"name": "data", "projected": {"sources": [{"secret": {"name": "x"}}]}},
        "there is no Secret x",
    ),
    (
        "Deployment",
        f"{POD}.volumes.0",
        {"name": "data", "configMap": {"name": "settings", "items": [{"key": "c", "path": "c"}]}},
        "ConfigMap settings has no key c",
    ),
    ("Deployment", f"{FIRST}.envFrom.1.secretRef.optional", False, "there is no Secret keys"),
    ("Deployment", f"{FIRST}.env.1.valueFrom.configMapKeyRef.key", "c", "ConfigMap settings has no key c"),
    ("Service", "spec.selector.app", "other", "spec.selector: selects no pod"),
    ("Service", "spec.ports.0.targetPort", "https", "spec.ports.0.targetPort: no container names a port 'https'"),
]

SCHEMA = [
    ("Deployment", "spec.replica", 1, "Additional properties are not allowed ('replica' was unexpected)"),
    ("Deployment", "apiVersion", "extensions/v1beta1", "no schema"),
    ("RayJob", "spec.entryPoint", "a", "Additional properties are not allowed ('entryPoint' was unexpected)"),
    ("RayJob", f"{WORKER}.containers.0.resource", {}, "Additional properties are not allowed ('resource' was"),
    ("RayJob", "metadata.label", {}, "Additional properties are not allowed ('label' was unexpected)"),
    ("RayJob", "apiVersion", "ray.io/v2", "no schema"),
]


@pytest.mark.parametrize(("kind", "path", "value", "expected"), [*SCHEMA, *SERVER, *OPERATOR, *POLICY, *TOGETHER])
def test_it_is_found(kind: str, path: str, value: object, expected: str) -> None:
    manifests = good()
    change(manifests[kind], path, value)
    found = problems(manifests.values())
    if not expected:
        assert found == []
    else:
        title = f"{kind}/{manifests[kind]['metadata']['name']}: "
        assert any(one.startswith(title) and expected in one for one in found), found


def change(node: Any, path: str, value: object) -> None:
    *parents, last = (int(key) if key.isdecimal() else key for key in path.split("."))
    for key in parents:
        node = node[key]
    if value is GONE:
        del node[last]
    elif isinstance(node, list):
        node[last : last + 1] = [value]
    else:
        node[last] = value


@pytest.mark.parametrize("kind", ["ServiceAccount", "ConfigMap", "PersistentVolumeClaim", "PriorityClass", "Namespace"])
def test_what_is_named_must_be_there(kind: str) -> None:
    manifests = good()
    name = manifests.pop(kind)["metadata"]["name"]
    found = problems(manifests.values())
    assert found and all(f"there is no {kind} {name}" in one for one in found)


def test_two_mistakes_at_once() -> None:
    manifests = good()
    change(manifests["RayJob"], "spec.shutdownAfterJobFinishes", False)
    change(manifests["RayJob"], "spec.suspend", True)
    assert problems(manifests.values()) == [
        "RayJob/web: spec: ttlSecondsAfterFinished needs shutdownAfterJobFinishes",
        "RayJob/web: spec: suspend needs shutdownAfterJobFinishes",
    ]


@pytest.mark.parametrize("text", ["a: 1\nb: 2\na: 3\n", "a: {b: 1, b: 1}\n", "---\na: 1\n---\na: [{b: 1, b: 2}]\n"])
def test_keys_that_are_there_twice_are_refused(text: str) -> None:
    with pytest.raises(yaml.YAMLError, match="duplicate key"):
        read_manifests(text)


@pytest.mark.parametrize(
    ("text", "amount"), [("250m", 0.25), (2, 2), ("1.5Gi", 1.5 * 2**30), ("1e3", 1000), ("1G", 1e9), ("0", 0)]
)
def test_quantities(text: str | int, amount: float) -> None:
    assert quantity(text) == amount


def test_macros_of_cron() -> None:
    manifests = good()
    for schedule in ("@daily", "@every 1h30m", "*/5 * * * *", "0 0 ? * 0-6/2"):
        manifests["CronJob"]["spec"]["schedule"] = schedule
        assert problems(manifests.values()) == []


@pytest.mark.parametrize(("ci", "outcome"), [("true", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_without_the_schemas_of_kuberay(
    ci: str, outcome: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere than here they may be missing; where it counts, nothing goes unchecked."""
    monkeypatch.setenv("CI", ci)
    monkeypatch.setattr(manifest_checks, "SHARED", tmp_path)
    manifest_checks._schemas.cache_clear()
    try:
        with pytest.raises(outcome, match="the schemas of KubeRay are not here"):
            problems(good().values())
    finally:
        manifest_checks._schemas.cache_clear()
