"""A plain PyTorch training loop on one process, to compare the engine and loop of distlm with.

Written after the documentation alone: linear warm-up and decay, AdamW without decay on biases and norms, clipping,
dropout seeded by (seed, step, micro batch). It shares with distlm which samples come when, how they
are masked, and the numbers of dropout.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from distlm.config.schema import RunConfig, TrainingConfig
from distlm.data.order import permute, samples
from distlm.data.pack import PackedDataset
from distlm.tasks import make_task
from distlm.worker.cpu_layers import use_cpu_layers
from distlm.worker.prepare import Prepared


@dataclass
class Curve:
    """One value for each step: mean loss per target, gradient norm before clipping, learning rate."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)


def load(initial_model: Path) -> Any:
    from transformers import AutoModelForMaskedLM

    return AutoModelForMaskedLM.from_pretrained(initial_model, dtype=torch.float32, local_files_only=True)


def plain_training(config: RunConfig, prepared: Prepared, initial_model: Path) -> tuple[Curve, dict[str, Tensor]]:
    """Train for `max_steps` and return the curve and the final weights by name."""
    training = config.training
    task = make_task(config, prepared, initial_model.parent / "tokenizer")
    data = PackedDataset([Path(path) for path in prepared.train_paths])
    model = load(initial_model).train()
    use_cpu_layers(model)
    decayed = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    undecayed = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": training.weight_decay}, {"params": undecayed, "weight_decay": 0.0}],
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_epsilon,
    )
    curve = Curve()
    num_micro_batches = training.global_train_batch_size // training.per_device_train_batch_size
    assert training.max_steps is not None
    for step in range(1, training.max_steps + 1):
        batches = []
        for micro_batch in range(num_micro_batches):
            first = ((step - 1) * num_micro_batches + micro_batch) * training.per_device_train_batch_size
            epochs, indices = samples(first, training.per_device_train_batch_size, len(data), config.seed)
            batches.append(task.collate(data[indices], epochs, indices, training=True))
        num_targets = sum(int((batch["labels"] != -100).sum()) for batch in batches)
        loss_sum = 0.0
        for micro_batch, batch in enumerate(batches):
            torch.manual_seed(dropout_seed(config.seed, step, micro_batch))
            with torch.autocast("cpu", torch.bfloat16, enabled=training.mixed_precision == "bf16"):
                logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            loss = cross_entropy(logits.float().flatten(0, 1), batch["labels"].flatten(), reduction="sum")
            (loss / num_targets).backward()
            loss_sum += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), training.max_grad_norm or torch.inf)
        learning_rate = scheduled_rate(training, step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad()
        curve.losses.append(loss_sum / num_targets)
        curve.grad_norms.append(norm.item())
        curve.learning_rates.append(learning_rate)
    return curve, {name: parameter.detach() for name, parameter in model.named_parameters()}


def dropout_seed(seed: int, step: int, micro_batch: int) -> int:
    """The formula that a run started today must find again when it is resumed by another version."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{micro_batch}".encode()).digest()[:8], "little") // 2


def scheduled_rate(training: TrainingConfig, step: int) -> float:
    """From 0 at step 1 up to the peak after `warmup_steps`; then constant, or down to 0 after the last step."""
    assert training.max_steps is not None
    done, warmup = step - 1, int(training.warmup_steps)
    if done < warmup:
        return training.learning_rate * done / warmup
    if training.lr_scheduler_type == "constant_with_warmup":
        return training.learning_rate
    assert training.lr_scheduler_type == "linear"
    return training.learning_rate * (training.max_steps - done) / (training.max_steps - warmup)


def plain_evaluation(
    config: RunConfig, prepared: Prepared, initial_model: Path, weights: Mapping[str, Tensor]
) -> dict[str, float]:
    """Loss and accuracy of `weights` on the held-out samples, one sample at a time."""
    assert prepared.validation_path is not None
    task = make_task(config, prepared, initial_model.parent / "tokenizer")
    data = PackedDataset([Path(prepared.validation_path)])
    model = load(initial_model).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    count = min(config.training.max_eval_samples or len(data), len(data))
    loss_sum, num_correct, num_targets = 0.0, 0, 0
    with torch.no_grad():
        for index in permute(np.arange(count), len(data), 0, 0):
            batch = task.collate(data[np.array([index])], np.array([0]), np.array([index]), training=False)
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            labels = batch["labels"].flatten()
            loss_sum += cross_entropy(logits.flatten(0, 1), labels, reduction="sum").item()
            num_correct += int((logits.argmax(-1).flatten() == labels).sum())
            num_targets += int((labels != -100).sum())
    return {"eval/loss": loss_sum / num_targets, "eval/accuracy": num_correct / num_targets}
