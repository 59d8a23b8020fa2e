"""The training loop on real gloo processes: it trains what a plain PyTorch loop trains, at every ZeRO stage, on any
number of workers and over a restart; and it stops where it would train something else."""

from __future__ import annotations

import copy
import math
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_loop import Curve, load, plain_evaluation, plain_training
from ranks import run_on_ranks
from saved_state import saved_weights

from distlm.checkpoint.store import Checkpoint, CheckpointStore
from distlm.config.load import load_tree
from distlm.config.resolve import contradictions
from distlm.config.schema import RunConfig
from distlm.errors import DistlmError, InputError
from distlm.run_folder import RunFolder
from distlm.worker.prepare import Prepared, prepare_run

STAGES = (0, 1, 2, 3)
SHARDED_STAGES = (1, 2, 3)
STEPS, HALF = 12, 6
PARITY_STEPS = 50
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

LINEAR = (
    "training.lr_scheduler_type=linear",
    "training.per_device_train_batch_size=6",
    "training.max_grad_norm=0",
    "training.gradient_checkpointing=true",
)
"""Another schedule, one micro batch of 6 on each of 2 workers, no clipping, activations computed twice."""

Reports = list[tuple[int, dict[str, float]]]
"""What a rank reported, in order."""


# --- runs ------------------------------------------------------------------------------------------------------------


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


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = tmp_path_factory.mktemp("training")
    tree = copy.deepcopy(CONFIG)
    for split, num_documents, seed in (("train", 69, 0), ("validation", 15, 1)):
        path = folder / f"{split}.txt"
        path.write_text(english(num_documents, seed), encoding="utf-8")
        tree["data"][split] = [{"source": "files", "paths": [str(path)]}]
    run = RunFolder.create(folder / "runs", "base")
    prepared = prepare_run(load_tree(copy.deepcopy(tree), check=contradictions).config, run)
    # So that an epoch ends in the middle of a micro batch after the restart, and evaluation in the middle of a batch.
    assert HALF * GLOBAL_BATCH < prepared.num_train_samples < STEPS * GLOBAL_BATCH
    assert prepared.num_train_samples % 2 == 1
    assert all(prepared.num_validation_samples % size for size in (2, 3, 4, 5))
    return Base(tree, run, prepared)


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


@pytest.fixture(scope="module")
def on_two(base: Base) -> dict[str, Finished]:
    """Uninterrupted on 2 workers: every stage in fp32 ("no") and bf16, and one of another kind."""
    trainings = {"linear": base.training("linear", *LINEAR)}
    for precision, num_steps in (("no", PARITY_STEPS), ("bf16", STEPS)):
        for stage in STAGES:
            trainings[f"{precision}-{stage}"] = base.training(
                f"{precision}-{stage}",
                f"training.max_steps={num_steps}",
                f"deepspeed.zero_stage={stage}",
                f"training.mixed_precision={precision}",
            )
    return train_all(2, trainings)


@pytest.fixture(scope="module")
def resumed_on_two(base: Base, on_two: dict[str, Finished]) -> dict[str, Finished]:
    """From the checkpoint at half of the steps on, in new processes."""
    return train_all(
        2,
        {
            f"{precision}-{stage}": base.training(
                f"resumed-{precision}-{stage}",
                f"deepspeed.zero_stage={stage}",
                f"training.mixed_precision={precision}",
                "training.per_device_eval_batch_size=5",
                "training.max_eval_samples=11",
                checkpoint=on_two[f"{precision}-{stage}"].training.saved_at(HALF),
            )
            for precision in ("no", "bf16")
            for stage in SHARDED_STAGES
        },
    )


@pytest.fixture(scope="module")
def on_one(base: Base, on_two: dict[str, Finished]) -> dict[str, Finished]:
    """fp32 on 1 worker: uninterrupted, and from the checkpoint of 2 workers on."""
    checkpoints = {stage: on_two[f"no-{stage}"].training.saved_at(HALF) for stage in SHARDED_STAGES}
    return train_all(1, whole_and_continued(base, 1, checkpoints))


