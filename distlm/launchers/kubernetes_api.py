"""The API of a Kubernetes cluster, by its official client: what distlm asks of it, and its refusals in words that help.

The client is imported where it is used: `pip install 'distlm[kubernetes]'`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Self

from distlm.errors import DistlmError, InfrastructureError, InputError, Problem
from distlm.launchers.kubernetes_manifests import Manifest
from distlm.launchers.kubernetes_states import Found, of_run


@dataclass(frozen=True)
class _Kind:
    """How the client calls what it does with objects of a kind."""

    api: str
    method: str
    arguments: Mapping[str, str] = field(default_factory=dict)
    get: str = "read"
    """Its verb for that."""


def _of_ray(plural: str) -> _Kind:
    arguments = {"group": "ray.io", "version": "v1", "plural": plural}
    return _Kind("CustomObjectsApi", "{verb}_namespaced_custom_object", arguments, "get")


_KINDS = {
    "ConfigMap": _Kind("CoreV1Api", "{verb}_namespaced_config_map"),
    "Secret": _Kind("CoreV1Api", "{verb}_namespaced_secret"),
    "NetworkPolicy": _Kind("NetworkingV1Api", "{verb}_namespaced_network_policy"),
    "RayJob": _of_ray("rayjobs"),
    "RayCluster": _of_ray("rayclusters"),
}
_NUM_TRIES, _PAUSE_FACTOR_S = 5, 0.5
_TIMEOUT_S = (5.0, 30.0)
"""To connect, and for an answer."""
_HANDSHAKE = re.compile(r"Handshake status (\d+).*-\+-\+- (.*)", re.DOTALL)
_INSTALL_KUBERAY = "install KubeRay's operator, with its CRDs, as docs/kubernetes.md says"
_NEEDED_RIGHTS = "the rights that it needs are those of the Role in k8s/20-rbac.yaml"


class NotThereError(InputError):
    """The API knows no object of that name."""


class AlreadyThereError(InputError):
    """There is an object of that name."""


class KubernetesApi:
    """One namespace of one cluster."""

    def __init__(self, client: Any, namespace: str, context: str) -> None:
        self._client = client
        self.namespace, self.context = namespace, context

    @classmethod
    def connect(cls, context: str | None, namespace: str | None) -> Self:
        """By a context of the kubeconfig, or with the account of the pod that this is. Raises InputError."""
        if find_spec("kubernetes") is None:
            raise InputError("kubernetes is not installed here; run: pip install 'distlm[kubernetes]'")
        from kubernetes import client, config
        from kubernetes.config.config_exception import ConfigException

        configuration = client.Configuration()
        try:
            contexts, current = config.list_kube_config_contexts()
        except ConfigException as error:
            if context is not None:
                raise InputError(Problem(f"there is no kubeconfig: {error}", "kubernetes.context", context)) from None
            return cls._in_a_pod(configuration, namespace)
        if context is None and current is None:
            raise InputError("the kubeconfig has no current context; name one with kubernetes.context")
        names = [one["name"] for one in contexts]
        if context is not None and context not in names:
            raise InputError(
                f"kubernetes.context = {context}: the kubeconfig has no such one; it has {', '.join(names)}"
            )
        chosen = next(one for one in contexts if one["name"] == context) if context else current
        try:
            config.load_kube_config(context=chosen["name"], client_configuration=configuration)
        except ConfigException as error:
            raise InputError(f"the context {chosen['name']} of the kubeconfig cannot be used: {error}") from None
        found = namespace or chosen["context"].get("namespace") or "default"
        return cls(_patient(configuration), found, chosen["name"])

    @classmethod
    def _in_a_pod(cls, configuration: Any, namespace: str | None) -> Self:
        from kubernetes import config
        from kubernetes.config.config_exception import ConfigException

        try:
            config.load_incluster_config(client_configuration=configuration)
        except ConfigException:
            raise InputError(
                "no cluster is known here: there is no kubeconfig, and this is no pod with an account"
            ) from None
        if namespace is None:
            with open("/var/run/secrets/kubernetes.io/serviceaccount/namespace", encoding="utf-8") as file:
                namespace = file.read().strip()
        return cls(_patient(configuration), namespace, "")

    # --- the objects of a run ----------------------------------------------------------------------------------------

    def create(self, manifest: Manifest) -> dict[str, Any]:
        """The object that is made. Raises AlreadyThereError, or DistlmError in the API's words."""
        body = {**manifest, "metadata": {**manifest["metadata"], "namespace": self.namespace}}
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        with self._words(f"the {kind} {name} cannot be made"):
            made: dict[str, Any] = self._call("create", kind, body=body, field_validation="Strict")
        return made

    def own(self, manifest: Manifest, owner: Mapping[str, Any]) -> None:
        """Have an object deleted with its owner."""
        reference = {
            "apiVersion": owner["apiVersion"], "kind": owner["kind"],
            "name": owner["metadata"]["name"], "uid": owner["metadata"]["uid"],
        }  # fmt: skip
        self._patch(manifest["kind"], manifest["metadata"]["name"], {"metadata": {"ownerReferences": [reference]}})

    def no_more_retries(self, name: str) -> None:
        """Of a RayJob: its next end is its last one."""
        self._patch("RayJob", name, {"spec": {"backoffLimit": 0}})

    def _patch(self, kind: str, name: str, patch: Manifest) -> None:
        with self._words(f"the {kind} {name} cannot be changed"):
            self._call("patch", kind, name=name, body=patch)

    def delete(self, kind: str, name: str) -> None:
        """Also of one that is not there."""
        with suppress(NotThereError), self._words(f"the {kind} {name} cannot be deleted"):
            self._call("delete", kind, name=name)

    def get(self, kind: str, name: str) -> dict[str, Any]:
        """Raises NotThereError, or DistlmError in the API's words."""
        with self._words(f"the {kind} {name}"):
            found: dict[str, Any] = self._call(_KINDS[kind].get, kind, name=name)
        return found

    def _call(self, verb: str, kind: str, **options: Any) -> Any:
        """One of the client's methods for the objects of a run; its answer, as plain data."""
        from kubernetes import client

        of_kind = _KINDS[kind]
        method = getattr(getattr(client, of_kind.api)(self._client), of_kind.method.format(verb=verb))
        answer = method(**of_kind.arguments, namespace=self.namespace, _request_timeout=_TIMEOUT_S, **options)
        return self._client.sanitize_for_serialization(answer)

    # --- how it stands -----------------------------------------------------------------------------------------------

    def find(self, name: str) -> Found:
        """All that is known of a run. Raises NotThereError, or DistlmError in the API's words."""
        job = self.get("RayJob", name)
        cluster, pods = None, []
        if cluster_name := (job.get("status") or {}).get("rayClusterName"):
            with suppress(InputError):  # not made yet, or not to be seen
                cluster = self.get("RayCluster", cluster_name)
        with suppress(InputError):
            pods = self.pods(of_run(name))
        of_these = {one["metadata"].get("uid") for one in (job, cluster, *pods) if one}
        events = [event for event in self._warnings() if event["involvedObject"].get("uid") in of_these]
        return Found(job, cluster, pods, events)

    def pods(self, selector: str) -> list[dict[str, Any]]:
        """Those with these labels, newest first."""
        from kubernetes import client

        with self._words("the pods cannot be listed"):
            found = client.CoreV1Api(self._client).list_namespaced_pod(
                self.namespace, label_selector=selector, _request_timeout=_TIMEOUT_S
            )
        pods: list[dict[str, Any]] = self._client.sanitize_for_serialization(found.items)
        return sorted(pods, key=lambda pod: pod["metadata"].get("creationTimestamp") or "", reverse=True)

    def _warnings(self) -> list[dict[str, Any]]:
        """The namespace's events that are warnings, oldest first; none where they are not to be seen."""
        from kubernetes import client

        try:
            with self._words("the events cannot be listed"):
                found = client.CoreV1Api(self._client).list_namespaced_event(
                    self.namespace, field_selector="type=Warning", limit=1000, _request_timeout=_TIMEOUT_S
                )
        except InputError:
            return []
        events: list[dict[str, Any]] = self._client.sanitize_for_serialization(found.items)
        return sorted(events, key=_time_of_event)

    # --- what it says, and what is said to it ------------------------------------------------------------------------

    def log(self, pod: str, container: str) -> str:
        """Raises DistlmError in the API's words."""
        from kubernetes import client

        with self._words(f"the log of the pod {pod}"):
            answer = client.CoreV1Api(self._client).read_namespaced_pod_log(
                pod, self.namespace, container=container, _preload_content=False, _request_timeout=_TIMEOUT_S
            )
            text: str = answer.data.decode(errors="replace")
        return text

    def run(self, pod: str, container: str, command: Sequence[str]) -> Iterator[str]:
        """What a command prints in a pod, as it comes. Raises InputError where it cannot be run there, and
        InfrastructureError where it ends with another exit code than 0."""
        from kubernetes import client, stream

        with self._words(f"`{' '.join(command)}` in the pod {pod}"):
            connection = stream.stream(
                client.CoreV1Api(self._client).connect_get_namespaced_pod_exec, pod, self.namespace,
                container=container, command=list(command), stdin=False, stdout=True, stderr=True, tty=False,
                _preload_content=False, _request_timeout=None,
            )  # fmt: skip
        errors = ""
        with closing(connection):
            while connection.is_open():
                connection.update(timeout=1)
                if connection.peek_stdout():
                    yield connection.read_stdout()
                if connection.peek_stderr():
                    errors += connection.read_stderr()
            if code := connection.returncode:
                raise InfrastructureError(f"in the pod {pod}: {errors.strip() or f'exit code {code}'}")

    @contextmanager
    def _words(self, what: str) -> Iterator[None]:
        """Turns what the client raises into what the user can do about it."""
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        try:
            yield
        except ApiException as error:
            status, message = _answer(error)
            raise _refusal(status, message, what, self.namespace) from None
        except (HTTPError, OSError) as error:
            host = self._client.configuration.host
            raise InfrastructureError(f"the Kubernetes API at {host} does not answer: {_cause(error)}") from None


