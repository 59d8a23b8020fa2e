"""docs/config.md: complete, of today's schema, and with the schema's own defaults."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from distlm.config.load import all_keys, models_in, parse_scalar
from distlm.config.reference import config_reference
from distlm.config.resolve import MAY_CHANGE_ON_RESUME
from distlm.config.schema import RunConfig

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/config.md").read_text(encoding="utf-8")
SECTION = object()
"""Stands for the default of a section: those of its keys."""


def test_the_page_is_of_this_schema() -> None:
    if config_reference() != PAGE:  # not an assert: its message would be both pages
        pytest.fail("the schema has changed; renew the page: distlm schema --markdown > docs/config.md", pytrace=False)


def test_the_command_prints_the_page() -> None:
    command = [sys.executable, "-m", "distlm.cli", "schema", "--markdown"]
    assert subprocess.run(command, capture_output=True, check=True, cwd=ROOT).stdout.decode() == PAGE


def rows() -> Iterator[tuple[list[str], list[str]]]:
    """(dotted keys, cells) of each row of the page's tables."""
    places = [""]
    for line in PAGE.splitlines():
        if line.startswith("## "):
            places = re.findall(r"`([^`]+)`", line.partition(" with ")[0]) or [""]
        elif line.startswith("| ") and not line.startswith("| key "):
            name, *cells = (cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1])
            name = re.sub(r"<a [^>]*></a>", "", name).strip("`")
            yield [f"{place}.{name}" if place else name for place in places], cells


def defaults(model: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, field in model.model_fields.items():
        sections = list(models_in(field.annotation))
        default = "required" if field.is_required() else "see meaning" if field.default_factory else field.default
        yield prefix + name, SECTION if isinstance(default, BaseModel) else default
        for section in sections:
            yield from defaults(section, f"{prefix}{name}.")


def test_every_key_is_there_with_its_default() -> None:
    told = set()
    for keys, (_, default, *_) in rows():
        value = parse_scalar(default.strip("`")) if default else SECTION
        told |= {(key, repr(value)) for key in keys}
    assert told == {(key, repr(default)) for key, default in defaults()}
    assert {key for key, _ in told} == set(all_keys())


def test_every_row_says_whether_a_resume_may_change_the_key() -> None:
    for keys, (value, _, may_change, _) in rows():
        for key in keys:
            expected = "yes" if key.startswith(MAY_CHANGE_ON_RESUME) else "no"
            assert may_change == ("" if "[section" in value else expected), key  # a section's keys say it


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("training.max_steps", "whole number ≥ 1, or null"),
        ("training.mixed_precision", "one of `no`, `bf16`, `fp16`"),
        ("training.weight_decay", "number ≥ 0"),
        ("data.validation_fraction", r"number ≥ 0, \< 1"),
        ("data.max_seq_length", "whole number ≥ 8"),
        ("seed", r"whole number ≥ 0, \< 2^63"),
        ("data.validation.paths", "non-empty list of text"),
        ("data.train.max_gib", "number > 0, in GiB"),
        ("training.lr_scheduler_kwargs", "mapping of names to numbers"),
        ("task.class_weights", "`balanced`, or mapping of names to numbers > 0, or null"),
        ("task.labels", "non-empty list of text, or null"),
        ("tokenizer.train", "[section](#tokenizer.train), or null"),
    ],
)
def test_values_are_in_the_words_of_yaml(key: str, value: str) -> None:
    assert value in [cells[0] for keys, cells in rows() if key in keys]


def test_every_link_leads_somewhere_and_no_place_is_named_twice() -> None:
    anchors = re.findall(r'<a id="([^"]+)"></a>', PAGE)
    assert len(anchors) == len(set(anchors))
    assert set(re.findall(r"\]\(#([^)]+)\)", PAGE)) <= set(anchors)
    assert set(all_keys()) <= set(anchors)


def test_every_row_has_as_many_cells_as_its_table() -> None:
    """A bar that was not escaped would make one more."""
    assert {len(cells) for _, cells in rows()} == {4}