@pytest.fixture(scope="module")
def on_three(base: Base, on_one: dict[str, Finished]) -> dict[str, Finished]:
    """fp32 on 3 workers: uninterrupted, and from the checkpoint of 1 worker on."""
    checkpoints = {stage: on_one[f"{stage}"].training.saved_at(HALF) for stage in SHARDED_STAGES}
    return train_all(3, whole_and_continued(base, 3, checkpoints))


def whole_and_continued(base: Base, num_workers: int, checkpoints: Mapping[int, Checkpoint]) -> dict[str, Training]:
    trainings = {}
    for stage, checkpoint in checkpoints.items():
        overrides = (
            f"deepspeed.zero_stage={stage}",
            f"resources.num_workers={num_workers}",
            "training.per_device_eval_batch_size=16",
        )
        trainings[f"{stage}"] = base.training(f"{num_workers}-{stage}", *overrides)
        trainings[f"{stage}-resumed"] = base.training(
            f"{num_workers}-{stage}-resumed", *overrides, checkpoint=checkpoint
        )
    return trainings


# --- the same training as plain PyTorch ------------------------------------------------------------------------------


def assert_same_training(finished: Finished, curve: Curve, weights: Mapping[str, torch.Tensor]) -> None:
    num_steps = len(curve.losses)
    for key, expected, tolerance in (
        ("train/loss", curve.losses, 1e-5),
        ("grad_norm", curve.grad_norms, 1e-4),
        ("learning_rate", curve.learning_rates, 1e-9),
    ):
        reported = finished.curve(key)
        assert list(reported) == list(range(1, num_steps + 1))
        assert list(reported.values()) == pytest.approx(expected, abs=tolerance), key
    assert largest_difference(finished.weights(num_steps), weights) < 1e-4


