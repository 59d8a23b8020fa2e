"""A Kubernetes API server of the tests' own: real HTTP, objects in memory, no controllers and no kubelet.

It answers the official client as kube-apiserver does, in that server's words, for the kinds in RESOURCES. What differs:
objects are not defaulted, lists are not paged, labels cannot be selected by their mere presence, pods go at once, and a
strategic merge patch replaces lists, except that ownerReferences are merged by uid. What controllers would do is done
by hand, with set_status, create and delete; only the garbage collector is here, and it is done when the request that
gave it work is answered.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import functools
import hashlib
import itertools
import json
import operator
import os
import random
import re
import socket
import struct
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple, Self
from urllib.parse import parse_qsl, unquote, urlsplit

import jsonschema
import kubernetes_validate
import pytest
import yaml

Object = dict[str, Any]

NAMESPACE = "distlm"
USER = "system:serviceaccount:distlm:default"
SHARED = Path(__file__).parents[2].parent / "shared"


@dataclass(frozen=True)
class Resource:
    """A kind of objects, as it is found in paths and in messages."""

    plural: str
    kind: str
    group: str = ""
    namespaced: bool = True
    has_status: bool = False
    """Whether status is written at a path of its own, /status."""

    @property
    def api_version(self) -> str:
        return f"{self.group}/v1".lstrip("/")

    @property
    def qualified(self) -> str:
        return f"{self.plural}.{self.group}".rstrip(".")

    @property
    def custom(self) -> bool:
        return self.group == "ray.io"


RESOURCES = {
    resource.plural: resource
    for resource in (
        Resource("namespaces", "Namespace", namespaced=False),
        Resource("pods", "Pod", has_status=True),
        Resource("configmaps", "ConfigMap"),
        Resource("secrets", "Secret"),
        Resource("events", "Event"),
        Resource("serviceaccounts", "ServiceAccount"),
        Resource("services", "Service"),
        Resource("networkpolicies", "NetworkPolicy", "networking.k8s.io"),
        Resource("jobs", "Job", "batch", has_status=True),
        Resource("rayjobs", "RayJob", "ray.io", has_status=True),
        Resource("rayclusters", "RayCluster", "ray.io", has_status=True),
    )
}


# Refusals


class ApiError(Exception):
    """A request refused."""

    def __init__(self, code: int, reason: str, message: str, **details: Any) -> None:
        super().__init__(message)
        self.code = code
        self.status = {
            "apiVersion": "v1",
            "kind": "Status",
            "metadata": {},
            "status": "Failure",
            "message": message,
            "reason": reason,
            "details": {key: value for key, value in details.items() if value},
            "code": code,
        }


def refusal(code: int, reason: str, resource: Resource, name: str, words: str) -> ApiError:
    """A refusal that begins with the object's kind and name."""
    subject = f'{resource.qualified} "{name}"' if name else resource.qualified
    return ApiError(code, reason, f"{subject} {words}", name=name, group=resource.group, kind=resource.plural)


def bad_request(message: str) -> ApiError:
    return ApiError(400, "BadRequest", message)


def conflict(resource: Resource, name: str, words: str) -> ApiError:
    message = f'Operation cannot be fulfilled on {resource.qualified} "{name}": {words}'
    return ApiError(409, "Conflict", message, name=name, group=resource.group, kind=resource.plural)


def cause(reason: str, path: str, message: str) -> Object:
    """What is wrong with one field."""
    return {"reason": reason, "message": message, "field": path}


def invalid(resource: Resource, name: str, causes: list[Object]) -> ApiError:
    """A refusal of what the fields hold."""
    said = [f"{problem['field']}: {problem['message']}" for problem in causes]
    kind = f"{resource.kind}.{resource.group}".rstrip(".")
    message = f'{kind} "{name}" is invalid: ' + (said[0] if len(said) == 1 else f"[{', '.join(said)}]")
    return ApiError(422, "Invalid", message, name=name, group=resource.group, kind=resource.kind, causes=causes)


# Schemas

NAME = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*"
NAME_RULE = (
    "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start "
    f"and end with an alphanumeric character (e.g. 'example.com', regex used for validation is '{NAME}')"
)
LABEL_VALUE = r"(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?"
LABEL_RULE = (
    "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must start and "
    "end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex used for validation is "
    f"'{LABEL_VALUE}')"
)
JSON_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}


@functools.cache
def load_schemas() -> tuple[Any, dict[tuple[str, str], Any]]:
    """The validating tool in ../shared, and the closed schemas of KubeRay's CRDs by (apiVersion, kind)."""
    if not (SHARED / "crds").is_dir():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"needs KubeRay's CRDs in {SHARED / 'crds'}")
    sys.path.append(str(SHARED / "tools"))
    try:
        import crd_validate
    finally:
        sys.path.remove(str(SHARED / "tools"))
    return crd_validate, crd_validate.load_crds(str(SHARED / "crds" / "kuberay-*" / "*.yaml"))


def schema_errors(resource: Resource, obj: Object) -> list[jsonschema.ValidationError]:
    """What speaks against an object. A built-in kind tells one error at a time."""
    tool, schemas = load_schemas()
    # The schema of a CRD leaves metadata open: any built-in kind tells what may be in there.
    built_in = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": obj["metadata"]} if resource.custom else obj
    errors = list(schemas[resource.api_version, resource.kind].iter_errors(obj)) if resource.custom else []
    try:
        kubernetes_validate.validate(built_in, tool.K8S, strict=True)
    except kubernetes_validate.ValidationError as error:
        errors.append(error)
    return errors


