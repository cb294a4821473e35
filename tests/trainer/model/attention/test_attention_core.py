"""Core attention against a float64 softmax: causal, grouped heads, documents, windows, sinks; no seq x seq tensor."""

from __future__ import annotations

from typing import Any

import pytest

from tests.pool import Place
from tests.trainer.model.attention.flash_kernels import stated_flash_kernels

# name: (query length, key length, batch, query heads, key heads, key size, value size, document lengths or None)
SHAPES: dict[str, tuple[Any, ...]] = {
    "causal": (17, 17, 2, 4, 4, 16, 16, None),
    "grouped": (17, 17, 2, 6, 2, 16, 16, None),
    "one_key_head": (17, 17, 2, 4, 1, 16, 16, None),
    "latent": (17, 17, 2, 4, 4, 24, 16, None),
    "documents": (30, 30, 1, 4, 2, 16, 16, (1, 12, 7, 10)),
    "latent_documents": (30, 30, 1, 4, 4, 24, 16, (13, 17)),
    "later_queries": (5, 17, 2, 4, 2, 16, 16, None),
    "one_query": (1, 17, 2, 4, 2, 16, 16, None),
}


def build_attention(
    scale: float | None = None,
    kind: str = "SdpaCoreAttention",
    num_heads: int = 4,
    window: int | None = None,
    has_sinks: bool = False,
) -> Any:
    """Return the module in training mode, without dropout."""
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from trainer.model.attention import core as attention

    config = TransformerConfig(
        num_layers=1,
        hidden_size=16 * num_heads,
        num_attention_heads=num_heads,
        attention_dropout=0.0,
        window_size=window and (window - 1, 0),
        softmax_type="learnable" if has_sinks else "vanilla",
    )
    return getattr(attention, kind)(config, 1, AttnMaskType.causal, "self", softmax_scale=scale)


def reference(query: Any, key: Any, value: Any, scale: float, window: int | None = None, sinks: Any = None) -> Any:
    """Return softmax attention of `[seq, batch, heads, dim]` with the last query seeing the last keys, in float64.

    `sinks [heads]` are logits of one more key each, whose value is zero.
    """
    import torch

    repeats = query.shape[2] // key.shape[2]
    key, value = key.repeat_interleave(repeats, 2), value.repeat_interleave(repeats, 2)
    scores = torch.einsum("qbhd,kbhd->bhqk", query, key) * scale
    sq, sk = scores.shape[-2:]
    behind = torch.arange(sq)[:, None] + sk - sq - torch.arange(sk)
    hidden = (behind < 0) | (behind >= (window or sk))
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks[None, :, None, None].expand(*scores.shape[:3], 1)], dim=-1)
    return torch.einsum("bhqk,kbhd->qbhd", scores.softmax(-1)[..., :sk], value).flatten(2)


def reference_of_documents(parts: list[Any], lengths: tuple[int, ...], *others: Any) -> Any:
    """Return the attention of each document alone, joined; `others` are the further arguments of `reference`."""
    import torch

    pieces = zip(*(part.split(list(lengths)) for part in parts), strict=True)
    return torch.cat([reference(*piece, *others) for piece in pieces])


def attend_varlen(
    query: Any,
    key: Any,
    value: Any,
    bounds_q: Any,
    bounds_k: Any,
    longest_q: int,
    longest_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
) -> Any:
    """Stand for torch's kernel of packed documents, which runs on GPUs alone: what its documentation says it does."""
    import torch

    assert query.shape[2] == key.shape[2] == value.shape[2] and query.shape[2] % 8 == 0, "sizes the kernel refuses"
    left, right = window_size
    assert query.shape[1] == key.shape[1] and bounds_q is bounds_k and right == 0
    lengths = bounds_q.diff().tolist()
    assert longest_q == longest_k == max(lengths)
    parts = [[piece.unsqueeze(1) for piece in part.split(lengths)] for part in (query, key, value)]
    documents = [reference(*piece, scale, None if left < 0 else left + 1) for piece in zip(*parts, strict=True)]
    return torch.cat(documents).squeeze(1).unflatten(-1, (query.shape[1], -1))


