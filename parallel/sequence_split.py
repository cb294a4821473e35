"""How context parallelism splits a sequence over its ranks. Torch-free.

Every row is cut into 2*cp chunks of equal length; rank r has chunks r and 2*cp-1-r, so that under a causal mask all
ranks have the same work (the zig-zag split of Llama 3, arXiv:2407.21783 section 3.3.2, and of Megatron-Core).
Documents need no split of their own: a chunk may hold many, and a document may lie in many chunks.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Segment:
    """Tokens that lie together, both on the rank that holds them and in the whole."""

    local: int
    """Place of the first among the rank's tokens."""
    start: int
    """Place of the first among all tokens: rows laid end to end."""
    length: int

    @property
    def end(self) -> int:
        """Place after the last among all tokens."""
        return self.start + self.length


def segments_of(cp_rank: int, cp_size: int, *, num_rows: int, seq_len: int) -> tuple[Segment, ...]:
    """Return where the tokens of a rank lie in `num_rows` rows of `seq_len`, which 2*cp_size must divide.

    A rank's tokens are its rows laid end to end, each its two chunks. With `cp_size` 1 a row is one segment.
    """
    if cp_size == 1:
        return tuple(Segment(row * seq_len, row * seq_len, seq_len) for row in range(num_rows))
    assert seq_len % (2 * cp_size) == 0, "configs.rules.layout refuses such a length"
    length = seq_len // (2 * cp_size)
    return tuple(
        Segment((2 * row + place) * length, row * seq_len + chunk * length, length)
        for row in range(num_rows)
        for place, chunk in enumerate((cp_rank, 2 * cp_size - 1 - cp_rank))
    )