def field_path(path: list[str | int]) -> str:
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).lstrip(".")


def cause_of(error: jsonschema.ValidationError) -> Object:
    """A cause in a Status, for an error of a JSON schema."""
    where, value = field_path([*error.absolute_path]), error.instance
    if error.validator == "required":
        missing = error.message.split("'")[1]
        return cause("FieldValueRequired", f"{where}.{missing}".lstrip("."), "Required value")
    if error.validator == "enum":
        supported = ", ".join(f'"{allowed}"' for allowed in error.validator_value)
        return cause("FieldValueNotSupported", where, f'Unsupported value: "{value}": supported values: {supported}')
    if error.validator == "type":
        found, wanted = JSON_TYPES.get(type(value), "null"), error.validator_value
        wanted = wanted if isinstance(wanted, str) else wanted[0]
        message = f'Invalid value: "{found}": {where} in body must be of type {wanted}: "{found}"'
        return cause("FieldValueInvalid", where, message)
    return cause("FieldValueInvalid", where, f"Invalid value: {json.dumps(value)}: {error.message}")


def metadata_causes(metadata: Object) -> Iterator[Object]:
    """What speaks against a name and labels, which no schema tells."""
    name = metadata.get("name", "")
    if not name:
        yield cause("FieldValueRequired", "metadata.name", "Required value: name or generateName is required")
    elif not re.fullmatch(NAME, name):
        yield cause("FieldValueInvalid", "metadata.name", f"Invalid value: {json.dumps(name)}: {NAME_RULE}")
    for value in metadata.get("labels", {}).values():
        rule = "must be no more than 63 bytes" if len(value) > 63 else LABEL_RULE
        if len(value) > 63 or not re.fullmatch(LABEL_VALUE, value):
            yield cause("FieldValueInvalid", "metadata.labels", f"Invalid value: {json.dumps(value)}: {rule}")


def checked(resource: Resource, obj: Object, strict: bool) -> Object:
    """An object as the schemas allow it: without unknown fields, which strict refuses."""
    obj, unknown = load_schemas()[0].drop_null(obj), []
    while errors := schema_errors(resource, obj):
        closed = [error for error in errors if error.validator == "additionalProperties"]
        if not closed:
            raise invalid(resource, obj["metadata"].get("name", ""), [cause_of(error) for error in errors])
        for error in closed:
            path = [*error.absolute_path]
            parent = functools.reduce(operator.getitem, path, obj)
            for key in [key for key in parent if key not in error.schema.get("properties", {})]:
                unknown.append(f'unknown field "{field_path([*path, key])}"')
                del parent[key]
    if unknown and strict:
        kind, problem = resource.kind, f"strict decoding error: {', '.join(unknown)}"
        raise bad_request(f'{kind} in version "v1" cannot be handled as a {kind}: {problem}')
    return obj


# Selectors

Matcher = Callable[[Object], bool]

REQUIREMENT = re.compile(r"\s*([\w./-]+)\s*(==|=|!=|\bnotin\b|\bin\b)\s*(\([^)]*\)|[^,()]*?)\s*(?:,|$)")
FIELD_LABELS = {"events": r"involvedObject\.\w+|reason|type", "pods": r"status\.phase|spec\.nodeName"}


def requirements(selector: str) -> Iterator[tuple[str, bool, set[str]]]:
    """(key, whether its value is to be one of the values, values) of a label or field selector."""
    position = 0
    while position < len(selector):
        found = REQUIREMENT.match(selector, position)
        if not found:
            raise bad_request(f"unable to parse requirement: {selector[position:]!r}")
        key, relation, values = found.groups()
        yield key, relation in ("=", "==", "in"), {value.strip() for value in values.strip("()").split(",")}
        position = found.end()


def field_value(obj: Object, path: str) -> str:
    value: Any = obj
    for key in path.split("."):
        value = value.get(key, "") if isinstance(value, dict) else ""
    return str(value)


def matcher(call: Call) -> Matcher:
    """Whether an object is one of those that a list or a watch asks for."""
    labels, fields = ([*requirements(call.query.get(name, ""))] for name in ("labelSelector", "fieldSelector"))
    known = rf"metadata\.name(space)?|{FIELD_LABELS.get(call.resource.plural, 'metadata.name')}"
    for key, _, _ in fields:
        if not re.fullmatch(known, key):
            raise bad_request(f"field label not supported: {key}")

    def matches(obj: Object) -> bool:
        metadata = obj["metadata"]
        return (
            call.namespace in ("", metadata.get("namespace", ""))
            and all((metadata.get("labels", {}).get(key) in values) == is_in for key, is_in, values in labels)
            and all((field_value(obj, key) in values) == is_in for key, is_in, values in fields)
        )

    return matches


# Patches


def merge_patch(value: Any, patch: Any) -> Any:
    if not isinstance(patch, dict):
        return patch
    merged = dict(value) if isinstance(value, dict) else {}
    for key, part in patch.items():
        if part is None:
            merged.pop(key, None)
        else:
            merged[key] = merge_patch(merged.get(key), part)
    return merged


