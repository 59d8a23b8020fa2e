"""A tiny BERT and the training step of distlm, small enough to compare engines over whole loss curves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distlm.worker.engine import (
    EngineSettings,
    build_optimizer,
    make_accelerator,
    parameter_groups,
    prepare,
    set_learning_rate,
)

VOCAB_SIZE = 200
SEQUENCE_LENGTH = 16
MICRO_BATCH_SIZE = 4
MICRO_BATCHES_PER_STEP = 4
WORLD_SIZE = 2
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.1


def write_initial_weights(folder: Path, seed: int = 0, dropout: float = 0.0) -> Path:
    """Draw a tiny BERT (hidden 32, 2 layers, tied embeddings) and save it as a Hugging Face folder."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=SEQUENCE_LENGTH,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    BertForMaskedLM(config).save_pretrained(folder)
    return folder


def load_model(folder: Path) -> Any:
    from transformers import AutoModelForMaskedLM

    return AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32)


def adamw(model: torch.nn.Module) -> torch.optim.AdamW:
    groups = parameter_groups(model, WEIGHT_DECAY)
    return build_optimizer(groups, learning_rate=LEARNING_RATE, adam_beta2=0.98, adam_epsilon=1e-6)


def settings(
    zero_stage: int, mixed_precision: Any = "no", world_size: int = WORLD_SIZE, **others: Any
) -> EngineSettings:
    accumulation = MICRO_BATCHES_PER_STEP // world_size
    return EngineSettings(zero_stage, mixed_precision, accumulation, MICRO_BATCH_SIZE, **others)


def fresh_engine(engine_settings: EngineSettings, init: Path, frozen_prefix: str = "") -> tuple[Any, Any]:
    """(accelerator, engine) of the tiny BERT; parameters whose names start with `frozen_prefix`, if given, are
    frozen."""

    def make_model() -> Any:
        model = load_model(init)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not (frozen_prefix and name.startswith(frozen_prefix)))
        return model

    return engine_of(engine_settings, make_model)


def engine_of(engine_settings: EngineSettings, make_model: Callable[[], torch.nn.Module]) -> tuple[Any, Any]:
    """(accelerator, engine), as if in a new process: Accelerate's process-wide state is forgotten first."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = make_accelerator(engine_settings)
    model = make_model()
    return accelerator, prepare(accelerator, model, adamw(model))


def micro_batch(step: int, index: int) -> tuple[Tensor, Tensor]:
    """(input_ids, labels), both [MICRO_BATCH_SIZE, SEQUENCE_LENGTH]; sequences that count up, 30 % masked."""
    generator = torch.Generator().manual_seed(1000 * step + index)
    first = 8 * torch.randint(0, VOCAB_SIZE // 8, (MICRO_BATCH_SIZE, 1), generator=generator)
    tokens = (first + torch.arange(SEQUENCE_LENGTH)) % VOCAB_SIZE
    masked = torch.rand(tokens.shape, generator=generator) < 0.3
    masked[:, 0] = True
    return tokens.masked_fill(masked, 3), tokens.masked_fill(~masked, -100)


def loss_sum(model: Any, input_ids: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy summed over the masked tokens."""
    logits = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids)).logits.float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


def num_masked_tokens(batches: Sequence[tuple[Tensor, Tensor]]) -> int:
    return sum(int((labels != -100).sum()) for _, labels in batches)


def train_step(
    accelerator: Any,
    engine: Any,
    step: int,
    learning_rate: float = LEARNING_RATE,
    loss_factor: float = 1.0,
    num_micro_batches: int = MICRO_BATCHES_PER_STEP,
    loss_of: Callable[[Any, Tensor, Tensor], Tensor] = loss_sum,
) -> float:
    """One optimizer step on the step's micro batches; returns the mean loss per masked token over all ranks.

    `loss_of(engine, input_ids, labels)` is summed over a micro batch.
    """
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    batches = [micro_batch(step, index) for index in range(num_micro_batches)]
    num_tokens = num_masked_tokens(batches)
    set_learning_rate(engine, learning_rate)
    total = torch.zeros(())
    for index in range(rank, num_micro_batches, world_size):
        torch.manual_seed(10_000 * step + index)
        loss = loss_of(engine, *batches[index])
        total += loss.detach() / num_tokens
        with accelerator.accumulate(engine):
            accelerator.backward(loss_factor * loss * num_micro_batches / num_tokens)
    torch.distributed.all_reduce(total)
    return total.item()


def plain_curve(
    init: Path, num_steps: int, max_grad_norm: float, bf16: bool = False
) -> tuple[list[float], list[float]]:
    """(losses, gradient norms before clipping) of a plain PyTorch loop on one process."""
    model = load_model(init).train()
    optimizer = adamw(model)
    losses, norms = [], []
    for step in range(num_steps):
        batches = [micro_batch(step, index) for index in range(MICRO_BATCHES_PER_STEP)]
        num_tokens = num_masked_tokens(batches)
        total = 0.0
        for input_ids, labels in batches:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = loss_sum(model, input_ids, labels) / num_tokens
            loss.backward()
            total += loss.item()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, norms