def largest_errors_of_flash(
    place: Place, shape: tuple[Any, ...], window: int | None = None, has_sinks: bool = False
) -> list[float]:
    """Return the largest errors of the module for GPUs, with its kernels of documents replaced."""
    from unittest.mock import patch

    with patch("torch.nn.attention.varlen.varlen_attn", attend_varlen), stated_flash_kernels():
        return largest_errors(place, shape, None, "FlashCoreAttention", window, has_sinks)


def largest_errors(
    place: Place,
    shape: tuple[Any, ...],
    scale: float | None,
    kind: str = "SdpaCoreAttention",
    window: int | None = None,
    has_sinks: bool = False,
) -> list[float]:
    """Return the largest absolute error of the output and of each gradient."""
    import torch

    from trainer.model.attention.documents import PackedDocuments

    sq, sk, batch, heads, groups, dim, dim_v, lengths = shape
    torch.manual_seed(1)
    sizes = (sq, batch, heads, dim), (sk, batch, groups, dim), (sk, batch, groups, dim_v)
    exact = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]
    parts = [part.detach().float().requires_grad_() for part in exact]
    used_scale = dim**-0.5 if scale is None else scale
    module, sinks = build_attention(scale, kind, heads, window, has_sinks), None
    if has_sinks:
        sinks = torch.randn(heads, dtype=torch.float64, requires_grad=True)
        module.softmax_offset.data.copy_(sinks)
    further = used_scale, window, sinks
    if lengths is None:
        out, expected = module(*parts, None), reference(*exact, *further)
    else:
        bounds = torch.tensor([0, *lengths]).cumsum(0).int()
        documents = PackedDocuments(
            qkv_format="thd",
            cu_seqlens_q=bounds,
            cu_seqlens_kv=bounds,
            max_seqlen_q=max(lengths),
            bounds=tuple(bounds.tolist()),
        )
        out = module(*(part.squeeze(1) for part in parts), None, packed_seq_params=documents).unsqueeze(1)
        expected = reference_of_documents(exact, lengths, *further)
    weights = torch.randn(expected.shape, dtype=torch.float64)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    if sinks is not None:
        parts, exact = [*parts, module.softmax_offset], [*exact, sinks]
    gradients = [float((ours.grad - theirs.grad).abs().max()) for ours, theirs in zip(parts, exact, strict=True)]
    return [float((out - expected).abs().max()), *gradients]


@pytest.mark.parametrize("name", SHAPES)
def test_equals_float64_softmax(ranks, name):
    (errors,) = ranks.run(largest_errors, SHAPES[name], None)
    assert max(errors) < 2e-5, errors


@pytest.mark.parametrize("name", [*SHAPES, "odd_latent_documents"])
def test_the_module_for_gpus_equals_float64_softmax(ranks, name):
    shape = SHAPES.get(name, (30, 30, 1, 4, 2, 20, 12, (13, 17)))
    (errors,) = ranks.run(largest_errors_of_flash, shape)
    assert max(errors) < 2e-5, errors


