"""The order of the samples and the counter-based random numbers."""

from __future__ import annotations

import itertools
import time
import warnings
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest

from distlm.data.order import SampleOrder, permute, samples, uniform


@pytest.fixture(autouse=True)
def warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("n", [*range(1, 40), 63, 64, 65, 127, 128, 129, 1000, 4097, 65_535, 100_003])
def test_permute_is_a_bijection(n: int) -> None:
    for seed, epoch in [(0, 0), (0, 1), (42, 0), (2**70, 7)]:
        assert np.array_equal(np.sort(permute(np.arange(n), n, seed, epoch)), np.arange(n))


def test_permute_takes_any_subset_and_one_epoch_for_each_index() -> None:
    n = 1009
    first, second = permute(np.arange(n), n, 3, 5), permute(np.arange(n), n, 3, 6)
    picked = np.array([7, 1008, 0, 500])
    assert np.array_equal(permute(picked, n, 3, 5), first[picked])
    mixed = permute(picked, n, 3, np.array([5, 6, 6, 5]))
    assert mixed.tolist() == [first[7], second[1008], second[0], first[500]]


def test_every_permutation_of_three_is_as_likely_as_the_others() -> None:
    epochs = 60_000
    images = permute(np.tile(np.arange(3), epochs), 3, 1, np.repeat(np.arange(epochs), 3)).reshape(epochs, 3)
    seen = Counter(map(tuple, images.tolist()))
    assert set(seen) == set(itertools.permutations(range(3)))
    chi_square = sum((count - epochs / 6) ** 2 / (epochs / 6) for count in seen.values())
    assert chi_square < 20.5  # 5 degrees of freedom: p = 0.001


