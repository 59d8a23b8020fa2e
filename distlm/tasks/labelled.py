"""What the tasks on labelled samples share: batches, and the loss of a choice between labels.

B samples, S tokens of the longest, L labels, T targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from distlm.data.samples import IGNORED, SampleDataset, Samples, pad

if TYPE_CHECKING:
    from distlm.tasks import Batch


class OnSamples:
    """What the tasks on labelled samples do alike: nothing is changed in the model, and no head told apart."""

    def dataset(self, paths: Sequence[Path]) -> SampleDataset:
        return SampleDataset(paths)

    def attach(self, model: nn.Module) -> None:
        pass

    def head(self, model: nn.Module) -> nn.Module | None:
        return None


def make_batch(samples: Samples, labels: np.ndarray, pad_token_id: int, length: int) -> Batch:
    """Samples padded to `length` tokens, with their labels [B, ...]."""
    lengths = np.array([len(ids) for ids in samples.input_ids])
    input_ids = pad(samples.input_ids, pad_token_id, length=length)
    batch = {
        "input_ids": input_ids,
        "attention_mask": (np.arange(input_ids.shape[1]) < lengths[:, None]).astype(np.int64),
        "labels": labels,
    }
    if samples.token_type_ids is not None:
        batch["token_type_ids"] = pad(samples.token_type_ids, 0, length=length)
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def logits_of(model: nn.Module, batch: Batch, device: torch.device) -> torch.Tensor:
    """What the model's head gives for texts [B, L] or their tokens [B, S, L], in fp32."""
    inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items() if name != "labels"}
    if batch["attention_mask"].all():  # without one, transformers neither makes a mask nor looks whether it may
        del inputs["attention_mask"]
    logits: torch.Tensor = model(**inputs).logits
    return logits.float()


class LabelLoss:
    """Cross entropy of a choice between labels; what has an id that the model does not know is left out of it."""

    def __init__(self, num_labels: int, weights: list[float] | None, smoothing: float) -> None:
        self._num_labels, self._smoothing = num_labels, smoothing
        self._weights = torch.tensor(weights) if weights else None

    def count(self, labels: torch.Tensor) -> float:
        """Sum of the targets' weights, each 1 where labels have none."""
        known = labels[(labels >= 0) & (labels < self._num_labels)]
        return float(self._weights[known].sum()) if self._weights is not None else float(known.numel())

    def sum(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Of logits [T, L] and ids [T]."""
        return F.cross_entropy(
            logits,
            torch.where(labels < self._num_labels, labels, IGNORED),
            weight=self._weights.to(logits.device) if self._weights is not None else None,
            ignore_index=IGNORED,
            reduction="sum",
            label_smoothing=self._smoothing,
        )
