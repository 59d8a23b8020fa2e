"""The training loop on real gloo processes: it trains what a plain PyTorch loop trains, at every ZeRO stage, on any
number of workers and over a restart; and it stops where it would train something else."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_loop import Curve, load, plain_evaluation
from ranks import run_on_ranks
from tiny_runs import (
    GLOBAL_BATCH,
    HALF,
    STEPS,
    Base,
    Finished,
    Reports,
    Training,
    english,
    largest_difference,
    make_base,
    train_all,
    train_once,
)

from distlm.checkpoint.store import Checkpoint, CheckpointStore
from distlm.config.load import load_tree
from distlm.config.resolve import contradictions
from distlm.errors import DistlmError, InputError
from distlm.run_folder import RunFolder
from distlm.worker.prepare import prepare_run

STAGES = (0, 1, 2, 3)
SHARDED_STAGES = (1, 2, 3)
PARITY_STEPS = 50

LINEAR = (
    "training.lr_scheduler_type=linear",
    "training.per_device_train_batch_size=6",
    "training.max_grad_norm=0",
    "training.gradient_checkpointing=true",
)
"""Another schedule, one micro batch of 6 on each of 2 workers, no clipping, activations computed twice."""

# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    base = make_base(tmp_path_factory.mktemp("training"))
    # So that an epoch ends in the middle of a micro batch after the restart, and evaluation in the middle of a batch.
    assert HALF * GLOBAL_BATCH < base.prepared.num_train_samples < STEPS * GLOBAL_BATCH
    assert base.prepared.num_train_samples % 2 == 1
    assert all(base.prepared.num_validation_samples % size for size in (2, 3, 4, 5))
    return base


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
    assert manifests[0].progress.epoch == manifests[1].progress.epoch  # the evaluations are of other samples
    assert [manifest.progress.sample_position for manifest in manifests] == [STEPS * GLOBAL_BATCH] * 2


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

    patch.setattr(Worker, "my_micro_batches", lambda worker, step: range(worker.plan.accumulation_steps))
    return training


def other_data(patch: pytest.MonkeyPatch, training: Training) -> Training:
    assert training.prepared.validation_path is not None
    if torch.distributed.get_rank() == 0:
        return training
    return replace(training, prepared=replace(training.prepared, train_paths=[training.prepared.validation_path]))


def nan_on_one_rank(patch: pytest.MonkeyPatch, training: Training) -> Training:
    from distlm.tasks.masked_lm import MaskedLM

    loss = MaskedLM.loss

    def broken_loss(task: MaskedLM, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        loss_sum, correct = loss(task, *arguments)
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
