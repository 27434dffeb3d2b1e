"""Random orders whose every element is computed on its own: nothing to draw, nothing to keep.

A Feistel network over the smallest even number of bits that holds the size is a bijection whatever its round function;
an image outside of the size is put through again until it falls inside ("cycle walking": Black and Rogaway, Ciphers
with Arbitrary Finite Domains, 2002), which takes under four rounds on average. Element ten million of an order costs
what element one does, so a run resumes at once wherever it stood.
"""

import numpy as np

_ROUNDS = 6
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def shuffled(positions: np.ndarray, sizes: np.ndarray | int, *key: int, salts: np.ndarray | int = 0) -> np.ndarray:
    """Returns where each position of a random order of `sizes` elements points to, int64.

    `positions`, `sizes` and `salts` are int64 of one shape (the last two may be single numbers), each position below
    its size. `key`, the size and the salt together choose the order.
    """
    values = np.array(positions, dtype=np.uint64)
    limits = np.broadcast_to(np.asarray(sizes, dtype=np.uint64), values.shape)
    half = _half_bits(limits)
    mask = (np.uint64(1) << half) - np.uint64(1)
    own = _mix(limits * _GOLDEN + np.broadcast_to(np.asarray(salts, dtype=np.uint64), values.shape))
    keys = [_mix(_combined(key, number) + own) for number in range(_ROUNDS)]
    outside = np.ones(values.shape, dtype=bool)
    while outside.any():
        left, right = values[outside] >> half[outside], values[outside] & mask[outside]
        for one in keys:
            left, right = right, left ^ (_mix(right + one[outside]) & mask[outside])
        values[outside] = (left << half[outside]) | right
        outside = values >= limits
    return values.astype(np.int64)


def _half_bits(limits: np.ndarray) -> np.ndarray:
    """Half of the bits that hold every number below each limit, at least one."""
    bits = np.ceil(np.log2(np.maximum(limits.astype(np.float64), 2.0)))
    return np.maximum((bits.astype(np.uint64) + np.uint64(1)) >> np.uint64(1), np.uint64(1))


def _combined(key: tuple[int, ...], number: int) -> np.uint64:
    """One 64-bit key of the integers in `key` and the round's number."""
    combined = np.zeros(1, dtype=np.uint64)
    for part in (*key, number):
        combined = _mix(combined + np.uint64(part & 0xFFFFFFFFFFFFFFFF) + _GOLDEN)
    return combined[0]


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): each input bit moves about half of the output bits."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
