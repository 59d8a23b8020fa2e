"""docs/finetuning.md and the README's config of it: what they show is accepted, and no metric is missing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from distlm.config.load import load_tree
from distlm.config.metrics import METRICS
from distlm.config.resolve import contradictions

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/finetuning.md").read_text(encoding="utf-8")
MINIMAL = {
    "task": {"type": "text-classification"},
    "model": {"name_or_path": "bert-base-uncased"},
    "peft": {"peft_type": "lora"},
    "data": {"train": [{"source": "files", "paths": ["train.csv"]}]},
    "training": {"max_steps": 10, "global_train_batch_size": 8},
}
"""What a block that shows a few keys is a part of."""


def blocks(text: str) -> list[dict[str, Any]]:
    return [yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)]


def accept(block: dict[str, Any]) -> None:
    tree = MINIMAL | {name: MINIMAL.get(name, {}) | section for name, section in block.items()}
    if {"data", "training", "model"} <= block.keys():
        tree = block
    load_tree(_numbers(tree), check=lambda config: contradictions(config, gpu_count=8))


def _numbers(tree: Any) -> Any:
    """5e-4 is a number in the YAML of configs, which is 1.2, and text to the parser of this test."""
    if isinstance(tree, dict):
        return {key: _numbers(value) for key, value in tree.items()}
    return float(tree) if isinstance(tree, str) and re.fullmatch(r"\d+e-\d+", tree) else tree


@pytest.mark.parametrize("block", blocks(PAGE), ids=lambda block: "+".join(block))
def test_a_block_is_accepted(block: dict[str, Any]) -> None:
    accept(block)


def test_the_config_of_the_readme_is_accepted() -> None:
    (shown,) = (block for block in blocks((ROOT / "README.md").read_text(encoding="utf-8")) if "peft" in block)
    accept(shown | {"model": {"name_or_path": "bert-base-uncased"}})  # the run that it names is not here


def test_the_table_of_metrics_is_that_of_the_code() -> None:
    told = {
        kind: re.findall(r"`(\w+)`", metrics)
        for kind, metrics in re.findall(r"^\| ([\w-]+) \| (`loss`.*) \|$", PAGE, re.MULTILINE)
    }
    assert told == {kind: list(metrics) for kind, metrics in METRICS.items()}
    (smaller,) = re.findall(r"^Of ([\w, ]+) less is better\.", PAGE, re.MULTILINE)
    better_if_smaller = {name for metrics in METRICS.values() for name, greater in metrics.items() if not greater}
    assert set(re.findall(r"\w+", smaller)) - {"and"} == better_if_smaller


@pytest.mark.parametrize(
    ("task", "is_refused"),
    [
        ({"type": "text-classification"}, True),
        ({"type": "token-classification"}, True),
        ({"type": "text-classification", "problem_type": "multi_label_classification"}, False),
    ],
)
def test_one_label_is_told_from_nothing_unless_texts_may_lack_it(task: dict[str, str], is_refused: bool) -> None:
    config = load_tree(MINIMAL | {"task": {**task, "labels": ["a"]}}).config
    assert [problem.key for problem in contradictions(config)] == ["task.labels"] * is_refused
