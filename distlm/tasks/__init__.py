"""What is particular to a kind of training: its model class, its collator, its loss and its metrics. One file a task.

A task offers what `Task` lists and is found by its `type` in the config through `make_task`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import torch
    from torch import nn

    from distlm.config.schema import RunConfig
    from distlm.worker.prepare import Prepared

Batch = dict[str, "torch.Tensor"]


class Task(Protocol):
    """The interface between the training loop and a task."""

    def attach(self, model: nn.Module) -> None:
        """Change a loaded model as the task needs it, before the engine takes it over."""
        ...

    def head(self, model: nn.Module) -> nn.Module | None:
        """The part of a model that is particular to the task, called last; None: it cannot be told."""
        ...

    def collate(self, input_ids: np.ndarray, epochs: np.ndarray, indices: np.ndarray, training: bool) -> Batch:
        """Make a batch of samples [B, S]; random choices depend on (seed, epoch, sample index) alone."""
        ...

    def count_targets(self, batch: Batch) -> int:
        """Number of predictions that the loss of a batch sums over."""
        ...

    def leave_out(self, batch: Batch, rows: torch.Tensor) -> None:
        """Change a batch so that the samples where `rows` [B] is true count for nothing."""
        ...

    def loss(self, model: nn.Module, batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum of the loss over a batch's targets, differentiable, and, where no gradients are asked for, the number of
        right predictions (else 0), both on the device. The batch is on the host. The model is called whatever the batch
        holds, since its forward pass is a collective operation under ZeRO-3."""
        ...


def make_task(config: RunConfig, prepared: Prepared, tokenizer: Path) -> Task:
    """The task of a run; `tokenizer` is the folder of the run's tokenizer."""
    from distlm.tasks.masked_lm import MaskedLM

    parts = None
    if config.task.whole_word_masking:
        from distlm.tasks.words import word_parts

        parts = word_parts(tokenizer)
    return MaskedLM(config.task, config.seed, prepared, parts)