def strategic_merge_patch(obj: Object, patch: Object) -> Object:
    """A merge patch, except that owners are merged by their uid."""
    merged = merge_patch(obj, patch)
    if added := patch.get("metadata", {}).get("ownerReferences"):
        owners = {owner["uid"]: owner for owner in [*obj["metadata"].get("ownerReferences", []), *added]}
        merged["metadata"]["ownerReferences"] = [*owners.values()]
    return merged


def json_patch(obj: Object, operations: list[Object]) -> Object:
    patched = copy.deepcopy(obj)
    for step in operations:
        *parents, last = (part.replace("~1", "/").replace("~0", "~") for part in step["path"].split("/")[1:])
        parent: Any = patched
        for key in parents:
            parent = parent[int(key) if isinstance(parent, list) else key]
        in_list = isinstance(parent, list)
        key = (len(parent) if last == "-" else int(last)) if in_list else last
        if step["op"] == "remove":
            del parent[key]
        elif step["op"] == "add" and in_list:
            parent.insert(key, step["value"])
        elif step["op"] == "add" or parent[key] is not None:  # replace: what is to be there
            parent[key] = step["value"]
    return patched


PATCHES: dict[str, Callable[[Object, Any], Object]] = {
    "application/json-patch+json": json_patch,
    "application/merge-patch+json": merge_patch,
    "application/strategic-merge-patch+json": strategic_merge_patch,
}


def patched(resource: Resource, obj: Object, content_type: str, patch: Any) -> Object:
    accepted = [name for name in PATCHES if not (resource.custom and "strategic" in name)]
    if content_type not in accepted:
        formats = ", ".join(accepted)
        message = f"the body of the request was in an unknown format - accepted media types include: {formats}"
        raise ApiError(415, "UnsupportedMediaType", message)
    if isinstance(patch, list) != (content_type == "application/json-patch+json"):
        raise bad_request(f"error decoding patch: not a patch of {content_type}")
    try:
        return PATCHES[content_type](obj, patch)
    except (LookupError, TypeError, ValueError) as error:
        raise ApiError(422, "Invalid", "the server rejected our request due to an error in our request") from error


# Objects

SERVERS_OWN = ("name", "namespace", "uid", "creationTimestamp", "generation", "deletionTimestamp")


class Change(NamedTuple):
    resource: Resource
    before: Object | None
    after: Object | None
    last: Object
    """The state after it; of an object that is gone, the last one."""


def now() -> str:
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"


class Store:
    """The objects, and every change that was made to them: the number of a change is a resourceVersion.

    An object that is in here is never changed, only replaced. changed is the one lock, and tells of changes.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.changes: list[Change] = []
        self.compacted = 0
        """Versions before this one cannot be watched from any more."""
        self._objects: dict[tuple[str, str, str], Object] = {}

    def get(self, resource: Resource, namespace: str, name: str) -> Object:
        try:
            return self._objects[resource.plural, namespace, name]
        except KeyError:
            raise refusal(404, "NotFound", resource, name, "not found") from None

    def select(self, resource: Resource, matches: Matcher = lambda obj: True) -> list[Object]:
        with self.changed:
            return [obj for (plural, _, _), obj in self._objects.items() if plural == resource.plural and matches(obj)]

    def create(self, resource: Resource, namespace: str, obj: Object, dry_run: bool = False) -> Object:
        with self.changed:
            if resource.namespaced:
                self.get(RESOURCES["namespaces"], "", namespace)
            name = obj["metadata"]["name"]
            if (resource.plural, namespace, name) in self._objects:
                raise refusal(409, "AlreadyExists", resource, name, "already exists")
            servers_own: Object = {"uid": str(uuid.uuid4()), "creationTimestamp": now()}
            servers_own |= {"generation": 1} if "spec" in obj else {}
            servers_own |= {"namespace": namespace} if resource.namespaced else {}
            return self._commit(resource, None, obj | {"metadata": obj["metadata"] | servers_own}, dry_run)

    def update(
        self, resource: Resource, before: Object, after: Object, subresource: str = "", dry_run: bool = False
    ) -> Object:
        """Replace an object's status, or all but its status; remove what only waited for its finalizers."""
        with self.changed:
            was, name = before["metadata"], before["metadata"]["name"]
            if after["metadata"].get("resourceVersion", was["resourceVersion"]) != was["resourceVersion"]:
                words = "the object has been modified; please apply your changes to the latest version and try again"
                raise conflict(resource, name, words)
            if subresource == "status":
                after = before | {"status": after.get("status", {})}
            elif resource.has_status:
                after = {key: value for key, value in after.items() if key != "status"}
                after |= {"status": before["status"]} if "status" in before else {}
            metadata = {key: value for key, value in after["metadata"].items() if key not in SERVERS_OWN}
            metadata |= {key: was[key] for key in (*SERVERS_OWN, "resourceVersion") if key in was}
            if before.get("spec") != after.get("spec"):
                metadata["generation"] = was.get("generation", 0) + 1
            after = after | {"metadata": metadata}
            if after == before:
                return before
            if "deletionTimestamp" in metadata and not metadata.get("finalizers") and not dry_run:
                self._remove(resource, before)
                return after
            return self._commit(resource, before, after, dry_run)

    def delete(self, resource: Resource, obj: Object, orphan: bool = False) -> Object:
        """Remove an object and what it owns, or, while it has finalizers, mark it as being deleted."""
        with self.changed:
            if orphan:
                self._orphan(obj["metadata"]["uid"])
            if not obj["metadata"].get("finalizers"):
                self._remove(resource, obj)
                return obj
            if "deletionTimestamp" in obj["metadata"]:
                return obj
            return self._commit(resource, obj, obj | {"metadata": obj["metadata"] | {"deletionTimestamp": now()}})

    def _commit(self, resource: Resource, before: Object | None, after: Object | None, dry_run: bool = False) -> Object:
        last = copy.deepcopy(after or before or {})
        if dry_run:
            return last
        metadata = last["metadata"]
        metadata["resourceVersion"] = str(len(self.changes) + 1)
        key = resource.plural, metadata.get("namespace", ""), metadata["name"]
        if after:
            self._objects[key] = last
        else:
            del self._objects[key]
        self.changes.append(Change(resource, before, after and last, last))
        self.changed.notify_all()
        return last

    def _remove(self, resource: Resource, obj: Object) -> None:
        self._commit(resource, obj, None)
        removed = obj["metadata"]
        alive = {other["metadata"]["uid"] for other in self._objects.values()}
        for key, other in list(self._objects.items()):
            owners = [owner["uid"] for owner in other["metadata"].get("ownerReferences", [])]
            orphaned = removed["uid"] in owners and not alive.intersection(owners)
            if key in self._objects and (orphaned or (resource.plural, key[1]) == ("namespaces", removed["name"])):
                self.delete(RESOURCES[key[0]], other)

    def _orphan(self, uid: str) -> None:
        for (plural, _, _), obj in list(self._objects.items()):
            owners = obj["metadata"].get("ownerReferences", [])
            others = [owner for owner in owners if owner["uid"] != uid]
            if others != owners:
                self.update(RESOURCES[plural], obj, obj | {"metadata": obj["metadata"] | {"ownerReferences": others}})


