"""One linear layer in FP8: output and both gradients against float64, history of delayed scaling, what is kept out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from configs.fp8 import RECIPES
from tests.trainer.model.fp8.test_quantize import state
from trainer.model.fp8.history import AmaxHistory, Site
from trainer.model.fp8.linear import Fp8Linear, Scheme
from trainer.model.fp8.multiply import MULTIPLIES
from trainer.model.fp8.quantize import FORMATS

SITE = Site(0, "mlp.linear_fc1")
NO_SPLIT = {"input": None, "weight": None, "gradient": None}
TOKENS, WIDTH_IN, WIDTH_OUT = 36, 160, 144


class OneRank:
    """A tp group of one."""

    def size(self):
        return 1


def make_scheme(recipe, gradient="e5m2", backend="emulated", history=None):
    dtypes = {"input": FORMATS["e4m3"], "weight": FORMATS["e4m3"], "gradient": FORMATS[gradient]}
    return Scheme(RECIPES[recipe], dtypes, MULTIPLIES[backend], history)


def operands(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(TOKENS // 2, 2, WIDTH_IN), (WIDTH_OUT, WIDTH_IN), (TOKENS // 2, 2, WIDTH_OUT)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def run_linear(linear, inputs, weight, gradient, bias=None):
    inputs, weight = inputs.clone().requires_grad_(), weight.clone().requires_grad_()
    output = linear(input=inputs, weight=weight, bias=bias, allreduce_dgrad=False, sequence_parallel=False)
    output.backward(gradient)
    return output.detach(), inputs.grad, weight.grad


def flat(tensor):
    return tensor.reshape(-1, tensor.shape[-1]).double().numpy()


@pytest.mark.parametrize("gradient_format", ["e5m2", "e4m3"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_output_and_gradients_equal_float64(recipe, gradient_format):
    history = AmaxHistory([SITE], 4, "max", torch.device("cpu")) if recipe == "delayed" else None
    linear = Fp8Linear(make_scheme(recipe, gradient_format, history=history), SITE, NO_SPLIT, OneRank())
    inputs, weight, gradient = operands()
    found = run_linear(linear, inputs, weight, gradient, bias=torch.ones(WIDTH_OUT))
    x, w, dy = flat(inputs), flat(weight), flat(gradient)
    activations, weights = RECIPES[recipe].activation_block, RECIPES[recipe].weight_block
    expected = [
        state(x, activations, "e4m3") @ state(w, weights, "e4m3").T + 1.0,
        state(dy, activations, gradient_format) @ state(w.T, weights, "e4m3").T,
        state(dy.T, activations, gradient_format) @ state(x.T, activations, "e4m3").T,
    ]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(flat(one), other, rtol=1e-5, atol=1e-5 * np.abs(other).max())


def test_torchs_kernel_gives_the_emulations_layer():
    found = [
        run_linear(Fp8Linear(make_scheme("tensorwise", "e4m3", backend), SITE, NO_SPLIT, OneRank()), *operands())
        for backend in ("emulated", "torch")
    ]
    for emulated, torchs in zip(*found, strict=True):
        torch.testing.assert_close(torchs, emulated, rtol=1e-5, atol=1e-4)


def test_an_expert_without_tokens_has_zero_gradients():
    _, weight, _ = operands()
    linear = Fp8Linear(make_scheme("tensorwise"), SITE, NO_SPLIT, OneRank())
    output, inputs_gradient, weight_gradient = run_linear(
        linear, torch.empty(0, WIDTH_IN), weight, torch.empty(0, WIDTH_OUT)
    )
    assert output.shape == (0, WIDTH_OUT) and inputs_gradient.shape == (0, WIDTH_IN)
    assert weight_gradient.shape == weight.shape and not weight_gradient.any()


def test_a_frozen_weight_gets_no_gradient():
    inputs, weight, gradient = operands()
    linear = Fp8Linear(make_scheme("rowwise"), SITE, NO_SPLIT, OneRank())
    inputs.requires_grad_()
    linear(input=inputs, weight=weight, bias=None, allreduce_dgrad=False, sequence_parallel=False).backward(gradient)
    assert weight.grad is None and inputs.grad.any()


def test_weights_are_quantised_once_until_they_change(monkeypatch):
    scheme = make_scheme("tensorwise")
    linear = Fp8Linear(scheme, SITE, NO_SPLIT, OneRank())
    inputs, weight, gradient = operands()
    first = run_linear(linear, inputs, weight, gradient)[0]
    assert torch.equal(run_linear(linear, inputs, 2 * weight, gradient)[0], first), "the step's weights are kept"
    scheme.weights_version += 1
    assert torch.equal(run_linear(linear, inputs, 2 * weight, gradient)[0], 2 * first)


class TestDelayed:
    """Scales of delayed scaling come from earlier steps, those of the first step from itself."""

    @pytest.fixture
    def group(self, tmp_path):
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
        yield torch.distributed.group.WORLD
        torch.distributed.destroy_process_group()

    def step(self, linear, factor):
        inputs, weight, gradient = operands()
        return run_linear(linear, factor * inputs, weight, gradient)[0]

    def test_an_earlier_range_cuts_larger_numbers(self, group):
        history = AmaxHistory([SITE], 3, "max", torch.device("cpu"))
        scheme = make_scheme("delayed", history=history)
        linear = Fp8Linear(scheme, SITE, NO_SPLIT, OneRank())
        first = self.step(linear, 1.0)
        history.close_step(group, is_applied=True)
        assert not torch.equal(self.step(linear, 1024.0), 1024 * first), "cut to the range of the first step"
        history.close_step(group, is_applied=True)
        assert torch.equal(self.step(linear, 1024.0), 1024 * first), "the range has followed"

    def test_max_remembers_and_most_recent_does_not(self, group):
        for compute, expected in (("max", 8.0), ("most_recent", 2.0)):
            history = AmaxHistory([SITE], 3, compute, torch.device("cpu"))
            for value in (8.0, 2.0):
                history.record(SITE, "input", torch.tensor([[1.0]]))
                history.record(SITE, "input", torch.tensor([[value]]))
                history.close_step(group, is_applied=True)
            assert float(history.amax(SITE, "input")) == expected
            for _ in range(3):
                history.close_step(group, is_applied=True)
            assert float(history.amax(SITE, "input")) == 0.0, "nothing is remembered for longer"

    def test_a_skipped_step_is_forgotten(self, group):
        history = AmaxHistory([SITE], 3, "max", torch.device("cpu"))
        history.record(SITE, "input", torch.tensor([[torch.inf]]))
        history.close_step(group, is_applied=False)
        history.record(SITE, "input", torch.tensor([[3.0]]))
        history.close_step(group, is_applied=True)
        assert history.values[0, 0].tolist() == [3.0, 0.0, 0.0]

    def test_the_weights_are_recorded_after_a_skipped_step(self, group):
        from types import SimpleNamespace

        from trainer.model.fp8.attach import Fp8State

        history = AmaxHistory([SITE], 3, "most_recent", torch.device("cpu"))
        scheme = make_scheme("delayed", history=history)
        state = Fp8State(scheme, SimpleNamespace(stage_group=group))
        linear = Fp8Linear(scheme, SITE, NO_SPLIT, OneRank())
        for is_applied in (True, False, True):
            self.step(linear, 1.0)
            state.close_step(is_applied=is_applied)
        assert history.values[0, 1, 0] == history.values[0, 1, 1] > 0

    def test_an_infinity_is_not_cut_to_yesterdays_range(self, group):
        history = AmaxHistory([SITE], 3, "max", torch.device("cpu"))
        linear = Fp8Linear(make_scheme("delayed", history=history), SITE, NO_SPLIT, OneRank())
        self.step(linear, 1.0)
        history.close_step(group, is_applied=True)
        assert not torch.isfinite(self.step(linear, torch.inf)).any()

    def test_validation_leaves_no_trace(self, group):
        history = AmaxHistory([SITE], 3, "max", torch.device("cpu"))
        linear = Fp8Linear(make_scheme("delayed", history=history), SITE, NO_SPLIT, OneRank())
        inputs, weight, _ = operands()
        with torch.no_grad():
            linear(input=inputs, weight=weight, bias=None, allreduce_dgrad=False, sequence_parallel=False)
        history.close_step(group, is_applied=True)
        assert not history.values[0, 0].any() and not history.values[0, 2].any()
