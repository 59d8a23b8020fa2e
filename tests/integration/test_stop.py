"""A wish to stop that one worker hears: all stop after the same step, which is saved, and going on is exact."""

from __future__ import annotations

import os

import pytest
import torch
from ranks import run_on_ranks
from tiny_runs import STEPS, Base, Finished, Reports, Training, largest_difference, make_base, train_all

from distlm.checkpoint.store import CheckpointStore

STOP_IN_STEP = 5


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return make_base(tmp_path_factory.mktemp("stop"))


def train_until_asked_to_stop(training: Training, heard_in_step: dict[int, int]) -> tuple[Reports, list[int]]:
    """Runs on every rank. Some hear in the middle of the run, each in its own step, that it should stop."""
    from accelerate.state import AcceleratorState

    from distlm.worker.train import WorkerContext, train

    reports: Reports = []
    stopped: list[int] = []
    asked = 0

    def is_stop_wanted() -> bool:
        nonlocal asked
        asked += 1  # once in a step
        return asked >= heard_in_step.get(int(os.environ["RANK"]), STEPS + 1)

    def report(step: int, values: dict[str, float]) -> None:
        reports.append((step, values))

    AcceleratorState._reset_state(reset_partial_state=True)
    context = WorkerContext(
        training.config, training.prepared, training.run, "cpu", training.checkpoint, report, print,
        is_stop_wanted=is_stop_wanted, stopped=stopped.append,
    )  # fmt: skip
    train(context)
    return reports, stopped


@pytest.mark.parametrize(
    "heard_in_step",
    [{0: STOP_IN_STEP}, {1: STOP_IN_STEP}, {0: STOP_IN_STEP + 1, 1: STOP_IN_STEP}],
    ids=["rank-0", "rank-1", "in-different-steps"],
)
def test_all_stop_after_the_same_step_and_a_resume_trains_the_same_bits(
    base: Base, heard_in_step: dict[int, int], request: pytest.FixtureRequest
) -> None:
    name = request.node.callspec.id
    quiet = ("training.logging_steps=4", "training.save_steps=null")
    straight = train_all(2, {"s": base.training(f"straight-{name}", *quiet)})["s"]
    stopped = base.training(f"stopped-{name}", *quiet)
    (reports, steps), (others, none) = run_on_ranks(train_until_asked_to_stop, 2, stopped, heard_in_step)
    assert (steps, none, others) == ([STOP_IN_STEP], [], []), "rank 0 alone tells"
    assert [step for step, values in reports if "train/loss" in values] == [1, 4, STOP_IN_STEP]
    assert [one.step for one in CheckpointStore(stopped.run.checkpoints).checkpoints()] == [STOP_IN_STEP]
    resumed: Finished = train_all(2, {"r": base.resumed(stopped, *quiet)})["r"]
    assert largest_difference(straight.weights(STEPS), resumed.weights(STEPS)) == 0
    assert straight.curve("train/loss")[STEPS] == resumed.curve("train/loss")[STEPS]


def test_a_wish_in_the_last_step_changes_nothing(base: Base) -> None:
    training = base.training("at-the-end", f"training.max_steps={STOP_IN_STEP}")
    (reports, steps), _ = run_on_ranks(train_until_asked_to_stop, 2, training, {1: STOP_IN_STEP})
    assert steps == []
    assert [step for step, values in reports if "eval/loss" in values][-1] == STOP_IN_STEP


def test_votes_arrive_on_the_host() -> None:
    from distlm.worker.stop import Votes

    votes = Votes(torch.device("cpu"))
    assert not votes.want_stop()
    votes.count(torch.tensor(2.0))
    assert votes.want_stop()
    votes.count(torch.tensor(0.0))
    assert not votes.want_stop()
