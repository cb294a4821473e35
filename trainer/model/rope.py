"""Rotary frequencies of the scaling kinds that Megatron-Core lacks, as pure functions. Knows no model class."""

from __future__ import annotations

import math

import torch

from configs.sections.model import RopeConfig


def compute_inverse_frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """Return the fp32 inverse frequencies `[rotary_dim / 2]` in radians per token, scaling applied.

    Sources: Su et al. 2021 (arXiv:2104.09864) eq. 15; linear: Chen et al. 2023 (arXiv:2306.15595); llama3: Llama 3
    report (arXiv:2407.21783) as published with the weights. dynamic: those up to the original length.
    """
    exponents = _exponents(rope, head_dim, torch.float32)
    plain = 1.0 / rope.base**exponents
    if rope.scaling == "linear":
        return plain / rope.factor
    if rope.scaling == "llama3":
        return _scale_llama3(plain, rope)
    assert rope.scaling in ("none", "dynamic"), "yarn is Megatron-Core's own"
    return plain


def compute_dynamic_frequencies(rope: RopeConfig, head_dim: int, lengths: torch.Tensor) -> torch.Tensor:
    """Return the fp32 inverse frequencies `[n, rotary_dim / 2]` of sequences of `lengths [n]` tokens, on their device.

    Dynamic NTK scaling (arXiv:2309.00071, definition 1 and section 3.3) as `_compute_dynamic_ntk_parameters` of
    transformers 5.23 has it:
    with s the factor, L the original length and d the rotated dimensions, a sequence of l > L tokens has the base
    b * (s * l / L - (s - 1)) ** (d / (d - 2)), a shorter one the base b. Computed in float64.
    """
    exponents = _exponents(rope, head_dim, torch.float64, lengths.device)
    rotary_dim = 2 * len(exponents)
    original = rope.original_max_position_embeddings
    stretch = rope.factor * lengths.double().clamp(min=original) / original - (rope.factor - 1)
    bases = rope.base * stretch ** (rotary_dim / (rotary_dim - 2))
    return (bases.unsqueeze(1) ** -exponents).float()


def yarn_coefficient(rope: RopeConfig) -> float:
    """Return the `mscale` with which Megatron-Core comes to `rope.attention_factor`, and the given one without that.

    It rotates by (0.1 * mscale * ln(factor) + 1) / (0.1 * mscale_all_dim * ln(factor) + 1), arXiv:2309.00071 eq. 22.
    """
    if rope.attention_factor is None:
        return rope.mscale
    slope = 0.1 * math.log(rope.factor)
    return (rope.attention_factor * (rope.mscale_all_dim * slope + 1) - 1) / slope


def _exponents(rope: RopeConfig, head_dim: int, dtype: torch.dtype, device: torch.device | None = None) -> torch.Tensor:
    rotary_dim = int(head_dim * rope.fraction)
    return torch.arange(0, rotary_dim, 2, dtype=dtype, device=device) / rotary_dim


def _scale_llama3(plain: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    """Divide long wavelengths by the factor, keep short ones, interpolate smoothly in between."""
    rotations = rope.original_max_position_embeddings * plain / (2 * math.pi)
    smooth = ((rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return (1 - smooth) * plain / rope.factor + smooth * plain
