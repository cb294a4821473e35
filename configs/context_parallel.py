"""How context-parallel ranks share attention, as plain data. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator

from configs.fp8 import uses_te_layers
from configs.stages import Config


def resolve_cp_attention(config: Config, *, has_te: bool) -> str:
    """Return the method that `parallel.cp_attention` means on a machine with or without Transformer Engine.

    Transformer Engine splits each document for itself, so that rows of documents, split as a whole, are for ours; so
    are windows and sinks, which its ring has not.
    """
    model = config.model
    if config.parallel.cp_attention != "auto":
        return config.parallel.cp_attention
    is_plain = not config.has_document_mask and model.window_size is None and not model.attention_sinks
    return "te" if uses_te_layers(config, has_te=has_te) and is_plain else "ring"


def uses_te_attention(config: Config, *, use_te: bool) -> bool:
    """Return whether Transformer Engine's layers keep their own core attention; `use_te` says whether they are used.

    Its sinks know no packed documents and no ring of ranks, so that all sinks are ours.
    """
    if not use_te or config.model.attention_sinks:
        return False
    return config.parallel.cp == 1 or resolve_cp_attention(config, has_te=use_te) == "te"


def check_cp_attention(config: Config, *, has_te: bool) -> Iterator[str]:
    """Yield what is wrong with the method that is asked for."""
    parallel, model = config.parallel, config.model
    method = resolve_cp_attention(config, has_te=has_te)
    if parallel.cp_inner is not None and method != "hierarchical":
        yield f"parallel.cp_inner: is for parallel.cp_attention=hierarchical, which is {method}; set it to null"
    if parallel.cp == 1:
        return
    if method == "te" and not uses_te_layers(config, has_te=has_te):
        yield "parallel.cp_attention: te needs layers of Transformer Engine; a value that would work: ring"
    if method == "te" and config.has_document_mask:
        yield (
            "parallel.cp_attention: te splits each document for itself, and data.document_mask packs documents of any "
            "length; a value that would work: ring"
        )
    if method == "te" and (model.window_size is not None or model.attention_sinks):
        field = "window_size" if model.window_size is not None else "attention_sinks"
        yield f"parallel.cp_attention: te cannot do model.{field}; a value that would work: ring"
    if model.attention_dropout > 0 and method != "te":
        yield (
            f"model.attention_dropout: {model.attention_dropout} is not drawn alike on the ranks of parallel.cp="
            f"{parallel.cp}; a value that would work: 0.0"
        )
    if method == "hierarchical":
        works = [size for size in range(2, parallel.cp) if parallel.cp % size == 0]
        if parallel.cp_inner not in works:
            advice = f"a value that would work: {works[0]}" if works else "set parallel.cp_attention=ring"
            what = "is needed for" if parallel.cp_inner is None else f"{parallel.cp_inner} does not suit"
            yield (
                f"parallel.cp_inner: {what} parallel.cp_attention=hierarchical with parallel.cp={parallel.cp}, which "
                f"it must divide into several groups of several neighbours; {advice}"
            )
            return
    if method in ("ulysses", "hierarchical"):
        yield from _check_heads(config, parallel.cp if method == "ulysses" else parallel.cp_inner or 1)


def _check_heads(config: Config, num_ranks: int) -> Iterator[str]:
    """Yield whether so many ranks cannot divide the heads of a tp rank among them."""
    model, tp = config.model, config.parallel.tp
    heads = model.num_attention_heads // tp
    groups = heads if model.mla is not None else (model.num_query_groups or model.num_attention_heads) // tp
    if heads % num_ranks or (groups % num_ranks and num_ranks % max(groups, 1)):
        name = "parallel.cp_attention" if config.parallel.cp_attention == "ulysses" else "parallel.cp_inner"
        yield (
            f"{name}: {num_ranks} ranks cannot divide {heads} query heads and {groups} key-value heads (of a tp rank) "
            "among them; a value that would work: parallel.cp_attention=ring"
        )
