"""From YAML text and `key.sub=value` overrides to a RunConfig, with every problem of the input found at once.

The values as written (with their `${VAR}` unexpanded) are kept beside the validated config: they are what is stored,
logged and printed, so that a secret in the environment stays there.
"""

from __future__ import annotations

import copy
import difflib
import os
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from distlm.config.schema import FOREIGN_MAPPINGS, RunConfig, Source, Task
from distlm.errors import InputError, Problem
from distlm.redact import holds_secret, redact_uri

Key = tuple[str | int, ...]
"""Path of a value in the tree: ("data", "train", 0, "paths")."""

_MAX_NODES = 100_000
_MAX_DEPTH = 50
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


@dataclass(frozen=True)
class LoadedConfig:
    """A valid config, the tree it was read from, and where each of its values was written."""

    config: RunConfig
    """Validated, environment variables expanded."""
    raw: dict[str, Any]
    """The tree as the user wrote it, overrides applied, `${VAR}` unexpanded."""
    origins: dict[str, str] = field(default_factory=dict)
    """Dotted key -> "file:line" or "command line"."""


def load_config(
    path: Path,
    overrides: Sequence[str] = (),
    check: Callable[[RunConfig], Iterator[Problem]] | None = None,
    environ: Mapping[str, str] = os.environ,
) -> LoadedConfig:
    """Read, override, expand and validate. `check` finds what is wrong between keys; its problems join the others.

    Raises InputError with all problems of the file, each with file and line, key and value as written.
    """
    raw, origins = read_config(path)
    problems = [p for item in overrides for p in _apply_override(raw, origins, item)]
    return _validate(raw, origins, problems, check, environ, default_location=str(path))


def load_tree(
    raw: dict[str, Any],
    overrides: Sequence[str] = (),
    check: Callable[[RunConfig], Iterator[Problem]] | None = None,
    environ: Mapping[str, str] = os.environ,
    origins: Mapping[str, str] | None = None,
) -> LoadedConfig:
    """The same for a tree that was read before, such as that of run.yaml, which stays as it is."""
    raw, known = copy.deepcopy(raw), dict(origins or {})
    problems = [p for item in overrides for p in _apply_override(raw, known, item)]
    return _validate(raw, known, problems, check, environ, default_location="")


