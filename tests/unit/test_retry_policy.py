"""Which failures are tried again, how often, and after what pause."""

from __future__ import annotations

import pytest

from distlm.config.schema import MaxRetries, RecoveryConfig
from distlm.errors import AttestationError, Cause, CheckpointError, ExitCode, RayLostError
from distlm.outcome import Outcome
from distlm.retry_policy import NO_RETRIES, RetryPolicy

RETRIED = {Cause.NODE_LOST, Cause.HANG, Cause.INFRASTRUCTURE, Cause.OUT_OF_MEMORY, Cause.CODE}


def failed(cause: Cause, step: int | None = None) -> Outcome:
    return Outcome(ExitCode.INFRASTRUCTURE, "it failed", cause=cause, step=step)


@pytest.mark.parametrize("cause", list(Cause))
def test_by_default_only_what_may_be_otherwise_next_time_is_tried_again(cause: Cause) -> None:
    decision = RetryPolicy(RecoveryConfig()).decide(failed(cause), has_progressed=False)
    assert decision.try_again == (cause in RETRIED)


@pytest.mark.parametrize("code", [ExitCode.SUCCEEDED, ExitCode.BAD_INPUT, ExitCode.PREEMPTED, ExitCode.CANCELLED])
def test_an_end_that_is_none_of_failure_is_the_end(code: ExitCode) -> None:
    outcome = Outcome(code, cause=Cause.INFRASTRUCTURE)
    assert not RetryPolicy(RecoveryConfig()).decide(outcome, has_progressed=True).try_again


def test_what_is_refused_on_purpose_is_not_tried_again() -> None:
    policy = RetryPolicy(RecoveryConfig())
    assert not policy.decide(Outcome.of(AttestationError("two MLflow runs")), has_progressed=True).try_again
    assert policy.decide(Outcome.of(RayLostError("gone")), has_progressed=True).try_again


def test_each_cause_has_its_own_budget_and_a_new_checkpoint_fills_all_up() -> None:
    policy = RetryPolicy(RecoveryConfig(max_retries=MaxRetries(node_lost=2, hang=1)))

    def decide(cause: Cause, has_progressed: bool = False) -> bool:
        return policy.decide(failed(cause), has_progressed=has_progressed).try_again

    assert decide(Cause.NODE_LOST) and decide(Cause.HANG) and decide(Cause.NODE_LOST)
    assert decide(Cause.NODE_LOST, has_progressed=True) and decide(Cause.HANG) and decide(Cause.NODE_LOST)
    decision = policy.decide(failed(Cause.HANG), has_progressed=False)
    assert not decision.try_again
    assert decision.reason == "recovery.max_retries.hang = 1 without a new checkpoint"


def test_what_fails_twice_in_the_same_step_is_not_tried_a_third_time() -> None:
    for cause in (Cause.CODE, Cause.OUT_OF_MEMORY):
        policy = RetryPolicy(RecoveryConfig(max_retries=MaxRetries(code=9, out_of_memory=9)))
        assert policy.decide(failed(cause, step=7), has_progressed=True).try_again
        again = policy.decide(failed(cause, step=7), has_progressed=True)
        assert (again.try_again, again.reason) == (False, "the same in step 7 twice")


def test_in_another_step_or_for_another_reason_it_is() -> None:
    policy = RetryPolicy(RecoveryConfig(max_retries=MaxRetries(code=9)))
    steps = [(Cause.CODE, 7), (Cause.CODE, 8), (Cause.NODE_LOST, 8), (Cause.NODE_LOST, 8), (Cause.CODE, 8)]
    assert all(policy.decide(failed(*step), has_progressed=False).try_again for step in steps)


def test_the_first_try_follows_at_once_and_pauses_double_up_to_the_longest() -> None:
    policy = RetryPolicy(RecoveryConfig(longest_pause_s=5.0))
    pauses = [policy.decide(failed(Cause.NODE_LOST), has_progressed=False).pause_s for _ in range(6)]
    assert pauses == [0, 1, 2, 4, 5, 5]
    assert policy.decide(failed(Cause.NODE_LOST), has_progressed=True).pause_s == 0


def test_no_retries_at_all() -> None:
    decisions = [RetryPolicy(NO_RETRIES).decide(failed(cause), has_progressed=True) for cause in Cause]
    assert not any(decision.try_again for decision in decisions)
    assert {decision.reason for decision in decisions} == {""}


def test_a_failed_save_is_tried_again_where_the_user_says_so() -> None:
    outcome = Outcome.of(CheckpointError("no space left"))
    policy = RetryPolicy(RecoveryConfig(max_retries=MaxRetries(storage=1)))
    assert policy.decide(outcome, has_progressed=False).try_again