# Requests

PATH = re.compile(
    r"/(?:api|apis/(?P<group>[^/]+))/v1(?:/namespaces/(?P<namespace>[^/]+))?"
    r"/(?P<plural>[^/]+)(?:/(?P<name>[^/]+)(?:/(?P<subresource>[^/]+))?)?"
)
VERBS = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete", "GET": "get"}
NAME_ENDINGS = "bcdfghjklmnpqrstvwxz2456789"


class Request(NamedTuple):
    method: str
    path: str
    query: dict[str, str]


@dataclass(frozen=True)
class Call:
    """A request as it is understood."""

    verb: str
    resource: Resource
    namespace: str
    name: str
    subresource: str
    query: dict[str, str]
    commands: list[str]
    content_type: str
    body: Any

    @property
    def strict(self) -> bool:
        return self.query.get("fieldValidation") == "Strict"

    @property
    def dry_run(self) -> bool:
        return "dryRun" in self.query


@dataclass(frozen=True)
class Reply:
    """What is sent back. The body: JSON, plain text, pieces of a stream, or the command of an exec."""

    code: int
    body: Object | str | Iterator[str] | Callable[[], tuple[str, int]]
    headers: dict[str, str] = field(default_factory=dict)


JSON = {"Content_Type": "application/json"}
TEXT = {"Content_Type": "text/plain; charset=utf-8"}
NOT_FOUND = Reply(404, "404 page not found\n")


def flag(query: dict[str, str], name: str) -> bool:
    return query.get(name, "false").lower() not in ("false", "0")


def decoded(body: bytes) -> Any:
    try:
        return json.loads(body or b"{}")
    except ValueError as error:
        raise bad_request(f"couldn't get version/kind; json parse error: {error}") from error


@dataclass
class Log:
    """What a container wrote: each line with the time of it."""

    lines: list[tuple[float, str]] = field(default_factory=list)
    ended: bool = False

    def write(self, text: str, age_s: float = 0) -> None:
        self.lines += [(time.time() - age_s, line) for line in re.findall(r"[^\n]*\n|[^\n]+", text)]