def _patient(configuration: Any) -> Any:
    """A client that tries again where a connection breaks or the API is too busy. What is made a second time by that is
    refused as being there, and then looked at."""
    from kubernetes import client
    from urllib3 import Retry

    configuration.retries = Retry(
        total=_NUM_TRIES, backoff_factor=_PAUSE_FACTOR_S, status_forcelist=(429, 502, 503, 504), allowed_methods=None,
        raise_on_status=False,
    )  # fmt: skip
    return client.ApiClient(configuration)


def _refusal(status: int, message: str, what: str, namespace: str) -> DistlmError:
    """Of the API's code and words."""
    said = f"{what}: {message}"
    match status:
        case 401:
            return InputError(f"{said}; the kubeconfig's credentials are not accepted: log in to the cluster again")
        case 403 if "exceeded quota" in message:
            return InputError(f"{said}; use fewer or smaller pods, or have the quota raised")
        case 403:
            return InputError(f"{said}; {_NEEDED_RIGHTS}")
        case 404 if "page not found" in message:
            return InputError(f"{what}: the cluster does not know RayJobs; {_INSTALL_KUBERAY}")
        case 404 if f'namespaces "{namespace}" not found' in message:
            return InputError(f"{said}; set kubernetes.namespace to one that is there, or make it")
        case 404:
            return NotThereError(said)
        case 409 if "already exists" in message:
            return AlreadyThereError(said)
        case 400 | 409 | 422:
            return InputError(said)
    return InfrastructureError(said)


def _answer(error: Any) -> tuple[int, str]:
    """The API's code, and what it says, in one line."""
    code, body = error.status or 0, error.body or ""
    if found := _HANDSHAKE.match(error.reason or ""):  # of a WebSocket, which the client tells in another way
        code, body = int(found[1]), found[2]
    body = body.decode(errors="replace") if isinstance(body, bytes) else body
    with suppress(ValueError, KeyError, TypeError):
        body = json.loads(body)["message"]
    return code, " ".join(str(body or error.reason or f"status {code}").split())


def _cause(error: BaseException) -> str:
    """The innermost reason, which urllib3 wraps."""
    while isinstance(inner := getattr(error, "reason", None), BaseException):
        error = inner
    text = " ".join(str(error).split())
    return text.rpartition(": ")[2] if "Connection object" in text or "HTTPConnection" in text else text


def _time_of_event(event: Mapping[str, Any]) -> str:
    return str(event.get("lastTimestamp") or event.get("eventTime") or event["metadata"].get("creationTimestamp") or "")
