"""Bytes that one rank sends over each parallel axis in a step, inside its node and to other nodes. Torch-free.

Sources: all-reduce 2 (n-1)/n, all-gather and reduce-scatter (n-1)/n of the whole (Patarasu and Yuan 2009; NCCL's
"bus bandwidth"); what each axis sends: Shoeybi et al. (arXiv:1909.08053), Narayanan et al. (arXiv:2104.04473),
Korthikanti et al. (arXiv:2205.05198), Rajbhandari et al. (arXiv:1910.02054), Lepikhin et al. (arXiv:2006.16668).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

from configs.context_parallel import resolve_cp_attention
from configs.plan.context_bytes import Method, SentBytes, microbatch_bytes
from configs.plan.derive import Layout
from configs.sections.train import RecomputeConfig
from configs.stages import Config

Axis = Literal["tp", "cp", "ep", "dp", "edp", "pp"]


@dataclass(frozen=True)
class Sent:
    """Bytes that one rank sends to ranks of its own node and to those of others."""

    inside: float = 0.0
    across: float = 0.0

    @property
    def total(self) -> float:
        return self.inside + self.across

    def __add__(self, other: Sent) -> Sent:
        return Sent(self.inside + other.inside, self.across + other.across)

    def __mul__(self, times: float) -> Sent:
        return Sent(self.inside * times, self.across * times)


@dataclass(frozen=True)
class Group:
    """Ranks of one axis: how many, and how many of them are in one node."""

    size: int
    in_node: int

    def ring(self, whole: float) -> Sent:
        """Return what an all-gather or reduce-scatter of `whole` bytes sends: (n-1)/n of it.

        Across nodes as a hierarchy does it: each node's ranks share what must cross, once.
        """
        num_nodes = self.size / self.in_node
        across = whole * (num_nodes - 1) / num_nodes / self.in_node
        return Sent(whole * (self.size - 1) / self.size - across, across)

    def exchange(self, whole: float) -> Sent:
        """Return what an all-to-all of `whole` bytes a rank sends: an equal part to each other rank."""
        return Sent(whole * (self.in_node - 1) / self.size, whole * (self.size - self.in_node) / self.size)


def axis_group(axis: Axis, layout: Layout, gpus_per_node: int) -> Group:
    """Return the group of an axis; ranks lie in Megatron-Core's order tp-cp-ep-dp-pp, nodes full."""
    ways: dict[Axis, tuple[int, int]] = {
        "tp": (layout.tp, 1),
        "cp": (layout.cp, layout.tp),
        "dp": (layout.dp * layout.cp, layout.tp),  # gradients and weights are shared over dp and cp
        "ep": (layout.ep * layout.etp, 1),
        "edp": (layout.edp, layout.etp * layout.ep),
        "pp": (layout.pp, layout.world_size // layout.pp),
    }
    size, stride = ways[axis]
    in_node = max(1, min(size, gpus_per_node // stride))
    while size % in_node:  # a last node that is not full: as if all nodes had as many as divide
        in_node -= 1
    return Group(size, in_node)


@dataclass(frozen=True)
class LayerTraffic:
    """What one layer sends for one microbatch."""

    tp_hidden: Sent
    """In the backward pass beside multiplications: Megatron-Core starts these first."""
    tp_waited: Sent
    """While nothing else can be computed."""
    tp_block: Sent
    """In the forward pass of one of the blocks, attention and MLP, part of `tp_waited`."""
    num_blocks: int
    """Blocks whose ranks add up over tp: not the routed experts."""
    cp: SentBytes
    ep: Sent

    @property
    def tp(self) -> Sent:
        return self.tp_hidden + self.tp_waited


def layer_traffic(config: Config, layout: Layout, gpus_per_node: int, *, has_experts: bool) -> LayerTraffic:
    """Return what one layer sends over tp, cp and ep for one microbatch, forward and backward.

    tp without sp: two all-reduces forward and two backward. With sp each is an all-gather and a reduce-scatter, and the
    backward pass gathers both inputs once more, which were kept split; these gathers and the scatters of gradients run
    beside multiplications. Routed experts have tokens of their own on each rank and no tp between dispatch and return.
    """
    value_bytes = 4 if config.precision.compute == "fp32" else 2
    tokens = config.train.micro_batch_size * config.train.seq_len // layout.cp
    whole = tokens * config.model.hidden_size * value_bytes
    group, moe = axis_group("tp", layout, gpus_per_node), config.model.moe
    num_blocks = 1 + (not has_experts or (moe is not None and moe.shared_expert_ffn_hidden_size is not None))
    one = group.ring(whole) if layout.tp > 1 else Sent()
    # an all-reduce is two rings
    hidden, waited = one * (2 * num_blocks), one * ((3 if layout.sp else 2) * num_blocks)
    cp = SentBytes(0, 0)
    if layout.cp > 1:
        method = resolve_cp_attention(config, has_te=True)
        cp = microbatch_bytes(config, cast(Method, "ring" if method == "te" else method))
    ep = Sent()
    if has_experts and moe is not None and layout.ep * layout.etp > 1:
        # out and back, forward and backward; with etp each token goes to etp ranks of the expert
        own = whole / (layout.tp if layout.sp else 1)
        ep = axis_group("ep", layout, gpus_per_node).exchange(own * moe.top_k * layout.etp) * 4
    return LayerTraffic(hidden, waited, one * 2, num_blocks, cp, ep)


@dataclass(frozen=True)
class RecomputedTraffic:
    """What one layer sends once more for one microbatch, as parts of its forward pass are computed again."""

    tp: Sent = Sent()
    cp: float = 0.0
    ep: Sent = Sent()


def recomputed_traffic(recompute: RecomputeConfig, traffic: LayerTraffic) -> RecomputedTraffic:
    """Return what the modules that are recomputed send once more: all that their forward pass sends."""
    if recompute.granularity == "full":
        return RecomputedTraffic(traffic.tp_block * traffic.num_blocks, traffic.cp.forward, traffic.ep * 0.5)
    if recompute.granularity == "selective" and not {"mlp", "moe"}.isdisjoint(recompute.modules):
        return RecomputedTraffic(tp=traffic.tp_block * (traffic.num_blocks - 1), ep=traffic.ep * 0.5)
    return RecomputedTraffic()


@dataclass(frozen=True)
class ReplicaTraffic:
    """What a rank sends once a step to the ranks that hold the same weights (ZeRO-1)."""

    gradients: Sent
    """Reduce-scatter, in fp32."""
    weights: Sent
    """All-gather, in the compute format or FP8."""


def replica_traffic(config: Config, layout: Layout, gpus_per_node: int, dense: int, expert: int) -> ReplicaTraffic:
    """Return what a rank that trains `dense` parameters outside and `expert` inside the experts sends over dp and cp.

    Psi parameters: 4 Psi (n-1)/n bytes of gradients and 2 Psi (n-1)/n of weights, of experts over their own replicas.
    """
    fp8 = config.precision.fp8
    weight_bytes = 4 if config.precision.compute == "fp32" else 1 if fp8 is not None and fp8.param_gather else 2
    dp, edp = axis_group("dp", layout, gpus_per_node), axis_group("edp", layout, gpus_per_node)
    return ReplicaTraffic(
        dp.ring(4.0 * dense) + edp.ring(4.0 * expert),
        dp.ring(weight_bytes * float(dense)) + edp.ring(weight_bytes * float(expert)),
    )


def boundary_traffic(config: Config, layout: Layout, gpus_per_node: int) -> Sent:
    """Return what a rank sends to the next pipeline stage for one microbatch of one chunk: its output, as it lies.

    The slowest hop sets the pace: it is inside a node only where all stages are in one.
    """
    if layout.pp == 1:
        return Sent()
    value_bytes = 4 if config.precision.compute == "fp32" else 2
    tokens = config.train.micro_batch_size * config.train.seq_len // layout.cp
    size = tokens * config.model.hidden_size * value_bytes / (layout.tp if layout.sp else 1)
    is_inside = layout.world_size <= gpus_per_node
    return Sent(inside=size) if is_inside else Sent(across=size)
