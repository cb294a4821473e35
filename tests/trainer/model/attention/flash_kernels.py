"""Stands for torch's flash attention, which runs on GPUs alone: what its source says it computes, in float64.

Imported by the workers. Sizes and shapes that the kernels refuse are refused here too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch


@contextlib.contextmanager
def stated_flash_kernels() -> Iterator[list[int]]:
    """Replace the kernels; yield the number of sequences of each forward launch."""
    import torch

    launches: list[int] = []

    def forward(
        query: Any, key: Any, value: Any, bounds_q: Any, bounds_k: Any, longest_q: int, longest_k: int,
        dropout: float, is_causal: bool, wants_mask: bool, **options: Any,
    ) -> tuple[Any, ...]:  # fmt: skip
        assert (dropout, is_causal, wants_mask) == (0.0, False, False)
        check(query, key, value, bounds_q, bounds_k, longest_q, longest_k)
        pieces = list(split(query, key, value, bounds_q, bounds_k))
        launches.append(len(pieces))
        found = [attend(*piece, **options) for piece in pieces]
        outputs = [(weights @ spread(value, query)).transpose(0, 1) for (query, _, value), (weights, _) in
                   zip(pieces, found, strict=True)]  # fmt: skip
        sums = [log_sum for _, log_sum in found]
        if bounds_q is None:
            return torch.stack(outputs).to(query.dtype), torch.stack(sums).float(), None, None, None
        return torch.cat(outputs).to(query.dtype), torch.cat(sums, dim=1).float(), None, None, None

    def backward(
        gradient: Any, query: Any, key: Any, value: Any, output: Any, log_sum: Any, bounds_q: Any, bounds_k: Any,
        longest_q: int, longest_k: int, dropout: float, is_causal: bool, seed: Any, offset: Any, **options: Any,
    ) -> tuple[Any, ...]:  # fmt: skip
        assert (dropout, is_causal) == (0.0, False)
        check(query, key, value, bounds_q, bounds_k, longest_q, longest_k)
        heads, tokens = query.shape[-2], query.shape[-3]
        shape = (heads, tokens) if bounds_q is not None else (len(query), heads, tokens)
        assert log_sum.shape == shape and log_sum.dtype == torch.float32 and log_sum.is_contiguous()
        assert gradient.shape == output.shape == query.shape
        sums = list(log_sum) if bounds_q is None else log_sum.split(bounds_q.diff().tolist(), dim=1)
        given = zip(*split(gradient, output, output, bounds_q, bounds_q), strict=True)
        pieces = zip(split(query, key, value, bounds_q, bounds_k), *list(given)[:2], sums, strict=True)
        found = zip(*(differentiate(*piece, **options) for piece in pieces), strict=True)
        join = torch.stack if bounds_q is None else torch.cat
        return tuple(join(part).to(query.dtype) for part in found)

    aten = torch.ops.aten
    names = {"_flash_attention_forward": forward, "_flash_attention_backward": backward}
    with contextlib.ExitStack() as stack:
        for name, function in names.items():
            getattr(aten, name)  # so that it is there to be put back
            stack.enter_context(patch.object(aten, name, function))
        yield launches


def check(query: Any, key: Any, value: Any, bounds_q: Any, bounds_k: Any, longest_q: int, longest_k: int) -> None:
    """Refuse what the kernels refuse."""
    import torch

    dim = 3 if bounds_q is not None else 4
    assert query.dim() == key.dim() == value.dim() == dim and key.shape == value.shape
    assert query.shape[-1] == key.shape[-1] <= 256 and query.shape[-1] % 8 == 0, "sizes the kernel refuses"
    assert query.shape[-2] % key.shape[-2] == 0
    assert all(part.stride(-1) == 1 for part in (query, key, value))
    if bounds_q is None:
        assert bounds_k is None and (longest_q, longest_k) == (query.shape[1], key.shape[1])
        return
    for bounds, longest, part in ((bounds_q, longest_q, query), (bounds_k, longest_k, key)):
        assert bounds.dtype == torch.int32 and bounds[0] == 0 and bounds[-1] == len(part)
        assert longest == bounds.diff().max() and bounds.diff().min() > 0


def split(query: Any, key: Any, value: Any, bounds_q: Any, bounds_k: Any) -> Iterator[list[Any]]:
    """Yield queries, keys and values `[heads, n, dim]` of each sequence, in float64."""
    if bounds_q is None:
        sequences = zip(query, key, value, strict=True)
    else:
        bounds = (bounds_q, bounds_k, bounds_k)
        sequences = zip(
            *(part.split(one.diff().tolist()) for part, one in zip((query, key, value), bounds, strict=True)),
            strict=True,
        )
    for parts in sequences:
        yield [part.transpose(0, 1).double() for part in parts]


def spread(part: Any, query: Any) -> Any:
    """Return keys or values for every head of the queries."""
    return part.repeat_interleave(len(query) // len(part), dim=0)


def score(query: Any, key: Any, scale: float, window_size_left: int, window_size_right: int) -> Any:
    """Return scores; query i's own key is the i + keys - queries-th, and a side of -1 is seen to the end."""
    import torch

    assert window_size_left >= -1 and window_size_right >= -1
    num_queries, num_keys = query.shape[1], key.shape[1]
    own, place = torch.arange(num_queries)[:, None] + num_keys - num_queries, torch.arange(num_keys)
    seen = torch.ones(num_queries, num_keys, dtype=torch.bool)
    if window_size_left >= 0:
        seen &= place >= own - window_size_left
    if window_size_right >= 0:
        seen &= place <= own + window_size_right
    return (query @ spread(key, query).transpose(1, 2) * scale).masked_fill(~seen, float("-inf"))


def attend(query: Any, key: Any, value: Any, **options: Any) -> tuple[Any, Any]:
    """Return the weights and the log-sum-exp of one sequence."""
    scores = score(query, key, **options)
    return scores.softmax(-1), scores.logsumexp(-1)


def differentiate(parts: list[Any], gradient: Any, output: Any, log_sum: Any, **options: Any) -> list[Any]:
    """Return the gradients `[n, heads, dim]` of queries, keys and values, from the output and sum over all keys.

    Dao 2023 (arXiv:2307.08691), algorithm 2.
    """
    query, key, value = parts
    weights = (score(query, key, **options) - log_sum.double().unsqueeze(-1)).exp()
    of_weights = gradient @ spread(value, query).transpose(1, 2)
    of_scores = weights * (of_weights - (gradient * output).sum(-1, keepdim=True)) * options["scale"]
    of_query = of_scores @ spread(key, query)
    groups = len(query) // len(key)
    of_key, of_value = (
        (part.transpose(1, 2) @ by).unflatten(0, (-1, groups)).sum(1)
        for part, by in ((of_scores, query), (weights, gradient))
    )
    return [one.transpose(0, 1) for one in (of_query, of_key, of_value)]
