"""From texts to labels: a trained model that computes as it did in the evaluations of its training.

B samples, S tokens of the longest, L labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from distlm.config.schema import TokenClassificationTask
from distlm.data.batches import evaluation_batches
from distlm.data.samples import Samples
from distlm.data.tagged import WordEncoder, group
from distlm.data.texts import encode_texts
from distlm.errors import TrainingError
from distlm.inference.run_settings import RunSettings
from distlm.run_folder import RunFolder
from distlm.tasks.decoding import WordDecoder
from distlm.tasks.labelled import logits_of, make_batch
from distlm.tasks.tags import TagScheme
from distlm.worker.cpu_bf16 import use_fp32_kernels_for_bf16
from distlm.worker.cpu_layers import use_cpu_layers
from distlm.worker.trained_model import load_verified_step, tokenizer_of

THRESHOLD = 0.5
"""Probability from which on one of several labels is predicted, as in the evaluations of training."""
_DECIMALS = 6  # of a score; more differ between machines


class Example(NamedTuple):
    """What a prediction is made from: a text, a pair of texts, or the words of a text."""

    text: str | list[str]
    pair: str | None = None
    document: str | None = None
    """What it has in common with other examples of its document, where that matters."""


Prediction = dict[str, Any]
"""Column -> value: label and score; labels and scores; prediction; or labels, one for each word."""


class EvaluatedModel(nn.Module):
    """A model on a device that computes in the precision of its training."""

    def __init__(self, model: nn.Module, mixed_precision: str, device: torch.device) -> None:
        super().__init__()
        self._device_type = device.type
        # fp16 in training is for GPUs; on a CPU the weights, which are fp32 always, are computed with as they are.
        has_fp16 = mixed_precision == "fp16" and device.type != "cpu"
        self._dtype = torch.bfloat16 if mixed_precision == "bf16" else torch.float16 if has_fp16 else None
        if device.type == "cpu":
            if self._dtype is torch.bfloat16:
                use_fp32_kernels_for_bf16()
            use_cpu_layers(model)
        self.model = model.to(device).eval()

    def forward(self, **inputs: torch.Tensor) -> Any:
        with torch.autocast(self._device_type, dtype=self._dtype, enabled=self._dtype is not None):
            return self.model(**inputs)


def best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Predictor:
    """The model of a checkpoint, ready to predict. Takes the memory of the weights."""

    def __init__(self, run: RunFolder, step: int, batch_size: int | None = None) -> None:
        """`step`: of a checkpoint that was verified. `batch_size`: samples of a batch at most; None: as in the
        evaluations of training."""
        self._settings = RunSettings.of(run, "predict")
        self._device = best_device()
        self._model = EvaluatedModel(load_verified_step(run, step), self._settings.mixed_precision, self._device)
        self._tokenizer: PreTrainedTokenizerFast = tokenizer_of(run)
        self._batch_size = batch_size or self._settings.batch_size
        self._labels = np.array(self._settings.labels, dtype=object)
        self._pad_token_id = self._settings.prepared.pad_token_id
        self._words = WordEncoder(self._tokenizer, self._settings.max_seq_length)
        self._decoder = WordDecoder(self._labels.tolist(), TagScheme(self._settings.prepared.tag_scheme))

    def predict(self, examples: Sequence[Example]) -> list[Prediction]:
        """A prediction for each, in their order. Raises TrainingError where the model gives no finite numbers."""
        if self._settings.task.type == "token-classification":
            return self._predict_words(examples)
        return self._predict_texts(examples)

    def _predict_texts(self, examples: Sequence[Example]) -> list[Prediction]:
        pairs = [example.pair or "" for example in examples] if examples and examples[0].pair is not None else None
        texts = [str(example.text) for example in examples]
        encoded = encode_texts(self._tokenizer, self._settings.max_seq_length, texts, pairs)
        token_types = encoded.get("token_type_ids")
        found: list[Prediction] = [{}] * len(examples)
        for indices, logits in self._logits(encoded["input_ids"], token_types):
            for index, prediction in zip(indices.tolist(), self._decode_texts(logits), strict=True):
                found[index] = prediction
        return found

    def _decode_texts(self, logits: torch.Tensor) -> Iterator[Prediction]:
        """From logits [B, L]."""
        problem_type = getattr(self._settings.task, "problem_type", None)
        if problem_type == "regression":
            yield from ({"prediction": round(value, _DECIMALS)} for value in logits[:, 0].tolist())
        elif problem_type == "multi_label_classification":
            for scores in logits.sigmoid().numpy():
                by_label = zip(self._labels, (round(float(score), _DECIMALS) for score in scores), strict=True)
                yield {"labels": self._labels[scores >= THRESHOLD].tolist(), "scores": dict(by_label)}
        else:
            scores, ids = logits.softmax(-1).max(-1)
            for score, number in zip(scores.tolist(), ids.tolist(), strict=True):
                yield {"label": self._labels[number], "score": round(score, _DECIMALS)}

    def _predict_words(self, examples: Sequence[Example]) -> list[Prediction]:
        task = self._settings.task
        assert isinstance(task, TokenClassificationTask)
        texts = [list(example.text) for example in examples]
        found: list[dict[int, np.ndarray]] = [{} for _ in texts]  # what the decoder needs of each word
        documents = [example.document for example in examples]
        groups = group(documents, self._words.windows(texts), self._words, task.context)
        samples = [self._words.sample(windows) for complete, _ in groups for windows in complete]
        samples = [sample for sample in samples if any(place is not None for place in sample.words)]
        types = [sample.token_types for sample in samples] if task.case_feature else None
        for indices, logits in self._logits([sample.input_ids for sample in samples], types):
            reduced = self._decoder.reduce(logits.numpy())  # [B, S, ...]
            for b, index in enumerate(indices.tolist()):
                previous: tuple[int, int] | None = None
                for position, place in enumerate(samples[index].words):
                    if place is not None and place != previous:  # the first token stands for its word
                        row, word = place
                        found[row][word] = reduced[b, position]
                    previous = place
        return [{"labels": self._decoded([words[i] for i in range(len(words))])} for words in found]

    def _decoded(self, words: list[np.ndarray]) -> list[str]:
        names: list[str] = self._labels[self._decoder.decode(np.array(words))].tolist()
        return names

    def _logits(
        self, input_ids: Sequence[list[int]], token_types: Sequence[list[int]] | None
    ) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """(indices [B], logits [B, L], or of words [B, S, L]) of all samples, the longest first."""
        if not input_ids:
            return
        ids = [np.array(sample or [self._pad_token_id]) for sample in input_ids]  # not every tokenizer adds tokens
        types = None
        if token_types is not None:
            types = [np.array(sample or [0]) for sample in token_types]
        lengths = np.array([len(sample) for sample in ids])
        everything = np.arange(len(ids))
        for batch in evaluation_batches(everything, lengths, self._batch_size, self._settings.max_batch_tokens, 1):
            chosen = batch.indices.tolist()
            samples = Samples(
                input_ids=[ids[i] for i in chosen],
                token_type_ids=None if types is None else [types[i] for i in chosen],
                labels=[],
                rows=[],
            )
            length = samples.padded_length(self._settings.max_seq_length)
            inputs = make_batch(samples, np.zeros(len(chosen)), self._pad_token_id, length)
            with torch.no_grad():
                logits = logits_of(self._model, inputs, self._device)
            if not torch.isfinite(logits).all():
                raise TrainingError("the model gives numbers that are not finite; predict with another --step")
            yield batch.indices, logits.cpu()
