"""Seconds of one training step on a layout and a device, by what they go into; bytes over each axis. Torch-free.

The step is that of the slowest pipeline stage: (m + (p - 1) / v) microbatches of it (arXiv:2104.04473, section 2.2),
and once a step what dp does and the update. What of communication runs beside compute is what Megatron-Core does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from configs.context_parallel import resolve_cp_attention
from configs.plan import efficiency
from configs.plan.adapters import trained_parameters_of_stage
from configs.plan.compute_time import ComputeTime, LayerSeconds, Seconds, recomputed
from configs.plan.derive import Layout, chunk_layers, first_layer_with_experts, num_microbatches
from configs.plan.devices import Device
from configs.plan.estimate import parameters_of_stages
from configs.plan.flops import flops_per_step
from configs.plan.traffic import (
    Axis,
    LayerTraffic,
    Sent,
    axis_group,
    boundary_traffic,
    layer_traffic,
    recomputed_traffic,
    replica_traffic,
)
from configs.sections.train import RecomputeConfig
from configs.stages import Config

_BUCKET_PARAMETERS = 40_000_000
"""Megatron-Core reduces gradients in pieces of this many, or of a million times dp."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by what they go into, and what the slowest stage's ranks send."""

    compute: float
    """Forward, backward and recomputation of all microbatches."""
    host: float
    """Waiting for the host to launch."""
    tp: float
    cp: float
    ep: float
    pp: float
    bubble: float
    dp: float
    update: float
    sent: dict[Axis, Sent]
    """Bytes of a step by axis; dp of what is outside the experts, edp of the experts."""
    tokens_per_second: float
    """Of one GPU."""
    model_flops_per_second: float
    """Of one GPU, recomputation not counted."""

    @property
    def total(self) -> float:
        return self.compute + self.host + self.tp + self.cp + self.ep + self.pp + self.bubble + self.dp + self.update


def bubble_fraction(pp: int, vpp: int, num_microbatches: int) -> float:
    """Return idle over busy time of the (interleaved) 1F1B schedule: (p - 1) / (v m) (arXiv:2104.04473, 2.2)."""
    return (pp - 1) / (vpp * num_microbatches)


@dataclass(frozen=True)
class _Share:
    """Seconds of a microbatch on one stage: computed, and waited for on each axis."""

    seconds: Seconds = Seconds()
    tp: float = 0.0
    cp: float = 0.0
    ep: float = 0.0
    num_layers: float = 0.0

    @property
    def total(self) -> float:
        return self.seconds.total + self.tp + self.cp + self.ep

    @property
    def host(self) -> float:
        """What the host takes longer than the device."""
        return max(0.0, self.num_layers * efficiency.HOST_SECONDS_PER_LAYER - self.total)

    def __add__(self, other: _Share) -> _Share:
        return _Share(
            self.seconds + other.seconds,
            self.tp + other.tp,
            self.cp + other.cp,
            self.ep + other.ep,
            self.num_layers + other.num_layers,
        )

    def times(self, count: float) -> _Share:
        seconds = Seconds(self.seconds.forward * count, self.seconds.backward * count)
        return _Share(seconds, self.tp * count, self.cp * count, self.ep * count, self.num_layers * count)


def estimate_step(config: Config, layout: Layout, device: Device, gpus_per_node: int, *, has_te: bool) -> StepTime:
    """Estimate the time of one step at the full global batch."""
    return StepModel(config, layout, device, gpus_per_node, has_te=has_te).estimate(config)


