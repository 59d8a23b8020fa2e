"""Runs of a tiny BERT through `distlm.worker.train.train` on real gloo processes, and what came out of them.

base = make_base(folder)                                       # data and initial weights, shared by all runs
trainings = {"a": base.training("a", "deepspeed.zero_stage=3")}
finished = train_all(2, trainings)["a"]                        # on 2 new processes
finished.losses(1, 12), finished.weights(12)
"""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from plain_loop import Curve, plain_training
from ranks import run_on_ranks
from saved_state import saved_weights

from distlm.checkpoint.store import Checkpoint, CheckpointStore
from distlm.config.load import load_tree
from distlm.config.resolve import contradictions
from distlm.config.schema import RunConfig
from distlm.run_folder import RunFolder
from distlm.worker.prepare import Prepared, prepare_run

STEPS, HALF = 12, 6
GLOBAL_BATCH = 12
NUM_MICRO_BATCHES = 6  # on 1, 2 and 3 workers: 6, 3 and 2 accumulation steps

CONFIG: dict[str, Any] = {
    "seed": 7,
    "model": {
        "config": {
            "model_type": "bert",
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "max_position_embeddings": 32,
            "hidden_dropout_prob": 0.1,
            "attention_probs_dropout_prob": 0.1,
        }
    },
    "tokenizer": {"train": {"vocab_size": 300}},
    "data": {"train": [], "validation": [], "max_seq_length": 32},
    "training": {
        "max_steps": STEPS,
        "global_train_batch_size": GLOBAL_BATCH,
        "per_device_train_batch_size": GLOBAL_BATCH // NUM_MICRO_BATCHES,
        "per_device_eval_batch_size": 4,
        "learning_rate": 5e-3,
        # The rate does not depend on the last step, so runs of different lengths share their first steps.
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 5,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "mixed_precision": "no",
        "logging_steps": 1,
        "eval_steps": HALF,
        "save_steps": HALF,
        "save_total_limit": None,
    },
    "resources": {"num_workers": 2, "device": "cpu"},
}

Reports = list[tuple[int, dict[str, float]]]
"""What a rank reported, in order."""


@dataclass(frozen=True)
class Training:
    """What `train` is given."""

    config: RunConfig
    prepared: Prepared
    run: RunFolder
    checkpoint: Checkpoint | None = None

    def saved_at(self, step: int) -> Checkpoint:
        return Checkpoint(step, self.run.checkpoints / f"step-{step:08d}")


@dataclass(frozen=True)
class Base:
    """What all runs of this file share: data and initial weights."""

    tree: dict[str, Any]
    run: RunFolder
    prepared: Prepared

    def config(self, *overrides: str) -> RunConfig:
        return load_tree(copy.deepcopy(self.tree), overrides, check=contradictions).config

    def training(self, name: str, *overrides: str, checkpoint: Checkpoint | None = None) -> Training:
        """A new run with these data and weights."""
        run = RunFolder.create(self.run.runs_dir, name)
        run.init.symlink_to(self.run.init)
        config = self.config(*overrides)
        assert config.training.max_steps is not None
        return Training(config, replace(self.prepared, total_steps=config.training.max_steps), run, checkpoint)

    def resumed(self, training: Training, *overrides: str) -> Training:
        """The same run in its next attempt: from its last good checkpoint on, with other overrides."""
        checkpoint, refused = CheckpointStore(training.run.checkpoints).latest_good()
        assert checkpoint is not None and not refused
        config = self.config(*overrides)
        assert config.training.max_steps is not None
        prepared = replace(self.prepared, total_steps=config.training.max_steps)
        return Training(config, prepared, training.run, checkpoint)

    def plain(self, *overrides: str) -> tuple[Curve, dict[str, torch.Tensor]]:
        """The plain loop's curve and final weights."""
        return plain_training(self.config(*overrides), self.prepared, self.run.init / "model")


@dataclass(frozen=True)
class Finished:
    """A training and what rank 0 reported."""

    training: Training
    reports: Reports

    def curve(self, key: str) -> dict[int, float]:
        """Value by step."""
        return {step: values[key] for step, values in self.reports if key in values}

    def losses(self, first_step: int, last_step: int) -> list[float]:
        curve = self.curve("train/loss")
        return [curve[step] for step in range(first_step, last_step + 1)]

    def weights(self, step: int) -> dict[str, torch.Tensor]:
        return saved_weights(self.training.saved_at(step).path)

    def state_files(self, step: int) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in sorted(self.training.saved_at(step).path.glob("shard-*"))}


def make_base(folder: Path, model: dict[str, Any] | None = None) -> Base:
    """Tokenise a small corpus and draw the initial weights, of another `model` section than the usual where given."""
    tree = copy.deepcopy(CONFIG)
    tree["model"] = model or tree["model"]
    for split, num_documents, seed in (("train", 69, 0), ("validation", 15, 1)):
        path = folder / f"{split}.txt"
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(english(num_documents, seed), encoding="utf-8")
        tree["data"][split] = [{"source": "files", "paths": [str(path)]}]
    run = RunFolder.create(folder / "runs", "base")
    return Base(tree, run, prepare_run(load_tree(copy.deepcopy(tree), check=contradictions).config, run))


def english(num_documents: int, seed: int) -> str:
    """Paragraphs of three sentences, simple enough that a tiny model learns something in few steps."""
    pick = random.Random(seed).choice
    nouns = ["cat", "dog", "farmer", "teacher", "river", "garden", "house", "letter", "story", "captain", "winter"]
    verbs = ["sees", "finds", "follows", "paints", "remembers", "carries", "leaves", "watches", "hears", "builds"]
    adjectives = ["old", "young", "quiet", "red", "small", "heavy", "happy", "distant", "golden", "broken"]
    places = ["near the mill", "under a bridge", "in the morning", "before dinner", "across the valley"]

    def sentence() -> str:
        return f"The {pick(adjectives)} {pick(nouns)} {pick(verbs)} a {pick(adjectives)} {pick(nouns)} {pick(places)}."

    return "\n\n".join(" ".join(sentence() for _ in range(3)) for _ in range(num_documents))


def train_once(training: Training, reports: Reports) -> None:
    """Runs on every rank, as if in a new process: Accelerate's process-wide state is forgotten first."""
    from accelerate.state import AcceleratorState

    from distlm.worker.train import WorkerContext, train

    def report(step: int, values: dict[str, float]) -> None:
        reports.append((step, values))

    AcceleratorState._reset_state(reset_partial_state=True)
    train(WorkerContext(training.config, training.prepared, training.run, "cpu", training.checkpoint, report, print))


def train_all_on_rank(trainings: Sequence[Training]) -> list[Reports]:
    reports: list[Reports] = [[] for _ in trainings]
    for training, said in zip(trainings, reports, strict=True):
        train_once(training, said)
    return reports


def train_all(num_workers: int, trainings: Mapping[str, Training]) -> dict[str, Finished]:
    """Train one after the other on the same new processes, and return what came out by name."""
    of_rank_0, *of_others = run_on_ranks(train_all_on_rank, num_workers, list(trainings.values()))
    assert not any(any(reports) for reports in of_others), "rank 0 alone reports"
    return {name: Finished(trainings[name], said) for name, said in zip(trainings, of_rank_0, strict=True)}


def largest_difference(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)
