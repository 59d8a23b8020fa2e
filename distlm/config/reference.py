"""docs/config.md: every key of the config on one page, made from the JSON Schema that `distlm schema` prints."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from distlm.config.resolve import MAY_CHANGE_ON_RESUME
from distlm.config.schema import RunConfig

JsonSchema = dict[str, Any]

_BEGINNING = """\
# The config: every key

<!-- Made from distlm/config/schema.py by: distlm schema --markdown > docs/config.md -->

A config is a YAML file. Keys that are not on this page are refused, and so are values of another type: `"10"` is text,
not a number. On the command line a key is written with dots, and its value is YAML: `training.max_steps=1000`,
`data.train.0.paths='[corpus/*.txt]'`. Any value may name environment variables, `${LIKE_THIS}`.
`distlm validate CONFIG` lists everything that is wrong with a config, also between keys. `distlm schema` prints this
page as JSON Schema, for editors.

Text is never empty, numbers are finite, and whole numbers are below 2^31 where no other limit is given. In the column
*resume*, "yes" means that `distlm resume RUN KEY=VALUE` may change the key; another value of any other key makes
another run.
"""

_UNITS = {"_s": "seconds", "_gib": "GiB"}
"""Endings of names that carry a unit; other names say theirs in words, such as max_steps."""

_COMMON_LIMIT = 2**31


@dataclass
class _Section:
    """A mapping of the config with the keys of its own."""

    title: str
    schema: JsonSchema
    places: list[str] = field(default_factory=list)
    """Dotted keys that hold such a mapping: several where a kind of section is used twice; "" is the whole config."""

    @property
    def heading(self) -> str:
        return ", ".join(f"`{place}`" for place in self.places if place) + self.title


def config_reference() -> str:
    """The page, in GitHub's Markdown."""
    sections = list(_sections())
    contents = [f"{_indent(section)}- [{section.heading}](#{_anchor(section)})" for section in sections]
    anchored: set[str] = set()
    tables = [line for section in sections for line in _lines(section, anchored)]
    return "\n".join([_BEGINNING, *contents, *tables, ""])


def _sections() -> Iterator[_Section]:
    """Every kind of section once, in the order of the schema."""
    schema = RunConfig.model_json_schema()
    definitions = schema.pop("$defs")
    found: dict[str, _Section] = {}

    def visit(name: str, title: str, section: JsonSchema, place: str) -> None:
        found.setdefault(name, _Section(title, section)).places.append(place)
        for key, value in section["properties"].items():
            inner = f"{place}.{key}" if place else key
            kinds = _kinds(value)
            if len(kinds) > 1:  # first what they have in common, then what is special to each of them
                members = {tag: definitions[kind] for tag, kind in kinds.items()}
                shared = _shared([member["properties"] for member in members.values()])
                text = "Each is of one of the kinds below." + (" All of them have these keys:" if shared else "")
                common = {"description": text, "properties": shared}
                visit(" ".join(kinds.values()), "", common, inner)
                for tag, member in members.items():
                    own = {name: key for name, key in member["properties"].items() if name not in shared}
                    visit(kinds[tag], f" with `{tag}`", {**member, "properties": own}, inner)
            else:
                for kind in kinds.values():
                    visit(kind, "", definitions[kind], inner)

    visit("", "Top level", schema, "")
    yield from found.values()


def _kinds(value: JsonSchema) -> dict[str, str]:
    """What sections a value may be, by the key that tells them apart ("" where there is one kind only)."""
    if "$ref" in value:
        return {"": _name(value["$ref"])}
    if "discriminator" in value:
        key = value["discriminator"]["propertyName"]
        order = [branch["$ref"] for branch in value["oneOf"]]
        tags = {reference: tag for tag, reference in value["discriminator"]["mapping"].items()}
        return {f"{key}: {tags[reference]}": _name(reference) for reference in order}
    inner = [*value.get("anyOf", []), *([value["items"]] if "items" in value else [])]
    return {tag: name for part in inner for tag, name in _kinds(part).items()}


def _name(reference: str) -> str:
    return reference.rpartition("/")[2]


def _shared(members: list[JsonSchema]) -> JsonSchema:
    return {name: key for name, key in members[0].items() if all(member.get(name) == key for member in members)}


def _indent(section: _Section) -> str:
    depth = section.places[0].count(".") + bool(section.title) if section.places[0] else 0
    return "  " * depth


