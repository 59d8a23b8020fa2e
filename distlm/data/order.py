"""Which sample comes when, and random numbers that depend on counters alone; numpy only, no state, O(1) memory.

The order is a function of (seed, epoch, global sample number): the same for every number of workers, and a run resumes
at any sample without reading those before it. Nothing here is meant for cryptography.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike, NDArray

Int64s = NDArray[np.int64]
UInt64s = NDArray[np.uint64]

_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_ORDER_STREAM, _SOURCE_STREAM = -1, -2  # the streams of `uniform` that callers choose are 0 and above
# A Feistel network of few rounds over very few bits is far from uniform; walking through a larger domain mends that.
_MIN_DOMAIN_BITS = 6


def _mix(value: UInt64s) -> UInt64s:
    """SplitMix64's bijective finalizer; Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators"."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _hash(*counters: ArrayLike) -> UInt64s:
    """One 64-bit hash for each tuple of integer counters; the counters broadcast, and their order matters."""
    state = np.zeros(1, np.uint64)  # an array, not a scalar: numpy warns when scalars wrap around
    for counter in counters:
        state = _mix((state + _GOLDEN_GAMMA) ^ _as_uint64(counter))
    return state


def _as_uint64(counter: ArrayLike) -> UInt64s:
    if isinstance(counter, int):
        return np.asarray([counter % 2**64], np.uint64)
    return np.atleast_1d(np.asarray(counter, np.int64)).view(np.uint64)


_ROUND_CONSTANTS = _hash(np.arange(6))


def uniform(seed: int, epoch: ArrayLike, index: ArrayLike, position: ArrayLike, stream: int) -> NDArray[np.float64]:
    """Random numbers in [0, 1) that are a function of the arguments alone.

    `epoch`, `index` (of the sample) and `position` (in the sample) are integers that broadcast against each other:
    shapes [n, 1], [n, 1] and [length] give [n, length]. `stream` separates the uses that share these counters. The
    result has at least one dimension.
    """
    return (_hash(seed, stream, epoch, index, position) >> np.uint64(11)) * np.float64(2.0**-53)


def permute(index: ArrayLike, n: int, seed: int, epoch: ArrayLike) -> Int64s:
    """Where a pseudo-random permutation of [0, n), chosen by seed and epoch, sends each of `index`.

    An unbalanced Feistel network permutes the integers below a power of two; what falls outside [0, n) is sent through
    again until it falls inside ("cycle walking"; Black & Rogaway 2002, "Ciphers with arbitrary finite domains"), less
    than twice on average unless n is tiny. `epoch` is one integer or one for each index. Holds for n up to 2**62.
    Raises ValueError where an index is outside [0, n).
    """
    value = np.atleast_1d(np.asarray(index, np.int64))
    if value.size and not (0 <= value.min() and value.max() < n):
        raise ValueError(f"indices must be in [0, {n}), not in [{value.min()}, {value.max()}]")
    bits = max(_MIN_DOMAIN_BITS, (n - 1).bit_length())
    key = np.broadcast_to(_hash(seed, _ORDER_STREAM, epoch), value.shape)
    result = _feistel(value.view(np.uint64), key, bits)
    while (outside := result >= np.uint64(n)).any():
        result[outside] = _feistel(result[outside], key[outside], bits)
    return result.view(np.int64)


def _feistel(value: UInt64s, key: UInt64s, bits: int) -> UInt64s:
    """A permutation of [0, 2**bits) for each key. The halves differ by one bit where `bits` is odd, and change places
    in each round, so that after an even number of rounds their widths are as at the start."""
    left_bits, right_bits = np.uint64(bits // 2), np.uint64(bits - bits // 2)
    left, right = value >> right_bits, value & _ones(right_bits)
    for round_constant in _ROUND_CONSTANTS:
        left, right = right, left ^ (_mix(right ^ key ^ round_constant) & _ones(left_bits))
        left_bits, right_bits = right_bits, left_bits
    return (left << right_bits) | right


def _ones(bits: np.uint64) -> np.uint64:
    return (np.uint64(1) << bits) - np.uint64(1)


def samples(first: int, count: int, n: int, seed: int, shuffle: bool = True) -> tuple[Int64s, Int64s]:
    """The global samples first, first + 1, ..., first + count - 1 of a training on n samples: (epoch, index) of each.

    Samples are numbered from the start of the training, and each epoch takes every index once. Without `shuffle` an
    epoch goes through the indices in their own order, as evaluation does.
    """
    epoch, index = np.divmod(np.arange(first, first + count, dtype=np.int64), n)
    return epoch, permute(index, n, seed, epoch) if shuffle else index


class SampleOrder:
    """The order of a training on several sources, of which source i holds `sizes[i]` samples.

    Samples are numbered through the sources, one after the other. An epoch has as many samples as all sources hold.
    Without `weights` it takes each of them once. With weights, source i gives `samples_per_epoch[i]` of them, its share
    of the weights; it is gone through evenly, in a new order each time, and its next pass begins where its last one has
    ended, in the middle of an epoch or not. Raises ValueError where a source with a weight is empty.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] | None, seed: int) -> None:
        self.sizes = list(sizes)
        self.num_samples = sum(sizes)
        """In an epoch."""
        self.samples_per_epoch = self.sizes if weights is None else _apportion(self.num_samples, weights)
        self._is_weighted = weights is not None
        self._seed = seed
        self._source_seeds = [int(_hash(seed, _SOURCE_STREAM, number)[0]) for number in range(len(self.sizes))]
        if weights is not None and not all(self.sizes):
            raise ValueError("a source without samples cannot have a weight")

    def samples(self, first: int, count: int) -> tuple[Int64s, Int64s]:
        """The samples first, first + 1, ..., first + count - 1 of the training: (pass, index) of each.

        `pass` counts how often the source of the sample was gone through before; no pair comes twice.
        """
        epochs, places = samples(first, count, self.num_samples, self._seed)
        if not self._is_weighted:
            return epochs, places
        passes, indices = np.empty_like(places), np.empty_like(places)
        ends = np.cumsum(self.samples_per_epoch)
        sources = np.searchsorted(ends, places, side="right")
        for number in np.unique(sources).tolist():
            chosen = sources == number
            size, per_epoch = self.sizes[number], self.samples_per_epoch[number]
            # How many samples of this source come before, in earlier epochs and in the order of this one.
            before = epochs[chosen] * per_epoch + places[chosen] - (ends[number] - per_epoch)
            passes[chosen], position = np.divmod(before, size)
            own_index = permute(position, size, self._source_seeds[number], passes[chosen])
            indices[chosen] = sum(self.sizes[:number]) + own_index
        return passes, indices


def _apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers that add up to the total in proportion to the weights, each at least 1 (largest remainders)."""
    exact = [Fraction(weight) for weight in weights]
    scale = Fraction(total) / sum(exact)
    shares = [scale * weight for weight in exact]
    counts = [max(1, int(share)) for share in shares]
    # Those with the largest remainders round up; where the floor of 1 has given too much, the largest give back.
    by_remainder = sorted(range(len(shares)), key=lambda i: (counts[i] - shares[i], i))
    for number in by_remainder[: max(0, total - sum(counts))]:
        counts[number] += 1
    while sum(counts) > total:
        counts[counts.index(max(counts))] -= 1
    return counts
