"""SwiGLU, RMSNorm, rotation and the largest logit in fewer passes: torch's and Megatron-Core's results bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.pool import Place


def run_both(ours: Callable[..., Any], theirs: Callable[..., Any], inputs: list[Any], residual: bool) -> list[bool]:
    """Return whether output and all gradients are equal; with `residual` the first input is added to the output."""
    import torch

    found = []
    for function in (ours, theirs):
        leaves = [one.detach().clone().requires_grad_() for one in inputs]
        begun = [leaves[0] * 3.0, *leaves[1:]]  # gradients meet in a tensor between, as in a layer
        output = function(*begun)
        output = output + begun[0] if residual else output
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
        (output * weights).sum().backward()
        found.append([output, *(one.grad for one in leaves)])
    return [torch.equal(one, other) for one, other in zip(*found, strict=True)]


def random(*shape: int, dtype: str = "float32") -> Any:
    """Return random values of a seed that depends on the shape."""
    import torch

    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(getattr(torch, dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("inputs", ["alone", "bias", "weights"])
def test_swiglu(inputs, dtype):
    import torch

    from trainer.model.fewer_passes import swiglu, weighted_swiglu

    def glu(halves: Any) -> Any:  # as in megatron.core.transformer.mlp
        gate, up = torch.chunk(halves, 2, dim=-1)
        return torch.nn.functional.silu(gate) * (up + 0.0)

    halves = random(6, 3, 22, dtype=dtype)
    if inputs == "alone":
        equal = run_both(lambda x: swiglu(x, None), glu, [halves], False)
    elif inputs == "bias":
        equal = run_both(swiglu, lambda x, bias: glu(x + bias), [halves, random(22, dtype=dtype)], False)
    else:  # a router's weights are fp32
        pair = [halves, random(6, 3, 1)]
        equal = run_both(
            lambda x, weights: weighted_swiglu(x, None, weights), lambda x, w: (glu(x) * w).to(x.dtype), pair, False
        )
    assert all(equal), equal


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(40, 2, 96), (33, 64)])
def test_rms_norm_before_a_residual(shape, dtype):
    import torch

    from trainer.model.fewer_passes import rms_norm

    torch_norm = torch.rms_norm
    inputs = [random(*shape, dtype=dtype), random(shape[-1], dtype=dtype)]
    equal = run_both(
        lambda x, weight: rms_norm(x, shape[-1:], weight, 1e-5),
        lambda x, weight: torch_norm(x, shape[-1:], weight, 1e-5),
        inputs,
        True,
    )
    assert all(equal), equal


def rotate_rows_both_ways(place: Place, dtype: str, options: dict[str, Any]) -> list[bool]:
    """Compare rotations of queries that are a slice of a projection's output."""
    from trainer.model import rotate

    angles = random(24, 1, 1, 12)
    return run_both(
        lambda x: rotate.rotate_rows(x[..., :4, :], angles, **options),
        lambda x: rotate._rotate_otherwise(x[..., :4, :], angles, **options),
        [random(24, 3, 6, 16, dtype=dtype)],
        False,
    )


@pytest.mark.parametrize("options", [{}, {"rotary_interleaved": True}, {"mla_rotary_interleaved": True, "mscale": 1.2}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rotation(ranks, dtype, options):
    assert ranks.run(rotate_rows_both_ways, dtype, options) == [[True, True]]


def is_contiguous_after_attention(place: Place) -> list[bool]:
    """Return whether rotated keys and their gradient are contiguous, which attention permutes."""
    from trainer.model.rotate import rotate_rows

    keys, found = random(24, 3, 6, 12).requires_grad_(), []
    sliced = keys[..., :4, :] * 1.0
    sliced.register_hook(lambda gradient: found.append(gradient.is_contiguous()))
    rotated = rotate_rows(sliced, random(24, 1, 1, 12))
    rotated.backward(random(3, 4, 24, 12).permute(2, 0, 1, 3))
    return [rotated.is_contiguous(), *found]


def test_rms_norm_of_a_vector_and_of_sizes_that_do_not_fit():
    """What torch takes, and what it refuses."""
    import torch
    import torch.nn.functional as F

    from trainer.model.fewer_passes import rms_norm

    def ours(hidden, weight):
        return rms_norm(hidden, (8,), weight, 1e-5)

    def theirs(hidden, weight):
        return F.rms_norm(hidden, (8,), weight, 1e-5)

    assert all(run_both(ours, theirs, [random(8), random(8)], residual=False))
    with pytest.raises(RuntimeError):
        rms_norm(random(3, 8), (4,), torch.ones(1), 1e-5)


def test_rotation_keeps_the_order_in_which_sums_follow(ranks):
    assert ranks.run(is_contiguous_after_attention) == [[True, True]]


def test_the_largest_logits():
    import torch

    from trainer.losses.cross_entropy import find_largest_logits

    logits = random(5, 2, 64, dtype="bfloat16")
    found, largest = find_largest_logits(logits)
    assert found.dtype == torch.float32 and torch.equal(largest, logits.float().max(dim=-1)[0])


def replaced_in_the_model(place: Place) -> list[str]:
    """Return the nodes of the loss's graph that are ours, once a model was built."""
    import torch
    from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy

    from tests.small_runs import open_engine, small_config
    from trainer.losses.cross_entropy import find_largest_logits

    with open_engine(place, small_config(1)) as engine:
        tokens = torch.arange(8).view(1, 8)
        output = engine.chunks[0](tokens, tokens, None, labels=tokens)
    assert VocabParallelCrossEntropy.calculate_logits_max is find_largest_logits
    names, stack, seen = set(), [output.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            names.add(node.name())
            stack += [parent for parent, _ in node.next_functions]
    return sorted(name for name in names if name.startswith("_") and "Parallel" not in name)


def test_the_model_uses_them(ranks):
    assert ranks.run(replaced_in_the_model) == [["_RmsNormBackward", "_RotationBackward", "_SwiGluBackward"]]