class Verbs:
    """What is done with objects, logs and commands, and said of it."""

    def __init__(self) -> None:
        self._store = Store()
        self._changed = self._store.changed
        self._quotas: dict[str, str] = {}
        self._logs: dict[tuple[str, str, str], Log] = {}
        self._on_exec: Callable[[str, list[str]], tuple[str, int]] | None = None
        self._closed = False

    def carry_out(self, call: Call) -> Reply:
        answers = {
            "get": self._get,
            "list": self._list,
            "watch": self._watch,
            "create": self._create,
            "update": self._update,
            "patch": self._update,
            "delete": self._delete,
        }
        if call.resource.has_status:
            answers |= {f"{verb} status": answers[verb] for verb in ("get", "update", "patch")}
        if call.resource.plural == "pods":
            answers |= {"get log": self._log, "get exec": self._exec}
        if not (answer := answers.get(f"{call.verb} {call.subresource}".rstrip())):
            raise ApiError(405, "MethodNotAllowed", "the server does not allow this method on the requested resource")
        return answer(call)

    def _get(self, call: Call) -> Reply:
        return Reply(200, self._store.get(call.resource, call.namespace, call.name))

    def _list(self, call: Call) -> Reply:
        items = self._store.select(call.resource, matcher(call))
        if not call.resource.custom:  # the items of a built-in list do not say what they are
            items = [{key: item[key] for key in item if key not in ("apiVersion", "kind")} for item in items]
        metadata = {"resourceVersion": str(len(self._store.changes))}
        kind = f"{call.resource.kind}List"
        return Reply(200, {"apiVersion": call.resource.api_version, "kind": kind, "metadata": metadata, "items": items})

    def _create(self, call: Call) -> Reply:
        resource, obj = call.resource, self._sent(call)
        metadata = obj["metadata"]
        if "name" not in metadata and "generateName" in metadata:
            metadata["name"] = metadata["generateName"] + "".join(random.choices(NAME_ENDINGS, k=5))
        if metadata.get("namespace", call.namespace) != call.namespace:
            raise bad_request("the namespace of the provided object does not match the namespace sent on the request")
        if resource.namespaced:
            self._store.get(RESOURCES["namespaces"], "", call.namespace)
        obj = self._admitted(call, obj)
        if resource.has_status:
            obj.pop("status", None)
        if resource.plural == "pods":
            obj["status"] = {"phase": "Pending"}
        if quota := self._quotas.get(resource.plural):
            one, used = f"count/{resource.qualified}", len(self._store.select(resource))
            words = f"exceeded quota: {quota}, requested: {one}=1, used: {one}={used}, limited: {one}={used}"
            raise refusal(403, "Forbidden", resource, metadata["name"], f"is forbidden: {words}")
        return Reply(201, self._store.create(resource, call.namespace, obj, call.dry_run))

    def _sent(self, call: Call) -> Object:
        """The object in a body. A built-in kind need not say what it is: the path does."""
        resource, obj = call.resource, call.body
        if resource.custom and not obj.get("kind"):
            raise bad_request(f"Object 'Kind' is missing in '{json.dumps(obj)}'")
        named = {"apiVersion": resource.api_version, "kind": resource.kind}
        obj = named | {"metadata": {}} | obj
        if not named.items() <= obj.items():
            found, expected = (f"{what['apiVersion']}, Kind={what['kind']}" for what in (obj, named))
            message = f"the API version in the data ({found}) does not match the expected API version ({expected})"
            raise bad_request(message)
        return obj

    def _admitted(self, call: Call, obj: Object) -> Object:
        """A new state as it may be stored."""
        obj = checked(call.resource, obj, call.strict)
        if causes := list(metadata_causes(obj["metadata"])):
            raise invalid(call.resource, obj["metadata"].get("name", ""), causes)
        if plain := obj.pop("stringData", None):
            data = {key: base64.b64encode(value.encode()).decode() for key, value in plain.items()}
            obj["data"] = obj.get("data", {}) | data
        return obj

    def _update(self, call: Call) -> Reply:
        resource, before = call.resource, self._store.get(call.resource, call.namespace, call.name)
        sent = call.verb == "update"
        after = self._sent(call) if sent else patched(resource, before, call.content_type, call.body)
        name = after["metadata"].get("name")
        if name != call.name:
            raise bad_request(f"the name of the object ({name}) does not match the name on the URL ({call.name})")
        if resource.custom and not after["metadata"].get("resourceVersion"):
            message = "Invalid value: 0x0: must be specified for an update"
            raise invalid(resource, call.name, [cause("FieldValueInvalid", "metadata.resourceVersion", message)])
        after = self._admitted(call, after)
        return Reply(200, self._store.update(resource, before, after, call.subresource, call.dry_run))

    def _delete(self, call: Call) -> Reply:
        resource, obj = call.resource, self._store.get(call.resource, call.namespace, call.name)
        uid, wanted = obj["metadata"]["uid"], call.body.get("preconditions", {}).get("uid")
        if wanted not in (None, uid):
            words = f"the UID in the precondition ({wanted}) does not match the UID in record ({uid}). "
            words += "The object might have been deleted and then recreated"
            raise conflict(resource, call.name, words)
        # Of old, a Job leaves its pods behind unless told otherwise.
        usual = "Orphan" if resource.plural == "jobs" else "Background"
        policy = call.query.get("propagationPolicy") or call.body.get("propagationPolicy") or usual
        obj = obj if call.dry_run else self._store.delete(resource, obj, policy == "Orphan")
        if "deletionTimestamp" in obj["metadata"] or resource.plural == "pods":
            return Reply(200, obj)
        details = {"name": call.name, "group": resource.group, "kind": resource.plural, "uid": uid}
        details = {key: value for key, value in details.items() if value}
        status = {"apiVersion": "v1", "kind": "Status", "metadata": {}, "status": "Success", "details": details}
        return Reply(200, status)

    def _watch(self, call: Call) -> Reply:
        since, matches = int(call.query.get("resourceVersion") or 0), matcher(call)
        if 0 < since < self._store.compacted:
            gone = ApiError(410, "Expired", f"too old resource version: {since} ({self._store.compacted})")
            return Reply(200, iter([watch_event("ERROR", gone.status)]), JSON)
        present = [] if since else self._store.select(call.resource, matches)
        deadline = time.monotonic() + float(call.query.get("timeoutSeconds") or 1800)
        news = self._follow_changes(call.resource, matches, since or len(self._store.changes), deadline)
        return Reply(200, itertools.chain((watch_event("ADDED", obj) for obj in present), news), JSON)

    def _follow_changes(self, resource: Resource, matches: Matcher, since: int, deadline: float) -> Iterator[str]:
        while not self._closed and time.monotonic() < deadline:
            with self._changed:
                if len(self._store.changes) == since and not self._closed:
                    self._changed.wait(max(0, deadline - time.monotonic()))
                news = self._store.changes[since:]
            since += len(news)
            for change in news:
                was, now = (state is not None and matches(state) for state in (change.before, change.after))
                if change.resource == resource and (was or now):
                    kind = "DELETED" if not now else "MODIFIED" if was else "ADDED"
                    yield watch_event(kind, change.last)

    def _log(self, call: Call) -> Reply:
        pod = self._store.get(call.resource, call.namespace, call.name)
        container = container_of(pod, call.query.get("container", ""))
        log = self._logs.get((call.namespace, call.name, container)) or self._logs.get((call.namespace, call.name, ""))
        if not log:
            return without_kubelet(pod, f"containerLogs/{call.namespace}/{call.name}/{container}")
        since = time.time() - float(call.query.get("sinceSeconds", "inf"))
        lines = [line for line in log.lines if line[0] >= since]
        if "tailLines" in call.query:
            lines = lines[max(0, len(lines) - int(call.query["tailLines"])) :]
        follow = self._follow_log(pod, log, len(log.lines)) if flag(call.query, "follow") else iter(())
        stamped = flag(call.query, "timestamps")
        return Reply(200, (log_line(line, stamped) for line in itertools.chain(lines, follow)), TEXT)

    def _follow_log(self, pod: Object, log: Log, sent: int) -> Iterator[tuple[float, str]]:
        ended, uid = False, pod["metadata"]["uid"]
        while not ended:
            with self._changed:
                gone = not self._store.select(RESOURCES["pods"], lambda other: other["metadata"]["uid"] == uid)
                ended = log.ended or self._closed or gone
                if len(log.lines) == sent and not ended:
                    self._changed.wait()
                news = log.lines[sent:]
            sent += len(news)
            yield from news

    def _exec(self, call: Call) -> Reply:
        pod = self._store.get(call.resource, call.namespace, call.name)
        container = container_of(pod, call.query.get("container", ""))
        if not self._on_exec:
            return without_kubelet(pod, f"exec/{call.namespace}/{call.name}/{container}")
        return Reply(101, functools.partial(self._on_exec, call.name, call.commands))


