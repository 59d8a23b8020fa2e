"""What is particular to a kind of training: its model class, its collator, its loss and its metrics. One file a task.

A task offers what `Task` lists and is found by its `type` in the config through `make_task`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import nn

    from distlm.config.schema import RunConfig
    from distlm.tasks.scores import Evaluation
    from distlm.worker.prepare import Prepared

Batch = dict[str, "torch.Tensor"]


class Dataset(Protocol):
    """Samples on disk."""

    sizes: list[int]
    """Samples in each file."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: NDArray[np.int64]) -> Any:
        """The samples of these indices, in the form that the task's `collate` takes."""
        ...


class Task(Protocol):
    """The interface between the training loop and a task."""

    def dataset(self, paths: Sequence[Path]) -> Dataset:
        """Open prepared samples; with `lengths` [n], tokens of each, where these differ."""
        ...

    def attach(self, model: nn.Module) -> None:
        """Change a loaded model as the task needs it, before the engine takes it over."""
        ...

    def head(self, model: nn.Module) -> nn.Module | None:
        """The part of a model that is particular to the task, called last; None: it cannot be told."""
        ...

    def collate(self, samples: Any, epochs: np.ndarray, indices: np.ndarray, training: bool) -> Batch:
        """Make a batch of samples; random choices depend on (seed, epoch, sample index) alone. It has input_ids,
        attention_mask and labels, of which B rows each belong to the samples in their order."""
        ...

    def count_targets(self, batch: Batch) -> float:
        """Number of predictions that the loss of a batch sums over, or where these have weights the sum of these."""
        ...

    def leave_out(self, batch: Batch, rows: torch.Tensor) -> None:
        """Change a batch so that the samples where `rows` [B] is true count for nothing."""
        ...

    def loss(self, model: nn.Module, batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum of the loss over a batch's targets, differentiable, and, where no gradients are asked for, what the model
        predicts in a form for `judge` (else anything), both on the device. The batch is on the host. The model is
        called whatever the batch holds, since its forward pass is a collective operation under ZeRO-3."""
        ...

    def judge(self, batch: Batch, indices: np.ndarray, predicted: torch.Tensor) -> Any:
        """What `evaluation` needs of a batch of samples [B]: small, and of numpy. Samples that were left out are not in
        it."""
        ...

    def evaluation(self, judged: list[Any], loss: float, num_targets: float, data: Any) -> Evaluation:
        """Metrics, but for the loss itself, of all batches of all workers; `data` is what was evaluated."""
        ...


def make_task(config: RunConfig, prepared: Prepared, tokenizer: Path) -> Task:
    """The task of a run; `tokenizer` is the folder of the run's tokenizer."""
    if config.task.type == "text-classification":
        from distlm.tasks.text_classification import TextClassification

        return TextClassification(config.task, prepared)
    if config.task.type == "token-classification":
        from distlm.tasks.token_classification import TokenClassification

        return TokenClassification(config.task, prepared)
    from distlm.tasks.masked_lm import MaskedLM

    parts = None
    if config.task.whole_word_masking:
        from distlm.tasks.words import word_parts

        parts = word_parts(tokenizer)
    return MaskedLM(config.task, config.seed, prepared, parts)
