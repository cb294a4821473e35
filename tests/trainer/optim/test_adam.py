"""GroupStepAdamW is `torch.optim.AdamW`, bit for bit, with the step count in the group."""

from __future__ import annotations

import pytest
import torch

from trainer.optim.adam import GroupStepAdamW

SETTINGS = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
NUM_STEPS = 20


def make_parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(5)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((7, 33), (64,), (1,), (5, 4, 3))]


def train(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], first: int, last: int) -> None:
    """Take steps first..last-1 with gradients and learning rates that depend on the step alone."""
    for step in range(first, last):
        generator = torch.Generator().manual_seed(100 + step)
        for group in optimizer.param_groups:
            group["lr"] = SETTINGS["lr"] * (1 + step) / NUM_STEPS
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator) * 10.0 ** (step % 5 - 3)
        optimizer.step()


def test_equals_torch_bit_for_bit():
    ours, theirs = make_parameters(), make_parameters()
    train(GroupStepAdamW(ours, **SETTINGS), ours, 0, NUM_STEPS)
    train(torch.optim.AdamW(theirs, fused=True, **SETTINGS), theirs, 0, NUM_STEPS)
    start = make_parameters()
    for one, other, first in zip(ours, theirs, start, strict=True):
        assert torch.equal(one, other)
        assert not torch.equal(one, first)


def test_equals_algorithm_2_in_float64():
    """Algorithm 2 of arXiv:1711.05101, written out."""
    ours = make_parameters()
    exact = [parameter.detach().double() for parameter in ours]
    first, second = ([torch.zeros_like(value) for value in exact] for _ in range(2))
    optimizer = GroupStepAdamW(ours, **SETTINGS)
    beta1, beta2 = SETTINGS["betas"]
    for step in range(NUM_STEPS):
        train(optimizer, ours, step, step + 1)
        lr, correction1, correction2 = optimizer.param_groups[0]["lr"], 1 - beta1 ** (step + 1), 1 - beta2 ** (step + 1)
        for value, m, v, parameter in zip(exact, first, second, ours, strict=True):
            gradient = parameter.grad.double()
            m.lerp_(gradient, 1 - beta1)
            v.mul_(beta2).add_((1 - beta2) * gradient**2)
            value.mul_(1 - lr * SETTINGS["weight_decay"])
            value.sub_(lr * (m / correction1) / ((v / correction2).sqrt() + SETTINGS["eps"]))
    for parameter, value in zip(ours, exact, strict=True):
        torch.testing.assert_close(parameter.double(), value, rtol=1e-5, atol=1e-7)


def test_step_is_in_the_group_and_survives_saving():
    ours, straight = make_parameters(), make_parameters()
    train(GroupStepAdamW(straight, **SETTINGS), straight, 0, NUM_STEPS)
    optimizer = GroupStepAdamW(ours, **SETTINGS)
    train(optimizer, ours, 0, 7)
    saved = optimizer.state_dict()
    assert [group["step"] for group in saved["param_groups"]] == [7]
    assert all(set(state) == {"exp_avg", "exp_avg_sq"} for state in saved["state"].values())
    resumed = GroupStepAdamW(ours, **SETTINGS)
    resumed.load_state_dict(saved)
    train(resumed, ours, 7, NUM_STEPS)
    assert all(torch.equal(one, other) for one, other in zip(ours, straight, strict=True))


def test_parameters_without_gradient_stay():
    parameters = make_parameters()
    before = parameters[0].detach().clone()
    optimizer = GroupStepAdamW(parameters, **SETTINGS)
    parameters[1].grad = torch.ones_like(parameters[1])
    optimizer.step()
    assert torch.equal(parameters[0], before) and parameters[0] not in optimizer.state


@pytest.mark.parametrize("option", [{"adam_w_mode": False}, {"capturable": True}])
def test_what_it_cannot_do_is_refused(option):
    with pytest.raises(NotImplementedError):
        GroupStepAdamW(make_parameters(), **option)
