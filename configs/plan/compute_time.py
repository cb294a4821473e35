"""Seconds that one rank computes: layers and output layer, forward and backward, a microbatch at a time. Torch-free.

Multiplications take the longer of their FLOPs and their bytes (a roofline, Williams et al. 2009); what lies between
them takes its bytes. Experts are evenly loaded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from configs.context_parallel import uses_te_attention
from configs.fp8 import uses_te_layers
from configs.plan import efficiency
from configs.plan.derive import (
    Layout,
    head_dim,
    is_gated,
    layer_windows,
    num_query_groups,
    padded_vocab_size,
)
from configs.plan.devices import Device
from configs.plan.flops import attended_pairs
from configs.plan.tensors import Linear, layer_linears
from configs.stages import Config

_TILE = 128
"""Rows that a multiplication computes at once: fewer take as long."""


@dataclass(frozen=True)
class Seconds:
    """Time of the forward and of the backward pass."""

    forward: float = 0.0
    backward: float = 0.0

    @property
    def total(self) -> float:
        return self.forward + self.backward

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.forward + other.forward, self.backward + other.backward)


@dataclass(frozen=True)
class LayerSeconds:
    """Time of one layer for one microbatch, by what is recomputed alone."""

    attention: Seconds
    """Its projections and the core."""
    core: Seconds
    mlp: Seconds
    activation: Seconds
    norms: Seconds
    up_projection: Seconds
    """Of latent attention."""

    @property
    def whole(self) -> Seconds:
        return self.attention + self.mlp + self.norms


@dataclass(frozen=True)
class _Product:
    """A multiplication of [rows, input] by [input, output], `times` over."""

    rows: float
    input: float
    output: float
    times: float = 1.0


class ComputeTime:
    """Times of one config on one layout and device."""

    def __init__(self, config: Config, layout: Layout, device: Device, *, has_te: bool) -> None:
        self._config, self._layout, self._device = config, layout, device
        self._tokens = config.train.micro_batch_size * config.train.seq_len // layout.cp
        self._has_te = has_te
        self._value_bytes = 4 if config.precision.compute == "fp32" else 2
        self._stream_split = layout.tp if layout.sp else 1

    def layer(self, layer: int) -> LayerSeconds:
        """Return the time of one layer (0-based), tp, cp and ep left out."""
        linears = list(layer_linears(self._config.model, layer))
        in_attention = [linear for linear in linears if linear.name.startswith("self_attention.")]
        in_mlp = [linear for linear in linears if linear not in in_attention]
        has_experts = any(linear.num_experts is not None for linear in linears)
        core, activation = self._core(), self._activation(has_experts)
        return LayerSeconds(
            attention=self._linears(in_attention, layer) + self._rotation() + core,
            core=core,
            mlp=self._linears(in_mlp, layer) + activation + self._dispatch(has_experts),
            activation=activation,
            norms=self._norms(),
            up_projection=self._linears([one for one in in_attention if one.name.endswith("_up_proj")], layer),
        )

    def output_layer(self) -> Seconds:
        """Return the time of the output layer and the loss, over a tp rank's part of the vocabulary."""
        is_scalar = self._config.head == "scalar"
        part = 1.0 if is_scalar else padded_vocab_size(self._config.model) / self._layout.tp
        products = self._products(_Product(self._tokens, self._config.model.hidden_size, part), is_fp8=False)
        # logits in the compute format and in fp32: written, read for the largest, the sum and the gradient
        return products + Seconds(self._moved(self._tokens * part * 14), self._moved(self._tokens * part * 10))

    def update(self, num_parameters: float, shard: float) -> float:
        """Return the time of clearing gradients, their norm, and Adam on `shard` of the rank's parameters.

        Adam reads gradient, moments and main weights and writes the last three and the weights: 4 + 12 + 12 + 2 bytes.
        """
        return self._moved(4 * num_parameters + 34 * shard)

    def _linears(self, linears: list[Linear], layer: int) -> Seconds:
        total = Seconds()
        for linear in linears:
            is_fp8 = self._is_fp8(layer) and not linear.is_router
            product = self._product(linear)
            total += self._products(product, is_fp8=is_fp8)
            if is_fp8:  # inputs and gradients of outputs are read and written twice in a byte, one transposed
                read = 2 * self._value_bytes if self._reads_twice() else self._value_bytes
                total += Seconds(
                    self._moved(product.rows * product.input * product.times * (read + 2)),
                    self._moved(product.rows * product.output * product.times * (read + 2)),
                )
        return total

    def _product(self, linear: Linear) -> _Product:
        layout, moe = self._layout, self._config.model.moe
        if linear.num_experts is not None and moe is not None:
            held = linear.num_experts / layout.ep
            rows = self._tokens / layout.tp * moe.top_k * layout.etp / held
            ways, times = layout.etp, held
        else:
            rows, times = self._tokens, 1.0
            ways = layout.tp if linear.split in ("column", "row") else 1
            if linear.split in ("none", "gathered"):  # each rank computes its own tokens
                rows = self._tokens / self._stream_split
        if linear.split == "row":
            return _Product(rows, linear.input.total / ways, linear.output.total, times)
        return _Product(rows, linear.input.total, linear.output.total / ways, times)

    def _products(self, product: _Product, *, is_fp8: bool) -> Seconds:
        """Return the time of a multiplication, and of its two gradients; those of weights are added up in fp32."""
        device, size = self._device, 1 if is_fp8 else self._value_bytes
        rows = -(-product.rows // _TILE) * _TILE
        if is_fp8 and device.fp8_flops is not None:
            peak = device.fp8_flops * efficiency.MATMUL_FP8
        else:
            peak = device.bf16_flops * efficiency.MATMUL_BF16 / (8 if self._value_bytes == 4 else 1)
        arithmetic = 2 * rows * product.input * product.output / peak
        weight, output = product.input * product.output, product.rows * product.output
        inputs = product.rows * product.input
        forward = max(arithmetic, self._moved(size * (inputs + weight) + self._value_bytes * output))
        data = max(arithmetic, self._moved(size * (output + weight) + self._value_bytes * inputs))
        weights = max(arithmetic, self._moved(size * (output + inputs) + 8 * weight))
        if self._config.lora is not None:  # frozen weights have no gradients
            weights = 0.0
        return Seconds(forward * product.times, (data + weights) * product.times)

    def _core(self) -> Seconds:
        """Return the time of the attention core: 2 heads (d_qk + d_v) FLOPs a pair, 2.5 times as many backward.

        Of layers with windows and without, the mean.
        """
        config, model = self._config, self._config.model
        value_dim = model.mla.v_head_dim if model.mla is not None else head_dim(model)
        windows = Counter(layer_windows(model))
        pairs: float = sum(count * attended_pairs(config.train.seq_len, window) for window, count in windows.items())
        pairs = pairs * config.train.micro_batch_size / model.num_layers
        flops = model.num_attention_heads * (head_dim(model) + value_dim) * pairs / self._layout.tp / self._layout.cp
        use_te = uses_te_attention(config, use_te=uses_te_layers(config, has_te=self._has_te))
        reached = efficiency.FUSED_ATTENTION if use_te else efficiency.FLASH_ATTENTION
        reached *= efficiency.SMALL_HEADS if head_dim(model) < 128 else 1.0
        seconds = flops / (self._device.bf16_flops * reached / (8 if self._value_bytes == 4 else 1))
        return Seconds(seconds, 2.5 * seconds)

    def _rotation(self) -> Seconds:
        model = self._config.model
        heads = model.num_attention_heads + (0 if model.mla is not None else num_query_groups(model))
        width = heads * head_dim(model) / self._layout.tp
        seconds = self._moved(2 * self._tokens * width * self._value_bytes)
        return Seconds(seconds, seconds)

    def _norms(self) -> Seconds:
        """Two norms and two residual sums: 5 passes forward and 6 backward over the stream each."""
        stream = self._tokens * self._config.model.hidden_size * self._value_bytes / self._stream_split
        return Seconds(self._moved(10 * stream), self._moved(12 * stream))

    def _activation(self, has_experts: bool) -> Seconds:
        """Reads its input and writes its output; backward reads both's gradients and input, writes the input's."""
        model, widths = self._config.model, 2 if is_gated(self._config.model) else 1
        width = float(model.ffn_hidden_size)
        if has_experts and model.moe is not None:
            width = model.moe.top_k * model.moe.ffn_hidden_size + (model.moe.shared_expert_ffn_hidden_size or 0)
        size = self._tokens * width * self._value_bytes / self._layout.tp
        return Seconds(self._moved((widths + 1) * size), self._moved((2 * widths + 1) * size))

    def _dispatch(self, has_experts: bool) -> Seconds:
        """Tokens are put in the order of experts and back: two passes over all copies, each read and written."""
        moe = self._config.model.moe
        if not has_experts or moe is None:
            return Seconds()
        own = self._tokens / self._stream_split * self._config.model.hidden_size * self._value_bytes
        seconds = self._moved(4 * moe.top_k * own)
        return Seconds(seconds, seconds)

    def _is_fp8(self, layer: int) -> bool:
        fp8 = self._config.precision.fp8
        if fp8 is None:
            return False
        num_layers = self._config.model.num_layers
        return fp8.num_first_layers_kept <= layer < num_layers - fp8.num_last_layers_kept

    def _reads_twice(self) -> bool:
        """Whether the scale of a tensor comes from its present largest value, which is looked for first."""
        fp8 = self._config.precision.fp8
        return fp8 is not None and fp8.recipe in ("tensorwise", "rowwise")

    def _moved(self, num_bytes: float) -> float:
        return num_bytes / (self._device.memory_bandwidth * efficiency.MEMORY)


def recomputed(layer: LayerSeconds, modules: Iterable[str]) -> float:
    """Return the seconds that recomputing some modules adds to the backward pass of a layer."""
    parts = {
        "core_attn": layer.core.forward,
        "mlp": layer.mlp.forward,
        "moe": layer.mlp.forward,
        "moe_act": layer.activation.forward,
        "layernorm": layer.norms.forward,
        "mla_up_proj": layer.up_projection.forward,
    }
    return sum(parts[module] for module in modules)