class StepModel:
    """What the time of a step follows from, whatever is recomputed: times and traffic of a layer, parameters."""

    def __init__(
        self,
        config: Config,
        layout: Layout,
        device: Device,
        gpus_per_node: int,
        *,
        has_te: bool,
        parameters: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        """Work out one layer of each kind; `parameters` are those of `parameters_of_stages`, if they are known.

        With LoRA what is reduced, updated and gathered are the adapters and a scalar head; what adapters compute is
        left out.
        """
        self.layout, self.gpus_per_node, self.links = layout, gpus_per_node, _Links(device)
        self.compute = ComputeTime(config, layout, device, has_te=has_te)
        if config.lora is not None:
            parameters = [trained_parameters_of_stage(config, layout, pp_rank) for pp_rank in range(layout.pp)]
        self.trained = parameters or parameters_of_stages(config, layout)
        first, num_layers = first_layer_with_experts(config.model), config.model.num_layers
        self.layers: dict[bool, tuple[LayerSeconds, LayerTraffic]] = {}
        for layer in {0, num_layers - 1}:
            traffic = layer_traffic(config, layout, gpus_per_node, has_experts=layer >= first)
            self.layers[layer >= first] = (self.compute.layer(layer), traffic)
        self.output = _Share(self.compute.output_layer())

    def estimate(self, config: Config) -> StepTime:
        """Return the time of a step of this config, in which recomputation alone may differ."""
        first, recompute = first_layer_with_experts(config.model), config.train.recompute
        shares = {kind: _share(config, self, recompute, *parts) for kind, parts in self.layers.items()}
        plain = {kind: _share(config, self, RecomputeConfig(), *parts) for kind, parts in self.layers.items()}
        is_block = recompute.granularity == "full" and recompute.method == "block"
        stages = []
        for pp_rank, chunks in enumerate(chunk_layers(config.model, config.parallel)):
            num_layers = sum(map(len, chunks))
            num_dense = sum(max(0, min(chunk.stop, first) - chunk.start) for chunk in chunks)
            counts = {False: num_dense, True: num_layers - num_dense}
            again = sum(min(recompute.num_layers, len(chunk)) for chunk in chunks) / num_layers if is_block else 1.0
            stage = self.output if pp_rank == self.layout.pp - 1 else _Share()
            for kind, count in counts.items():
                if count:
                    stage = stage + shares[kind].times(count * again) + plain[kind].times(count * (1 - again))
            stages.append((stage, counts, again))
        return _step(config, self, stages)


class _Links:
    """Seconds that bytes take."""

    def __init__(self, device: Device) -> None:
        self._link = device.link_bandwidth * efficiency.LINKS
        self._network = device.network_bandwidth * efficiency.NETWORK

    def seconds(self, sent: Sent, num_collectives: float = 1) -> float:
        """Return the time of so many bytes; links and network work at the same time."""
        if not sent.total:
            return 0.0
        return max(sent.inside / self._link, sent.across / self._network) + num_collectives * efficiency.LATENCY_SECONDS


def _share(
    config: Config, model: StepModel, recompute: RecomputeConfig, layer: LayerSeconds, traffic: LayerTraffic
) -> _Share:
    """Return one layer's time for a microbatch, with what it waits for and what it computes again."""
    layout, links, gpus_per_node = model.layout, model.links, model.gpus_per_node
    forward, backward = layer.whole.forward, layer.whole.backward
    tp = links.seconds(traffic.tp_waited, 6) + max(0.0, links.seconds(traffic.tp_hidden, 4) - layer.whole.backward)
    ep = links.seconds(traffic.ep, 4)
    again = recomputed_traffic(recompute, traffic)
    tp += links.seconds(again.tp, 2)
    ep += links.seconds(again.ep, 2)
    cp = 0.0
    if layout.cp > 1:
        group = axis_group("cp", layout, gpus_per_node)
        is_ring = resolve_cp_attention(config, has_te=True) in ("te", "ring")
        for num_bytes, core in (
            (traffic.cp.forward, layer.core.forward),
            (again.cp, layer.core.forward),
            (traffic.cp.backward, layer.core.backward),
        ):
            sent = Sent(across=num_bytes) if group.in_node < group.size else Sent(inside=num_bytes)
            cp += max(0.0, links.seconds(sent, layout.cp) - core * is_ring) if num_bytes else 0.0
    if recompute.granularity == "selective":
        backward += recomputed(layer, recompute.modules)
    elif recompute.granularity == "full":
        backward += forward
    return _Share(Seconds(forward, backward), tp, cp, ep, 1)


def _step(config: Config, model: StepModel, stages: Sequence[tuple[_Share, dict[bool, int], float]]) -> StepTime:
    """Put a step together from the times of its stages."""
    layout, links, gpus_per_node, compute = model.layout, model.links, model.gpus_per_node, model.compute
    train = config.train
    m = num_microbatches(config, layout, train.global_batch_size)
    slowest = max(range(layout.pp), key=lambda pp_rank: stages[pp_rank][0].total + stages[pp_rank][0].host)
    stage, counts, again = stages[slowest]
    boundary = boundary_traffic(config, layout, gpus_per_node)
    hop = links.seconds(boundary)
    # without chunks a stage waits for each batch of sends and receives, with them they run beside compute
    pp = 2 * hop * ((m if layout.vpp == 1 else 0) + layout.pp - 1)
    dp_seconds, update = 0.0, 0.0
    for dense, expert in model.trained:
        replicas = replica_traffic(config, layout, gpus_per_node, dense, expert)
        pieces = max(1, (dense + expert) // max(_BUCKET_PARAMETERS, 1_000_000 * layout.dp))
        waited = _left_over(links.seconds(replicas.gradients, pieces), stage.seconds.backward, pieces)
        waited += _left_over(links.seconds(replicas.weights, pieces), stage.seconds.forward, pieces)
        if config.parallel.overlap_grad_reduce is False:
            waited = links.seconds(replicas.gradients + replicas.weights, 2)
        dp_seconds = max(dp_seconds, waited)
        shard = dense / (layout.dp * layout.cp) + expert / layout.edp
        update = max(update, compute.update(dense + expert, shard))
    sent = _bytes_sent(config, model, slowest, {kind: count * m for kind, count in counts.items()}, again) | {
        "pp": boundary * (2 * m * layout.vpp)
    }
    busy = stage.times(m)
    seconds = StepTime(
        compute=busy.seconds.total, host=stage.host * m, tp=busy.tp, cp=busy.cp, ep=busy.ep, pp=pp,
        bubble=(stage.total + stage.host) * m * bubble_fraction(layout.pp, layout.vpp, m),
        dp=dp_seconds, update=update, sent=sent, tokens_per_second=0.0, model_flops_per_second=0.0,
    )  # fmt: skip
    gpu_seconds = seconds.total * layout.world_size
    return replace(
        seconds,
        tokens_per_second=train.global_batch_size * train.seq_len / gpu_seconds,
        model_flops_per_second=flops_per_step(config, train.global_batch_size) / gpu_seconds,
    )


def _bytes_sent(
    config: Config, model: StepModel, stage: int, counts: dict[bool, int], again: float
) -> dict[Axis, Sent]:
    """Return what a rank of a stage sends in a step, by axis but pp.

    `counts` are passes through layers of each kind, of which the share `again` recomputes what the config says.
    """
    layout, sent = model.layout, {}
    dense, expert = model.trained[stage]
    parts: tuple[tuple[Axis, int, int], ...] = (("dp", dense, 0), ("edp", 0, expert))
    for axis, *sizes in parts:
        replicas = replica_traffic(config, layout, model.gpus_per_node, *sizes)
        sent[axis] = replicas.gradients + replicas.weights
    kinds = [
        (traffic, recomputed_traffic(config.train.recompute, traffic), counts[kind])
        for kind, (_, traffic) in model.layers.items()
    ]
    sent["tp"] = sum(((first.tp + second.tp * again) * count for first, second, count in kinds), Sent())
    sent["ep"] = sum(((first.ep + second.ep * again) * count for first, second, count in kinds), Sent())
    group = axis_group("cp", layout, model.gpus_per_node)
    moved = sum((first.cp.forward + first.cp.backward + second.cp * again) * count for first, second, count in kinds)
    share = (group.in_node - (group.in_node < group.size)) / group.in_node  # of neighbours in the ring
    sent["cp"] = Sent(moved * share, moved * (1 - share))
    return sent


def _left_over(seconds: float, window: float, pieces: float) -> float:
    """Return what does not run beside `window` seconds of compute: the last piece never does."""
    return max(seconds - window, seconds / pieces)
