"""Adapters of a tiny BERT: drawn once in a folder like a run's init/, and trained under DeepSpeed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_training import SEQUENCE_LENGTH, VOCAB_SIZE, engine_of, settings, train_step
from torch import Tensor
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
)

from distlm.worker.adapter import Adapter, adapter_config, draw_adapter, load_adapter, rehearse, save_initial

TOTAL_STEPS = 10
NUM_LABELS = 3
MODEL_CLASSES: dict[str | None, Any] = {
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
    None: AutoModelForMaskedLM,
}


def write_base(folder: Path, task_type: str | None, num_positions: int = 2 * SEQUENCE_LENGTH) -> Path:
    """A tiny BERT with a head for the task, as init/model."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=num_positions,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=NUM_LABELS,
    )
    MODEL_CLASSES[task_type].from_config(config).save_pretrained(folder)
    return folder


def load_base(folder: Path, task_type: str | None) -> Any:
    return MODEL_CLASSES[task_type].from_pretrained(folder, dtype=torch.float32)


def draw(init: Path, peft: dict[str, Any], task_type: str | None, seed: int = 3) -> Adapter:
    """An adapter for init/model, rehearsed."""
    heads = [] if task_type is None else ["classifier"]
    config = adapter_config(peft, task_type, heads, head_is_new=task_type is not None, total_steps=TOTAL_STEPS)
    all_heads = ["cls"] if task_type is None else heads
    adapter = draw_adapter(load_base(init / "model", task_type), config, seed, all_heads)
    rehearse(adapter.model, SEQUENCE_LENGTH)
    return adapter


def write_init(init: Path, peft: dict[str, Any], task_type: str | None) -> Path:
    """init/model and init/adapter."""
    write_base(init / "model", task_type)
    save_initial(draw(init, peft, task_type), init)
    return init


def loss_of(task_type: str | None) -> Any:
    """A loss on the tiny training's samples, summed over as many targets as there are masked tokens."""

    def loss_sum(model: Any, input_ids: Tensor, labels: Tensor) -> Tensor:
        logits = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids)).logits.float()
        if task_type == "SEQ_CLS":
            return torch.nn.functional.cross_entropy(logits, input_ids[:, -1] % NUM_LABELS, reduction="sum")
        targets = labels if task_type is None else torch.where(labels == -100, labels, labels % NUM_LABELS)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")

    return loss_sum


def engine_with_adapter(init: Path, task_type: str | None, zero_stage: int, **others: Any) -> tuple[Any, Any]:
    """(accelerator, engine) of init/model with the adapter of init/adapter."""
    world_size = torch.distributed.get_world_size()
    engine_settings = settings(zero_stage, world_size=world_size, **others)
    return engine_of(engine_settings, lambda: load_adapter(load_base(init / "model", task_type), init / "adapter"))


def train(accelerator: Any, engine: Any, task_type: str | None, steps: range) -> list[float]:
    """The mean loss of each step."""
    return [train_step(accelerator, engine, step, loss_of=loss_of(task_type)) for step in steps]
