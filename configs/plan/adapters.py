"""Which linears of an architecture get LoRA adapters, under which of PEFT's names, and how large they are. Torch-free.

Where one linear here is several modules in Hugging Face models (query, key and value; gate and up), each module has an
adapter of its own: their A matrices lie above each other, and B has the linear's rows, of which each belongs to one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from configs.plan.derive import Layout, chunk_layers, first_layer_with_experts, head_dim, num_query_groups
from configs.plan.tensors import Linear, distinct_linears, layer_linears
from configs.roles import HeadKind
from configs.sections.lora import ALL_LINEAR, LoraConfig
from configs.sections.model import ModelConfig
from configs.stages import Config

_MODULES = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_proj": ("o_proj",),
    "linear_q_proj": ("q_proj",),
    "linear_q_down_proj": ("q_a_proj",),
    "linear_q_up_proj": ("q_b_proj",),
    "linear_kv_down_proj": ("kv_a_proj_with_mqa",),
    "linear_kv_up_proj": ("kv_b_proj",),
    "linear_fc2": ("down_proj",),
}
MIXTRAL_NAMES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
"""What Mixtral calls the projections of its experts."""


@dataclass(frozen=True)
class Part:
    """A module of Hugging Face models that lies in a linear."""

    module: str
    num_rows: int
    """Of the linear's output."""
    is_adapted: bool


@dataclass(frozen=True)
class AdaptedLinear:
    """A linear, some or all parts of which have an adapter."""

    linear: Linear
    parts: tuple[Part, ...]
    """In the order in which their rows lie."""
    num_blocks: int = 1
    """How often the rows of all parts alternate: query groups, each with its queries, key and value."""

    @property
    def is_gated(self) -> bool:
        """Whether it is gate and up, which are split over ranks one by one."""
        return self.linear.output.times == 2

    @property
    def num_adapted(self) -> int:
        """Parts with an adapter."""
        return sum(part.is_adapted for part in self.parts)


def linear_path(layer: int, name: str, expert: int | None = None) -> str:
    """Return a linear's name in the whole model, in which experts count too: `...experts.experts.7.linear_fc1`."""
    number = "" if expert is None else f"experts.{expert}."
    return f"decoder.layers.{layer}." + name.replace("experts.", f"experts.{number}", 1)


def module_names(model: ModelConfig) -> tuple[str, ...]:
    """Return the names that `lora.target_modules` may hold for a model, each once."""
    found = [part.module for linear in distinct_linears(model) for part in _parts(model, linear, ())]
    return tuple(dict.fromkeys(found))


def adapted_modules(model: ModelConfig, lora: LoraConfig) -> tuple[str, ...]:
    """Return the modules that get an adapter, by name."""
    there = module_names(model)
    if ALL_LINEAR in lora.target_modules:
        return there
    wanted = {MIXTRAL_NAMES.get(name, name) if model.moe is not None else name for name in lora.target_modules}
    return tuple(name for name in there if name in wanted)


def adapted_linears(model: ModelConfig, lora: LoraConfig, layer: int) -> Iterator[AdaptedLinear]:
    """Yield the linears of a layer (0-based) that get adapters."""
    modules = adapted_modules(model, lora)
    for linear in layer_linears(model, layer):
        parts = _parts(model, linear, modules)
        if any(part.is_adapted for part in parts):
            num_blocks = num_query_groups(model) if linear.name.endswith("linear_qkv") else 1
            yield AdaptedLinear(linear, parts, num_blocks)


def part_parameters(linear: Linear, part: Part, rank: int) -> int:
    """Return the parameters of a part's adapter, or of those of all experts."""
    return rank * (linear.input.total + part.num_rows) * (linear.num_experts or 1)


def count_adapter_parameters(model: ModelConfig, lora: LoraConfig, head: HeadKind = "vocabulary") -> int:
    """Return the parameters that are trained, as PEFT counts them: of all adapters, and of a scalar head."""
    return _head_parameters(model, head) + sum(
        part_parameters(adapted.linear, part, lora.rank)
        for layer in range(model.num_layers)
        for adapted in adapted_linears(model, lora, layer)
        for part in adapted.parts
        if part.is_adapted
    )


def trained_parameters_of_stage(config: Config, layout: Layout, pp_rank: int) -> tuple[int, int]:
    """Return the parameters that one rank of a pipeline stage trains with LoRA, outside and inside the experts.

    These are the adapters, and on the last stage a scalar head.
    """
    dense, expert = adapter_parameters_of_stage(config, layout, pp_rank)
    return dense + _head_parameters(config.model, config.head) * (pp_rank == layout.pp - 1), expert


def adapter_parameters_of_stage(config: Config, layout: Layout, pp_rank: int) -> tuple[int, int]:
    """Return the adapter parameters that one rank of a pipeline stage holds outside and inside the experts.

    B has the rows of parts without an adapter too, as zeros that nothing changes.
    """
    lora, model = config.lora, config.model
    assert lora is not None
    layers = [layer for chunk in chunk_layers(model, config.parallel)[pp_rank] for layer in chunk]
    first = first_layer_with_experts(model)
    dense = expert = 0
    # all layers of a kind are alike
    for some in ([layer for layer in layers if layer < first], [layer for layer in layers if layer >= first]):
        if some:
            of_one = _adapter_parameters(model, lora, layout, some[0])
            dense, expert = dense + len(some) * of_one[0], expert + len(some) * of_one[1]
    return dense, expert


def _head_parameters(model: ModelConfig, head: HeadKind) -> int:
    """Return the parameters of a head that is trained beside frozen weights."""
    return model.hidden_size if head == "scalar" else 0


def _adapter_parameters(model: ModelConfig, lora: LoraConfig, layout: Layout, layer: int) -> tuple[int, int]:
    """Return the adapter parameters of a layer that one rank holds outside and inside the experts."""
    dense = expert = 0
    for adapted in adapted_linears(model, lora, layer):
        linear = adapted.linear
        ways = layout.tp if linear.num_experts is None else layout.etp
        a, b = lora.rank * adapted.num_adapted * linear.input.total, lora.rank * linear.output.total
        a, b = (a // ways, b) if linear.split == "row" else (a, b // ways)
        if linear.num_experts is None:
            dense += a + b
        else:
            expert += (a + b) * (linear.num_experts // layout.ep)
    return dense, expert


def _parts(model: ModelConfig, linear: Linear, modules: tuple[str, ...]) -> tuple[Part, ...]:
    """Return the modules in a linear; none of a router, which is not adapted."""
    if linear.is_router:
        return ()
    last = linear.name.rpartition(".")[2]
    names: tuple[str, ...]
    if last == "linear_fc1":
        names = ("gate_proj", "up_proj") if linear.output.times == 2 else ("up_proj",)
    else:
        names = _MODULES[last]
    sizes = [linear.output.total // len(names)] * len(names)
    if last == "linear_qkv":
        heads, groups, size = model.num_attention_heads, num_query_groups(model), head_dim(model)
        sizes = [heads * size, groups * size, groups * size]
    return tuple(Part(name, rows, name in modules) for name, rows in zip(names, sizes, strict=True))