def _anchor(section: _Section) -> str:
    """Of a section for itself its place; of a kind of section what the kind is."""
    tag = section.title.partition("`")[2].strip("`").replace(": ", "-")
    return tag or section.places[0] or "top-level"


def _lines(section: _Section, anchored: set[str]) -> Iterator[str]:
    """A section's heading and table. `anchored`: keys that can be linked to already; kinds may share some."""
    anchors = [_anchor(section)] if section.title else section.places
    yield from ("", _links(anchors, anchored), "", f"## {section.heading}", "", _text(section.schema["description"]))
    if section.schema["properties"]:
        yield from ("", "| key | value | default | resume | meaning |", "|---|---|---|---|---|")
    for name, value in section.schema["properties"].items():
        keys = [f"{place}.{name}" if place else name for place in section.places]
        has_keys = bool(_kinds(value))
        yield _row(
            ("" if has_keys else _links(keys, anchored)) + f"`{name}`",
            _type(value, keys[0]) + _unit(name),
            _default(value, name in section.schema.get("required", ())),
            "" if has_keys else "yes" if keys[0].startswith(MAY_CHANGE_ON_RESUME) else "no",
            _text(value["description"]),
        )


def _links(keys: list[str], anchored: set[str]) -> str:
    new = [key for key in keys if key not in anchored]
    anchored.update(new)
    return "".join(f'<a id="{key}"></a>' for key in new)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _type(value: JsonSchema, key: str) -> str:
    """What may be written, in the words of YAML."""
    if "$ref" in value or "oneOf" in value:
        return f"[section](#{key})"
    if "anyOf" in value:
        return ", or ".join(_type(part, key) for part in value["anyOf"])
    if "const" in value or "enum" in value:
        choices = [_code(choice) for choice in value.get("enum", [value.get("const")])]
        return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
    match value["type"]:
        case "array":
            if (length := value.get("maxItems")) is not None and length == value.get("minItems"):
                return f"list of {length}, each {_type(value['items'], key)}"
            kind = "non-empty list" if value.get("minItems") else "list"
            return f"{kind} of {_type(value['items'], key).replace('[section]', '[sections]')}"
        case "object":
            of = value["additionalProperties"]
            if of is True:
                return "mapping"
            kind = _type(of, key)
            return f"mapping of names to {kind.replace('number', 'numbers') if 'number' in kind else f'{kind}s'}"
        case "integer" | "number" as kind:
            return ("whole number" if kind == "integer" else "number") + _range(value)
        case "string":
            return "text" + (" (see meaning)" if "pattern" in value else "")
        case kind:
            return {"boolean": "true or false", "null": "null"}[kind]


def _range(value: JsonSchema) -> str:
    is_whole = value["type"] == "integer"
    limits = []
    if (above := value.get("exclusiveMinimum")) is not None:
        limits.append(f"≥ {above + 1}" if is_whole else f"> {above:g}")
    if (least := value.get("minimum")) is not None:
        limits.append(f"≥ {least:g}")
    if (most := value.get("maximum")) is not None:
        limits.append(f"≤ {most:g}")
    if (below := value.get("exclusiveMaximum")) is not None and not (is_whole and below == _COMMON_LIMIT):
        limits.append(f"\\< 2^{below.bit_length() - 1}" if is_whole and below & (below - 1) == 0 else f"\\< {below:g}")
    return " " + ", ".join(limits) if limits else ""


def _unit(name: str) -> str:
    return next((f", in {unit}" for ending, unit in _UNITS.items() if name.endswith(ending)), "")


def _default(value: JsonSchema, is_required: bool) -> str:
    if is_required:
        return "required"
    if "default" not in value:  # it depends on other keys
        return "see meaning"
    return "" if isinstance(value["default"], dict) and _kinds(value) else _code(value["default"])


def _code(value: Any) -> str:
    """A value as YAML."""
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _text(docstring: str) -> str:
    """Prose for a paragraph or a cell: one line, and no letter that Markdown would read as a sign."""
    parts = " ".join(docstring.split()).split("`")
    plain = [_escaped(part, r"\<*[]$|" if number % 2 == 0 else "|") for number, part in enumerate(parts)]
    return "`".join(plain)


def _escaped(text: str, signs: str) -> str:
    return "".join(f"\\{letter}" if letter in signs else letter for letter in text)
