"""The worker's training loop on real gloo processes: it trains what a plain PyTorch loop trains, at every ZeRO stage, on
any number of workers and over a restart; and it stops where it would train something else."""

from __future__ import annotations

import copy
import dataclasses
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_loop import Curve, load, plain_evaluation, plain_training
from ranks import run_on_ranks

from distlm.config.load import load_tree
from distlm.config.resolve import contradictions
from distlm.config.schema import RunConfig
from distlm.errors import DistlmError
from distlm.run_folder import RunFolder
from distlm.worker.checkpoint import read_parameters
from distlm.worker.checkpoint_format import list_checkpoints, read_manifest
from distlm.worker.prepare import Prepared, prepare_run

STAGES = (0, 1, 2, 3)
SHARDED_STAGES = (1, 2, 3)
STEPS, HALF = 50, 25
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
"""What rank 0 reported, in order."""


# --- runs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Base:
    """What all runs of this file share: one prepared run's data and initial weights."""

    tree: dict[str, Any]
    run: RunFolder
    prepared: Prepared

    def config(self, *overrides: str) -> RunConfig:
        return load_tree(copy.deepcopy(self.tree), overrides, check=contradictions).config

    def training(self, name: str, *overrides: str, checkpoint: Path | None = None) -> Training:
        """A new run with these weights."""
        run = RunFolder.create(self.run.runs_dir, name)
        run.init.symlink_to(self.run.init)
        return Training(self.config(*overrides), self.prepared, run, checkpoint)


@dataclass(frozen=True)
class Training:
    config: RunConfig
    prepared: Prepared
    run: RunFolder
    checkpoint: Path | None = None

    def saved_at(self, step: int) -> Path:
        return self.run.checkpoints / f"step-{step:08d}"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = tmp_path_factory.mktemp("training")
    tree = copy.deepcopy(CONFIG)
    for split, num_documents, seed in (("train", 110, 0), ("validation", 15, 1)):
        path = folder / f"{split}.txt"
        path.write_text(english(num_documents, seed), encoding="utf-8")
        tree["data"][split] = [{"source": "files", "paths": [str(path)]}]
    run = RunFolder.create(folder / "runs", "base")
    prepared = prepare_run(load_tree(copy.deepcopy(tree), check=contradictions).config, run)
    # The runs below cross epochs in the middle of a micro batch and end an evaluation in the middle of a batch.
    assert GLOBAL_BATCH < prepared.num_train_samples < STEPS * GLOBAL_BATCH / 2
    assert prepared.num_train_samples % 2 == 1
    assert all(prepared.num_validation_samples % size for size in (2, 3, 4, 5))
    return Base(tree, run, prepared)


def english(num_documents: int, seed: int) -> str:
    """Paragraphs of three sentences, simple enough that a tiny model learns something in 50 steps."""
    pick = random.Random(seed).choice
    nouns = "cat dog farmer teacher river garden house letter story window captain horse winter market".split()
    verbs = "sees finds follows paints remembers carries leaves watches hears builds".split()
    adjectives = "old young quiet red small heavy happy distant golden broken".split()
    places = "near the mill|under a bridge|in the morning|before dinner|across the valley|without a word".split("|")

    def sentence() -> str:
        return f"The {pick(adjectives)} {pick(nouns)} {pick(verbs)} a {pick(adjectives)} {pick(nouns)} {pick(places)}."

    return "\n\n".join(" ".join(sentence() for _ in range(3)) for _ in range(num_documents))


def train_on_rank(trainings: Sequence[Training]) -> list[Reports]:
    """Runs on every rank: one training after the other, each as if in a new process."""
    return [train_once(training) for training in trainings]


def train_once(training: Training, reports: Reports | None = None) -> Reports:
    from accelerate.state import AcceleratorState

    from distlm.worker.train import WorkerContext, train

    AcceleratorState._reset_state(reset_partial_state=True)
    reports = [] if reports is None else reports

    def report(step: int, values: dict[str, float]) -> None:
        reports.append((step, values))

    train(WorkerContext(training.config, training.prepared, training.run, "cpu", training.checkpoint, report))
    return reports


