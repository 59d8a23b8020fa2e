"""The API of a Kubernetes cluster, by its official client: what distlm asks of it, and its refusals in words that help.

The client is imported where it is used: `pip install 'distlm[kubernetes]'`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import yaml

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
_NUM_TRIES, _PAUSE_FACTOR_S = 4, 0.5
_TIMEOUT_S = (5.0, 30.0)
"""To connect, and for an answer."""
_PAGE_SIZE, _MAX_PAGES = 500, 10
"""Of the events of a namespace."""
_HANDSHAKE = re.compile(r"Handshake status (\d+).*-\+-\+- (.*)", re.DOTALL)
_INSTALL_KUBERAY = "install KubeRay's operator, with its CRDs, as docs/kubernetes.md says"
_NEEDED_RIGHTS = "the rights that it needs are those of the Role in k8s/20-rbac.yaml"


class NotThereError(InputError):
    """The API knows no object of that name."""


class AlreadyThereError(InputError):
    """There is an object of that name."""


class CommandError(InfrastructureError):
    """A command in a pod was run, and has not succeeded."""

    def __init__(self, message: str, exit_code_there: int | None = None) -> None:
        """`exit_code_there`: None: it was cut off."""
        self.exit_code_there = exit_code_there
        super().__init__(message)


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
        from kubernetes.config import kube_config

        files = kube_config.KUBE_CONFIG_DEFAULT_LOCATION
        if any(Path(path).expanduser().exists() for path in files.split(os.pathsep) if path):
            client, name, its_namespace = _by_kubeconfig(files, context)
            return cls(client, namespace or its_namespace, name)
        if context is not None:
            raise InputError(Problem(f"there is no kubeconfig ({files})", "kubernetes.context", context))
        return cls(_by_account(), namespace or _namespace_of_pod(), "")

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
            with suppress(DistlmError):  # not made yet, or not to be seen
                cluster = self.get("RayCluster", cluster_name)
        with suppress(DistlmError):
            pods = self.pods(of_run(name))
        of_these = {one["metadata"].get("uid") for one in (job, cluster, *pods) if one}

        def is_about_run(about: Mapping[str, Any]) -> bool:
            return about.get("uid") in of_these or (about.get("kind"), about.get("name")) == ("Job", name)

        return Found(job, cluster, pods, [one for one in self._warnings() if is_about_run(one["involvedObject"])])

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

        events: list[dict[str, Any]] = []
        following: str | None = None
        with suppress(DistlmError), self._words("the events cannot be listed"):
            for _ in range(_MAX_PAGES):
                page = client.CoreV1Api(self._client).list_namespaced_event(
                    self.namespace, field_selector="type=Warning", limit=_PAGE_SIZE, _request_timeout=_TIMEOUT_S,
                    **({"_continue": following} if following else {}),
                )  # fmt: skip
                events += self._client.sanitize_for_serialization(page.items)
                if not (following := page.metadata._continue if page.metadata else None):
                    break
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
        """What a command prints in a pod, as it comes.

        Raises:
            DistlmError: in the API's words, where the command cannot be run there.
            CommandError: it ends with another exit code than 0, or the pod or the connection ends before it.
        """
        import websocket
        from kubernetes import client, stream

        websocket.setdefaulttimeout(_TIMEOUT_S[1])
        with self._words(f"`{' '.join(command)}` in the pod {pod}"):
            connection = stream.stream(
                client.CoreV1Api(self._client).connect_get_namespaced_pod_exec, pod, self.namespace,
                container=container, command=list(command), stdin=False, stdout=True, stderr=True, tty=False,
                _preload_content=False,
            )  # fmt: skip
        errors = ""
        with closing(connection):
            try:
                while connection.is_open():
                    connection.update(timeout=1)
                    if connection.peek_stdout():
                        yield connection.read_stdout()
                    if connection.peek_stderr():
                        errors += connection.read_stderr()
                code = connection.returncode
            except (websocket.WebSocketException, OSError, TypeError, KeyError, ValueError, yaml.YAMLError) as error:
                why = errors.strip() or str(error) or type(error).__name__
                raise CommandError(f"the command in the pod {pod} was cut off: {why}") from None
        if code:
            raise CommandError(f"in the pod {pod}: {errors.strip() or f'exit code {code}'}", code)

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


def _read_kubeconfig(files: str) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Contexts and users by their names, and the current context; of several files the first one counts, as kubectl has
    it. Raises InputError."""
    found: dict[str, dict[str, Any]] = {"context": {}, "user": {}}
    current = ""
    for path in (Path(path).expanduser() for path in files.split(os.pathsep) if path):
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else None
            for kind, named in found.items():
                for one in (content or {}).get(f"{kind}s") or ():
                    named.setdefault(one["name"], one.get(kind) or {})
            current = current or (content or {}).get("current-context") or ""
        except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
            raise InputError(f"the kubeconfig {path} cannot be read: {' '.join(str(error).split())}") from None
    return found["context"], found["user"], current