def with_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The tree with overrides that were valid before set in it, `${VAR}` unexpanded."""
    tree = copy.deepcopy(tree)
    for item in overrides:
        list(_apply_override(tree, {}, item))
    return tree


# --- YAML ------------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Safe YAML with the scalars of YAML 1.2: `1e-4` is a number, and `no` and `on` are words, not booleans."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except ValueError as error:  # such as !!int x
            raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from None


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9][0-9_]*", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|nan)", "-+.0123456789"),
    ("merge", r"<<", "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value.replace("_", "")))


def parse_scalar(text: str, key: Key = ()) -> Any:
    """The value of an override or of an environment variable: any YAML. Raises InputError for what is none."""
    return _parse(text, "", key)[0]


def read_config(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """What `parse_yaml` makes of a file. Raises InputError, too, for one that cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(Problem(f"cannot read the config: {error.strerror}", location=str(path))) from None
    except UnicodeDecodeError as error:
        raise InputError(Problem(f"not a UTF-8 text file (byte {error.start})", location=str(path))) from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, name: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The tree and the origin ("name:line") of each of its keys. Raises InputError for what is no mapping of keys."""
    tree, origins = _parse(text, name)
    if tree is None:
        raise InputError(Problem("the config is empty", location=name))
    if not isinstance(tree, dict):
        raise InputError(Problem(f"must be a mapping of keys to values, not a {type(tree).__name__}", location=name))
    return tree, origins


def _parse(text: str, name: str, key: Key = ()) -> tuple[Any, dict[str, str]]:
    """The value, and the origin of each of its keys. Raises InputError for what is no plain YAML."""
    origins: dict[str, str] = {}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, origins
        if refused := list(_locate(node, key, name, origins, set())):
            raise InputError(*refused)
        return loader.construct_document(node), origins
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}" if mark else name
        message = f"not valid YAML: {error.problem or error.context}"
        if "could not determine a constructor" in message:
            message += "; only plain YAML is read, no tags that create objects"
        raise InputError(Problem(message, location=where)) from None
    except yaml.reader.ReaderError as error:
        where = f"{name}:{text.count(chr(10), 0, error.position) + 1}"
        message = f"not valid YAML: the character U+{error.character:04X} is not allowed"
        raise InputError(Problem(message, location=where)) from None
    except RecursionError:
        raise InputError(Problem("nested too deeply", location=name)) from None
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(Problem(f"not valid YAML: {error}", location=name)) from None


def _locate(node: yaml.Node, key: Key, name: str, origins: dict[str, str], open_nodes: set[int]) -> Iterator[Problem]:
    """Note the line of every key; yield keys with dots, and those that stand twice, of which YAML silently takes the
    last."""
    if len(origins) > _MAX_NODES or id(node) in open_nodes:
        raise InputError(Problem("too large or refers to itself", location=name))
    if len(open_nodes) > _MAX_DEPTH:
        raise InputError(Problem("nested too deeply", location=name))
    open_nodes = open_nodes | {id(node)}
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            part = str(key_node.value)
            if part in seen:
                yield Problem(
                    f"is given twice, first in line {seen[part]}", _dotted((*key, part)), "", f"{name}:{line}"
                )
            seen[part] = line
            if "." in part and key_node.tag == "tag:yaml.org,2002:str" and not _is_foreign(key):
                message = "keys have no dots; write a: {b: ...} for a.b, which is meant for the command line"
                yield Problem(message, _dotted((*key, part)), "", f"{name}:{line}")
            origins[_dotted((*key, part))] = f"{name}:{line}"
            yield from _locate(value_node, (*key, part), name, origins, open_nodes)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            origins[_dotted((*key, index))] = f"{name}:{item.start_mark.line + 1}"
            yield from _locate(item, (*key, index), name, origins, open_nodes)


def _is_foreign(key: Key) -> bool:
    """Whether what is below it is named by others than us: Kubernetes' own names have dots."""
    return any(key[: len(known)] == known for known in FOREIGN_MAPPINGS)


def _is_index(part: str) -> bool:
    return part.isdecimal() and len(part) < 10


def _dotted(key: Key) -> str:
    return ".".join(str(part) for part in key)


# --- overrides and environment ---------------------------------------------------------------------------------------


def _apply_override(tree: dict[str, Any], origins: dict[str, str], item: str) -> Iterator[Problem]:
    """Set one `key.sub=value` in the tree; `key.0.sub` reaches into lists."""
    dotted, equals, text = item.partition("=")
    here = "command line"
    if not equals or not dotted or "" in dotted.split(".") or dotted.count(".") > _MAX_DEPTH:
        yield Problem(f"{item!r} is not an override; write key.sub=value", location=here)
        return
    if holds_secret(text):  # also of one that a later override replaces: all are stored
        yield Problem(_SECRET, dotted, _shown(text), here)
    try:
        value = parse_scalar(text, tuple(dotted.split(".")))
    except InputError as error:
        reason = error.problems[0].message.removeprefix("not valid YAML: ")
        yield Problem(f"the value is not valid YAML; quote it ({reason})", dotted, text, here)
        return
    *parents, last = dotted.split(".")
    place: Any = tree
    for depth, part in enumerate([*parents, last]):
        if isinstance(place, list):
            if not _is_index(part) or int(part) >= len(place):
                where = ".".join(dotted.split(".")[:depth])
                yield Problem(f"{where} is a list of {len(place)}; use an index below that", dotted, text, here)
                return
        elif not isinstance(place, dict):
            where = ".".join(dotted.split(".")[:depth])
            yield Problem(f"{where} is a plain value and has no keys below it", dotted, text, here)
            return
        index: Any = int(part) if isinstance(place, list) else part
        if depth == len(parents):
            place[index] = value
        else:
            if isinstance(place, dict) and place.get(index) is None:
                place[index] = {}
            place = place[index]
    for known in [key for key in origins if key.startswith(dotted + ".")]:
        del origins[known]
    origins[dotted] = here


