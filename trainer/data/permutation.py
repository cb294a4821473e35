"""Shuffles in constant memory: the place of any index under a keyed permutation, the same on every machine and version.

Knows nothing of documents or windows. A random-number generator would need the whole permutation in memory and does
not promise the same stream from one library version to the next; a resumed run must have it.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
from numpy.typing import NDArray

_NUM_ROUNDS = 8
_CHUNK = 1 << 20  # keeps the temporaries of a 1e8-document shuffle at tens of MB


def permute(index: NDArray[np.int64], size: int, key: str) -> NDArray[np.int64]:
    """Compute where each `index` goes under the permutation of `range(size)` named by `key`.

    `index` int64 [n], each in [0, size); returns int64 [n]. A Feistel network over Z_a x Z_b with a*b just above
    `size` (Black and Rogaway 2002, "Ciphers with arbitrary finite domains", generalised Feistel and cycle walking).
    """
    if index.size and (int(index.min()) < 0 or int(index.max()) >= size):
        raise ValueError(f"indices must lie in [0, {size}), got {int(index.min())}..{int(index.max())}")
    keys = _round_keys(key)
    rows = math.isqrt(max(size - 1, 0)) + 1
    columns = -(-size // rows) if size else 1
    permuted = np.empty(index.shape, dtype=np.int64)
    for start in range(0, index.size, _CHUNK):
        chunk = slice(start, start + _CHUNK)
        permuted[chunk] = _walk(index[chunk].astype(np.uint64), size, rows, columns, keys).astype(np.int64)
    return permuted


def _round_keys(key: str) -> NDArray[np.uint64]:
    """Derive one 64-bit key per round from the name of the permutation."""
    return np.frombuffer(hashlib.sha512(key.encode()).digest(), dtype="<u8")[:_NUM_ROUNDS].astype(np.uint64)


def _walk(
    values: NDArray[np.uint64], size: int, rows: int, columns: int, keys: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    """Apply the network until every value has landed below `size` (cycle walking; fewer than sqrt(size) values do)."""
    values = _network(values, rows, columns, keys)
    outside = np.flatnonzero(values >= size)
    while outside.size:
        values[outside] = _network(values[outside], rows, columns, keys)
        outside = outside[values[outside] >= size]
    return values


def _network(values: NDArray[np.uint64], rows: int, columns: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply the rounds of the network once: a bijection of range(rows * columns)."""
    num_rows, num_columns = np.uint64(rows), np.uint64(columns)
    left, right = values // num_columns, values % num_columns
    for number, key in enumerate(keys):
        if number % 2 == 0:
            left = (left + _mix(right ^ key) % num_rows) % num_rows
        else:
            right = (right + _mix(left ^ key) % num_columns) % num_columns
    return left * num_columns + right


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hash 64 bits to 64 bits: the finaliser of splitmix64 (Steele, Lea, Flood 2014); overflow wraps by intent."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
