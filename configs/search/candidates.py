"""Every layout worth judging for a config on so many GPUs: sizes of the axes, microbatch, recomputation. Torch-free.

Nothing is judged here: which are legal is `configs.rules`, which fit and how fast they are `configs.search.search`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from configs.sections.parallel import ParallelConfig
from configs.sections.train import RecomputeConfig
from configs.stages import Config

MICRO_BATCHES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Split:
    """How the layers are divided over the pipeline: evenly, or with other first and last stages."""

    first: int | None = None
    last: int | None = None
    vocabulary: bool = False


def layouts(config: Config, gpus: int, gpus_per_node: int) -> Iterator[ParallelConfig]:
    """Yield the `parallel` section of every layout; tp stays within a node.

    Sizes are divisors of the GPUs, of the experts and of a stage's layers; what else they must fit is for the rules.
    """
    moe, model = config.model.moe, config.model
    for tp in (size for size in divisors(gpus) if size <= gpus_per_node):
        for pp in (size for size in divisors(gpus // tp) if size <= model.num_layers + 2):
            for split, vpp in _splits(model.num_layers, pp):
                for cp in (size for size in divisors(gpus // (tp * pp)) if size <= config.train.seq_len):
                    for ep in (1,) if moe is None else divisors(moe.num_experts):
                        for etp in (None,) if moe is None or tp == 1 else (None, 1):
                            for sp in (False, True) if tp > 1 else (False,):
                                yield _parallel(config, split, tp=tp, pp=pp, vpp=vpp, cp=cp, ep=ep, etp=etp, sp=sp)


def recomputations(config: Config, *, has_te: bool) -> tuple[RecomputeConfig, ...]:
    """Return what may be recomputed, from nothing to everything."""
    model = config.model
    mlps: list[tuple[str, ...]] = [("mlp",)] if model.moe is None else [("moe_act",), ("moe",)]
    rest: list[tuple[str, ...]] = []
    if has_te:
        small = ("layernorm", "mla_up_proj") if model.mla is not None else ("layernorm",)
        rest = [small, *((*small, *one) for one in mlps)]
    if not has_te and model.moe is not None:
        mlps = [("moe",)]
    parts = [RecomputeConfig.model_validate({"granularity": "selective", "modules": one}) for one in [*mlps, *rest]]
    return (RecomputeConfig(), *parts, RecomputeConfig(granularity="full"))


def divisors(value: int) -> list[int]:
    """Return the divisors of a positive number, ascending."""
    small = [size for size in range(1, int(value**0.5) + 1) if value % size == 0]
    return sorted({*small, *(value // size for size in small)})


def _splits(num_layers: int, pp: int) -> Iterator[tuple[Split, int]]:
    """Yield the ways to divide the layers, with the virtual stages of each.

    Even where that goes; with embedding and output layer counted as layers where that goes; else with other first and
    last stages, as even as can be.
    """
    if pp == 1:
        yield Split(), 1
        return
    is_even = num_layers % pp == 0
    if is_even:
        yield from ((Split(), vpp) for vpp in divisors(num_layers // pp))
    is_counted = (num_layers + 2) % pp == 0
    if is_counted:
        chunks = (num_layers + 2) // pp
        yield from ((Split(vocabulary=True), vpp) for vpp in divisors(chunks) if chunks // vpp >= 2)
    if is_even or is_counted:
        return
    for middle in (num_layers // pp, num_layers // pp + 1):
        last = num_layers - middle * (pp - 1)
        if middle and last > 0:
            yield Split(last=last), 1
        ends = num_layers - middle * (pp - 2)
        if middle and ends >= 2:
            yield Split(first=ends - ends // 2, last=ends // 2), 1


def _parallel(config: Config, split: Split, **sizes: Any) -> ParallelConfig:
    cp = sizes["cp"]
    changed = {
        **sizes,
        "num_layers_in_first_pp_stage": split.first,
        "num_layers_in_last_pp_stage": split.last,
        "vocabulary_counts_as_layers": split.vocabulary,
    }
    if cp == 1:
        changed |= {"cp_attention": "auto", "cp_inner": None}
    return config.parallel.model_copy(update=changed)