class _FromEnvironment(str):
    """Text that an environment variable gave: read as a number or boolean where the schema asks for one."""


def _variables_there(raw: Any, environ: Mapping[str, str]) -> tuple[Mapping[str, str], Set[str] | None]:
    """The environment variables as the run has them, and the names of those that come to it; None: all.

    Pods have no environment of a user's: what the config names for them, and nothing else.
    """
    pods = _mapping(_mapping(raw).get("kubernetes"))
    if _mapping(_mapping(raw).get("resources")).get("target") != "kubernetes":
        return environ, None
    plain = {name: value for name, value in _mapping(pods.get("env")).items() if isinstance(value, str)}
    there = {**environ, **plain}
    there |= {name: _VARIABLE.sub(lambda match: there.get(match[1], match[0]), value) for name, value in plain.items()}
    names = {*plain, *(name for name in _list(_mapping(raw).get("env")) if isinstance(name, str))}
    for template in ("pod_template", "head_template", "worker_template"):
        for container in map(_mapping, _list(_mapping(_mapping(pods.get(template)).get("spec")).get("containers"))):
            if "envFrom" in container:
                return there, None
            names |= {str(_mapping(one).get("name")) for one in _list(container.get("env"))}
    return there, names


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _expand(
    value: Any, key: Key, environ: Mapping[str, str], passed_on: Set[str] | None, problems: list[tuple[Key, str]]
) -> Any:
    if isinstance(value, dict):
        return {name: _expand(item, (*key, name), environ, passed_on, problems) for name, item in value.items()}
    if isinstance(value, list):
        return [_expand(item, (*key, index), environ, passed_on, problems) for index, item in enumerate(value)]
    if not isinstance(value, str) or "${" not in value:
        return value
    names = _VARIABLE.findall(value)
    if len(names) != value.count("${"):
        problems.append((key, "has a '${' that does not begin a ${NAME} of letters, digits and underscores"))
        return value
    if missing := [name for name in names if name not in environ]:
        problems.append((key, f"environment variable {', '.join(missing)} is not set"))
        return value
    if strange := [name for name in names if passed_on is not None and name not in passed_on]:
        how = "name it under `env`, or give it in kubernetes.env"
        problems.append((key, f"environment variable {', '.join(strange)} is not passed on to the pods; {how}"))
        return value
    return _FromEnvironment(_VARIABLE.sub(lambda match: environ[match[1]], value))


def expanded(value: Any, key: str, environ: Mapping[str, str] = os.environ) -> Any:
    """A part of a tree, which stands at `key`, with its `${VAR}` expanded. Raises InputError for those not set."""
    problems: list[tuple[Key, str]] = []
    result = _expand(value, tuple(key.split(".")), environ, None, problems)
    if problems:
        raise InputError(*(Problem(message, _dotted(place), _shown(value)) for place, message in problems))
    return result


def _parse_from_environment(tree: Any, errors: list[Any]) -> bool:
    """Re-read as YAML those environment values that the schema refused as text. True if any was changed."""
    changed = False
    for error in errors:
        place, last = tree, error["loc"][-1] if error["loc"] else None
        for part in _strip_tags(tree, error["loc"])[:-1]:
            place = place[part]
        try:
            value = place[last]
        except (KeyError, IndexError, TypeError):
            continue
        # Of a list that was refused as a whole, any of its items may be the cause.
        places: list[tuple[Any, Any]] = [(place, last)]
        if isinstance(value, list):
            places += [(value, number) for number in range(len(value))]
        for holder, index in places:
            if isinstance(text := holder[index], _FromEnvironment):
                try:
                    holder[index] = parse_scalar(text)
                except InputError:
                    holder[index] = str(text)
                changed = True
    return changed


_SECRET = "holds a password or token; put that into an environment variable and write ${NAME} in its place"


