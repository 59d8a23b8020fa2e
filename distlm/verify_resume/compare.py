"""The verdict on a resume: a run in pieces beside the same run straight. Pure: no files, no processes, no numpy."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from distlm.verify_resume.samples import MicroBatch

LOSS_TOLERANCE = {"no": 1e-6, "bf16": 1e-3, "fp16": 1e-3}
"""By precision: how far two losses may be apart where rounding differs, as a share of the loss."""
WEIGHT_TOLERANCE = {"no": 1e-3, "bf16": 1e-1, "fp16": 1e-1}
"""By precision: how far weights may be apart then, as a share of the way that training moved them."""
_ROUNDING = 2.0**-24  # of an fp32 number: weights closer than this share of their size are equal, however little moved


@dataclass(frozen=True)
class Piece:
    """What one attempt has left. The straight run is one piece, too."""

    workers: int
    planned_first_step: int
    first_step: int
    """The one after the checkpoint that it really continued from."""
    last_step: int
    """The last one that it trained to its end."""
    killed_in_step: int | None
    """None: it reached the end of the run."""
    micro_batches: Sequence[MicroBatch]
    """Of all workers, including those of the step that it was killed in."""
    losses: Mapping[int, float]
    """By step."""


@dataclass(frozen=True)
class StateDifference:
    """How a checkpoint of the run in pieces differs from the straight run's of the same step."""

    step: int
    identical: bool
    """Weights and Adam's moments, bit by bit."""
    max_weight_difference: float
    """Largest absolute difference of a weight."""
    distance: float
    """Euclidean, between the weights of the two runs."""
    distance_trained: float
    """Euclidean, from the straight run's weights at its first checkpoint to those at its last."""
    size: float
    """Euclidean norm of the straight run's weights."""

    @property
    def relative(self) -> float:
        """Distance as a share of the way that training moved the weights."""
        return self.distance / self.distance_trained if self.distance_trained else math.inf


@dataclass(frozen=True)
class Difference:
    """Something that a correct resume does not do. Piece numbers count from 1."""

    piece: int
    step: int
    text: str

    def __str__(self) -> str:
        return f"step {self.step} (piece {self.piece}): {self.text}"


@dataclass(frozen=True)
class PieceResult:
    """How one piece compares with the straight run, over all its steps, those that a kill undid included."""

    piece: Piece
    was_resized: bool
    """The number of workers has differed from the straight run's, here or in a piece before: rounding may differ."""
    samples_equal: bool
    max_loss_difference: float


@dataclass(frozen=True)
class Verdict:
    """`differences` are in the order in which they arose; none: the resume is correct."""

    pieces: list[PieceResult]
    states: Sequence[StateDifference]
    differences: list[Difference]
    bit_identical: bool
    """Losses, weights and moments, up to the first resize."""

    @property
    def is_correct(self) -> bool:
        return not self.differences


def compare(
    straight: Piece, pieces: Sequence[Piece], states: Sequence[StateDifference], precision: str, is_deterministic: bool
) -> Verdict:
    """Compare a run in pieces with the straight run.

    Args:
        states: of every checkpoint of the run in pieces.
        precision: training.mixed_precision.
        is_deterministic: the same computation gives the same bits, as on CPUs; every bit must be equal then until the
            number of workers changes. Otherwise, and after that, losses and weights must be equal within tolerance.
    """
    results: list[PieceResult] = []
    differences: list[Difference] = []
    was_resized = False
    bit_identical = True
    for number, piece in enumerate(pieces, 1):
        was_resized |= piece.workers != straight.workers
        loss_tolerance, weight_tolerance = (
            (LOSS_TOLERANCE[precision], WEIGHT_TOLERANCE[precision])
            if was_resized or not is_deterministic
            else (0.0, 0.0)
        )
        wrong_samples = list(_compare_samples(number, straight, piece))
        end = pieces[number].first_step - 1 if number < len(pieces) else piece.last_step
        own_states = [state for state in states if piece.first_step <= state.step <= end]
        found = [
            *_compare_start(number, piece),
            *wrong_samples,
            *_compare_losses(number, straight, piece, loss_tolerance),
            *_compare_states(number, own_states, weight_tolerance),
        ]
        differences += sorted(found, key=lambda difference: difference.step)
        result = PieceResult(piece, was_resized, not wrong_samples, _max_loss_difference(straight, piece))
        results.append(result)
        if not was_resized:
            bit_identical &= result.max_loss_difference == 0 and all(state.identical for state in own_states)
    return Verdict(results, states, differences, bit_identical)