def largest_difference(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.fixture(scope="module")
def plain_fp32(base: Base) -> tuple[Curve, dict[str, torch.Tensor]]:
    return base.plain(f"training.max_steps={PARITY_STEPS}")


@pytest.mark.parametrize("stage", STAGES)
def test_fp32_is_the_training_of_a_plain_loop(
    on_two: dict[str, Finished], plain_fp32: tuple[Curve, dict[str, torch.Tensor]], stage: int
) -> None:
    curve, _ = plain_fp32
    assert curve.losses[0] - curve.losses[-1] > 0.5, "something is learned"
    assert max(curve.grad_norms) > 0.5, "gradients are clipped"
    assert_same_training(on_two[f"no-{stage}"], *plain_fp32)


def test_another_schedule_without_accumulation_and_clipping(base: Base, on_two: dict[str, Finished]) -> None:
    assert_same_training(on_two["linear"], *base.plain(*LINEAR))


def test_bf16_is_one_training_at_every_stage_and_near_fp32(base: Base, on_two: dict[str, Finished]) -> None:
    """A bf16 number is off by up to 2**-9 of its size; over a batch that averages to a few thousandths of a loss of 5.
    Between stages less, since they round the same numbers, up to the order of the fp32 sums in between."""
    plain, _ = base.plain("training.mixed_precision=bf16")
    for stage in STAGES:
        losses = on_two[f"bf16-{stage}"].losses(1, STEPS)
        assert losses == pytest.approx(plain.losses, abs=5e-3)
        assert losses == pytest.approx(on_two["bf16-0"].losses(1, STEPS), abs=2e-3)
        fp32 = on_two[f"no-{stage}"].losses(1, STEPS)
        assert losses == pytest.approx(fp32, abs=1e-2)
        assert losses != pytest.approx(fp32, abs=1e-5), "bf16 is used"


# --- going on --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("stage", SHARDED_STAGES)
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(
    on_two: dict[str, Finished], resumed_on_two: dict[str, Finished], stage: int, precision: str
) -> None:
    whole, resumed = on_two[f"{precision}-{stage}"], resumed_on_two[f"{precision}-{stage}"]
    assert resumed.state_files(STEPS) == whole.state_files(STEPS), "fp32 weights and both moments, every byte"
    assert len(resumed.state_files(STEPS)) == 2
    for key in ("train/loss", "grad_norm", "learning_rate", "epoch"):
        assert resumed.curve(key) == {s: v for s, v in whole.curve(key).items() if HALF < s <= STEPS}, key
    manifests = [
        CheckpointStore(r.training.run.checkpoints).manifest(r.training.saved_at(STEPS)) for r in (resumed, whole)
    ]
    assert manifests[0].progress == manifests[1].progress
    assert manifests[0].progress.sample_position == STEPS * GLOBAL_BATCH


@pytest.mark.parametrize("stage", SHARDED_STAGES)
def test_a_run_goes_on_with_fewer_or_more_workers(
    on_two: dict[str, Finished], on_one: dict[str, Finished], on_three: dict[str, Finished], stage: int
) -> None:
    two_to_one = on_two[f"no-{stage}"], on_one[f"{stage}-resumed"]
    one_to_three = on_one[f"{stage}"], on_three[f"{stage}-resumed"]
    for whole, resumed in (two_to_one, one_to_three):
        assert min(resumed.curve("train/loss")) == HALF + 1
        assert resumed.losses(HALF + 1, STEPS) == pytest.approx(whole.losses(HALF + 1, STEPS), abs=1e-5)
        assert largest_difference(resumed.weights(STEPS), whole.weights(STEPS)) < 1e-5


@pytest.mark.parametrize("stage", SHARDED_STAGES)
def test_the_number_of_workers_does_not_matter(
    on_one: dict[str, Finished], on_two: dict[str, Finished], on_three: dict[str, Finished], stage: int
) -> None:
    one = on_one[f"{stage}"]
    for other in (on_two[f"no-{stage}"], on_three[f"{stage}"]):
        assert other.losses(1, STEPS) == pytest.approx(one.losses(1, STEPS), abs=1e-5)
        assert largest_difference(other.weights(STEPS), one.weights(STEPS)) < 1e-5


# --- evaluation ------------------------------------------------------------------------------------------------------


def test_evaluation_is_that_of_one_process(
    base: Base,
    on_one: dict[str, Finished],
    on_two: dict[str, Finished],
    resumed_on_two: dict[str, Finished],
    on_three: dict[str, Finished],
) -> None:
    """17 samples in batches of 4 on 2 workers, 16 on 1 worker and 6 on 3 workers, and 11 of them in batches of 5 on 2
    workers: the last is never full."""
    for finished in (on_one["2"], on_two["no-0"], on_two["no-3"], resumed_on_two["no-3"], on_three["2"], on_three["3"]):
        expected = plain_evaluation(
            finished.training.config, base.prepared, base.run.init / "model", finished.weights(STEPS)
        )
        reported = {key: finished.curve(key)[STEPS] for key in expected}
        assert reported == pytest.approx(expected, abs=1e-6)
        assert finished.curve("eval/perplexity")[STEPS] == pytest.approx(math.exp(expected["eval/loss"]), rel=1e-6)


# --- stopping --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """How a training ended on one rank."""

    error: str
    message: str
    reports: Reports


def other_stage(patch: pytest.MonkeyPatch, training: Training) -> Training:
    from distlm.worker.engine import make_accelerator

    patch.setattr(
        "distlm.worker.train.make_accelerator", lambda settings: make_accelerator(replace(settings, zero_stage=1))
    )
    return training


def overlapping_samples(patch: pytest.MonkeyPatch, training: Training) -> Training:
    from distlm.worker.train import Worker

    patch.setattr(Worker, "my_micro_batches", lambda worker: range(worker.plan.accumulation_steps))
    return training


def other_data(patch: pytest.MonkeyPatch, training: Training) -> Training:
    assert training.prepared.validation_path is not None
    if torch.distributed.get_rank() == 0:
        return training
    return replace(training, prepared=replace(training.prepared, train_path=training.prepared.validation_path))


def nan_on_one_rank(patch: pytest.MonkeyPatch, training: Training) -> Training:
    from distlm.tasks.masked_lm import MaskedLM

    loss = MaskedLM.loss

    def broken_loss(task: MaskedLM, model: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        loss_sum, correct = loss(task, model, batch)
        return loss_sum * float("nan"), correct

    if torch.distributed.get_rank() == 1:
        patch.setattr(MaskedLM, "loss", broken_loss)
    return training


SABOTAGE = {f.__name__: f for f in (other_stage, overlapping_samples, other_data, nan_on_one_rank)}


def outcomes_on_rank(trainings: Mapping[str, Training]) -> dict[str, Outcome]:
    outcomes = {}
    for name, training in trainings.items():
        reports: Reports = []
        with pytest.MonkeyPatch.context() as patch:
            try:
                train_once(SABOTAGE[name](patch, training) if name in SABOTAGE else training, reports)
            except DistlmError as error:
                outcomes[name] = Outcome(type(error).__name__, str(error), reports)
    return outcomes


@dataclass(frozen=True)
class Stopped:
    training: Training
    ranks: list[Outcome]


@pytest.fixture(scope="module")
def stopped(base: Base) -> dict[str, Stopped]:
    """Trainings that must not go on, on 2 workers."""
    divergent = ("training.learning_rate=1e30", "training.warmup_steps=0", "training.logging_steps=50")
    trainings = {name: base.training(name, "training.save_steps=1") for name in SABOTAGE}
    trainings["nan_in_weights"] = base.training("nan_in_weights", "training.save_steps=1")
    poison(trainings["nan_in_weights"].run)
    trainings["divergence_at_save"] = base.training("divergence_at_save", *divergent, "training.save_steps=2")
    trainings["divergence_at_evaluation"] = base.training(
        "divergence_at_evaluation", *divergent, "training.save_steps=2", "training.eval_steps=1"
    )
    ranks = run_on_ranks(outcomes_on_rank, 2, trainings)
    return {name: Stopped(training, [rank[name] for rank in ranks]) for name, training in trainings.items()}


def poison(run: RunFolder) -> None:
    """Give the run initial weights of its own, with one NaN among them."""
    shared = run.init.resolve()
    run.init.unlink()
    shutil.copytree(shared, run.init)
    model = load(shared / "model")
    with torch.no_grad():
        model.get_parameter("cls.predictions.bias")[7] = float("nan")
    model.save_pretrained(run.init / "model")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("other_stage", "runs ZeRO stage 1, the config asks for 2"),
        ("overlapping_samples", "sample position 0 is trained by rank 0 and by rank 1"),
        ("other_data", "the sample at position 0 differs between rank 0"),
    ],
)
def test_nothing_trains_that_was_not_asked_for(stopped: dict[str, Stopped], name: str, reason: str) -> None:
    for outcome in stopped[name].ranks:
        assert outcome.error == "AttestationError"
        assert reason in outcome.message
        assert outcome.reports == []
    assert CheckpointStore(stopped[name].training.run.checkpoints).checkpoints() == []


