"""A shuffle of any length that is computed, not stored."""

from __future__ import annotations

import math
from typing import overload

import numpy as np
import numpy.typing as npt

# Four rounds of a Feistel network are indistinguishable from a random permutation if the round function is random
# (Luby and Rackoff, 1988). The halves here are small and the mix is only a good hash, so there are some to spare.
_ROUNDS = 6


class Permutation:
    """A bijection of ``range(length)`` in O(1) memory: a Feistel network whose left half counts modulo ``a``, the
    right one modulo ``b``, where a * b is the smallest near-square that holds ``length``; a number that lands outside
    goes through again (cycle walking), fewer than one in a hundred from a length of 10,000 on.

    Args:
        length: 1 to 2**62.
        key: numbers from 0 on, such as (seed, epoch, source); one that differs gives an unrelated order.

    Raises:
        ValueError: the length is out of range.
    """

    def __init__(self, length: int, key: tuple[int, ...]) -> None:
        if not 1 <= length <= 1 << 62:
            raise ValueError(f"A permutation has 1 to 2**62 elements, not {length}.")
        self.length = length
        root = math.isqrt(length - 1) + 1
        self._left, self._right = np.uint64(root), np.uint64(-(-length // root))
        self._keys = np.random.SeedSequence(key).generate_state(_ROUNDS, np.uint64)

    @overload
    def __call__(self, index: int) -> int: ...

    @overload
    def __call__(self, index: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]: ...

    def __call__(self, index: int | npt.NDArray[np.int64]) -> int | npt.NDArray[np.int64]:
        """Where each index goes: an int for an int, int64 (N,) for int64 (N,).

        Raises:
            IndexError: an index is outside ``range(length)``.
        """
        if isinstance(index, int):
            return int(self(np.array([index], np.int64))[0])
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < self.length:
            raise IndexError(f"Indices {index.min()} to {index.max()} are not all in range({self.length}).")
        places = self._network(index.astype(np.uint64))
        while len(outside := np.flatnonzero(places >= np.uint64(self.length))):
            places[outside] = self._network(places[outside])
        return places.astype(np.int64)

    def _network(self, places: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        """One pass: uint64 (N,) below a * b to the same."""
        left, right = places // self._right, places % self._right
        for even, odd in self._keys.reshape(-1, 2):
            left = (left + _mix(right + even) % self._left) % self._left
            right = (right + _mix(left + odd) % self._right) % self._right
        return left * self._right + right


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014; constants of Stafford's mix 13); wraps at 64 bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
