"""Weight gradients added up by the multiplication, and the fused norm and scaling of many gradients."""

from __future__ import annotations

from tests.pool import Place


def accumulate(place: Place) -> tuple[float, bool]:
    """Return the largest error against float64 after two additions, and whether the model's linears use it."""
    import torch
    from megatron.core.tensor_parallel import layers

    from tests.small_runs import open_engine, small_config
    from trainer.model.weight_gradients import WeightGradients

    torch.manual_seed(0)
    total = torch.randn(5, 7)
    expected = total.double()
    for _ in range(2):
        inputs, gradient = torch.randn(11, 7), torch.randn(11, 5)
        WeightGradients.wgrad_gemm_accum_fp32(inputs, gradient, total)
        expected += gradient.double().t() @ inputs.double()
    with open_engine(place, small_config(1)) as engine:
        is_used = engine.chunks[0].decoder.layers[0].mlp.linear_fc1.config.gradient_accumulation_fusion
    return float((total - expected).abs().max()), is_used and layers.fused_weight_gradient_mlp_cuda is WeightGradients


def test_gradients_add_up(ranks):
    ((error, is_used),) = ranks.run(accumulate)
    assert error < 1e-5 and is_used


def test_the_norm_over_many_tensors():
    import torch

    from trainer.optim.grad_norm import compute_l2_norm, compute_l2_norm_at_once

    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(size, generator=generator) * 10.0**power for power, size in enumerate((3, 5000, 70, 40000))]
    exact = sum(float(one.double().square().sum()) for one in tensors) ** 0.5
    for compute in (compute_l2_norm, compute_l2_norm_at_once):
        norm, _ = compute(0, torch.zeros(1), [tensors], False)
        assert norm.shape == (1,) and abs(float(norm) / exact - 1) < 1e-6, compute.__name__


def test_scaling_in_place_and_into_others():
    import torch

    from trainer.optim.grad_norm import scale_tensors

    tensors = [torch.arange(4.0), torch.ones(2, 3)]
    copies = [torch.empty(4), torch.empty(2, 3)]
    scale_tensors(0, torch.zeros(1), [tensors, copies], 0.5)
    assert copies[0].tolist() == [0.0, 0.5, 1.0, 1.5] and tensors[0].tolist() == [0.0, 1.0, 2.0, 3.0]
    scale_tensors(0, torch.zeros(1), [tensors, tensors], 2.0)
    assert tensors[0].tolist() == [0.0, 2.0, 4.0, 6.0] and float(tensors[1].sum()) == 12
    scale_tensors(0, torch.zeros(1), [[], []], 2.0)
