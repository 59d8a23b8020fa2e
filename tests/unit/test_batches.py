"""Which samples a step trains on, and how they are cut into micro batches."""

from __future__ import annotations

import csv
import itertools
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from distlm.config.resolve import BatchPlan, legal_world_sizes
from distlm.data.batches import (
    BATCHES_PER_WINDOW,
    StepOrder,
    StepSamples,
    evaluation_batches,
    in_order_of_batches,
)
from distlm.data.order import SampleOrder
from distlm.data.samples import round_up

REAL_DATA = Path(os.environ.get("DISTLM_TEST_DATA", Path(__file__).parents[2].parent / "shared" / "data"))

# Samples of an epoch, global batch, micro batch. Epochs of several windows, of one, of less than a batch; with batches
# in which an epoch ends, without, and with batches that hold more than an epoch.
SIZES = [(4001, 8, 4), (640, 16, 16), (97, 12, 3), (30, 30, 10), (23, 32, 8), (5, 16, 4), (1, 4, 2), (400, 1, 1)]
SEEDS = (0, 42, 2**40)


def random_lengths(n: int, seed: int = 0) -> np.ndarray:
    """Long-tailed, as the lengths of sentences are, with many ties."""
    return np.clip(np.random.default_rng(seed).lognormal(3, 0.6, n), 3, 200).astype(np.int32)


def make(
    n: int,
    global_batch: int,
    micro_batch: int,
    *,
    seed: int = 0,
    lengths: np.ndarray | None = None,
    group_by_length: bool = False,
    max_tokens: int | None = None,
) -> StepOrder:
    plan = BatchPlan(global_batch, micro_batch, 1)
    return StepOrder(SampleOrder([n], None, seed), plan, lengths, group_by_length, max_tokens, seed)


def all_samples(order: StepOrder, num_steps: int) -> tuple[list[int], list[int]]:
    steps = [order.step(step) for step in range(1, num_steps + 1)]
    return [p for s in steps for p in s.passes.tolist()], [i for s in steps for i in s.indices.tolist()]


def padding_share(steps: list[StepSamples], lengths: np.ndarray) -> float:
    """Of the tokens that are computed, how many are padding."""
    computed = real = 0
    for step in steps:
        for micro_batch in step.micro_batches:
            mine = lengths[step.indices[micro_batch]]
            computed += len(mine) * int(round_up(mine.max()))
            real += int(mine.sum())
    return 1 - real / computed


@pytest.mark.parametrize(("n", "global_batch", "micro_batch"), SIZES)
def test_without_lengths_steps_follow_the_order_of_the_samples(n: int, global_batch: int, micro_batch: int) -> None:
    for seed, lengths in itertools.product(SEEDS, (None, random_lengths(n))):
        steps = make(n, global_batch, micro_batch, seed=seed, lengths=lengths)
        order = SampleOrder([n], None, seed)
        for number in (1, 2, 7, 10**9):
            step = steps.step(number)
            passes, indices = order.samples((number - 1) * global_batch, global_batch)
            assert np.array_equal(step.passes, passes) and np.array_equal(step.indices, indices)
            starts = range(0, global_batch, micro_batch)
            assert step.micro_batches == [slice(start, start + micro_batch) for start in starts]


