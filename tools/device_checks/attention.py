"""The model's core attention, forward and backward, against softmax(Q K^T / sqrt(d)) V in float64 on the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from configs.stages import Config
from tools.device_checks.engine import build_config
from tools.device_checks.outcome import Outcome, judge

if TYPE_CHECKING:
    import torch

    from parallel.mesh import Mesh

TOLERANCES = {"fp32": 5e-5, "bf16": 2e-2, "fp16": 3e-3}
"""Largest error of the output and of each gradient relative to the largest value of each."""
BATCH_SIZE = 2
DOCUMENT_LENGTHS = (1, 37, 64, 90)
"""Of one packed row, in tokens; not multiples of any kernel's block."""


@dataclass(frozen=True)
class Case:
    """One shape of attention; `head_dim_v` differs from `head_dim` in MLA alone."""

    name: str
    num_heads: int
    num_groups: int
    head_dim: int
    head_dim_v: int
    is_packed: bool = False
    window: int | None = None
    """Keys that a query sees, itself among them."""
    has_sinks: bool = False
    by_tiles: bool = False
    """As where ranks share a sequence: in two pieces, of which the later one sees the earlier one too."""


CASES = (
    Case("causal", 4, 4, 64, 64),
    Case("grouped queries", 8, 2, 128, 128),
    Case("documents", 8, 2, 64, 64, is_packed=True),
    Case("MLA", 4, 4, 192, 128),
    Case("MLA documents", 4, 4, 192, 128, is_packed=True),
    Case("window", 8, 2, 64, 64, window=24),
    Case("window documents", 8, 2, 64, 64, is_packed=True, window=24),
    Case("window sinks", 8, 2, 64, 64, window=24, has_sinks=True),
    Case("window sinks documents", 8, 2, 64, 64, is_packed=True, window=24, has_sinks=True),
    Case("wide heads", 4, 2, 320, 320),
    Case("tiles", 8, 2, 128, 128, by_tiles=True),
    Case("tiles of documents", 8, 2, 64, 64, is_packed=True, by_tiles=True),
    Case("tiles of MLA documents", 4, 4, 192, 128, is_packed=True, by_tiles=True),
    Case("tiles of wide heads", 4, 2, 320, 320, is_packed=True, by_tiles=True),
)


def check_attention(mesh: Mesh, compute: str, *, use_te: bool, seq_len: int = 256) -> Outcome:
    """Compare every case's output and gradients with float64; `use_te` chooses Transformer Engine's kernels."""
    name = f"{compute} attention{' (Transformer Engine)' if use_te else ''}"
    refusal = mesh.platform.check_precision(compute)
    if refusal:
        return Outcome(name, "skipped", refusal)
    # Transformer Engine shares a sequence in its own way, and takes no heads wider than 256.
    cases = [case for case in CASES if not use_te or not (case.by_tiles or case.head_dim > 256)]
    errors = {case.name: _measure_error(mesh, compute, case, seq_len, use_te) for case in cases}
    limit = TOLERANCES[compute]
    # `not <=`, so that a NaN is a problem too
    problems = [f"{case}: error {error:.1e} above {limit:g}" for case, error in errors.items() if not error <= limit]
    worst = max(errors.values())
    figures = {f"error {case}": error for case, error in errors.items()}
    return judge(name, problems, f"{len(errors)} cases, largest error {worst:.1e} (limit {limit:g})", figures)


def _measure_error(mesh: Mesh, compute: str, case: Case, seq_len: int, use_te: bool) -> float:
    """Return the largest relative error over the output and the gradients of query, key, value and sinks."""
    import torch
    from megatron.core.transformer.enums import AttnMaskType

    from parallel.precision import DTYPES

    core, dtype = _build_core_attention(mesh, compute, case, use_te), DTYPES[compute]
    lengths = DOCUMENT_LENGTHS if case.is_packed else (seq_len,)
    rows = (sum(lengths),) if case.is_packed else (seq_len, BATCH_SIZE)
    generator = torch.Generator().manual_seed(17)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    query = draw(*rows, case.num_heads, case.head_dim)
    key = draw(*rows, case.num_groups, case.head_dim)
    value = draw(*rows, case.num_groups, case.head_dim_v)
    slope = draw(*rows, case.num_heads * case.head_dim_v)
    sinks = [draw(case.num_heads)] if case.has_sinks else []
    expected = _with_gradients(
        lambda *inputs: _reference(*inputs, lengths=lengths, window=case.window),
        [query, key, value, *sinks],
        slope,
        torch.float64,
    )
    packed = _pack(lengths, mesh.device) if case.is_packed else None
    for drawn in sinks:
        core.softmax_offset.data.copy_(drawn)
    on_device = [part.to(mesh.device) for part in (query, key, value)]

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if case.by_tiles:
            return _attend_by_tiles(core.tiles, q, k, v, lengths)
        return core(q, k, v, None, attn_mask_type=AttnMaskType.causal, packed_seq_params=packed)

    found = _with_gradients(attend, on_device, slope.to(mesh.device), dtype)
    found += [core.softmax_offset.grad for _ in sinks]
    return max(
        float((one.cpu().double().reshape(other.shape) - other).abs().max() / other.abs().max())
        for one, other in zip(found, expected, strict=True)
    )


