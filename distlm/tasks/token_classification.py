"""Classification of the words of a text: named entities, slots, parts of speech.

A word is predicted from its first token, and where labels are tags, so that it goes with the words before it
(`distlm.tasks.decoding`). A text that is longer than a sample was divided into several, of which each word is labelled
in one (`distlm.data.tagged`); for predictions they are put together again.

B samples, S tokens of the longest, L labels, T targets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from distlm.config.schema import TokenClassificationTask
from distlm.data.samples import IGNORED, SampleDataset, Samples, pad
from distlm.tasks import scores, tags
from distlm.tasks.decoding import WordDecoder
from distlm.tasks.labelled import LabelLoss, OnSamples, logits_of, make_batch

if TYPE_CHECKING:
    from distlm.tasks import Batch
    from distlm.worker.prepare import Prepared


class TokenClassification(OnSamples):
    """See `distlm.tasks.Task`. Labels of a batch: ids [B, S]."""

    def __init__(self, config: TokenClassificationTask, prepared: Prepared) -> None:
        self._pad_token_id, self._max_seq_length = prepared.pad_token_id, prepared.max_seq_length
        self._labels, self._scheme = np.array(prepared.labels, dtype=object), tags.TagScheme(prepared.tag_scheme)
        self._decoder = WordDecoder(prepared.labels[: prepared.num_labels], self._scheme)
        self._label_loss = LabelLoss(prepared.num_labels, prepared.label_weights, config.label_smoothing_factor)

    def collate(self, samples: Samples, epochs: np.ndarray, indices: np.ndarray, training: bool) -> Batch:
        length = samples.padded_length(self._max_seq_length)
        return make_batch(samples, pad(samples.labels, IGNORED, length=length), self._pad_token_id, length)

    def count_targets(self, batch: Batch) -> float:
        return self._label_loss.count(batch["labels"])

    def leave_out(self, batch: Batch, rows: torch.Tensor) -> None:
        batch["labels"][rows] = IGNORED

    def loss(self, model: nn.Module, batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        labels = batch["labels"].to(device, non_blocking=True)
        logits = logits_of(model, batch, device)
        return self._label_loss.sum(logits.flatten(0, 1), labels.flatten()), logits.detach()

    def judge(self, batch: Batch, indices: np.ndarray, predicted: torch.Tensor) -> list[tuple[int, np.ndarray]]:
        is_word = (batch["labels"] != IGNORED).numpy()
        logits = predicted.cpu().numpy()
        return [
            (int(index), self._decoder.reduce(logits[b][is_word[b]]))
            for b, index in enumerate(indices)
            if is_word[b].any()
        ]

    def evaluation(self, judged: list[Any], loss: float, num_targets: float, data: SampleDataset) -> scores.Evaluation:
        labels: dict[int, list[str]] = {}
        words: dict[int, list[np.ndarray]] = {}  # what the decoder needs of each
        for index, reduced in sorted((pair for batch in judged for pair in batch), key=lambda pair: pair[0]):
            sample = data[np.array([index])]
            wanted = sample.labels[0][sample.labels[0] != IGNORED]
            for row, label, word in zip(sample.rows[0].tolist(), wanted, reduced, strict=True):
                labels.setdefault(row, []).append(self._labels[label])
                words.setdefault(row, []).append(word)
        predictions = [self._labels[self._decoder.decode(np.array(of_row))].tolist() for of_row in words.values()]
        return scores.tagging(list(labels.values()), predictions, self._scheme)