def watch_event(kind: str, obj: Object) -> str:
    return json.dumps({"type": kind, "object": obj}) + "\n"


def log_line(line: tuple[float, str], stamped: bool) -> str:
    when, text = line
    return f"{datetime.fromtimestamp(when, UTC):%Y-%m-%dT%H:%M:%S.%f}000Z {text}" if stamped else text


def container_of(pod: Object, asked: str) -> str:
    """The container that a log or an exec is of."""
    name, spec = pod["metadata"]["name"], pod.get("spec", {})
    names, first = ([part["name"] for part in spec.get(key, [])] for key in ("containers", "initContainers"))
    if asked and names and asked not in names + first:
        raise bad_request(f"container {asked} is not valid for pod {name}")
    if not asked and len(names) > 1:
        others = f" or one of the init containers: [{' '.join(first)}]" if first else ""
        choice = f"choose one of: [{' '.join(names)}]{others}"
        raise bad_request(f"a container name must be specified for pod {name}, {choice}")
    return asked or "".join(names)


def without_kubelet(pod: Object, path: str) -> Reply:
    """What is said of a pod whose log or processes nobody can give."""
    name, status, node = pod["metadata"]["name"], pod.get("status", {}), pod.get("spec", {}).get("nodeName")
    is_log, container = path.startswith("containerLogs/"), path.rpartition("/")[2]
    if not node:
        if is_log:
            return Reply(204, "")
        raise bad_request(f"pod {name} does not have a host assigned")
    for known in status.get("containerStatuses", []) if is_log else []:
        if known["name"] == container and (waiting := known.get("state", {}).get("waiting")):
            words = f'container "{container}" in pod "{name}" is waiting to start: {waiting["reason"]}'
            raise bad_request(words)
    dialled = f"dial tcp {node}:10250: connect: connection refused"
    doing = f'Get "https://{node}:10250/{path}"' if is_log else "error dialing backend"
    raise ApiError(500, "", f"{doing}: {dialled}")


