"""What is wrong with manifests of Kubernetes, found without a cluster.

Schemas tell of unknown fields and wrong types; more is refused by the API server, by KubeRay's operator (v1.7.0,
ray-operator/controllers/ray/utils/validation.go), or by nobody. Each rule takes a manifest, or all that are applied
together, and yields what it finds as `path: what`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

Manifest = dict[str, Any]

SHARED = Path(__file__).parents[2].parent / "shared"
KUBERNETES_VERSIONS = ("1.29", "1.33", "1.37")


def read_manifests(text: str) -> list[Manifest]:
    return [document for document in yaml.load_all(text, _Loader) if document]


class _Loader(yaml.SafeLoader):
    """Refuses keys that are there twice, of which the last would win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for (key_node, _), key in zip(node.value, keys, strict=True):
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", key_node.start_mark)
        return super().construct_mapping(node, deep)


def problems(manifests: Iterable[Manifest]) -> list[str]:
    """Of all documents, each and together, as `Kind/name: path: what`."""
    manifests = list(manifests)
    found = [f"{_title(one)}: {what}" for one in manifests for rule in RULES for what in rule(one)]
    return found + list(missing_references(manifests)) + list(unserved_ports(manifests))


def _title(manifest: Manifest) -> str:
    return f"{manifest.get('kind')}/{manifest.get('metadata', {}).get('name')}"


# --- schemas ---------------------------------------------------------------------------------------------------------


def schema(manifest: Manifest) -> Iterator[str]:
    """Built-in kinds by the schemas of several versions of Kubernetes, others by those of their CRDs."""
    _schemas()
    yield from _schema(json.dumps(manifest))


@cache  # 10 ms for each version, and tests change one document of many
def _schema(manifest: str) -> list[str]:
    document = json.loads(manifest)
    tool, crds = _schemas()
    is_custom = (document.get("apiVersion"), document.get("kind")) in crds
    versions = KUBERNETES_VERSIONS[-1:] if is_custom else KUBERNETES_VERSIONS
    return [f"{found} (Kubernetes {version})" for version in versions for found in tool.check(document, crds, version)]


@cache
def _schemas() -> tuple[Any, Any]:
    path = SHARED / "tools" / "crd_validate.py"
    if not path.exists():
        stop = pytest.fail if os.environ.get("CI") else pytest.skip
        stop(f"the schemas of KubeRay are not here: {path.name} and its CRDs lie beside the repository, in shared/")
    spec = importlib.util.spec_from_file_location("crd_validate", path)
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool, tool.load_crds(f"{SHARED}/crds/*/*.yaml")


# --- what only a server refuses --------------------------------------------------------------------------------------

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")  # RFC 1123
_SUBDOMAIN = re.compile(rf"(?=.{{1,253}}\Z){_LABEL.pattern}(\.{_LABEL.pattern})*")
_DNS_1035_LABEL = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
_LABEL_KEY = re.compile(rf"({_SUBDOMAIN.pattern}/)?[A-Za-z0-9]([-A-Za-z0-9_.]{{0,61}}[A-Za-z0-9])?")
_PORT_NAME = re.compile(r"(?=.*[a-z])(?!.*--)[a-z0-9]([-a-z0-9]{0,13}[a-z0-9])?")


def names(manifest: Manifest) -> Iterator[str]:
    metadata = manifest.get("metadata", {})
    pattern = _DNS_1035_LABEL if manifest["kind"] == "Service" else _LABEL if _is("Namespace", manifest) else _SUBDOMAIN
    yield from _unlike(pattern, "name", "metadata.name", metadata.get("name", ""))
    yield from _unlike(_LABEL, "name", "metadata.namespace", metadata.get("namespace", "default"))
    for path, labels in (*_at_any_depth(manifest, "labels"), *_at_any_depth(manifest, "matchLabels")):
        for key, value in labels.items():
            yield from _unlike(_LABEL_KEY, "label", path, key)
            yield from _unlike(_LABEL_VALUE, "value of a label", f"{path}.{key}", value)
    for path, spec in pod_specs(manifest):
        for key in ("containers", "initContainers", "volumes"):
            for index, item in enumerate(spec.get(key, [])):
                yield from _unlike(_LABEL, "name", f"{path}.{key}.{index}.name", item.get("name", ""))
        for where, container in containers(path, spec):
            for index, port in enumerate(container.get("ports", [])):
                if "name" in port:
                    yield from _unlike(_PORT_NAME, "name of a port", f"{where}.ports.{index}.name", port["name"])


