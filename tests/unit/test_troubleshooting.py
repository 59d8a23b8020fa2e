"""docs/troubleshooting.md: every message that it quotes, every key and command that it names, is one of today's."""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from distlm.cli import _parser
from distlm.config.load import all_keys
from distlm.config.resolve import MAY_CHANGE_ON_RESUME

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
CODE = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", TEXT)]
VARIABLE = "…"
QUOTED = [
    message for line in TEXT.splitlines() if line.startswith("### ") for message in re.findall(r"`([^`]+)`", line)
]


def messages_of(path: Path) -> Iterator[str]:
    """Each text in the code of a file, with "…" for what an f-string computes; docstrings are no messages."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else VARIABLE for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


@pytest.fixture(scope="module")
def messages() -> list[str]:
    return [message for path in sorted((ROOT / "distlm").rglob("*.py")) for message in messages_of(path)]


@pytest.mark.parametrize("quoted", QUOTED)
def test_a_quoted_message_is_in_the_code(messages: list[str], quoted: str) -> None:
    if not any(quoted in message for message in messages):
        pytest.fail(f"no message of distlm/ has the text {quoted!r}: correct docs/troubleshooting.md", pytrace=False)


def test_messages_that_are_quoted_are_many_and_each_once() -> None:
    assert len(QUOTED) > 80
    assert len(QUOTED) == len(set(QUOTED))


def test_every_section_says_something_in_few_lines() -> None:
    for section in re.split(r"^#+ ", TEXT, flags=re.MULTILINE)[1:]:
        heading, _, body = section.partition("\n")
        if f"### {heading}\n" in TEXT:
            assert 1 <= len(body.strip().splitlines()) <= 4, heading


def keys_in(text: str) -> list[str]:
    """Dotted keys of the config that a text names, without the numbers of lists."""
    sections = "|".join({key.partition(".")[0] for key in all_keys() if "." in key})
    found = re.findall(rf"(?<![\w./])((?:{sections})\.[a-z0-9_.]*[a-z0-9_])", text)
    return [re.sub(r"\.\d+", "", key) for key in found if not key.endswith((".json", ".md"))]


def test_every_key_that_is_named_exists() -> None:
    named = {key for code in CODE for key in keys_in(code)}
    assert len(named) > 30
    model_keys = {key for key in named if key.startswith("model.config.")}  # of transformers
    assert named - model_keys <= set(all_keys())


def test_every_command_that_is_named_exists() -> None:
    (verbs,) = (action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction))
    commands = [code.split()[1] for code in CODE if code.startswith("distlm ")]
    assert {"resume", "sync", "validate", "checkpoints", "export"} <= set(commands) <= set(verbs.choices)


def test_what_a_resume_is_told_to_change_may_change() -> None:
    resumes = [keys_in(code) for code in CODE if code.startswith("distlm resume")]
    assert sum(map(bool, resumes)) > 5
    for key in (key for keys in resumes for key in keys):
        assert key.startswith(MAY_CHANGE_ON_RESUME), key


def test_every_link_leads_somewhere() -> None:
    headings = re.findall(r"^#+ (.+)$", TEXT, flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}  # as GitHub does
    for file, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", TEXT):
        if file:
            assert (ROOT / "docs" / file).is_file(), file
        else:
            assert anchor in anchors, anchor