def _with_gradients(attend: Any, inputs: list[torch.Tensor], slope: torch.Tensor, dtype: Any) -> list[torch.Tensor]:
    """Return the output and the gradients of (output * slope).sum() by the inputs, all computed in `dtype`."""
    leaves = [part.detach().to(dtype).requires_grad_() for part in inputs]
    output = attend(*leaves)
    output.backward(slope.to(dtype).reshape(output.shape))
    return [output.detach(), *(leaf.grad for leaf in leaves)]


def _reference(
    query: Any, key: Any, value: Any, sinks: Any = None, *, lengths: tuple[int, ...], window: int | None
) -> torch.Tensor:
    """Attend causally in each document of `[seq, (batch,) heads, dim]` by the definition (arXiv:1706.03762, eq. 1).

    A query sees `window` keys; `sinks [heads]` are logits of keys whose value is zero.
    """
    import torch

    repeats = query.shape[-2] // key.shape[-2]
    key, value = key.repeat_interleave(repeats, dim=-2), value.repeat_interleave(repeats, dim=-2)
    outputs, start = [], 0
    for length in lengths:
        q, k, v = (part[start : start + length].movedim(0, -2) for part in (query, key, value))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5  # [(batch,) heads, seq, seq]
        behind = torch.arange(length)[:, None] - torch.arange(length)
        scores = scores.masked_fill((behind < 0) | (behind >= (window or length)), float("-inf"))
        if sinks is not None:
            scores = torch.cat([scores, sinks[:, None, None].expand(*scores.shape[:-1], 1)], dim=-1)
        outputs.append((scores.softmax(-1)[..., :length] @ v).movedim(-2, 0))
        start += length
    return torch.cat(outputs).flatten(-2)


def _attend_by_tiles(tiles: Any, query: Any, key: Any, value: Any, lengths: tuple[int, ...]) -> torch.Tensor:
    """Attend on the kernels of shared sequences, here two pieces on one rank, in the shapes of the core attention."""
    from itertools import accumulate

    from parallel.sequence_split import Segment
    from trainer.model.attention.ring import RingAttention
    from trainer.model.attention.tiles import plan_tiles

    half, rest = len(query) // 2, len(query) - len(query) // 2
    pieces = [Segment(0, 0, half), Segment(half, half, rest)]
    plan = [plan_tiles(pieces, pieces, (0, *accumulate(lengths)), fewest_packed=tiles.fewest_packed)]
    is_packed = query.dim() == 3  # [seq, (batch,) heads, dim] -> [batch, heads, seq, dim]
    parts = [(one.unsqueeze(1) if is_packed else one).permute(1, 2, 0, 3) for one in (query, key, value)]
    output = RingAttention.apply(*parts, None, plan, None, tiles, query.shape[-1] ** -0.5).permute(2, 0, 1, 3)
    return output.squeeze(1).flatten(1) if is_packed else output.flatten(2)


def _pack(lengths: tuple[int, ...], device: Any) -> Any:
    import torch

    from trainer.model.attention.documents import PackedDocuments

    ends = torch.tensor((0, *lengths)).cumsum(0)
    bounds = ends.to(torch.int32).to(device)
    return PackedDocuments(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
        bounds=tuple(ends.tolist()),
    )


def _build_core_attention(mesh: Mesh, compute: str, case: Case, use_te: bool) -> Any:
    """Return the core attention that a model of this shape is built with."""
    from parallel.seeding import seed_everything
    from trainer.engine.kernels import replace_kernels
    from trainer.model.build import build_model_chunks

    replace_kernels(mesh.platform)
    seed_everything(17, mesh.pp_rank, mesh.ep_size)  # weights are drawn from generators that must have been seeded
    chunk = build_model_chunks(_build_config(compute, case), mesh, use_te=use_te)[0]
    return chunk.decoder.layers[0].self_attention.core_attention


def _build_config(compute: str, case: Case) -> Config:
    model: dict[str, Any] = {
        "num_layers": 1,
        "hidden_size": 128,
        "ffn_hidden_size": 128,
        "num_attention_heads": case.num_heads,
        "vocab_size": 128,
        "window_size": case.window,
        "attention_sinks": case.has_sinks,
    }
    if case.head_dim_v == case.head_dim:
        model |= {"num_query_groups": case.num_groups, "head_dim": case.head_dim}
    else:
        rope_dim = case.head_dim - case.head_dim_v
        sizes = {"qk_nope_head_dim": case.head_dim_v, "qk_rope_head_dim": rope_dim, "v_head_dim": case.head_dim_v}
        model["mla"] = {"q_lora_rank": 32, "kv_lora_rank": 32, **sizes}
    return build_config(compute, model)
