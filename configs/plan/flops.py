"""Model FLOPs of training, forward and backward: arithmetic on a config, torch-free.

Source: Chowdhery et al. 2022 (arXiv:2204.02311, appendix B).
"""

from __future__ import annotations

from configs.plan.adapters import adapted_linears, part_parameters
from configs.plan.derive import first_layer_with_experts, head_dim, layer_windows
from configs.plan.tensors import Linear, layer_linears
from configs.roles import HeadKind
from configs.sections.lora import LoraConfig
from configs.sections.model import ModelConfig
from configs.stages import Config


def active_part(model: ModelConfig, linear: Linear, count: int) -> int:
    """Return how many of a linear's `count` parameters a token meets: of the routed experts only the `top_k`."""
    if linear.num_experts is None or model.moe is None:
        return count
    return count * model.moe.top_k // linear.num_experts


def attended_pairs(length: int, window: int | None) -> int:
    """Return twice the queries and keys that meet in `length` tokens under a causal mask: the whole square, or a band.

    Without a window the square is length^2; what a window of so many keys hides of its half is a smaller triangle.
    """
    return length**2 if window is None else length**2 - max(0, length - window) ** 2


def model_flops(
    model: ModelConfig,
    num_tokens: int,
    num_attended_pairs: int,
    lora: LoraConfig | None = None,
    head: HeadKind = "vocabulary",
) -> float:
    """Return the FLOPs of forward and backward: 3 x the forward matrix multiplications.

    Two FLOPs per token and parameter that multiplies it (active experts, router and the output layer over the true
    vocabulary, or the scalar head; embedding look-up, norms and biases are free). `num_attended_pairs` is the sum of
    `attended_pairs` over the layers and over what attention sees at once (samples, or documents): 2 heads (d_qk + d_v)
    FLOPs a pair, of which half is counted, since the mask is causal: PaLM appendix B counts it whole, Megatron-LM half,
    and so do we. Recomputation is not counted: this is model, not hardware, FLOPs. With LoRA the frozen weights have no
    gradients, so that theirs are 2 x, and those of the adapters and of a scalar head come on top.
    """
    multiplied = (1 if head == "scalar" else model.vocab_size) * model.hidden_size
    first_with_experts = first_layer_with_experts(model)
    for layer, count in ((0, first_with_experts), (model.num_layers - 1, model.num_layers - first_with_experts)):
        if count:  # all layers of a kind are alike
            linears = layer_linears(model, layer)
            multiplied += count * sum(active_part(model, linear, linear.num_weights) for linear in linears)
    value_dim = model.mla.v_head_dim if model.mla is not None else head_dim(model)
    core = model.num_attention_heads * (head_dim(model) + value_dim)
    if lora is None:
        return 3.0 * (2 * multiplied * num_tokens + core * num_attended_pairs)
    passed = 2.0 * multiplied + 3.0 * _adapter_parameters(model, lora)
    passed += model.hidden_size if head == "scalar" else 0
    return 2 * passed * num_tokens + 3.0 * core * num_attended_pairs


def _adapter_parameters(model: ModelConfig, lora: LoraConfig) -> int:
    """Return the parameters of adapters that a token meets."""
    return sum(
        active_part(model, adapted.linear, part_parameters(adapted.linear, part, lora.rank))
        for layer in range(model.num_layers)
        for adapted in adapted_linears(model, lora, layer)
        for part in adapted.parts
        if part.is_adapted
    )


def flops_per_step(config: Config, global_batch: int) -> float:
    """Return the model FLOPs of a step of `global_batch` samples that are attended whole, over all ranks."""
    seq_len, model = config.train.seq_len, config.model
    pairs = sum(attended_pairs(seq_len, window) for window in layer_windows(model))
    return model_flops(model, global_batch * seq_len, global_batch * pairs, config.lora, config.head)