def _unlike(pattern: re.Pattern[str], what: str, path: str, value: Any) -> Iterator[str]:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        yield f"{path}: {value!r} is no {what}"


def duplicates(manifest: Manifest) -> Iterator[str]:
    for path, spec in pod_specs(manifest):
        yield from _twice(f"{path}.volumes", spec.get("volumes", []), "name")
        yield from _twice(f"{path}.containers", [one for _, one in containers(path, spec)], "name")
        for where, container in containers(path, spec):
            yield from _twice(f"{where}.env", container.get("env", []), "name")
            yield from _twice(f"{where}.volumeMounts", container.get("volumeMounts", []), "mountPath")
            yield from _twice(f"{where}.ports", container.get("ports", []), "name")


def _twice(path: str, items: list[Manifest], key: str) -> Iterator[str]:
    values = [item[key] for item in items if key in item]
    for value in dict.fromkeys(value for value in values if values.count(value) > 1):
        yield f"{path}: {key} {value!r} is there twice"


def pods(manifest: Manifest) -> Iterator[str]:
    """What a pod's spec says of itself that cannot be."""
    for path, spec in pod_specs(manifest):
        grace_s = spec.get("terminationGracePeriodSeconds", 30)
        if not isinstance(grace_s, int) or grace_s < 0:
            yield f"{path}.terminationGracePeriodSeconds: {grace_s!r} is no number of seconds"
        volumes = {volume.get("name") for volume in spec.get("volumes", [])}
        for where, container in containers(path, spec):
            for mount in container.get("volumeMounts", []):
                if mount["name"] not in volumes:
                    yield f"{where}.volumeMounts: no volume is named {mount['name']!r}"
            yield from _amounts(where, container.get("resources", {}))
            for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                yield from _probe(f"{where}.{probe}", container.get(probe), container)


def _amounts(path: str, resources: Manifest) -> Iterator[str]:
    limits = resources.get("limits", {})
    for name, requested in resources.get("requests", {}).items():
        if name in limits and quantity(requested) > quantity(limits[name]):
            yield f"{path}.resources.requests.{name}: {requested} is more than the limit, {limits[name]}"
    for name, limit in limits.items():
        requested = resources.get("requests", {}).get(name, limit)
        if "/" in name and quantity(requested) != quantity(limit):  # devices cannot be promised twice
            yield f"{path}.resources.requests.{name}: {requested} is not the limit, {limit}"