def _compare_start(number: int, piece: Piece) -> Iterator[Difference]:
    planned, first = piece.planned_first_step, piece.first_step
    if first != planned:
        text = f"training began here and not at step {planned}: the checkpoint of step {planned - 1} was not continued"
        yield Difference(number, first, text)


def _compare_samples(number: int, straight: Piece, piece: Piece) -> Iterator[Difference]:
    """Each micro batch of each step is trained once, by whichever worker, and is the straight run's."""
    expected = {(micro_batch.step, micro_batch.number): micro_batch for micro_batch in straight.micro_batches}
    trained = defaultdict(list)
    for micro_batch in piece.micro_batches:
        trained[micro_batch.step, micro_batch.number].append(micro_batch)
    due = {key for key in expected if piece.first_step <= key[0] <= piece.last_step}
    may_be_there = {key for key in expected if key[0] == piece.killed_in_step}
    for step, m in sorted(due | trained.keys()):
        found = trained[step, m]
        if not found:
            yield Difference(number, step, f"micro batch {m} was not trained")
        elif (step, m) not in due | may_be_there:
            yield Difference(number, step, f"micro batch {m} was trained, and the straight run has none there")
        elif len(found) > 1:
            yield Difference(number, step, f"micro batch {m} was trained {len(found)} times")
        elif found[0] != expected[step, m]:
            yield Difference(number, step, f"micro batch {m}: {_other_samples(expected[step, m], found[0])}")


def _other_samples(expected: MicroBatch, found: MicroBatch) -> str:
    wanted = list(zip(expected.positions, expected.epochs, expected.indices, strict=True))
    given = list(zip(found.positions, found.epochs, found.indices, strict=True))
    if len(wanted) != len(given):
        return f"{len(given)} samples instead of {len(wanted)}"
    for want, have in zip(wanted, given, strict=True):
        if want != have:
            return f"{_sample(*have)} instead of {_sample(*want)}"
    return "the same samples with other tokens or masks"


def _sample(position: int, epoch: int, index: int) -> str:
    return f"sample {index} of epoch {epoch} at position {position}"


def _compare_losses(number: int, straight: Piece, piece: Piece, tolerance: float) -> Iterator[Difference]:
    for step in range(piece.first_step, piece.last_step + 1):
        expected, found = straight.losses.get(step), piece.losses.get(step)
        if expected is None or found is None:
            yield Difference(number, step, f"the {'straight run' if expected is None else 'piece'} recorded no loss")
        elif not abs(found - expected) <= tolerance * abs(expected):  # so that NaN is a difference, too
            text = f"the loss is {found!r} and not {expected!r}"
            yield Difference(number, step, text + (f"; {tolerance:g} of it is allowed" if tolerance else ""))


def _max_loss_difference(straight: Piece, piece: Piece) -> float:
    common = straight.losses.keys() & piece.losses.keys()
    return max((abs(piece.losses[step] - straight.losses[step]) for step in common), default=0.0)


def _compare_states(number: int, states: Sequence[StateDifference], tolerance: float) -> Iterator[Difference]:
    for state in states:
        if tolerance == 0.0 and not state.identical:
            weights = state.max_weight_difference
            what = f"weights differ by up to {weights:.1e}" if weights else "the optimizer's state differs"
            yield Difference(number, state.step, f"the checkpoint is not bit-identical: {what}")
        elif not (state.relative <= tolerance or state.distance <= _ROUNDING * state.size):
            text = (
                f"the weights are {state.relative:.1e} of the way that training moved them apart; {tolerance:g} is "
                "allowed"
            )
            yield Difference(number, state.step, text)
