"""How many pieces the logits of a microbatch are made in. Torch-free: the plan of memory asks too."""

from __future__ import annotations

LARGEST_PIECE_BYTES = 2**29
"""Of logits in fp32. Smaller pieces are slower multiplications, larger ones more memory."""


def num_logit_pieces(num_tokens: int, vocabulary_part: int) -> int:
    """Return the pieces in which `num_tokens` tokens meet the `vocabulary_part` ids that a tp rank has."""
    return -(-num_tokens * vocabulary_part * 4 // LARGEST_PIECE_BYTES)
