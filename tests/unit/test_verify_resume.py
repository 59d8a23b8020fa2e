"""What `distlm verify-resume` makes of the evidence: every difference is found, and rounding after a resize is none."""

from __future__ import annotations

import math
import multiprocessing
import os
import re
import signal
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distlm.checkpoint.manifest import KINDS, Fragment, Manifest, Optimizer, Parameter, Progress
from distlm.checkpoint.store import CheckpointStore
from distlm.config.attempt import Attempt
from distlm.config.load import load_tree, parse_yaml
from distlm.config.resolve import contradictions
from distlm.config.schema import RunConfig
from distlm.controller.__main__ import write_result
from distlm.errors import (
    Cancelled,
    CheckpointError,
    DistlmError,
    ExitCode,
    InfrastructureError,
    InputError,
    NonFiniteLossError,
    Problem,
    TrainingError,
)
from distlm.metrics_file import encode_line
from distlm.outcome import Outcome
from distlm.run_folder import AttemptFolder, RunFolder, read_json, write_json
from distlm.tracking.records import Record
from distlm.verify_resume import command
from distlm.verify_resume.command import (
    PlannedPiece,
    default_sizes,
    folder_for_runs,
    make_plan,
    raise_failure,
    rehearsal_overrides,
)
from distlm.verify_resume.compare import Piece, StateDifference, Verdict, compare
from distlm.verify_resume.evidence import compare_states, was_killed
from distlm.verify_resume.report import table, verdict_text
from distlm.verify_resume.samples import MicroBatch, read_samples, samples_path, write_samples
from distlm.worker.rehearsal import Kill, SampleLog, make_sample_log

STEPS, MICRO_BATCHES = 12, 6
LOSSES = {step: 7.0 - step / 8 for step in range(1, STEPS + 1)}