@pytest.mark.parametrize("n", [10, 100, 257, 4096])
def test_each_index_goes_everywhere_equally_often(n: int) -> None:
    epochs = 100 * n if n <= 100 else 2000
    positions = np.array([0, 1, n // 2, n - 1])
    images = permute(np.tile(positions, epochs), n, 1, np.repeat(np.arange(epochs), 4)).reshape(epochs, 4)
    for column in images.T:
        cells = min(n, 50)
        expected = np.bincount(np.arange(n) * cells // n, minlength=cells) / n * epochs
        chi_square = ((np.bincount(column * cells // n, minlength=cells) - expected) ** 2 / expected).sum()
        assert chi_square < cells - 1 + 4.5 * np.sqrt(2 * (cells - 1))


def test_order_shows_no_trend_and_neighbours_part() -> None:
    n = 100_000
    order = permute(np.arange(n), n, 0, 0)
    tolerance = 4.5 / np.sqrt(n)
    assert abs(np.corrcoef(np.arange(n), order)[0, 1]) < tolerance
    for lag in (1, 2, 3, 64, 256):
        assert abs(np.corrcoef(order[:-lag], order[lag:])[0, 1]) < tolerance
    assert (np.abs(np.diff(order)) == 1).sum() < 20  # 2 are expected of a random permutation


@pytest.mark.parametrize("n", [1000, 1024, 99_991])
def test_adjacent_epochs_and_seeds_are_independent(n: int) -> None:
    index = np.arange(n)
    base = permute(index, n, 5, 0)
    for other in (permute(index, n, 5, 1), permute(index, n, 6, 0)):
        assert abs(np.corrcoef(base, other)[0, 1]) < 4.5 / np.sqrt(n)
        assert (base == other).sum() <= 8  # 1 is expected
        shift = (other - base) % n  # a shifted copy would have few distinct differences; 63 % are expected
        assert len(np.unique(shift)) > 0.55 * n


def test_a_trillion_samples_take_no_longer_than_a_million() -> None:
    def seconds(n: int) -> float:
        begin = time.perf_counter()
        image = permute(np.arange(n - 20_000, n), n, 9, 2)
        assert image.min() >= 0 and image.max() < n and len(np.unique(image)) == 20_000
        return time.perf_counter() - begin

    small, large = (min(seconds(n) for _ in range(5)) for n in (10**6, 10**12))
    assert large < 10 * small


def test_indices_outside_the_data_set_are_refused() -> None:
    for index in (-1, 10):
        with pytest.raises(ValueError, match=r"\[0, 10\)"):
            permute(np.array([3, index]), 10, 0, 0)


def test_uniform_depends_on_the_arguments_alone_and_broadcasts() -> None:
    index, epoch = np.array([[4], [9], [2**40]]), np.array([[0], [0], [1]])
    table = uniform(7, epoch, index, np.arange(5), stream=2)
    assert table.shape == (3, 5) and table.dtype == np.float64
    assert table[2, 3] == uniform(7, 1, 2**40, 3, stream=2)[0]
    assert np.array_equal(table[[1]], uniform(7, 0, 9, np.arange(5), stream=2)[None])


def test_uniform_is_uniform_and_each_argument_changes_it() -> None:
    n = 200_000
    counter = np.arange(n)
    draws = {
        "index": uniform(1, 0, counter, 0, 0),
        "position": uniform(1, 0, 0, counter, 0),
        "epoch": uniform(1, counter, 0, 0, 0),
        "other seed": uniform(2, 0, counter, 0, 0),
        "other stream": uniform(1, 0, counter, 0, 1),
        "next position": uniform(1, 0, counter, 1, 0),
    }
    for name, draw in draws.items():
        assert 0 <= draw.min() and draw.max() < 1, name
        chi_square = ((np.bincount((draw * 100).astype(int), minlength=100) - n / 100) ** 2 / (n / 100)).sum()
        assert chi_square < 99 + 4.5 * np.sqrt(2 * 99), name
        assert abs(np.corrcoef(draw[:-1], draw[1:])[0, 1]) < 4.5 / np.sqrt(n), name
    for (a, x), (b, y) in itertools.combinations(draws.items(), 2):
        assert abs(np.corrcoef(x[1:], y[1:])[0, 1]) < 4.5 / np.sqrt(n), (a, b)


def test_the_functions_stay_the_same_from_version_to_version() -> None:
    """A run that another version resumes must go on in the same order, with the same masks."""
    assert uniform(42, 3, 1234, np.arange(3), 1).tolist() == [
        0.2256944203297725,
        0.38503405877779895,
        0.10428802715859309,
    ]
    assert permute(np.arange(5), 1000, 42, 3).tolist() == [381, 499, 345, 936, 713]


def test_samples_count_on_over_the_epochs() -> None:
    n = 10
    epoch, index = samples(0, 35, n, seed=4)
    assert epoch.tolist() == [g // n for g in range(35)]
    for number in range(3):
        assert sorted(index[epoch == number].tolist()) == list(range(n))
    later_epoch, later_index = samples(17, 9, n, seed=4)
    assert later_epoch.tolist() == epoch[17:26].tolist() and later_index.tolist() == index[17:26].tolist()


def test_samples_without_shuffle_keep_their_order() -> None:
    epoch, index = samples(8, 4, 10, seed=4, shuffle=False)
    assert (epoch.tolist(), index.tolist()) == ([0, 0, 1, 1], [8, 9, 0, 1])


# ---------------------------------------------------------------------------------------------------- several sources


def test_without_weights_every_sample_of_every_source_comes_once_per_epoch() -> None:
    order = SampleOrder([7, 0, 30, 1], None, seed=4)
    passes, indices = order.samples(0, 3 * 38)
    assert order.samples_per_epoch == [7, 0, 30, 1]
    for epoch in range(3):
        assert sorted(indices[epoch * 38 : (epoch + 1) * 38].tolist()) == list(range(38))
        assert set(passes[epoch * 38 : (epoch + 1) * 38].tolist()) == {epoch}
    one = SampleOrder([38], None, seed=4).samples(0, 3 * 38)
    assert np.array_equal(one[0], passes) and np.array_equal(one[1], indices)
    assert all(np.array_equal(a, b) for a, b in zip(one, samples(0, 3 * 38, 38, 4), strict=True))


@pytest.mark.parametrize(
    ("sizes", "weights", "per_epoch"),
    [
        ([100, 100], [1.0, 3.0], [50, 150]),
        ([10, 190], [1.0, 1.0], [100, 100]),
        ([5, 5, 5], [1.0, 1.0, 1.0], [5, 5, 5]),
        ([10, 10, 10], [1.0, 1.0, 7.0], [4, 3, 23]),  # 3.33, 3.33, 23.33: of equal remainders the first rounds up
        ([1, 1, 1000], [1e-9, 1e-9, 1.0], [1, 1, 1000]),
        ([3, 999_999_999_997], [2.0, 1.0], [666_666_666_667, 333_333_333_333]),
    ],
)
def test_an_epoch_is_shared_out_by_weight(sizes: list[int], weights: list[float], per_epoch: list[int]) -> None:
    order = SampleOrder(sizes, weights, seed=1)
    assert order.samples_per_epoch == per_epoch
    assert sum(per_epoch) == sum(sizes)


def test_each_source_is_gone_through_evenly_in_an_order_of_its_own() -> None:
    sizes, weights = [10, 90, 25], [5.0, 3.0, 2.0]
    order = SampleOrder(sizes, weights, seed=9)
    epochs = 20
    passes, indices = order.samples(0, epochs * 125)
    starts = [0, 10, 100, 125]
    assert len({*zip(passes.tolist(), indices.tolist(), strict=True)}) == len(indices), "no sample twice in a pass"
    for number, (start, end) in enumerate(itertools.pairwise(starts)):
        mine = (indices >= start) & (indices < end)
        assert mine.reshape(epochs, 125).sum(axis=1).tolist() == [order.samples_per_epoch[number]] * epochs
        counts = np.bincount(indices[mine] - start, minlength=end - start)
        assert counts.max() - counts.min() <= 1
        assert passes[mine].max() == (epochs * order.samples_per_epoch[number] - 1) // (end - start)
    # Sources are mixed within an epoch, and passes differ in their order.
    first_half = indices[:62] < 10
    assert 15 < first_half.sum() < 47
    small = indices[(indices < 10)]
    assert len({tuple(small[passes[indices < 10] == number].tolist()) for number in range(50)}) > 40


def test_the_weighted_order_is_the_same_from_wherever_it_is_read() -> None:
    order = SampleOrder([10, 90, 25], [5.0, 3.0, 2.0], seed=9)
    passes, indices = order.samples(0, 1000)
    for first, count in ((0, 1), (124, 3), (333, 100), (999, 1)):
        some_passes, some_indices = order.samples(first, count)
        assert np.array_equal(some_passes, passes[first : first + count])
        assert np.array_equal(some_indices, indices[first : first + count])
    other = SampleOrder([10, 90, 25], [5.0, 3.0, 2.0], seed=10).samples(0, 1000)[1]
    assert (other == indices).mean() < 0.2


def test_a_weighted_trillion_takes_no_longer_than_a_million() -> None:
    def seconds(scale: int) -> float:
        order = SampleOrder([scale, 3 * scale], [1.0, 1.0], seed=2)
        begin = time.perf_counter()
        _, indices = order.samples(7 * scale + 3, 20_000)
        assert indices.min() >= 0 and indices.max() < 4 * scale and len(np.unique(indices)) > 19_000
        return time.perf_counter() - begin

    small, large = (min(seconds(scale) for _ in range(5)) for scale in (10**6, 10**12))
    assert large < 10 * small


def test_a_weight_needs_samples() -> None:
    with pytest.raises(ValueError, match="a source without samples cannot have a weight"):
        SampleOrder([10, 0], [1.0, 1.0], seed=0)


def test_the_weighted_order_stays_the_same_from_version_to_version() -> None:
    passes, indices = SampleOrder([10, 90, 25], [5.0, 3.0, 2.0], seed=42).samples(130, 6)
    assert (passes.tolist(), indices.tolist()) == ([7, 12, 1, 12, 6, 0], [5, 6, 115, 8, 6, 54])
