"""Rotary frequencies of the scaling kinds that Megatron-Core lacks, as pure functions. Knows no model class."""

from __future__ import annotations

import math

import torch

from configs.sections.model import RopeConfig


def compute_inverse_frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """Return the fp32 inverse frequencies `[rotary_dim / 2]` in radians per token, scaling applied.

    Sources: Su et al. 2021 (arXiv:2104.09864) eq. 15; linear: Chen et al. 2023 (arXiv:2306.15595); llama3: Llama 3
    report (arXiv:2407.21783) as published with the weights.
    """
    rotary_dim = int(head_dim * rope.fraction)
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim
    plain = 1.0 / rope.base**exponents
    if rope.scaling == "linear":
        return plain / rope.factor
    if rope.scaling == "llama3":
        return _scale_llama3(plain, rope)
    assert rope.scaling == "none", "yarn is Megatron-Core's own"
    return plain


def _scale_llama3(plain: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    """Divide long wavelengths by the factor, keep short ones, interpolate smoothly in between."""
    rotations = rope.original_max_position_embeddings * plain / (2 * math.pi)
    smooth = ((rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return (1 - smooth) * plain / rope.factor + smooth * plain