@cache
def _by_kubeconfig(files: str, context: str | None) -> tuple[Any, str, str]:
    """A client, the name of the context that it is for, and that one's namespace. Raises InputError."""
    from kubernetes import client, config
    from kubernetes.config.config_exception import ConfigException

    contexts, users, current = _read_kubeconfig(files)
    name = context or current
    there_are = f"it has {', '.join(contexts) or 'none'}"
    if not name:
        raise InputError(f"the kubeconfig has no current context; name one with kubernetes.context: {there_are}")
    if name not in contexts:
        raise InputError(Problem(f"the kubeconfig has no such one; {there_are}", "kubernetes.context", name))
    configuration = client.Configuration()
    try:
        config.load_kube_config(files, context=name, client_configuration=configuration)
    except (ConfigException, KeyError, TypeError, OSError, yaml.YAMLError) as error:
        raise InputError(f"the context {name} of the kubeconfig cannot be used: {error}") from None
    login = users.get(contexts[name].get("user"), {}).get("exec")
    if login and not (configuration.api_key or configuration.cert_file):
        raise InputError(f"the kubeconfig's command `{login.get('command')}` has given no credentials: log in again")
    return _patient(configuration), name, contexts[name].get("namespace") or "default"


def _by_account() -> Any:
    """A client with the account of the pod that this is. Raises InputError where it is none."""
    from kubernetes import client, config
    from kubernetes.config.config_exception import ConfigException

    configuration = client.Configuration()
    try:
        config.load_incluster_config(client_configuration=configuration)
    except ConfigException:
        raise InputError(
            "no cluster is known here: there is no kubeconfig, and this is no pod; let KUBECONFIG name one, or "
            "apply what distlm render prints where kubectl has one"
        ) from None
    return _patient(configuration)


def _namespace_of_pod() -> str:
    return Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace").read_text(encoding="utf-8").strip()


def _patient(configuration: Any) -> Any:
    """A client that tries again where a connection breaks or the API is too busy. What is made a second time by that is
    refused as being there, and then looked at."""
    from kubernetes import client
    from urllib3 import Retry

    configuration.retries = Retry(
        total=_NUM_TRIES - 1, backoff_factor=_PAUSE_FACTOR_S, status_forcelist=(429, 502, 503, 504),
        allowed_methods=None, raise_on_status=False,
    )  # fmt: skip
    return client.ApiClient(configuration)


def _refusal(status: int, message: str, what: str, namespace: str) -> DistlmError:
    """Of the API's code and words."""
    said = f"{what}: {message}"
    match status:
        case 403 if "system:anonymous" in message:
            return _refusal(401, message, what, namespace)
        case 401:
            _by_kubeconfig.cache_clear()  # they may be new ones next time
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
    """When it was last seen; who writes by the newer API gives the first time and counts on from there."""
    series = event.get("series") or {}
    times = (series.get("lastObservedTime"), event.get("lastTimestamp"), event.get("eventTime"))
    return str(next(filter(None, times), None) or event["metadata"].get("creationTimestamp") or "")