@pytest.mark.parametrize(("n", "global_batch", "micro_batch"), SIZES)
@pytest.mark.parametrize(("group_by_length", "max_tokens"), [(True, None), (False, 100), (True, 250)])
def test_every_epoch_takes_each_sample_once(
    n: int, global_batch: int, micro_batch: int, group_by_length: bool, max_tokens: int | None
) -> None:
    for seed in SEEDS:
        lengths = random_lengths(n, seed % 1000)
        steps = make(
            n, global_batch, micro_batch, seed=seed, lengths=lengths, group_by_length=group_by_length,
            max_tokens=max_tokens,
        )  # fmt: skip
        passes, indices = all_samples(steps, -(-3 * n // global_batch))
        taken = Counter(zip(passes, indices, strict=True))
        assert max(taken.values()) == 1
        for epoch in range(3):
            assert sorted(index for number, index in taken if number == epoch) == list(range(n))
        # No sample leaves the steps of its epoch: of each step, the passes are those of the order without grouping.
        plain, _ = SampleOrder([n], None, seed).samples(0, len(passes))
        for start in range(0, len(passes), global_batch):
            assert sorted(passes[start : start + global_batch]) == plain[start : start + global_batch].tolist()


def test_grouping_brings_like_lengths_together_and_shuffles_the_steps() -> None:
    n, size = 8000, 16
    lengths = random_lengths(n)
    grouped = make(n, size, size, lengths=lengths, group_by_length=True)
    plain = make(n, size, size, lengths=lengths)
    window = [grouped.step(step) for step in range(1, BATCHES_PER_WINDOW + 1)]
    spreads = [np.ptp(lengths[step.indices]) for step in window]
    assert np.median(spreads) <= 1
    assert np.median([np.ptp(lengths[plain.step(step).indices]) for step in range(1, 51)]) > 20
    same = [plain.step(step) for step in range(1, BATCHES_PER_WINDOW + 1)]
    assert sorted(i for s in window for i in s.indices.tolist()) == sorted(i for s in same for i in s.indices.tolist())

    longest = [int(lengths[step.indices].max()) for step in window]
    assert abs(np.corrcoef(np.arange(len(longest)), longest)[0, 1]) < 0.4, "long and short steps are mixed"
    ranks = []
    for first in range(1, 8 * BATCHES_PER_WINDOW, BATCHES_PER_WINDOW):
        means = [lengths[grouped.step(first + i).indices].mean() for i in range(BATCHES_PER_WINDOW)]
        ranks.append(tuple(np.argsort(means).tolist()))
    assert len(set(ranks)) == len(ranks), "each window has an order of its own"


def test_ties_keep_the_order_of_the_samples() -> None:
    n, size = 6 * 8, 8
    passes, indices = SampleOrder([n], None, 0).samples(0, n)
    steps = [make(n, size, 4, lengths=np.full(n, 7, np.int32), group_by_length=True).step(s) for s in range(1, 7)]
    blocks = {tuple(indices[start : start + size].tolist()) for start in range(0, n, size)}
    assert {tuple(step.indices.tolist()) for step in steps} == blocks
    assert passes.max() == 0


@pytest.mark.parametrize(("group_by_length", "max_tokens"), [(True, None), (True, 300), (False, 300)])
def test_a_training_that_begins_anywhere_is_the_same(group_by_length: bool, max_tokens: int | None) -> None:
    n, size = 1003, 12
    lengths = random_lengths(n)

    def fresh() -> StepOrder:
        return make(n, size, 6, seed=7, lengths=lengths, group_by_length=group_by_length, max_tokens=max_tokens)

    straight = fresh()
    expected = [straight.step(step) for step in range(1, 301)]
    backwards = fresh()
    for number in [300, 1, 51, 50, 52, 84, 83, 85, 299, 133, *range(300, 0, -7)]:
        for other in (fresh(), backwards):
            step = other.step(number)
            assert step.indices.tolist() == expected[number - 1].indices.tolist()
            assert step.passes.tolist() == expected[number - 1].passes.tolist()
            assert step.micro_batches == expected[number - 1].micro_batches


def test_a_start_in_the_middle_of_a_trillion_samples_costs_a_window() -> None:
    lengths = np.broadcast_to(np.int32(9), 10**12)  # in the memory of one

    def seconds(n: int, number: int) -> float:
        steps = make(n, 32, 8, lengths=lengths[:n], group_by_length=True, max_tokens=512)
        begin = time.perf_counter()
        steps.step(number)
        return time.perf_counter() - begin

    small = min(seconds(10**6, 1) for _ in range(5))
    large = min(seconds(10**12, 10**11 + 77) for _ in range(5))
    assert large < 10 * small


def test_micro_batches_keep_to_the_budget_at_every_world_size() -> None:
    n, size, micro = 2000, 48, 8
    lengths = random_lengths(n)
    lengths[::97] = 200
    factors = Counter()
    for group_by_length, budget in itertools.product((False, True), (200, 330, 600, 1200, 10**6)):
        steps = make(n, size, micro, lengths=lengths, group_by_length=group_by_length, max_tokens=budget)
        for number in range(1, 2 * n // size):
            step = steps.step(number)
            pieces = step.micro_batches
            own = lengths[step.indices]
            assert (np.diff(own) <= 0).all(), "the longest come first"
            assert [i for piece in pieces for i in range(size)[piece]] == list(range(size))
            rows = [piece.stop - piece.start for piece in pieces]
            assert min(rows) >= 1 and max(rows) - min(rows) <= 1 and max(rows) <= micro
            assert all(
                r == 1 or r * round_up(own[piece.start]) <= budget for r, piece in zip(rows, pieces, strict=True)
            )
            for world_size in legal_world_sizes(size // micro):
                assert len(pieces) % world_size == 0
                mine = [pieces[rank::world_size] for rank in range(world_size)]
                assert len({len(share) for share in mine}) == 1
            factor = len(pieces) // (size // micro)
            factors[factor] += 1
            if factor > 1:  # and one piece would not do with less
                fewer = np.array_split(own, size // micro * (factor - 1))
                assert any(len(part) * round_up(part[0]) > budget for part in fewer)
    assert {1, 2, 3} <= factors.keys() and factors.keys() - {1, 2, 4, 8}, "factors other than powers of two occur"


def test_a_sample_longer_than_the_budget_is_alone() -> None:
    lengths = np.array([5, 9, 40, 7], np.int32)
    step = make(4, 4, 4, lengths=lengths, max_tokens=30).step(1)
    assert [piece.stop - piece.start for piece in step.micro_batches] == [1, 1, 2]
    assert step.indices[0] == 2
    shorter = make(4, 4, 4, lengths=lengths, max_tokens=6).step(1)
    assert [piece.stop - piece.start for piece in shorter.micro_batches] == [1, 1, 1, 1]


def test_lengths_that_are_missing_or_of_other_samples_are_refused() -> None:
    for settings in ({"group_by_length": True}, {"max_tokens": 100}):
        with pytest.raises(ValueError, match="need the lengths"):
            make(10, 2, 1, **settings)
    with pytest.raises(ValueError, match="3 lengths were given for 10 samples"):
        make(10, 2, 1, lengths=np.ones(3, np.int32))


def test_weighted_sources_are_grouped_within_their_epochs() -> None:
    order = SampleOrder([40, 200], [1.0, 1.0], seed=3)
    lengths = random_lengths(240)
    steps = StepOrder(order, BatchPlan(16, 8, 1), lengths, True, 400, seed=3)
    passes, indices = all_samples(steps, 45)  # three epochs
    plain_passes, plain_indices = order.samples(0, 720)
    assert len({*zip(passes, indices, strict=True)}) == 720
    for epoch in range(3):
        own = slice(epoch * 240, (epoch + 1) * 240)
        expected = sorted(zip(plain_passes[own].tolist(), plain_indices[own].tolist(), strict=True))
        assert sorted(zip(passes[own], indices[own], strict=True)) == expected


def test_the_steps_stay_the_same_from_version_to_version() -> None:
    """A run that another version resumes must go on with the samples that are left."""
    lengths = (np.arange(1000) * 7919 % 61 + 3).astype(np.int32)
    step = make(1000, 6, 3, seed=42, lengths=lengths, group_by_length=True, max_tokens=128).step(500)
    assert step.passes.tolist() == [2] * 6
    assert step.indices.tolist() == [622, 733, 234, 539, 772, 29]
    assert [(piece.start, piece.stop) for piece in step.micro_batches] == [(0, 1), (1, 2), (2, 4), (4, 6)]


# --------------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("max_tokens", [None, 64, 500])
def test_an_evaluation_takes_each_sample_once_in_equal_numbers_of_batches(max_tokens: int | None) -> None:
    for n, batch_size in itertools.product((1, 2, 7, 64, 501), (1, 8, 32)):
        lengths = random_lengths(1000)
        indices = np.random.default_rng(n).permutation(1000)[:n]
        alone = evaluation_batches(indices, lengths[indices], batch_size, max_tokens, 1)
        for world_size in (1, 2, 3, 8):
            batches = evaluation_batches(indices, lengths[indices], batch_size, max_tokens, world_size)
            assert len(batches) % world_size == 0 and len(batches) - len(alone) < world_size
            counted = [batch for batch in batches if batch.is_counted]
            assert [batch.indices.tolist() for batch in counted] == [batch.indices.tolist() for batch in alone]
            assert sorted(i for batch in counted for i in batch.indices.tolist()) == sorted(indices.tolist())
            assert (np.diff(lengths[np.concatenate([batch.indices for batch in counted])]) <= 0).all()
            of_workers = [
                [batch for batch in batches[rank::world_size] if batch.is_counted] for rank in range(world_size)
            ]
            assert in_order_of_batches(of_workers) == counted
            for batch in batches:
                rows = len(batch.indices)
                assert 1 <= rows <= batch_size
                assert max_tokens is None or rows == 1 or rows * round_up(lengths[batch.indices].max()) <= max_tokens


# ---------------------------------------------------------------------------------------------------------- real text


def conll_sentences() -> Iterator[str]:
    text = (REAL_DATA / "conll2003" / "train.conll").read_text(encoding="utf-8")
    for block in text.split("\n\n"):
        words = [line.split()[0] for line in block.splitlines() if line.strip()]
        if words and words[0] != "-DOCSTART-":
            yield " ".join(words)


def banking_questions() -> Iterator[str]:
    with open(REAL_DATA / "banking77" / "train.csv", encoding="utf-8", newline="") as file:
        yield from (row["text"] for row in csv.DictReader(file))


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason=f"no real data at {REAL_DATA}; set DISTLM_TEST_DATA")
@pytest.mark.parametrize(
    ("texts", "ungrouped_at_least", "grouped_at_most"), [(conll_sentences, 0.3, 0.05), (banking_questions, 0.3, 0.05)]
)
def test_grouping_leaves_little_padding_of_real_text(
    texts: Callable[[], Iterator[str]], ungrouped_at_least: float, grouped_at_most: float
) -> None:
    """Lengths in words and marks, which stand in for tokens."""
    lengths = np.array([2 + len(re.findall(r"\w+|[^\w\s]", text)) for text in texts()], np.int32)
    n, size, micro = len(lengths), 32, 16
    num_steps = n // size
    shares = {}
    for name, settings in {
        "plain": {},
        "sorted in the step": {"max_tokens": 10**6},
        "grouped": {"group_by_length": True},
        "grouped with a budget": {"group_by_length": True, "max_tokens": 512},
    }.items():
        steps = make(n, size, micro, lengths=lengths, **settings)  # type: ignore[arg-type]
        shares[name] = padding_share([steps.step(step) for step in range(1, num_steps + 1)], lengths)
    assert shares["plain"] > ungrouped_at_least
    assert shares["grouped"] < grouped_at_most
    assert shares["grouped"] < shares["sorted in the step"] < shares["plain"]
    assert shares["grouped with a budget"] <= shares["grouped"]
