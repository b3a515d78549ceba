"""Which row stands at which position: a pure function of (seed, position), in constant memory.

Every epoch is another permutation of the rows. The permutation is a keyed Feistel network over the next power of four,
walked along its cycles until it lands inside the range (Black and Rogaway, "Ciphers with arbitrary finite domains",
2002), so that any position of any epoch is found without making the positions before it.
"""

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ROUND_KEYS = np.arange(6, dtype=np.uint64) * _GOLDEN
_CAPACITIES = 4 ** np.arange(1, 32)  # of networks whose halves have 1, 2, ... bits


def row_at(position: int | np.ndarray, rows: int | np.ndarray, seed: int | np.ndarray) -> np.ndarray:
    """The rows at the given positions of the endless shuffled stream.

    Args:
        position: Position(s) counted from the start of training; epoch = position // rows.
        rows: Rows an epoch, at least 1; an array where positions are of several streams.
        seed: Seed of the order; an array likewise.

    Returns:
        (positions,) int64, each in [0, rows).
    """
    positions = np.atleast_1d(np.asarray(position, dtype=np.int64))
    half_bits = (1 + np.searchsorted(_CAPACITIES, rows)).astype(np.uint64)
    epochs = (positions // rows).astype(np.uint64)
    keys = _mix(_mix(np.asarray(seed, dtype=np.uint64) + epochs * _GOLDEN))
    values = (positions % rows).astype(np.uint64)
    limits = np.broadcast_to(np.asarray(rows, dtype=np.uint64), values.shape)
    half_bits = np.broadcast_to(half_bits, values.shape)
    values = _feistel(values, keys, half_bits)
    outside = np.flatnonzero(values >= limits)
    while len(outside):
        values[outside] = _feistel(values[outside], keys[outside], half_bits[outside])
        outside = outside[values[outside] >= limits[outside]]
    return values.astype(np.int64)


def _feistel(values: np.ndarray, keys: np.ndarray, half_bits: np.ndarray) -> np.ndarray:
    """A bijection of [0, 4**half_bits), chosen by the keys."""
    low_mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = values >> half_bits, values & low_mask
    for round_key in _ROUND_KEYS:
        left, right = right, left ^ (_mix(right + keys + round_key) & low_mask)
    return (left << half_bits) | right


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): 64 bits in, 64 well mixed bits out."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