_SUFFIXES = {"n": -9, "u": -6, "m": -3, "": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
_BINARY_SUFFIXES = {"Ki": 1, "Mi": 2, "Gi": 3, "Ti": 4, "Pi": 5, "Ei": 6}


def quantity(value: str | int) -> Decimal:
    """An amount of a resource; 0 where it is none, of which schema() tells."""
    match = re.fullmatch(r"([+-]?[0-9.]+(?:[eE][+-]?[0-9]+)?)([A-Za-z]*)", str(value))
    if match is None or match[2] not in _SUFFIXES | _BINARY_SUFFIXES:
        return Decimal(0)
    scale = Decimal(1024) ** _BINARY_SUFFIXES.get(match[2], 0) * Decimal(10) ** _SUFFIXES.get(match[2], 0)
    return Decimal(match[1]) * scale


def _probe(path: str, probe: Manifest | None, container: Manifest) -> Iterator[str]:
    if probe is None:
        return
    handlers = [probe[key] for key in ("httpGet", "tcpSocket", "exec", "grpc") if key in probe]
    if len(handlers) != 1:
        yield f"{path}: needs one of httpGet, tcpSocket, exec and grpc"
    ports = {port.get("name") for port in container.get("ports", [])}
    for handler in handlers:
        if isinstance(port := handler.get("port"), str) and port not in ports:
            yield f"{path}: no port of the container is named {port!r}"


_RESTARTS = {
    "Deployment": ("Always",),
    "StatefulSet": ("Always",),
    "DaemonSet": ("Always",),
    "Job": ("OnFailure", "Never"),
    "CronJob": ("OnFailure", "Never"),
}


def restarts(manifest: Manifest) -> Iterator[str]:
    for path, spec in pod_specs(manifest):
        kind = "Job" if path.startswith("spec.submitterPodTemplate") else manifest["kind"]
        if (policy := spec.get("restartPolicy", "Always")) not in _RESTARTS.get(kind, ("Always", "OnFailure", "Never")):
            yield f"{path}.restartPolicy: {policy} is refused in a {kind}"


def selectors(manifest: Manifest) -> Iterator[str]:
    if manifest["kind"] not in ("Deployment", "StatefulSet", "DaemonSet", "Job"):
        return
    labels = _get(manifest, "spec.template.metadata.labels", {})
    for key, value in _get(manifest, "spec.selector.matchLabels", {}).items():
        if labels.get(key) != value:
            yield f"spec.selector: the template has no label {key}={value}"


_CRON_FIELDS = (
    ("minute", 0, 59, ""),
    ("hour", 0, 23, ""),
    ("day of the month", 1, 31, ""),
    ("month", 1, 12, "jan feb mar apr may jun jul aug sep oct nov dec"),
    ("day of the week", 0, 6, "sun mon tue wed thu fri sat"),
)
_CRON_MACROS = ("@yearly", "@annually", "@monthly", "@weekly", "@daily", "@midnight", "@hourly")


def cron(manifest: Manifest) -> Iterator[str]:
    if manifest["kind"] != "CronJob":
        return
    schedule = str(_get(manifest, "spec.schedule", ""))
    if schedule in _CRON_MACROS or re.fullmatch(r"@every ([0-9]+[hms])+", schedule):
        return
    if len(fields := schedule.split()) != len(_CRON_FIELDS):
        yield f"spec.schedule: {schedule!r} has not five fields"
        return
    for text, (name, lowest, highest, words) in zip(fields, _CRON_FIELDS, strict=True):
        if not all(_is_cron(part, lowest, highest, words.split()) for part in text.split(",")):
            yield f"spec.schedule: {text!r} is no {name}"


def _is_cron(part: str, lowest: int, highest: int, words: list[str]) -> bool:
    span, _, step = part.partition("/")
    if "/" in part and not (step.isdecimal() and int(step)):
        return False
    if span in ("*", "?"):
        return True
    ends = [words.index(end.lower()) + lowest if end.lower() in words else end for end in span.split("-")]
    if len(ends) > 2 or not all(str(end).isdecimal() for end in ends):
        return False
    numbers = [int(end) for end in ends]
    return lowest <= numbers[0] <= numbers[-1] <= highest


def disruption_budgets(manifest: Manifest) -> Iterator[str]:
    spec = manifest.get("spec", {})
    if _is("PodDisruptionBudget", manifest) and {"minAvailable", "maxUnavailable"} <= spec.keys():
        yield "spec: has both minAvailable and maxUnavailable"


def claims(manifest: Manifest) -> Iterator[str]:
    if not _is("PersistentVolumeClaim", manifest):
        return
    modes = _get(manifest, "spec.accessModes", [])
    for mode in modes:
        if mode not in ("ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod"):
            yield f"spec.accessModes: {mode!r} is none"
    if not modes or ("ReadWriteOncePod" in modes and len(modes) > 1):
        yield f"spec.accessModes: {modes} cannot be asked for"
    if not quantity(_get(manifest, "spec.resources.requests.storage", 0)) > 0:
        yield "spec.resources.requests.storage: asks for nothing"


def services(manifest: Manifest) -> Iterator[str]:
    if not _is("Service", manifest):
        return
    ports = _get(manifest, "spec.ports", [])
    for index, port in enumerate(ports):
        path = f"spec.ports.{index}"
        if "name" in port or len(ports) > 1:
            yield from _unlike(_LABEL, "name", f"{path}.name", port.get("name", ""))
        for key in ("port", "targetPort"):
            if isinstance(number := port.get(key), int) and not 0 < number < 65536:
                yield f"{path}.{key}: {number} is no port"
        if isinstance(target := port.get("targetPort"), str):
            yield from _unlike(_PORT_NAME, "name of a port", f"{path}.targetPort", target)
    yield from _twice("spec.ports", ports, "name")


# --- what KubeRay's operator refuses, or nobody -----------------------------------------------------------------------

_SUBMISSION_MODES = ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
_MAX_RAY_JOB_NAME = 47  # KubeRay makes longer names of it


def ray_jobs(manifest: Manifest) -> Iterator[str]:
    if not _is("RayJob", manifest):
        return
    name, spec = manifest["metadata"].get("name", ""), manifest["spec"]
    if len(name) > _MAX_RAY_JOB_NAME:
        yield f"metadata.name: has {len(name)} characters, and may have {_MAX_RAY_JOB_NAME}"
    yield from _unlike(_DNS_1035_LABEL, "DNS-1035 label", "metadata.name", name)
    mode = spec.get("submissionMode", "K8sJobMode")
    if mode not in _SUBMISSION_MODES:
        yield f"spec.submissionMode: {mode!r} is waited for for ever; it is one of {', '.join(_SUBMISSION_MODES)}"
    for key, lowest in (
        ("activeDeadlineSeconds", 1),
        ("preRunningDeadlineSeconds", 1),
        ("ttlSecondsAfterFinished", 0),
        ("backoffLimit", 0),
    ):
        if spec.get(key, lowest) < lowest:
            yield f"spec.{key}: {spec[key]} is less than {lowest}"
    shuts_down, suspended = spec.get("shutdownAfterJobFinishes", False), spec.get("suspend", False)
    selects, retries = "clusterSelector" in spec, spec.get("backoffLimit", 0) > 0
    lingers, has_rules = spec.get("ttlSecondsAfterFinished", 0) > 0, _get(spec, "deletionStrategy.deletionRules")
    own_submitter = {"submitterPodTemplate", "submitterConfig"} & spec.keys()
    head_restarts = _get(spec, "rayClusterSpec.headGroupSpec.template.spec.restartPolicy", "Never") != "Never"
    accounts = _get(spec, "rayClusterSpec.authOptions.enableK8sTokenAuth")
    for is_broken, rule in (
        (lingers and not shuts_down, "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"),
        (suspended and not shuts_down, "suspend needs shutdownAfterJobFinishes"),
        (has_rules and shuts_down, "deletionRules exclude shutdownAfterJobFinishes"),
        (not selects and "rayClusterSpec" not in spec, "needs rayClusterSpec or clusterSelector"),
        (selects and suspended, "clusterSelector excludes suspend"),
        (selects and retries, "clusterSelector excludes backoffLimit"),
        (mode == "InteractiveMode" and retries, "InteractiveMode excludes backoffLimit"),
        (mode == "SidecarMode" and own_submitter, "SidecarMode has no pod to submit from"),
        (mode == "SidecarMode" and head_restarts, "SidecarMode needs restartPolicy Never of the head"),
        (accounts, "enableK8sTokenAuth is for clusters without a job"),
    ):
        if is_broken:
            yield f"spec: {rule}"
    try:
        yaml.safe_load(spec.get("runtimeEnvYAML", ""))
    except yaml.YAMLError:
        yield "spec.runtimeEnvYAML: is no YAML"


def ray_clusters(manifest: Manifest) -> Iterator[str]:
    path = {"RayJob": "spec.rayClusterSpec", "RayCluster": "spec"}.get(manifest["kind"], "")
    cluster = _get(manifest, path)
    if not path or cluster is None:
        return
    scales = cluster.get("enableInTreeAutoscaling", False)
    groups = [("headGroupSpec", cluster.get("headGroupSpec", {}))]
    for index, group in enumerate(cluster.get("workerGroupSpecs", [])):
        groups.append((f"workerGroupSpecs.{index}", group))
        yield from (f"{path}.workerGroupSpecs.{index}: {found}" for found in _replicas(group, scales))
    for where, group in groups:
        given = group.get("rayStartParams", {})
        if "labels" in given:
            yield f"{path}.{where}.rayStartParams: labels are a field of the group"
        if group.get("resources") and given.keys() & {"num-cpus", "num-gpus", "memory", "resources"}:
            yield f"{path}.{where}: has resources, and in rayStartParams as well"
        for key, value in given.items():
            if not isinstance(value, str):
                yield f"{path}.{where}.rayStartParams.{key}: {value!r} is no text"
    if _get(cluster, "authOptions.mode") == "token" and _version(cluster.get("rayVersion")) < (2, 52):
        yield f"{path}.rayVersion: {cluster.get('rayVersion')} knows no tokens, which authOptions asks for"
    for key in ("networkPolicy", "tlsOptions", "historyServerOptions"):
        if key in cluster:
            yield f"{path}.{key}: needs a feature of the operator that is off by default"


def _replicas(group: Manifest, scales: bool) -> Iterator[str]:
    lowest, replicas, highest = (group.get(key) for key in ("minReplicas", "replicas", "maxReplicas"))
    if not scales and (lowest is None or highest is None):
        yield "needs minReplicas and maxReplicas"
    numbers = [number for number in (lowest, replicas, highest) if number is not None]
    if any(number < 0 for number in numbers) or numbers != sorted(numbers):
        yield f"minReplicas {lowest}, replicas {replicas} and maxReplicas {highest} contradict"


def _version(text: Any) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", str(text or ""))[:2]))


# --- policy ----------------------------------------------------------------------------------------------------------


def pod_policy(manifest: Manifest) -> Iterator[str]:
    """What Pod Security Standards call restricted, and more that every pod of ours keeps to."""
    for path, spec in pod_specs(manifest):
        for key in ("hostNetwork", "hostPID", "hostIPC"):
            if spec.get(key):
                yield f"{path}.{key}: must not be"
        for index, volume in enumerate(spec.get("volumes", [])):
            if "hostPath" in volume:
                yield f"{path}.volumes.{index}: hostPath must not be"
        if spec.get("automountServiceAccountToken") is not False:
            yield f"{path}.automountServiceAccountToken: must be false"
        for where, container in containers(path, spec):
            yield from _container_policy(where, container, spec.get("securityContext", {}))


def _container_policy(path: str, container: Manifest, of_pod: Manifest) -> Iterator[str]:
    own = container.get("securityContext", {})
    effective = {**of_pod, **own}
    for key, wanted in (
        ("runAsNonRoot", True),
        ("seccompProfile", {"type": "RuntimeDefault"}),
        ("allowPrivilegeEscalation", False),
        ("readOnlyRootFilesystem", True),
    ):
        if effective.get(key) != wanted:
            yield f"{path}.securityContext.{key}: must be {wanted}"
    for key in ("runAsUser", "runAsGroup"):
        if not effective.get(key):
            yield f"{path}.securityContext.{key}: must be a number that is not root's"
    if own.get("privileged"):
        yield f"{path}.securityContext.privileged: must not be"
    if own.get("capabilities") != {"drop": ["ALL"]}:
        yield f"{path}.securityContext.capabilities: must drop ALL and add none"
    for kind in ("requests", "limits"):
        for name in ("cpu", "memory"):
            if name not in container.get("resources", {}).get(kind, {}):
                yield f"{path}.resources.{kind}.{name}: must be set"
    if not re.search(r"(:(?!latest$)[\w.-]+|@sha256:[0-9a-f]{64})$", image := container.get("image", "")):
        yield f"{path}.image: {image!r} has no tag, or latest"
    for port in container.get("ports", []):
        if "hostPort" in port:
            yield f"{path}.ports: hostPort must not be"


def probes(manifest: Manifest) -> Iterator[str]:
    """Of what serves; KubeRay adds those of Ray's pods."""
    if manifest["kind"] not in ("Deployment", "StatefulSet", "DaemonSet"):
        return
    for path, spec in pod_specs(manifest):
        for index, container in enumerate(spec["containers"]):
            for key in ("readinessProbe", "livenessProbe"):
                if key not in container:
                    yield f"{path}.containers.{index}.{key}: must be set"


RULES: tuple[Callable[[Manifest], Iterator[str]], ...] = (
    schema,
    names,
    duplicates,
    pods,
    restarts,
    selectors,
    cron,
    disruption_budgets,
    claims,
    services,
    ray_jobs,
    ray_clusters,
    pod_policy,
    probes,
)


# --- all together ----------------------------------------------------------------------------------------------------

_BUILT_IN = {
    ("Namespace", "default"),
    ("ServiceAccount", "default"),
    ("PriorityClass", "system-cluster-critical"),
    ("PriorityClass", "system-node-critical"),
}
_CLUSTER_WIDE = (
    "Namespace", "PriorityClass", "ClusterRole", "ClusterRoleBinding", "ResourceFlavor", "ClusterQueue",
)  # fmt: skip


def missing_references(manifests: list[Manifest]) -> Iterator[str]:
    """What is named and neither optional nor among the manifests: no server refuses it, and pods wait for it."""
    present = {(one["kind"], one["metadata"]["name"]): one for one in manifests}
    for manifest in manifests:
        for path, kind, name, key in _references(manifest):
            target = present.get((kind, name))
            if target is None and (kind, name) not in _BUILT_IN:
                yield f"{_title(manifest)}: {path}: there is no {kind} {name}"
            elif target is not None and key and key not in {**target.get("data", {}), **target.get("stringData", {})}:
                yield f"{_title(manifest)}: {path}: {kind} {name} has no key {key}"


def _references(manifest: Manifest) -> Iterator[tuple[str, str, str, str | None]]:
    """Path, kind, name, and the key in what is named."""
    if manifest["kind"] not in _CLUSTER_WIDE:
        yield "metadata.namespace", "Namespace", manifest["metadata"].get("namespace", "default"), None
    if manifest["kind"] == "RoleBinding":
        yield "roleRef", manifest["roleRef"]["kind"], manifest["roleRef"]["name"], None
        for index, subject in enumerate(manifest.get("subjects", [])):
            if subject["kind"] == "ServiceAccount":
                yield f"subjects.{index}", "ServiceAccount", subject["name"], None
    for path, spec in pod_specs(manifest):
        for field, kind in (("serviceAccountName", "ServiceAccount"), ("priorityClassName", "PriorityClass")):
            if field in spec:
                yield f"{path}.{field}", kind, spec[field], None
        for index, secret in enumerate(spec.get("imagePullSecrets", [])):
            yield f"{path}.imagePullSecrets.{index}", "Secret", secret["name"], None
        for index, volume in enumerate(spec.get("volumes", [])):
            for source in (volume, *_get(volume, "projected.sources", [])):
                yield from _sources(f"{path}.volumes.{index}", source)
        for where, container in containers(path, spec):
            for index, variables in enumerate(container.get("envFrom", [])):
                yield from _sources(f"{where}.envFrom.{index}", variables)
            for index, variable in enumerate(container.get("env", [])):
                yield from _sources(f"{where}.env.{index}", variable.get("valueFrom", {}))


_SOURCES = {
    "configMap": ("ConfigMap", "name"),
    "secret": ("Secret", "secretName"),
    "persistentVolumeClaim": ("PersistentVolumeClaim", "claimName"),
    "configMapRef": ("ConfigMap", "name"),
    "secretRef": ("Secret", "name"),
    "configMapKeyRef": ("ConfigMap", "name"),
    "secretKeyRef": ("Secret", "name"),
}


def _sources(path: str, holder: Manifest) -> Iterator[tuple[str, str, str, str | None]]:
    for field, (kind, key_of_name) in _SOURCES.items():
        source = holder.get(field)
        if source is not None and not source.get("optional"):
            name = source.get(key_of_name) or source["name"]  # a projected secret's is `name`, too
            yield f"{path}.{field}", kind, name, source.get("key")
            for item in source.get("items", []):
                yield f"{path}.{field}.items", kind, name, item["key"]


def unserved_ports(manifests: list[Manifest]) -> Iterator[str]:
    """Services that select no pod, or a port that its containers do not name."""
    templates = [template for one in manifests for _, template in pod_templates(one)]
    for service in manifests:
        selector = _get(service, "spec.selector") if _is("Service", service) else None
        if not selector:
            continue
        selected = [one for one in templates if selector.items() <= _get(one, "metadata.labels", {}).items()]
        if not selected:
            yield f"{_title(service)}: spec.selector: selects no pod"
        for index, port in enumerate(service["spec"]["ports"]):
            target = port.get("targetPort")
            for template in selected:
                ports = [port for one in template["spec"]["containers"] for port in one.get("ports", [])]
                if isinstance(target, str) and target not in {port.get("name") for port in ports}:
                    yield f"{_title(service)}: spec.ports.{index}.targetPort: no container names a port {target!r}"


# --- walking ---------------------------------------------------------------------------------------------------------


def pod_templates(node: Any, path: str = "") -> Iterator[tuple[str, Manifest]]:
    """Wherever containers are, so that no kind is overlooked; a Pod is one itself."""
    if isinstance(node, dict) and isinstance(node.get("spec"), dict) and "containers" in node["spec"]:
        yield path, node
    else:
        for key, value in _items(node):
            yield from pod_templates(value, f"{path}.{key}".lstrip("."))


def pod_specs(manifest: Manifest) -> Iterator[tuple[str, Manifest]]:
    for path, template in pod_templates(manifest):
        yield f"{path}.spec".lstrip("."), template["spec"]


def containers(path: str, spec: Manifest) -> Iterator[tuple[str, Manifest]]:
    for kind in ("initContainers", "containers"):
        for index, container in enumerate(spec.get(kind, [])):
            yield f"{path}.{kind}.{index}", container


def _at_any_depth(node: Any, wanted: str, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    for key, value in _items(node):
        here = f"{path}.{key}".lstrip(".")
        if key == wanted and isinstance(value, dict):
            yield here, value
        else:
            yield from _at_any_depth(value, wanted, here)


def _items(node: Any) -> Iterable[tuple[Any, Any]]:
    return node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()


def _get(node: Any, path: str, default: Any = None) -> Any:
    for key in path.split("."):
        if not isinstance(node, dict) or key not in node:
            return default
        node = node[key]
    return node


def _is(kind: str, manifest: Manifest) -> bool:
    return manifest["kind"] == kind
