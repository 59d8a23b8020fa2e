"""Every method that PEFT registers, on a tiny BERT under ZeRO-2: it trains and can be loaded, or is refused by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from ranks import run_on_ranks
from tiny_adapters import draw, engine_with_adapter, train, write_base, write_init

from distlm.errors import InputError

DOCS = Path(__file__).parent.parent.parent / "docs" / "peft-methods.md"

SMALL: dict[str, dict[str, Any]] = {
    # Keys without which the method does not work, or defaults that are too large for layers of 32 by 32.
    "cartridge": {"num_virtual_tokens": 4},
    "prefix_tuning": {"num_virtual_tokens": 4},
    "prompt_tuning": {"num_virtual_tokens": 4},
    "p_tuning": {"num_virtual_tokens": 4},
    "ln_tuning": {"target_modules": ["LayerNorm"]},
    "c3a": {"block_size": 16},
    "miss": {"r": 8},
    "road": {"group_size": 16},
    "shira": {"r": 4},
    "vblora": {"vector_length": 16, "num_vectors": 32},
    "waveft": {"n_frequency": 100},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "adaption_prompt": ({}, "has no modules_to_save"),
    "cpt": ({"num_virtual_tokens": 4}, "only supports task_type = CAUSAL_LM"),
    "multitask_prompt_tuning": ({"num_virtual_tokens": 4}, "task_ids cannot be None"),
    "poly": ({}, "task_ids should not be None"),
    "shadow": ({}, "decoder layers"),
    "trainable_tokens": ({"token_indices": [5]}, "has no modules_to_save"),
    "xlora": ({}, "has no modules_to_save"),
}
REGISTERED = sorted(name.value.lower() for name in PEFT_TYPE_TO_CONFIG_MAPPING)
WORKING = [name for name in REGISTERED if name not in REFUSED]


def train_each(root: Path, zero_stage: int) -> dict[str, list[float]]:
    losses = {}
    for name in WORKING:
        accelerator, engine = engine_with_adapter(root / name, "SEQ_CLS", zero_stage)
        losses[name] = train(accelerator, engine, "SEQ_CLS", range(1, 3))
    return losses


def test_methods_train_the_same_on_two_ranks_as_on_one(tmp_path: Path) -> None:
    for name in WORKING:
        write_init(tmp_path / name, {"peft_type": name, **SMALL.get(name, {})}, "SEQ_CLS")
    [alone] = run_on_ranks(train_each, 1, tmp_path, 0)
    together, _ = run_on_ranks(train_each, 2, tmp_path, 2)
    for name in WORKING:
        assert together[name] == pytest.approx(alone[name], abs=1e-5), name


def test_methods_that_cannot_are_refused_with_the_reason(tmp_path: Path) -> None:
    write_base(tmp_path / "model", "SEQ_CLS")
    for name, (keys, reason) in REFUSED.items():
        with pytest.raises(InputError, match=re.escape(reason)) as error:
            draw(tmp_path, {"peft_type": name, **keys}, "SEQ_CLS")
        assert all(problem.key.startswith("peft") for problem in error.value.problems)


def test_the_table_of_methods_is_complete() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (yes|no)", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    assert dict(rows) == {name: "yes" if name in WORKING else "no" for name in REGISTERED}