def _secrets(value: Any, key: Key) -> Iterator[Key]:
    """Where a secret is written out, which would be stored and logged with the config."""
    if isinstance(value, (dict, list)):
        for part, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _secrets(item, (*key, part))
    elif isinstance(value, str) and holds_secret(value):
        yield key


# --- validation ------------------------------------------------------------------------------------------------------


def _validate(
    raw: dict[str, Any],
    origins: dict[str, str],
    problems: list[Problem],
    check: Callable[[RunConfig], Iterator[Problem]] | None,
    environ: Mapping[str, str],
    default_location: str,
) -> LoadedConfig:
    def located(problem: Problem) -> Problem:
        key: Key = tuple(int(part) if _is_index(part) else part for part in problem.key.split("."))
        return replace(
            problem,
            value=_shown(problem.value or _lookup(raw, key)),
            location=problem.location or locate(origins, problem.key) or default_location,
        )

    problems = [*problems, *(located(Problem(_SECRET, _dotted(key))) for key in _secrets(raw, ()))]
    unset: list[tuple[Key, str]] = []
    tree = _expand(raw, (), *_variables_there(raw, environ), unset)
    problems = [*problems, *(located(Problem(message, _dotted(key))) for key, message in unset)]
    config, errors = _try(tree)
    if errors and _parse_from_environment(tree, errors):
        config, errors = _try(tree)
    unset_keys = {_dotted(key) for key, _ in unset}
    for error in errors:
        key = _key_of(tree, error)
        if _dotted(key) not in unset_keys:
            problems.append(located(Problem(_message(error, key), _dotted(key))))
    # What several keys say about each other is checked on what is left without the refused keys, so that one wrong
    # key does not hide the other problems.
    refused = {_dotted(_strip_tags(tree, error["loc"])) for error in errors} | unset_keys
    while config is None and (wrong := [key for error in errors if (key := _strip_tags(tree, error["loc"]))]):
        if not all(_remove(tree, key) for key in sorted(wrong, key=_dotted, reverse=True)):
            break
        config, errors = _try(tree)
    if config is not None and check is not None:
        problems.extend(located(problem) for problem in check(config) if problem.key not in refused)
    if problems or config is None:
        raise InputError(*sorted(set(problems), key=_by_location))
    return LoadedConfig(config, raw, origins)


def _try(tree: dict[str, Any]) -> tuple[RunConfig | None, list[Any]]:
    try:
        return RunConfig.model_validate(tree), []
    except ValidationError as error:
        errors = error.errors(include_url=False, include_input=False, include_context=True)
        # Where a default that depends on other keys was not made is no problem of its own.
        return None, [one for one in errors if one["type"] != "default_factory_not_called"]


def _by_location(problem: Problem) -> tuple[str, int, str]:
    name, _, line = problem.location.rpartition(":")
    return (name, int(line), problem.key) if line.isdigit() else (problem.location, 0, problem.key)


def _lookup(tree: Any, key: Key) -> Any:
    for part in key:
        try:
            tree = tree[part]
        except (KeyError, IndexError, TypeError):
            return None
    return tree


def _remove(tree: Any, key: Key) -> bool:
    """Take a value out of the tree; False if it is not there (a required key that is missing)."""
    parent = _lookup(tree, key[:-1])
    try:
        del parent[key[-1]]
    except (KeyError, IndexError, TypeError):
        return False
    return True


def locate(origins: Mapping[str, str], dotted: str) -> str:
    """Where a key was written: itself, or something below it, or else the nearest section around it."""
    if dotted not in origins:
        for known, where in origins.items():
            if known.startswith(dotted + "."):
                return where
    key = dotted.split(".")
    for length in range(len(key), 0, -1):
        if found := origins.get(".".join(key[:length])):
            return found
    return ""


def _shown(value: Any) -> str:
    if value is None or isinstance(value, (dict, list)):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    text = redact_uri(value) if isinstance(value, str) else str(value)
    text = "".join(letter if letter.isprintable() else f"\\x{ord(letter):02x}" for letter in text)
    return text if len(text) <= 120 else text[:117] + "..."