def micro_batch(step: int, number: int) -> MicroBatch:
    """Two samples; epochs of 50."""
    first = 2 * (MICRO_BATCHES * (step - 1) + number)
    positions = [first, first + 1]
    indices = [7 * position % 50 for position in positions]
    return MicroBatch(step, number, positions, [p // 50 for p in positions], indices, f"{step}-{number}")


def piece(workers: int, first_step: int, last_step: int, is_killed: bool = False) -> Piece:
    steps = range(first_step, last_step + 1 + is_killed)
    return Piece(
        workers,
        planned_first_step=first_step,
        first_step=first_step,
        last_step=last_step,
        killed_in_step=last_step + 1 if is_killed else None,
        micro_batches=[micro_batch(step, m) for step in steps for m in range(MICRO_BATCHES)],
        losses={step: LOSSES[step] for step in range(first_step, last_step + 1)},
    )


STRAIGHT = piece(2, 1, STEPS)
PIECES = [piece(2, 1, 5, is_killed=True), piece(2, 4, 8, is_killed=True), piece(1, 7, STEPS)]
STATES = [
    StateDifference(step, True, 0.0, 0.0, distance_trained=4.0, size=100.0) for step in range(3, STEPS + 1, 3)
]  # fmt: skip


def verdict_on(
    pieces: list[Piece] = PIECES,
    states: list[StateDifference] = STATES,
    precision: str = "no",
    is_deterministic: bool = True,
) -> Verdict:
    return compare(STRAIGHT, pieces, states, precision, is_deterministic)


def with_piece(number: int, **fields: object) -> list[Piece]:
    """The pieces with one of them (from 1) changed."""
    changed = replace(PIECES[number - 1], **fields)  # type: ignore[arg-type]
    return [*PIECES[: number - 1], changed, *PIECES[number:]]


def with_micro_batch(number: int, step: int, m: int, change: Callable[[MicroBatch], list[MicroBatch]]) -> list[Piece]:
    """The pieces with one micro batch of one of them replaced by what `change` returns."""
    original = PIECES[number - 1].micro_batches
    changed = [new for old in original for new in (change(old) if (old.step, old.number) == (step, m) else [old])]
    return with_piece(number, micro_batches=changed)


def with_loss(number: int, step: int, loss: float) -> list[Piece]:
    return with_piece(number, losses={**PIECES[number - 1].losses, step: loss})


def with_state(step: int, **fields: object) -> list[StateDifference]:
    return [replace(s, **fields) if s.step == step else s for s in STATES]  # type: ignore[arg-type]


def differences(verdict: Verdict) -> list[str]:
    return list(map(str, verdict.differences))


class TestCompare:
    def test_equal_runs(self) -> None:
        verdict = verdict_on()
        assert verdict.is_correct and verdict.bit_identical
        assert [(result.samples_equal, result.max_loss_difference) for result in verdict.pieces] == [(True, 0.0)] * 3
        assert [result.was_resized for result in verdict.pieces] == [False, False, True]
        assert verdict_text(verdict) == (
            "resume is exact: the same samples, and the same bits on 2 workers; after resizing to 1, losses and "
            "weights agree within rounding"
        )

    def test_a_step_that_was_killed_may_be_incomplete(self) -> None:
        assert verdict_on(with_micro_batch(1, step=6, m=2, change=lambda _: [])).is_correct

    def test_a_missing_sample(self) -> None:
        verdict = verdict_on(with_micro_batch(2, step=5, m=3, change=lambda _: []))
        assert differences(verdict) == ["step 5 (piece 2): micro batch 3 was not trained"]
        assert [result.samples_equal for result in verdict.pieces] == [True, False, True]

    def test_a_sample_trained_twice(self) -> None:
        verdict = verdict_on(with_micro_batch(3, step=9, m=0, change=lambda old: [old, old]))
        assert differences(verdict) == ["step 9 (piece 3): micro batch 0 was trained 2 times"]

    @pytest.mark.parametrize(("number", "step"), [(1, 4), (2, 4), (1, 6), (3, 12)])
    def test_a_swapped_sample_also_in_a_step_that_a_kill_undid(self, number: int, step: int) -> None:
        def swapped(old: MicroBatch) -> list[MicroBatch]:
            return [replace(old, indices=old.indices[::-1])]

        verdict = verdict_on(with_micro_batch(number, step, 1, swapped))
        first, second = micro_batch(step, 1).indices
        position, epoch = micro_batch(step, 1).positions[0], micro_batch(step, 1).epochs[0]
        assert differences(verdict) == [
            f"step {step} (piece {number}): micro batch 1: sample {second} of epoch {epoch} at position {position} "
            f"instead of sample {first} of epoch {epoch} at position {position}"
        ]

    def test_the_same_samples_masked_otherwise(self) -> None:
        verdict = verdict_on(with_micro_batch(2, 7, 4, lambda old: [replace(old, sha256="other")]))
        assert differences(verdict) == ["step 7 (piece 2): micro batch 4: the same samples with other tokens or masks"]

    def test_a_step_that_is_not_of_the_run(self) -> None:
        extra = replace(micro_batch(12, 0), step=13)
        verdict = verdict_on(with_piece(3, micro_batches=[*PIECES[2].micro_batches, extra]))
        assert differences(verdict) == [
            "step 13 (piece 3): micro batch 0 was trained, and the straight run has none there"
        ]

    def test_a_checkpoint_that_was_not_continued(self) -> None:
        again = replace(piece(2, 1, 8, is_killed=True), planned_first_step=4)
        verdict = verdict_on([PIECES[0], again, PIECES[2]])
        assert differences(verdict) == [
            "step 1 (piece 2): training began here and not at step 4: the checkpoint of step 3 was not continued"
        ]

    def test_the_last_bit_of_a_loss_on_the_same_workers(self) -> None:
        loss = math.nextafter(LOSSES[5], 8)
        verdict = verdict_on(with_loss(2, 5, loss))
        assert differences(verdict) == [f"step 5 (piece 2): the loss is {loss!r} and not {LOSSES[5]!r}"]
        on_gpus = verdict_on(with_loss(2, 5, loss), is_deterministic=False)
        assert on_gpus.is_correct and not on_gpus.bit_identical
        assert verdict_text(on_gpus).startswith("resume is within tolerance, not bit-identical: ")

    @pytest.mark.parametrize(("precision", "tolerance"), [("no", 1e-6), ("bf16", 1e-3), ("fp16", 1e-3)])
    def test_the_loss_after_a_resize(self, precision: str, tolerance: float) -> None:
        within, beyond = (LOSSES[9] * (1 - share * tolerance) for share in (0.9, 1.1))
        verdict = verdict_on(with_loss(3, 9, within), precision=precision)
        assert verdict.is_correct and verdict.bit_identical
        assert verdict.pieces[2].max_loss_difference == pytest.approx(LOSSES[9] * 0.9 * tolerance, rel=1e-6)
        (found,) = differences(verdict_on(with_loss(3, 9, beyond), precision=precision))
        assert found.startswith(f"step 9 (piece 3): the loss is {beyond!r} and not {LOSSES[9]!r}; {tolerance:g} of it")

    def test_a_loss_that_is_missing_or_not_a_number(self) -> None:
        losses = {step: loss for step, loss in LOSSES.items() if 7 <= step != 8}
        assert differences(verdict_on(with_piece(3, losses=losses))) == ["step 8 (piece 3): the piece recorded no loss"]
        assert not verdict_on(with_loss(3, 8, math.nan)).is_correct

    def test_after_a_resize_and_back_bits_are_no_longer_asked_for(self) -> None:
        pieces = [PIECES[0], replace(PIECES[1], workers=3), replace(PIECES[2], workers=2)]
        pieces[2] = replace(pieces[2], losses={**pieces[2].losses, 9: math.nextafter(LOSSES[9], 8)})
        verdict = verdict_on(pieces)
        assert verdict.is_correct and [result.was_resized for result in verdict.pieces] == [False, True, True]

    def test_weights_on_the_same_workers(self) -> None:
        states = with_state(9, identical=False, max_weight_difference=1e-9, distance=1e-8)
        assert verdict_on(states=states).is_correct, "piece 3 has written it, on another number of workers"
        states = with_state(6, identical=False, max_weight_difference=1e-9, distance=1e-8)
        assert differences(verdict_on(states=states)) == [
            "step 6 (piece 2): the checkpoint is not bit-identical: weights differ by up to 1.0e-09"
        ]
        assert differences(verdict_on(states=with_state(6, identical=False))) == [
            "step 6 (piece 2): the checkpoint is not bit-identical: the optimizer's state differs"
        ]
        assert verdict_on(states=states, is_deterministic=False).is_correct

    @pytest.mark.parametrize(("precision", "tolerance"), [("no", 1e-3), ("bf16", 0.1)])
    def test_weights_after_a_resize(self, precision: str, tolerance: float) -> None:
        within, beyond = (
            with_state(12, identical=False, distance=4.0 * tolerance * share, max_weight_difference=0.5)
            for share in (0.9, 1.1)
        )
        assert verdict_on(states=within, precision=precision).is_correct
        assert differences(verdict_on(states=beyond, precision=precision)) == [
            f"step 12 (piece 3): the weights are {1.1 * tolerance:.1e} of the way that training moved them apart; "
            f"{tolerance:g} is allowed"
        ]

    def test_weights_that_hardly_moved_may_differ_by_their_rounding(self) -> None:
        def difference(distance: float) -> list[StateDifference]:
            return with_state(12, identical=False, distance=distance, distance_trained=1e-6)

        assert verdict_on(states=difference(100.0 * 2**-25)).is_correct
        assert not verdict_on(states=difference(100.0 * 2**-23)).is_correct
        assert not verdict_on(states=difference(math.nan)).is_correct

    def test_the_first_difference_is_the_earliest_of_the_run_and_of_all_kinds(self) -> None:
        pieces = with_loss(2, 7, 1.0)
        pieces[2] = replace(pieces[2], losses={**pieces[2].losses, 7: 2.0})
        states = with_state(3, identical=False, max_weight_difference=0.1, distance=0.1)
        verdict = verdict_on(pieces, states)
        assert [(d.piece, d.step) for d in verdict.differences] == [(1, 3), (2, 7), (3, 7)]
        assert verdict_text(verdict) == f"resume is NOT correct: {verdict.differences[0]} (2 more)"

    def test_the_table(self) -> None:
        states = with_state(12, identical=False, max_weight_difference=2e-7, distance=4e-6)
        pieces = with_loss(3, 9, LOSSES[9] + 2.5e-7)
        assert list(table(verdict_on(pieces, states))) == [
            "piece  workers  steps  ended             samples  max |loss difference|",
            "1      2        1-5    killed in step 6  equal    0",
            "2      2        4-8    killed in step 9  equal    0",
            "3      1        7-12   finished          equal    2.5e-07",
            *(f"checkpoint of step {step}: weights and optimizer state bit-identical" for step in (3, 6, 9)),
            "checkpoint of step 12: weights differ by up to 2.0e-07; their distance is 1.0e-06 of the way that "
            "training moved them",
        ]


class TestStates:
    """Checkpoints on disk, written by different numbers of workers."""

    SHAPE = (3, 4)

    def save(self, run: RunFolder, step: int, weights: list[float], moment: float = 0.5, shards: int = 1) -> None:
        store = CheckpointStore(run.checkpoints)
        store.clean()
        content = {"weight": weights, "exp_avg": [moment] * 12, "exp_avg_sq": [0.25] * 12}
        parameters = [Parameter(name="w", shape=list(self.SHAPE))]
        temporary, written = store.temporary(step, "test"), {}
        for rank in range(shards):
            start, end = 12 * rank // shards, 12 * (rank + 1) // shards
            pieces = [memoryview(struct.pack(f"{end - start}f", *content[kind][start:end])) for kind in KINDS]
            fragments = [Fragment(0, start, end - start)]
            name, shard = store.write_shard(temporary, rank, shards, parameters, fragments, pieces)
            written[name] = shard
        manifest = Manifest(
            step=step, progress=Progress(sample_position=step, epoch=0), seed=1, world_size=shards, zero_stage=2,
            mixed_precision="no", versions={}, parameters=parameters,
            optimizer=Optimizer(adam_step=step, groups=[], loss_scaler=None), shards=written,
        )  # fmt: skip
        store.commit(temporary, manifest)

    @pytest.fixture
    def runs(self, tmp_path: Path) -> tuple[RunFolder, RunFolder]:
        """Alike at step 2; weights at step 4 that training has moved by 2 in one element."""
        straight, pieces = (RunFolder.create(tmp_path, name) for name in ("straight", "pieces"))
        for run, shards in ((straight, 2), (pieces, 3)):
            self.save(run, 2, [1.0] * 12, shards=shards)
            self.save(run, 4, [3.0] + [1.0] * 11, shards=shards)
        return straight, pieces

    def test_the_same_state_in_other_shards_is_identical(self, runs: tuple[RunFolder, RunFolder]) -> None:
        states = compare_states(*runs)
        assert [(s.step, s.identical, s.distance, s.max_weight_difference) for s in states] == [
            (2, True, 0.0, 0.0), (4, True, 0.0, 0.0)
        ]  # fmt: skip
        assert {s.distance_trained for s in states} == {2.0}
        assert states[1].size == pytest.approx(math.sqrt(9 + 11))

    def test_other_weights(self, runs: tuple[RunFolder, RunFolder], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("distlm.verify_resume.evidence._CHUNK_ELEMENTS", 5)  # three chunks, the last one shorter
        self.save(runs[1], 4, [3.0, 1.375] + [1.0] * 9 + [0.5], shards=3)
        state = compare_states(*runs)[1]
        assert (state.identical, state.max_weight_difference, state.distance) == (False, 0.5, 0.625)
        assert state.relative == 0.3125

    def test_another_moment(self, runs: tuple[RunFolder, RunFolder]) -> None:
        self.save(runs[1], 4, [3.0] + [1.0] * 11, moment=0.75, shards=3)
        state = compare_states(*runs)[1]
        assert (state.identical, state.max_weight_difference, state.relative) == (False, 0.0, 0.0)

    def test_a_checkpoint_that_one_run_lacks(self, runs: tuple[RunFolder, RunFolder]) -> None:
        self.save(runs[0], 6, [1.0] * 12)
        with pytest.raises(CheckpointError, match=r"only one of .* has checkpoints of the steps \[6\]"):
            compare_states(*runs)

    def test_a_damaged_one(self, runs: tuple[RunFolder, RunFolder]) -> None:
        shard = next((runs[1].checkpoints / "step-00000004").glob("shard-*"))
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)
        with pytest.raises(CheckpointError, match="was altered"):
            compare_states(*runs)


def train_with_a_log(attempt: AttemptFolder, run: RunFolder) -> None:
    """Steps 1 to 6 of rank 1, where step 4 is the one to die in, after the checkpoint of step 2."""
    log = SampleLog(attempt, 1, Kill(4, save_steps=2, run=run, attempt=attempt))
    for step in range(1, 7):
        log([micro_batch(step, 1)])


class TestKill:
    @pytest.fixture
    def run(self, tmp_path: Path) -> RunFolder:
        return RunFolder.create(tmp_path, "run")

    @pytest.mark.parametrize("checkpoint_first", [True, False])
    def test_the_worker_dies_once_checkpoint_and_metrics_are_on_disk(
        self, run: RunFolder, checkpoint_first: bool
    ) -> None:
        attempt = run.new_attempt()
        worker = multiprocessing.get_context("spawn").Process(target=train_with_a_log, args=(attempt, run))
        worker.start()
        deadline = time.monotonic() + 60
        while not any(m.step == 4 for m in read_samples(attempt.samples)):
            assert time.monotonic() < deadline and worker.is_alive()
            time.sleep(0.02)

        def save() -> None:
            (run.checkpoints / "step-00000002").mkdir(parents=True)

        def record() -> None:
            lines = (encode_line(Record(s, 1, 0, {"train/loss": 7.0}).to_message()) for s in (1, 2, 3))
            attempt.metrics_jsonl.write_bytes(b"".join(lines))

        first, second = (save, record) if checkpoint_first else (record, save)
        first()
        worker.join(0.5)
        assert worker.is_alive() and not was_killed(attempt), "the other of the two is missing"
        second()
        worker.join(60)
        assert worker.exitcode == -signal.SIGKILL and was_killed(attempt)
        assert [m.step for m in read_samples(attempt.samples)] == [1, 2, 3, 4]

    def test_it_gives_up_where_nothing_reaches_the_disk(self, run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("distlm.worker.rehearsal._TIMEOUT_S", 0.2)
        attempt = run.new_attempt()
        with pytest.raises(
            InfrastructureError, match="in step 4 for the checkpoint of step 2 and the metrics of step 3"
        ):
            train_with_a_log(attempt, run)
        assert not was_killed(attempt)

    def test_a_full_disk_is_no_failure_of_the_training(self, run: RunFolder) -> None:
        attempt = run.new_attempt()
        attempt.samples.write_text("a file where a folder is needed")
        with pytest.raises(InfrastructureError, match=r"cannot write .*rank-00001\.jsonl: "):
            SampleLog(attempt, 1)([micro_batch(1, 0)])

    @pytest.mark.parametrize(
        ("asked", "rank", "kills"),
        [
            ({}, 1, None),
            ({"record_samples": True}, 1, False),
            ({"record_samples": True, "kill_in_step": 4}, 0, False),
            ({"record_samples": True, "kill_in_step": 4}, 1, True),
        ],
    )
    def test_only_what_an_attempt_asks_for(
        self, asked: dict[str, Any], rank: int, kills: bool | None, run: RunFolder
    ) -> None:
        attempt = run.new_attempt()
        Attempt(target="local", distlm_version="1", **asked).write(attempt)
        log = make_sample_log(run, attempt, config("resources.num_workers=2"), rank)
        assert kills is None if log is None else (log._kill is not None) == kills


class TestFolder:
    def test_it_goes_and_the_cache_stays(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with folder_for_runs(tmp_path / "runs", keep=False) as folder:
            cache = RunFolder(folder.path / "id").cache
            (cache / "data").write_text("tokens")
        assert [path.name for path in (tmp_path / "runs").iterdir()] == ["cache"]
        assert (tmp_path / "runs" / "cache" / "data").read_text() == "tokens"
        assert capsys.readouterr().out == ""

    @pytest.mark.parametrize("error", [InputError("bad"), Cancelled("stop"), KeyboardInterrupt()])
    def test_it_goes_when_the_user_stops_or_is_wrong(self, error: BaseException, tmp_path: Path) -> None:
        with pytest.raises(type(error)), folder_for_runs(tmp_path, keep=False):
            raise error
        assert [path.name for path in tmp_path.iterdir()] == ["cache"]

    def test_it_goes_when_the_process_is_terminated(self, tmp_path: Path) -> None:
        before = signal.getsignal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt), folder_for_runs(tmp_path, keep=False):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        assert [path.name for path in tmp_path.iterdir()] == ["cache"]
        assert signal.getsignal(signal.SIGTERM) == before

    def test_runs_that_were_through_stay_when_the_input_turns_out_to_be_bad(self, tmp_path: Path) -> None:
        with pytest.raises(InputError), folder_for_runs(tmp_path, keep=False) as folder:
            write_json(RunFolder.create(folder.path, "run").new_attempt().result_json, {})
            raise InputError("no room for that many workers")
        assert folder.path.is_dir()

    def test_a_storage_without_links_leaves_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(Path, "symlink_to", refuse)
        with pytest.raises(InputError, match="not permitted"), folder_for_runs(tmp_path, keep=False):
            pass
        assert [path.name for path in tmp_path.iterdir()] == ["cache"]

    @pytest.mark.parametrize("error", [None, InfrastructureError("disk"), TrainingError("nan"), ValueError("bug")])
    def test_it_stays_and_is_named(
        self, error: Exception | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with suppress(type(error) if error else ()), folder_for_runs(tmp_path, keep=error is None) as folder:
            if error:
                raise error
        assert folder.path.is_dir()
        assert capsys.readouterr().out == f"the runs are in {os.path.relpath(folder.path)}\n"

    def test_a_runs_dir_that_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "runs").write_text("a file")
        message = r"runs_dir = .*: cannot make a folder for runs: "
        with pytest.raises(InputError, match=message), folder_for_runs(tmp_path / "runs", keep=False):
            pass


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (NonFiniteLossError("the loss is nan"), "because a run failed: the loss is nan; see "),
        (InfrastructureError("disk full"), "because a run failed: disk full; see "),
        (InputError(Problem("no such file", "data.train.0"), Problem("too long", "model")), "data.train.0: no such"),
        (Cancelled("stopped"), "stopped on request; resume was not verified"),
    ],
)
def test_a_run_that_fails_otherwise_passes_its_code_on(error: DistlmError, expected: str, tmp_path: Path) -> None:
    attempt = RunFolder.create(tmp_path, "run").new_attempt()
    problems = [problem.to_json() for problem in error.problems] if isinstance(error, InputError) else []
    write_result(attempt, Outcome(error.exit_code, str(error)), 0.0, problems)
    with pytest.raises(DistlmError, match=re.escape(expected)) as raised:
        raise_failure(read_json(attempt.result_json))
    assert raised.value.exit_code == error.exit_code
    if isinstance(error, InputError):
        assert str(raised.value) == str(error)


def test_bad_input_without_a_list_of_problems_is_passed_on(tmp_path: Path) -> None:
    """As when a worker refuses it, or when a package is not installed."""
    attempt = RunFolder.create(tmp_path, "run").new_attempt()
    write_result(attempt, Outcome(ExitCode.BAD_INPUT, "ray is not installed here"), 0.0)
    with pytest.raises(InputError, match="because a run failed: ray is not installed here; see "):
        raise_failure(read_json(attempt.result_json))


class TestPlan:
    def test_each_piece_continues_a_checkpoint_and_loses_what_came_after_the_next(self) -> None:
        plan = make_plan(12, [2, 2, 1])
        assert plan.save_steps == 3
        assert plan.pieces == (
            PlannedPiece(2, 1, 5, is_killed=True),
            PlannedPiece(2, 4, 8, is_killed=True),
            PlannedPiece(1, 7, 12, is_killed=False),
        )
        assert plan.straight == PlannedPiece(2, 1, 12, is_killed=False)

    @pytest.mark.parametrize("count", [2, 3, 7])
    @pytest.mark.parametrize("more_steps", [0, 1, 5, 100])
    def test_any_plan_saves_before_each_kill_and_ends_at_the_last_step(self, count: int, more_steps: int) -> None:
        steps = 2 * count + more_steps
        plan = make_plan(steps, [1] * count)
        for piece, following in zip(plan.pieces, plan.pieces[1:], strict=False):
            saved = following.first_step - 1
            assert saved % plan.save_steps == 0 and piece.first_step <= saved < piece.last_step < steps
            assert piece.last_step + 1 <= steps and (piece.last_step + 1) // plan.save_steps * plan.save_steps > saved
        assert plan.pieces[-1].last_step == steps

    def test_too_few_steps_or_pieces_are_refused(self) -> None:
        with pytest.raises(InputError, match="--steps = 5: 3 pieces take 6 steps or more"):
            make_plan(5, [2, 2, 1])
        with pytest.raises(InputError, match="--workers: a resume takes two sizes or more"):
            make_plan(12, [2])


def config(*overrides: str) -> RunConfig:
    tree, _ = parse_yaml(
        "{model: {config: {model_type: bert}}, tokenizer: {train: {vocab_size: 1000}}, "
        "data: {train: [{source: python-docs}]}, "
        "training: {num_train_epochs: 3.0, global_train_batch_size: 24, per_device_train_batch_size: 2}, "
        "resources: {device: cpu}}",
        "run.yaml",
    )
    return load_tree(tree, overrides, contradictions).config


@pytest.mark.parametrize(
    ("workers", "cores", "expected"),
    [
        (4, 4, [4, 4, 3]),  # 12 micro batches
        (6, 1, [6, 6, 4]),
        (1, 8, [1, 1, 2]),
        (1, 1, [1, 1]),
    ],
)
def test_the_default_sizes(workers: int, cores: int, expected: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command.os, "sched_getaffinity", lambda _: set(range(cores)))
    assert default_sizes(config(f"resources.num_workers={workers}")) == expected


def test_of_a_range_the_largest_size_that_there_is_room_for_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command.os, "sched_getaffinity", lambda _: set(range(5)))
    assert default_sizes(config("resources.num_workers=[1,8]")) == [4, 4, 3]  # 12 micro batches
    assert default_sizes(config("resources.num_workers=[6,8]")) == [6, 6, 4]