# name: (shape, window, whether there are sinks)
WINDOWS = {
    "window": ("grouped", 5, False),
    "window_of_one": ("causal", 1, False),
    "window_longer_than_a_mask_has_rows": ((700, 700, 1, 2, 1, 8, 8, None), 40, False),
    "sinks": ("grouped", None, True),
    "window_and_sinks": ("causal", 7, True),
    "latent": ("latent", 7, True),
    "documents": ("documents", 8, False),  # one is shorter, one is as long
    "documents_and_sinks": ("documents", 8, True),
    "latent_documents_and_sinks": ("latent_documents", None, True),
    "later_queries": ("later_queries", 7, True),
    "one_query": ("one_query", 7, False),
    "hides_nothing": ("causal", 17, False),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_windows_and_sinks_equal_float64_softmax(ranks, name):
    shape, window, has_sinks = WINDOWS[name]
    (errors,) = ranks.run(largest_errors, SHAPES.get(shape, shape), None, "SdpaCoreAttention", window, has_sinks)
    assert len(errors) == 4 + has_sinks and max(errors) < 2e-5, errors


@pytest.mark.parametrize("name", [name for name in WINDOWS if name not in ("hides_nothing",)])
def test_the_module_for_gpus_has_windows_and_sinks(ranks, name):
    shape, window, has_sinks = WINDOWS[name]
    (errors,) = ranks.run(largest_errors_of_flash, SHAPES.get(shape, shape), window, has_sinks)
    assert len(errors) == 4 + has_sinks and max(errors) < 2e-5, errors


def kernels_of_heads(place: Place) -> list[str]:
    """Return the tiles of the module for GPUs by sizes of heads: those of the config, or of keys and of values."""
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from trainer.model.attention.core import FlashCoreAttention

    found = []
    for head_dim, sizes in ((256, {}), (264, {}), (64, {"k_channels": 320, "v_channels": 256}), (512, SMALLER)):
        config = TransformerConfig(num_layers=1, hidden_size=64, num_attention_heads=4, kv_channels=head_dim)
        module = FlashCoreAttention(config, 1, AttnMaskType.causal, "self", **sizes)
        found.append(f"{type(module.tiles).__name__} {module.takes_groups}")
    return found


SMALLER = {"k_channels": 192, "v_channels": 128}


def test_heads_that_flash_attention_does_not_take_have_other_tiles(ranks):
    """Of latent attention, the sizes that are told count, and not the config's."""
    flash, efficient = "FlashTiles True", "EfficientTiles False"
    assert ranks.run(kernels_of_heads) == [[flash, efficient, efficient, flash]]


def test_scale_is_used(ranks):
    (errors,) = ranks.run(largest_errors, SHAPES["causal"], 0.7)
    assert max(errors) < 2e-5, errors


def measure_attention(
    place: Place, seq_len: int, groups: int, dim_v: int, dtype: str, window: int | None = None
) -> tuple[int, list[str]]:
    """Return the largest single allocation in bytes of a forward and backward pass, and the attention kernels used."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    sizes = (seq_len, 1, 4, 16), (seq_len, 1, groups, 16), (seq_len, 1, groups, dim_v)
    parts = [torch.randn(size, dtype=getattr(torch, dtype), requires_grad=True) for size in sizes]
    module = build_attention(window=window)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        module(*parts, None).sum().backward()
    kernels = {event.name for event in profiled.events() if "_scaled_dot_product" in event.name}
    largest = max(event.self_cpu_memory_usage for event in profiled.events())
    return largest, sorted(kernels)


@pytest.mark.parametrize(
    "groups, dim_v, dtype, window",
    [
        (4, 16, "float32", None),
        (2, 16, "float32", None),
        (4, 8, "float32", None),
        (2, 16, "bfloat16", None),
        (2, 16, "float32", 64),
    ],
    ids=["mha", "gqa", "latent", "bf16", "window"],
)
def test_never_a_seq_by_seq_tensor(ranks, groups, dim_v, dtype, window):
    """At 8192 tokens one head's scores alone would take 64 MB as bytes; all inputs together take 6 MB."""
    seq_len = 8192 if dtype == "float32" else 4096
    ((largest, kernels),) = ranks.run(measure_attention, seq_len, groups, dim_v, dtype, window)
    assert kernels and not [name for name in kernels if "math" in name], kernels
    assert largest < seq_len * seq_len / 4, f"{largest} bytes at once"


def refusals(place: Place) -> list[str]:
    """Return what the module says to explicit masks and biases."""
    import torch

    part, mask, said = torch.randn(4, 1, 4, 16), torch.zeros(4, 4, dtype=torch.bool), []
    for arguments in ({"attention_mask": mask}, {"attention_mask": None, "attention_bias": mask}):
        try:
            build_attention()(part, part, part, **arguments)
        except NotImplementedError as error:
            said.append(str(error))
    return said


def test_masks_and_biases_are_refused(ranks):
    (said,) = ranks.run(refusals)
    assert len(said) == 2 and all("masks or biases" in sentence for sentence in said)