@dataclass(frozen=True)
class Finished:
    training: Training
    reports: Reports

    def curve(self, key: str) -> dict[int, float]:
        return {step: values[key] for step, values in self.reports if key in values}

    def losses(self, after: int = 0) -> list[float]:
        return [loss for step, loss in self.curve("train/loss").items() if step > after]

    def weights(self) -> dict[str, torch.Tensor]:
        return dict(read_parameters(self.training.saved_at(STEPS)))

    def state_files(self) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in sorted(self.training.saved_at(STEPS).glob("shard-*"))}


def run_all(num_workers: int, trainings: Mapping[str, Training]) -> dict[str, Finished]:
    """Train on new processes and return what came out, by name."""
    reports = run_on_ranks(train_on_rank, num_workers, list(trainings.values()), timeout_s=300)
    assert not any(any(of_rank) for of_rank in reports[1:]), "rank 0 alone reports"
    return {name: Finished(training, said) for (name, training), said in zip(trainings.items(), reports[0], strict=True)}


def largest_difference(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.fixture(scope="module")
def on_two(base: Base) -> dict[str, Finished]:
    """Every stage in fp32 and bf16, uninterrupted on 2 workers, and one without accumulation or clipping."""
    trainings = {
        f"{precision}-{stage}": base.training(
            f"{precision}-{stage}", f"deepspeed.zero_stage={stage}", f"training.mixed_precision={precision}"
        )
        for precision in ("no", "bf16")
        for stage in STAGES
    }
    trainings["one-micro-batch"] = base.training(
        "one-micro-batch", "training.per_device_train_batch_size=6", "training.max_grad_norm=0"
    )
    return run_all(2, trainings)


@pytest.fixture(scope="module")
def resumed_on_two(base: Base, on_two: dict[str, Finished]) -> dict[str, Finished]:
    """The same from the checkpoint of step 25 on, in new processes."""
    return run_all(
        2,
        {
            f"{precision}-{stage}": base.training(
                f"resumed-{precision}-{stage}",
                f"deepspeed.zero_stage={stage}",
                f"training.mixed_precision={precision}",
                "training.per_device_eval_batch_size=5",
                checkpoint=on_two[f"{precision}-{stage}"].training.saved_at(HALF),
            )
            for precision in ("no", "bf16")
            for stage in SHARDED_STAGES
        },
    )


@pytest.fixture(scope="module")
def on_one(base: Base, on_two: dict[str, Finished]) -> dict[str, Finished]:
    """fp32 on 1 worker: uninterrupted, and going on from the checkpoint of 2 workers."""
    trainings = {}
    for stage in SHARDED_STAGES:
        common = (f"deepspeed.zero_stage={stage}", "resources.num_workers=1", "training.per_device_eval_batch_size=16")
        trainings[f"{stage}"] = base.training(f"one-{stage}", *common)
        checkpoint = on_two[f"no-{stage}"].training.saved_at(HALF)
        trainings[f"{stage}-resumed"] = base.training(f"one-resumed-{stage}", *common, checkpoint=checkpoint)
    return run_all(1, trainings)


@pytest.fixture(scope="module")
def on_three(base: Base, on_one: dict[str, Finished]) -> dict[str, Finished]:
    """fp32 on 3 workers: uninterrupted, and going on from the checkpoint of 1 worker."""
    trainings = {}
    for stage in SHARDED_STAGES:
        common = (f"deepspeed.zero_stage={stage}", "resources.num_workers=3", "training.per_device_eval_batch_size=16")
        trainings[f"{stage}"] = base.training(f"three-{stage}", *common)
        checkpoint = on_one[f"{stage}"].training.saved_at(HALF)
        trainings[f"{stage}-resumed"] = base.training(f"three-resumed-{stage}", *common, checkpoint=checkpoint)
    return run_all(3, trainings)


@pytest.fixture(scope="module")
def plain(base: Base) -> Callable[..., tuple[Curve, dict[str, torch.Tensor]]]:
    """plain(*overrides): the plain loop's curve and final weights."""
    known: dict[tuple[str, ...], tuple[Curve, dict[str, torch.Tensor]]] = {}

    def curve_and_weights(*overrides: str) -> tuple[Curve, dict[str, torch.Tensor]]:
        if overrides not in known:
            known[overrides] = plain_training(
                base.config(*overrides), base.prepared, base.run.init / "model", STEPS
            )
        return known[overrides]

    return curve_and_weights


# --- the same training as plain PyTorch ------------------------------------------------------------------------------


def assert_same_training(finished: Finished, curve: Curve, weights: Mapping[str, torch.Tensor]) -> None:
    steps = list(range(1, STEPS + 1))
    for key, expected, tolerance in (
        ("train/loss", curve.losses, {"abs": 1e-4}),
        ("grad_norm", curve.grad_norms, {"rel": 1e-3}),
        ("learning_rate", curve.learning_rates, {"rel": 1e-12}),
    ):
        reported = finished.curve(key)
        assert list(reported) == steps
        assert list(reported.values()) == pytest.approx(expected, **tolerance), key
    assert largest_difference(finished.weights(), weights) < 1e-3


@pytest.mark.parametrize("stage", STAGES)
def test_fp32_is_the_training_of_a_plain_loop(on_two: dict[str, Finished], plain: Any, stage: int) -> None:
    curve, weights = plain()
    assert curve.losses[0] - curve.losses[-1] > 0.5, "something is learned"
    assert max(curve.grad_norms) > 0.5, "gradients are clipped"
    assert_same_training(on_two[f"no-{stage}"], curve, weights)


def test_without_accumulation_and_clipping_it_is_too(on_two: dict[str, Finished], plain: Any) -> None:
    curve, weights = plain("training.per_device_train_batch_size=6", "training.max_grad_norm=0")
    assert_same_training(on_two["one-micro-batch"], curve, weights)


def test_bf16_is_the_same_training_at_every_stage(on_two: dict[str, Finished], plain: Any) -> None:
    fp32, (bf16, _) = on_two["no-2"].losses(), plain("training.mixed_precision=bf16")
    for stage in STAGES:
        losses = on_two[f"bf16-{stage}"].losses()
        print(stage, diff(losses, bf16.losses), diff(losses, fp32), diff(losses, on_two["bf16-0"].losses()))


def diff(a, b):
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


# --- going on --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("stage", SHARDED_STAGES)
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(
    on_two: dict[str, Finished], resumed_on_two: dict[str, Finished], stage: int, precision: str
) -> None:
    straight, resumed = on_two[f"{precision}-{stage}"], resumed_on_two[f"{precision}-{stage}"]
    assert resumed.state_files() == straight.state_files(), "fp32 weights and both moments, every byte"
    assert len(straight.state_files()) == 2
    for key in ("train/loss", "grad_norm", "learning_rate", "epoch"):
        later = {step: value for step, value in straight.curve(key).items() if step > HALF}
        assert resumed.curve(key) == later, key
    manifests = [read_manifest(finished.training.saved_at(STEPS)) for finished in (straight, resumed)]
    assert manifests[0].progress == manifests[1].progress
    assert manifests[0].progress["sample_position"] == STEPS * GLOBAL_BATCH


@pytest.mark.parametrize("stage", SHARDED_STAGES)
def test_a_run_goes_on_with_fewer_or_more_workers(
    on_two: dict[str, Finished],
    on_one: dict[str, Finished],
    on_three: dict[str, Finished],
    stage: int,
) -> None:
    changes = [(on_two[f"no-{stage}"], on_one[f"{stage}-resumed"]), (on_one[f"{stage}"], on_three[f"{stage}-resumed"])]
    for straight, resumed in changes:
        print(stage, diff(resumed.losses(), straight.losses(after=HALF)), largest_difference(resumed.weights(), straight.weights()))
        assert resumed.losses() == pytest.approx(straight.losses(after=HALF), abs=1e-5)


@pytest.mark.parametrize("stage", SHARDED_STAGES)
def test_the_number_of_workers_does_not_matter(
    on_one: dict[str, Finished], on_two: dict[str, Finished], on_three: dict[str, Finished], stage: int
) -> None:
    one, two, three = on_one[f"{stage}"], on_two[f"no-{stage}"], on_three[f"{stage}"]
    for other in (two, three):
        print(stage, diff(other.losses(), one.losses()), largest_difference(other.weights(), one.weights()))
        assert other.losses() == pytest.approx(one.losses(), abs=1e-5)


# --- evaluation ------------------------------------------------------------------------------------------------------


def test_evaluation_is_that_of_one_process(base, on_one, on_two, resumed_on_two, on_three) -> None:
    for finished in [on_two["no-0"], on_two["no-3"], resumed_on_two["no-3"], on_one["3"], on_three["3"], on_three["2"]]:
        expected = plain_evaluation(finished.training.config, base.prepared, base.run.init / "model", finished.weights())
        print({key: (finished.curve(key)[STEPS], expected[key]) for key in expected})