def test_of_another_cluster_no_more_workers_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command.os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert default_sizes(config("resources.num_workers=1")) == [1, 1]
    assert default_sizes(config("resources.num_workers=2")) == [2, 2, 1]
    monkeypatch.setenv("RAY_ADDRESS", "")
    assert default_sizes(config("resources.num_workers=1")) == [1, 1, 2]


@pytest.mark.parametrize(
    ("warmup", "expected"), [("0.06", 0.06), ("12", 12), ("13", 6), ("1000", 6), ("0", 0)]
)  # fmt: skip
def test_the_config_of_the_runs_is_valid_and_short(warmup: str, expected: float) -> None:
    users = config(f"training.warmup_steps={warmup}", "tracking.registered_model_name=mine")
    overrides = rehearsal_overrides(users, make_plan(12, [2, 2, 1]), Path("a, [strange]: \N{GRINNING FACE} folder"))
    changed = config(f"training.warmup_steps={warmup}", "tracking.registered_model_name=mine", *overrides)
    training = changed.training
    assert training.warmup_steps == expected
    assert (training.max_steps, training.num_train_epochs, training.save_steps) == (12, None, 3)
    assert (training.logging_steps, training.eval_steps, training.save_total_limit) == (1, None, None)
    assert (changed.tracking.report_to, changed.tracking.log_model) == ([], False)
    assert changed.runs_dir == "a, [strange]: \N{GRINNING FACE} folder"
    assert (changed.data, changed.model) == (users.data, users.model)


def test_samples_are_read_as_written_and_a_torn_line_is_left_out(tmp_path: Path) -> None:
    for rank in (0, 1):
        for step in (1, 2):
            write_samples(
                samples_path(tmp_path / "samples", rank), [micro_batch(step, rank), micro_batch(step, rank + 2)]
            )
    with open(samples_path(tmp_path / "samples", 1), "a") as file:
        file.write('{"step":3,"number":1,"posi')
    assert list(read_samples(tmp_path / "samples")) == [
        micro_batch(step, m) for rank in (0, 1) for step in (1, 2) for m in (rank, rank + 2)
    ]
