"""The adapter of one linear against its closed form in float64, and dropout on its input as PEFT's modules have it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from configs.plan.adapters import AdaptedLinear, adapted_linears
from configs.sections.lora import LoraConfig
from configs.sections.model import ModelConfig
from trainer.model.lora.linear import LoraLinear, Site

MODEL = ModelConfig(
    num_layers=1, hidden_size=12, ffn_hidden_size=20, num_attention_heads=4, num_query_groups=2, vocab_size=8
)
# By linear: the rows of each module of Hugging Face, written out.
ROWS = {
    "self_attention.linear_qkv": {
        "q_proj": [0, 1, 2, 3, 4, 5, 12, 13, 14, 15, 16, 17],
        "k_proj": [6, 7, 8, 18, 19, 20],
        "v_proj": [9, 10, 11, 21, 22, 23],
    },
    "self_attention.linear_proj": {"o_proj": list(range(12))},
    "mlp.linear_fc1": {"gate_proj": list(range(20)), "up_proj": list(range(20, 40))},
    "mlp.linear_fc2": {"down_proj": list(range(12))},
}


def build(name: str, lora: LoraConfig) -> tuple[LoraLinear, AdaptedLinear]:
    """Return the adapter of a linear on one rank, with random matrices in float64."""
    adapted = next(one for one in adapted_linears(MODEL, lora, 0) if one.linear.name == name)
    weight = torch.zeros(adapted.linear.output.total, adapted.linear.input.total, dtype=torch.float64)
    weight.allreduce = True
    alone = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    linear = SimpleNamespace(tp_group=alone, sequence_parallel=False, weight=weight)
    module = LoraLinear(Site(0, name), adapted, lora, linear)
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data.normal_(generator=generator)
    return module, adapted


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("left_out", [None, "k_proj", "gate_proj"])
@pytest.mark.parametrize("name", ROWS)
def test_output_and_gradients_are_the_closed_form(name, left_out, use_rslora):
    targets = [part for parts in ROWS.values() for part in parts if part != left_out]
    lora = LoraConfig(rank=3, alpha=5.0, use_rslora=use_rslora, target_modules=targets)
    module, adapted = build(name, lora)
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(4, 2, adapted.linear.input.total, dtype=torch.float64, generator=generator, requires_grad=True)
    output = module(inputs)
    gradient = torch.randn(output.shape, dtype=torch.float64, generator=generator)
    output.backward(gradient)
    scaling = 5.0 / 3**0.5 if use_rslora else 5.0 / 3
    x, dy = inputs.detach().flatten(0, 1), gradient.flatten(0, 1)
    b, db = module.b.detach().flatten(0, -2), module.b.grad.flatten(0, -2)
    expected, dx, delta = torch.zeros_like(dy), torch.zeros_like(x), torch.zeros(len(b), x.shape[1])
    blocks = iter(zip(module.a.detach().split(3), module.a.grad.split(3), strict=True))
    for part, rows in ROWS[name].items():
        if part == left_out:
            assert not db[rows].any()
            continue
        a, da = next(blocks)
        expected[:, rows] = scaling * (x @ a.T) @ b[rows].T
        delta[rows] = scaling * (b[rows] @ a).float()
        torch.testing.assert_close(da, scaling * (dy[:, rows] @ b[rows]).T @ x, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(db[rows], scaling * dy[:, rows].T @ (x @ a.T), rtol=1e-12, atol=1e-12)
        dx += scaling * dy[:, rows] @ b[rows] @ a
    torch.testing.assert_close(output.detach().flatten(0, 1), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(inputs.grad.flatten(0, 1), dx, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(module.delta(), delta, rtol=1e-5, atol=1e-5)


def test_dropout_is_on_the_input_of_each_module():
    """As in PEFT: q, k and v see the input with other elements dropped, scaled by 1 / (1 - p); none in evaluation."""
    module, _ = build("self_attention.linear_qkv", LoraConfig(rank=3, alpha=3.0, dropout=0.25))
    inputs = torch.ones(5, 1, 12, dtype=torch.float64)
    torch.manual_seed(7)
    output = module(inputs).flatten(0, 1)
    torch.manual_seed(7)
    expected = torch.zeros_like(output)
    for a, rows in zip(module.a.split(3), ROWS["self_attention.linear_qkv"].values(), strict=True):
        kept = (torch.empty(5, 1, 12, dtype=torch.float64).bernoulli_(0.75) / 0.75).flatten(0, 1)
        expected[:, rows] = (kept @ a.T) @ module.b[rows].T
    torch.testing.assert_close(output, expected)
    module.eval()
    assert torch.equal(module(inputs), module(inputs))