@pytest.mark.parametrize(
    ("name", "step"),
    [("nan_on_one_rank", 1), ("nan_in_weights", 1), ("divergence_at_save", 2), ("divergence_at_evaluation", 1)],
)
def test_a_loss_that_is_not_finite_stops_all_ranks_and_is_not_saved(
    stopped: dict[str, Stopped], name: str, step: int
) -> None:
    for outcome in stopped[name].ranks:
        assert outcome.error == "NonFiniteLossError"
        assert f"at step {step}; lower training.learning_rate" in outcome.message
    assert [step for step, values in stopped[name].ranks[0].reports if "train/loss" in values] == [1]
    assert CheckpointStore(stopped[name].training.run.checkpoints).checkpoints() == []


def test_a_run_does_not_go_on_with_other_data(base: Base, tmp_path: Path) -> None:
    tokenizer, held_out = tmp_path / "tokenizer", tmp_path / "validation.txt"
    shutil.copytree(base.run.init / "tokenizer", tokenizer)
    held_out.write_text(english(20, seed=1), encoding="utf-8")
    tree = copy.deepcopy(base.tree)
    tree["tokenizer"] = {"name_or_path": str(tokenizer)}
    tree["data"]["validation"][0]["paths"] = [str(held_out)]
    config, run = load_tree(tree, check=contradictions).config, RunFolder.create(tmp_path / "runs", "run")
    prepared = prepare_run(config, run)
    assert prepare_run(config, run) == replace(prepared, data_was_cached=True)

    held_out.write_text(english(20, seed=2), encoding="utf-8")
    file = tokenizer / "tokenizer.json"
    file.write_text(file.read_text(encoding="utf-8").replace('"farmer"', '"farmers"'), encoding="utf-8")
    with pytest.raises(InputError) as error:
        prepare_run(config, run)
    assert [problem.key for problem in error.value.problems] == ["data.validation", "tokenizer"]
