"""Classification of texts and of pairs of texts: one label, any number of labels, or a number (regression).

B samples, L labels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from distlm.config.schema import TextClassificationTask
from distlm.data.samples import IGNORED, SampleDataset, Samples, pad
from distlm.tasks import scores
from distlm.tasks.labelled import LabelLoss, OnSamples, logits_of, make_batch

if TYPE_CHECKING:
    from distlm.tasks import Batch
    from distlm.worker.prepare import Prepared


class TextClassification(OnSamples):
    """See `distlm.tasks.Task`. Labels of a batch: ids [B]; 0 and 1 as floats [B, L]; or numbers [B]. NaN: left out."""

    def __init__(self, config: TextClassificationTask, prepared: Prepared) -> None:
        self._problem = config.problem_type
        self._pad_token_id, self._max_seq_length = prepared.pad_token_id, prepared.max_seq_length
        self._labels, self._num_labels = prepared.labels, prepared.num_labels
        self._weights = prepared.label_weights
        self._label_loss = LabelLoss(prepared.num_labels, prepared.label_weights, config.label_smoothing_factor)

    def collate(self, samples: Samples, epochs: np.ndarray, indices: np.ndarray, training: bool) -> Batch:
        if self._problem == "multi_label_classification":
            labels = pad(samples.labels, 0.0, np.float32)[:, : self._num_labels]
        else:
            labels = np.concatenate(samples.labels)
            labels = labels.astype(np.float32 if self._problem == "regression" else np.int64)
        return make_batch(samples, labels, self._pad_token_id, samples.padded_length(self._max_seq_length))

    def count_targets(self, batch: Batch) -> float:
        labels = batch["labels"]
        if self._problem == "single_label_classification":
            return self._label_loss.count(labels)
        return float((~labels.isnan()).reshape(len(labels), -1).all(1).sum())

    def leave_out(self, batch: Batch, rows: torch.Tensor) -> None:
        batch["labels"][rows] = IGNORED if self._problem == "single_label_classification" else torch.nan

    def loss(self, model: nn.Module, batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        logits = logits_of(model, batch, device)  # [B, L]
        labels = batch["labels"].to(device, non_blocking=True)
        if self._problem == "single_label_classification":
            return self._label_loss.sum(logits, labels), logits.detach().argmax(dim=-1)
        if self._problem == "regression":
            is_target = ~labels.isnan()
            return F.mse_loss(logits[is_target, 0], labels[is_target], reduction="sum"), logits.detach()[:, 0]
        is_target = ~labels.isnan().any(1)
        weight = torch.tensor(self._weights, device=device) if self._weights else None
        # The mean over the labels of a sample, as transformers has it.
        loss = F.binary_cross_entropy_with_logits(logits[is_target], labels[is_target], weight=weight, reduction="sum")
        return loss / self._num_labels, logits.detach().sigmoid()

    def judge(self, batch: Batch, indices: np.ndarray, predicted: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        labels = batch["labels"].reshape(len(indices), -1)
        is_left_out = (labels == IGNORED).all(1) if labels.dtype == torch.long else labels.isnan().any(1)
        kept = (~is_left_out).numpy()
        return indices[kept], predicted.cpu().numpy()[kept]

    def evaluation(self, judged: list[Any], loss: float, num_targets: float, data: SampleDataset) -> scores.Evaluation:
        indices = np.concatenate([indices for indices, _ in judged])
        predicted = np.concatenate([predicted for _, predicted in judged])
        labels = data[indices].labels
        if self._problem == "single_label_classification":
            return scores.classification(np.concatenate(labels), predicted, self._labels, self._num_labels)
        if self._problem == "regression":
            return scores.regression(np.concatenate(labels), predicted)
        # A sample that was written before an unknown label was met has no place for it.
        widest = [*labels, np.zeros(len(self._labels))]
        return scores.multi_label(pad(widest, 0, np.int64)[:-1], predicted, names=self._labels)