def _key_of(tree: Any, error: dict[str, Any]) -> Key:
    """The user's key that an error is about."""
    key = _strip_tags(tree, error["loc"])
    return (*key, error["ctx"]["discriminator"].strip("'")) if error["type"] == "union_tag_invalid" else key


def _strip_tags(tree: Any, loc: tuple[str | int, ...]) -> Key:
    """pydantic's place of an error without the names of union members, which are no keys of the user's."""
    key: Key = ()
    place = tree
    for position, part in enumerate(loc):
        if isinstance(place, dict) and part not in place and position and part in _TAGS:
            continue
        key = (*key, part)
        place = _lookup(place, (part,))
    return key


def _message(error: dict[str, Any], key: Key) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return f"unknown key; {_nearest(key, error['loc'])}"
    if kind == "missing":
        return "is required"
    if kind == "literal_error":
        return f"must be {context['expected']}"
    if kind == "union_tag_invalid":
        return f"must be one of {context['expected_tags']}"
    if kind == "union_tag_not_found":
        return f"needs the key {context['discriminator']}"
    if kind in _MESSAGES:
        return _MESSAGES[kind]
    return str(error["msg"]).replace("Input should be", "must be")


_MESSAGES = {
    "bool_type": "must be true or false",
    "dict_type": "must be a valid dictionary of keys and values",
    "invalid_key": "must be text: keys are names",
    "list_type": "must be a list, such as [a, b]",
    "model_attributes_type": "must be a valid dictionary of keys and values",
    "model_type": "must be a valid dictionary of keys and values",
    "string_type": "must be text; put it in quotes",
    "too_short": "must not be an empty list",
}
"""What pydantic says in the words of Python, in the words of YAML."""


# --- names -----------------------------------------------------------------------------------------------------------


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections that a value of this annotation may be, or hold in a list."""
    if get_origin(annotation) in (Annotated, Union, types.UnionType, list):
        for argument in get_args(annotation):
            yield from models_in(argument)
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation


def _fields_at(key: Key, loc: Key) -> dict[str, Any]:
    """The legal keys at a place of the tree, with their annotations; of a union, those of the member that pydantic's
    `loc` names."""
    models: list[type[BaseModel]] = [RunConfig]
    for part in key:
        if isinstance(part, str):
            found = [model.model_fields[part].annotation for model in models if part in model.model_fields]
            models = [model for annotation in found for model in models_in(annotation)]
    if len(models) > 1:
        models = [model for model in models if _tag_of(model) in loc]
    return {name: info.annotation for model in models for name, info in model.model_fields.items()}


def _tag_of(model: type[BaseModel]) -> str:
    """What tells a section from the others of its union."""
    fields = model.model_fields
    discriminator = fields["source"] if "source" in fields else fields["type"]
    return str(get_args(discriminator.annotation)[0])


_TAGS = {_tag_of(model) for union in (Source, Task) for model in models_in(union)}


def all_fields(model: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key of the schema with its annotation, sections before what they hold; list items have no index."""
    for name, info in model.model_fields.items():
        yield prefix + name, info.annotation
        for inner in models_in(info.annotation):
            yield from all_fields(inner, f"{prefix}{name}.")


def all_keys() -> Iterator[str]:
    """Every dotted key of the schema."""
    return (key for key, _ in all_fields())


def _nearest(key: Key, loc: Key) -> str:
    """Advice for an unknown key: the nearest legal name here, else the place where that name is legal."""
    name, legal = str(key[-1]), list(_fields_at(key[:-1], loc))
    if close := difflib.get_close_matches(name, legal, n=1, cutoff=0.6):
        return f"did you mean {_dotted((*key[:-1], close[0]))}?"
    elsewhere = {full.rpartition(".")[2]: full for full in all_keys()}
    if close := difflib.get_close_matches(name, list(elsewhere), n=1, cutoff=0.8):
        return f"did you mean {elsewhere[close[0]]}?"
    return f"allowed here: {', '.join(legal)}"