# The server


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one request."""

    kind: str
    method: str
    retry_after_s: int = 0


class KubeApi(Verbs):
    """The server: `with KubeApi() as api`. token: the bearer token that it wants, if any.

    The namespaces default and distlm are there from the beginning. Methods that take no namespace mean distlm.
    """

    def __init__(self, token: str = "") -> None:
        super().__init__()
        load_schemas()  # here, where it can still skip the test
        self.token = token
        self.requests: list[Request] = []
        self._faults: list[Fault] = []
        self.lift()
        for name in ("default", NAMESPACE):
            self.create("namespaces", {"metadata": {"name": name}})

    def __enter__(self) -> Self:
        self._server = Server(self)
        # polled often: shutdown waits for it
        serve = functools.partial(self._server.serve_forever, poll_interval=0.01)
        self._thread = threading.Thread(target=serve, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self.disconnect()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def kubeconfig(self, path: Path) -> Path:
        """Write a kubeconfig for this server, with the context test."""
        context = {"cluster": "test", "user": "test", "namespace": NAMESPACE}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": {"server": self.url}}],
            "users": [{"name": "test", "user": {"token": self.token} if self.token else {}}],
            "contexts": [{"name": "test", "context": context}],
            "current-context": "test",
        }
        path.write_text(yaml.safe_dump(config))
        return path

    # By hand, as controllers would. Field names are checked, so a mistake in a test is told.

    def create(self, resource: str, obj: Object, namespace: str = NAMESPACE) -> Object:
        """Create an object, status included; apiVersion and kind need not be given."""
        kind = RESOURCES[resource]
        obj = checked(kind, {"apiVersion": kind.api_version, "kind": kind.kind} | obj, strict=True)
        namespace = obj["metadata"].get("namespace", namespace) if kind.namespaced else ""
        return copy.deepcopy(self._store.create(kind, namespace, obj))

    def set_status(self, resource: str, name: str, status: Object, namespace: str = NAMESPACE) -> Object:
        """Merge into an object's status; None removes a field."""
        kind = RESOURCES[resource]
        with self._changed:
            before = self._found(resource, name, namespace)
            after = checked(kind, merge_patch(before, {"status": status}), strict=True)
            return copy.deepcopy(self._store.update(kind, before, after, "status" if kind.has_status else ""))

    def delete(self, resource: str, name: str, namespace: str = NAMESPACE) -> None:
        with self._changed:
            self._store.delete(RESOURCES[resource], self._found(resource, name, namespace))

    def object(self, resource: str, name: str, namespace: str = NAMESPACE) -> Object:
        with self._changed:
            return copy.deepcopy(self._found(resource, name, namespace))

    def _found(self, resource: str, name: str, namespace: str) -> Object:
        kind = RESOURCES[resource]
        return self._store.get(kind, namespace if kind.namespaced else "", name)

    def objects(self, resource: str) -> list[Object]:
        """All of a kind, in all namespaces, in the order of their creation."""
        return copy.deepcopy(self._store.select(RESOURCES[resource]))

    def wait_for(self, condition: Callable[[], Any], timeout_s: float = 10) -> Any:
        """Wait until a condition on objects or requests is true, and return what it says."""
        with self._changed:
            if not (result := self._changed.wait_for(condition, timeout_s)):
                raise TimeoutError(f"not within {timeout_s} s; requests: {self.requests}")
            return result

    # What a kubelet would give

    def set_log(self, namespace: str, pod: str, text: str, *, container: str = "", age_s: float = 0) -> None:
        """Begin a pod's log anew. Without a container it stands for each one that has none of its own."""
        with self._changed:
            self.end_log(namespace, pod, container=container)
            log = self._logs[namespace, pod, container] = Log()
            log.write(text, age_s)

    def append_log(self, namespace: str, pod: str, text: str, *, container: str = "") -> None:
        """Write whole lines to a log, and to who follows it."""
        with self._changed:
            self._logs[namespace, pod, container].write(text)
            self._changed.notify_all()

    def end_log(self, namespace: str, pod: str, *, container: str = "") -> None:
        """The container is done, and so is who follows its log. A pod that is gone ends it too."""
        with self._changed:
            if log := self._logs.get((namespace, pod, container)):
                log.ended = True
                self._changed.notify_all()

    def on_exec(self, function: Callable[[str, list[str]], tuple[str, int]]) -> None:
        """function(the pod's name, command) -> (stdout, exit code) is what exec runs."""
        self._on_exec = function

    # Trouble

    def forbid(self, verb: str, resource: str) -> None:
        """RBAC allows a verb on a resource, such as pods/log, no more."""
        self._forbidden.add((verb, resource))

    def exceed_quota(self, resource: str, quota: str = "quota") -> None:
        """A quota allows no more objects of a kind."""
        self._quotas[resource] = quota

    def without_kuberay(self) -> None:
        """KubeRay's CRDs are not installed."""
        self._kuberay = False

    def lift(self) -> None:
        """Undo forbid, exceed_quota and without_kuberay."""
        self._forbidden: set[tuple[str, str]] = set()
        self._quotas.clear()
        self._kuberay = True

    def throttle(self, times: int, retry_after_s: int = 1, method: str = "") -> None:
        """The next requests, of a method where one is given, are told to come later."""
        self._fail(times, Fault("throttle", method, retry_after_s))

    def drop(self, times: int, method: str = "") -> None:
        """The connection of the next requests is closed; nothing is done and nothing said."""
        self._fail(times, Fault("drop", method))

    def drop_after(self, times: int, method: str = "") -> None:
        """The next requests are carried out; then their connection is closed without an answer."""
        self._fail(times, Fault("drop_after", method))

    def _fail(self, times: int, fault: Fault) -> None:
        with self._changed:
            self._faults += [fault] * times

    def compact(self) -> None:
        """Forget the past: a watch from before now is refused."""
        with self._changed:
            self._store.compacted = len(self._store.changes)

    def disconnect(self) -> None:
        """Close every connection, watches and logs too, as a load balancer does."""
        for connection in list(self._server.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    # Answers

    def answer(self, method: str, target: str, headers: Any, body: bytes) -> Reply | None:
        """What is said to a request; None is an end of the connection."""
        path, pairs = unquote(urlsplit(target).path), parse_qsl(urlsplit(target).query, keep_blank_values=True)
        request = Request(method, path, dict(pairs))
        with self._changed:
            self.requests.append(request)
            self._changed.notify_all()
            fault = next((fault for fault in self._faults if fault.method in ("", method)), None)
            if fault:
                self._faults.remove(fault)
        if fault and fault.kind == "drop":
            return None
        if fault and fault.kind == "throttle":
            wait = {"Retry_After": str(fault.retry_after_s)}
            return Reply(429, "Too many requests, please try again later.\n", wait)
        try:
            if self.token and headers.get("Authorization") != f"Bearer {self.token}":
                raise ApiError(401, "Unauthorized", "Unauthorized")
            commands = [value for key, value in pairs if key == "command"]
            reply = self._reply(request, commands, headers.get("Content-Type", ""), body)
        except ApiError as error:
            reply = Reply(error.code, error.status)
        return None if fault else reply

    def _reply(self, request: Request, commands: list[str], content_type: str, body: bytes) -> Reply:
        found = PATH.fullmatch(request.path)
        group = (found["group"] or "") if found else "unknown"
        if not found or group not in {resource.group for resource in RESOURCES.values()}:
            return NOT_FOUND
        resource, verb = RESOURCES.get(found["plural"]), VERBS[request.method]
        if not resource or resource.group != group:
            raise ApiError(404, "NotFound", "the server could not find the requested resource")
        if not found["name"]:
            watched = flag(request.query, "watch")
            verb = {"get": "watch" if watched else "list", "delete": "deletecollection"}.get(verb, verb)
        namespace, name, subresource = (found[part] or "" for part in ("namespace", "name", "subresource"))
        call = Call(verb, resource, namespace, name, subresource, request.query, commands, content_type, decoded(body))
        self._authorize(call)
        if resource.custom and not self._kuberay:
            return NOT_FOUND
        with self._changed:
            return self.carry_out(call)

    def _authorize(self, call: Call) -> None:
        what = f"{call.resource.plural}/{call.subresource}".rstrip("/")
        # An exec over a WebSocket is a GET, and since Kubernetes 1.35 needs create as well.
        for verb in (call.verb, "create") if call.subresource == "exec" else (call.verb,):
            if (verb, what) in self._forbidden:
                where = f'in the namespace "{call.namespace}"' if call.namespace else "at the cluster scope"
                words = f'User "{USER}" cannot {verb} resource "{what}" in API group "{call.resource.group}" {where}'
                raise refusal(403, "Forbidden", call.resource, call.name, f"is forbidden: {words}")


# HTTP

STDOUT, ERROR = b"\x01", b"\x03"
BINARY_FRAME, CLOSE_FRAME = 0x82, 0x88
WEBSOCKET_GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
EXEC_PROTOCOLS = ("v5.channel.k8s.io", "v4.channel.k8s.io")


def exec_status(code: int) -> Object:
    if code == 0:
        return {"metadata": {}, "status": "Success"}
    return {
        "metadata": {},
        "status": "Failure",
        "message": f"command terminated with non-zero exit code: exit status {code}",
        "reason": "NonZeroExitCode",
        "details": {"causes": [{"reason": "ExitCode", "message": str(code)}]},
    }


class Server(ThreadingHTTPServer):
    """Knows its connections, so that they can be closed."""

    def __init__(self, api: KubeApi) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.api = api
        self.connections: set[Any] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client may go whenever it likes
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or a reply, which is two writes, waits 40 ms for an acknowledgement

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        reply = self.server.api.answer(self.command, self.path, self.headers, body)
        if reply is None:
            self.close_connection = True
        elif callable(reply.body):
            self._exec(reply.body)
        elif isinstance(reply.body, dict):
            self._send(reply.code, json.dumps(reply.body), **JSON)
        elif isinstance(reply.body, str):
            self._send(reply.code, reply.body, **TEXT, **reply.headers)
        else:
            self._stream(reply.body, **reply.headers)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _handle

    def _headers(self, code: int, **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def _send(self, code: int, text: str, **headers: str) -> None:
        body = text.encode()
        self._headers(code, Content_Length=str(len(body)), **headers)
        self.wfile.write(body)

    def _stream(self, pieces: Iterator[str], **headers: str) -> None:
        self._headers(200, Transfer_Encoding="chunked", **headers)
        for piece in pieces:
            data = piece.encode()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.write(b"0\r\n\r\n")

    def _exec(self, run: Callable[[], tuple[str, int]]) -> None:
        self.close_connection = True
        if self.headers.get("Upgrade", "").lower() != "websocket":
            error = bad_request("Upgrade request required")
            return self._send(error.code, json.dumps(error.status), **JSON)
        offered = [name.strip() for name in self.headers.get("Sec-WebSocket-Protocol", "").split(",")]
        key = hashlib.sha1(f"{self.headers['Sec-WebSocket-Key']}{WEBSOCKET_GUID}".encode(), usedforsecurity=False)
        self._headers(
            HTTPStatus.SWITCHING_PROTOCOLS,
            Upgrade="websocket",
            Connection="Upgrade",
            Sec_WebSocket_Accept=base64.b64encode(key.digest()).decode(),
            Sec_WebSocket_Protocol=next(name for name in EXEC_PROTOCOLS if name in offered),
        )
        stdout, code = run()
        if stdout:
            self._frame(BINARY_FRAME, STDOUT + stdout.encode())
        self._frame(BINARY_FRAME, ERROR + json.dumps(exec_status(code)).encode())
        self._frame(CLOSE_FRAME, struct.pack(">H", 1000))

    def _frame(self, opcode: int, data: bytes) -> None:
        length = bytes([len(data)]) if len(data) < 126 else bytes([127]) + struct.pack(">Q", len(data))
        self.wfile.write(bytes([opcode]) + length + data)
