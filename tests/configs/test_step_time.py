"""Bubble and bytes of each axis against published formulas; predicted speed against published and own measurements."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.errors import BadInput
from configs.load import load_config
from configs.plan.derive import derive_layout
from configs.plan.devices import DEVICES, find_device
from configs.plan.step_time import bubble_fraction, estimate_step
from configs.plan.traffic import Group, axis_group, boundary_traffic, layer_traffic, replica_traffic
from configs.stages import Config

ROOT = Path(__file__).parents[2] / "configs"
SEQ, HIDDEN, LAYERS = 4096, 2048, 8
TOKENS_BYTES = SEQ * HIDDEN * 2


def gpt(**sections: object) -> Config:
    model = {"num_layers": LAYERS, "hidden_size": HIDDEN, "ffn_hidden_size": 8192, "num_attention_heads": 16}
    fields = {
        "run": {"name": "x"},
        "model": model | {"vocab_size": 32000},
        "train": {"num_steps": 1, "seq_len": SEQ, "global_batch_size": 64},
        "data": {"train": [{"path": "x"}]},
    }
    for name, section in sections.items():
        fields[name] = fields.get(name, {}) | section
    return Config.model_validate(fields)


@pytest.mark.parametrize(("pp", "vpp", "m", "bubble"), [(8, 1, 32, 7 / 32), (8, 4, 32, 7 / 128), (1, 1, 4, 0.0)])
def test_the_bubble_is_that_of_narayanan(pp: int, vpp: int, m: int, bubble: float) -> None:
    assert bubble_fraction(pp, vpp, m) == bubble


def test_the_bubble_of_a_step_is_its_share_of_what_the_stages_do() -> None:
    """All stages alike: no vocabulary to speak of, so that idle over busy time is (p - 1) / (v m) of the whole."""
    config = gpt(model={"vocab_size": 128}, parallel={"pp": 4, "vpp": 2})
    step = estimate_step(config, derive_layout(config, 8), find_device("h100"), 8, has_te=True)
    assert step.bubble / (step.compute + step.host) == pytest.approx(3 / (2 * 32))


@pytest.mark.parametrize("size", [2, 8, 64])
def test_a_ring_sends_what_an_all_gather_and_an_all_to_all_must(size: int) -> None:
    for in_node in (1, 2, min(8, size)):
        group = Group(size, in_node)
        assert group.ring(1000).total == pytest.approx(1000 * (size - 1) / size)
        assert group.exchange(1000).total == pytest.approx(1000 * (size - 1) / size)
    assert Group(size, size).ring(1000).across == 0
    assert Group(size, 1).ring(1000).inside == 0


def test_each_node_receives_once_what_its_ranks_share() -> None:
    """16 ranks on 2 nodes: half of the whole lies on the other node, and 8 cards bring it in."""
    assert Group(16, 8).ring(1600).across == pytest.approx(1600 / 2 / 8)


def test_ranks_of_an_axis_lie_in_a_node_as_megatron_orders_them() -> None:
    config = gpt(parallel={"tp": 4, "cp": 2, "pp": 2, "sp": True})
    layout = derive_layout(config, 64)
    groups = {axis: axis_group(axis, layout, 8) for axis in ("tp", "cp", "dp", "pp")}
    assert groups == {"tp": Group(4, 4), "cp": Group(2, 2), "dp": Group(8, 2), "pp": Group(2, 1)}


@pytest.mark.parametrize(("sp", "rings"), [(False, 8), (True, 10)])
def test_tp_sends_four_all_reduces_a_layer(sp: bool, rings: int) -> None:
    """Shoeybi et al., 3: two forward, two backward, each 2 (n-1)/n; with sp (Korthikanti et al., 4.2.2) the same bytes,
    and the inputs of both blocks gathered once more."""
    config = gpt(parallel={"tp": 4, "sp": sp})
    traffic = layer_traffic(config, derive_layout(config, 4), 8, has_experts=False)
    assert traffic.tp.total == pytest.approx(rings * TOKENS_BYTES * 3 / 4)


def test_zero_1_sends_what_an_all_reduce_does() -> None:
    """Rajbhandari et al., 7: a reduce-scatter of the gradients and an all-gather of the weights, here 4 and 2 bytes."""
    config = gpt()
    replicas = replica_traffic(config, derive_layout(config, 16), 8, dense=1000, expert=0)
    assert replicas.gradients.total == pytest.approx(4000 * 15 / 16)
    assert replicas.weights.total == pytest.approx(2000 * 15 / 16)


def test_experts_exchange_every_chosen_token_four_times() -> None:
    """Out and back, forward and backward (arXiv:2006.16668); 7 of 8 ranks are others, 4 of them on the other node."""
    moe = {"num_experts": 16, "top_k": 2, "ffn_hidden_size": 1024}
    config = gpt(model={"moe": moe}, parallel={"ep": 8})
    traffic = layer_traffic(config, derive_layout(config, 8), 4, has_experts=True)
    assert traffic.ep.total == pytest.approx(4 * 2 * TOKENS_BYTES * 7 / 8)
    assert traffic.ep.across == pytest.approx(4 * 2 * TOKENS_BYTES * 4 / 8)


def test_a_stage_sends_its_output_as_it_lies() -> None:
    config = gpt(parallel={"tp": 4, "pp": 2, "sp": True})
    assert boundary_traffic(config, derive_layout(config, 16), 8).across == TOKENS_BYTES / 4
    assert boundary_traffic(config, derive_layout(config, 8), 8).inside == TOKENS_BYTES / 4


def test_stages_of_several_nodes_are_as_fast_as_the_hop_between_nodes() -> None:
    """tp 4, pp 4 on two nodes of 8: the second stage's outputs leave the node, and all others wait for that."""
    config = gpt(parallel={"tp": 4, "pp": 4, "sp": True})
    assert boundary_traffic(config, derive_layout(config, 16), 8).across == TOKENS_BYTES / 4


@pytest.mark.parametrize(
    ("recompute", "tp_rings", "cp_parts"),
    [
        ({}, 10, 6),
        ({"granularity": "selective", "modules": ["mlp"]}, 12, 6),
        ({"granularity": "full"}, 14, 7),
        ({"granularity": "full", "method": "block", "num_layers": 2}, 11, 6.25),
    ],
    ids=["none", "mlp", "full", "a quarter"],
)
def test_what_is_computed_again_is_sent_again(recompute: dict, tp_rings: float, cp_parts: float) -> None:
    """With sp each of two blocks has a gather and a scatter forward. Ring attention of 2 ranks: keys and values once
    forward, once backward and, in fp32, their gradients twice, which are 2 (n = 2) times twice as large: 1 + 1 + 4."""
    config = gpt(parallel={"tp": 2, "cp": 2, "sp": True}, train={"recompute": recompute})
    sent = estimate_step(config, derive_layout(config, 4), find_device("h100"), 8, has_te=True).sent
    ring = TOKENS_BYTES / 2 / 2  # of a cp rank's tokens, all but a tp rank's own
    assert sent["tp"].total == pytest.approx(64 * LAYERS * tp_rings * ring)
    keys = 2 * SEQ / 2 * HIDDEN / 2 * 2  # keys and values of a cp rank's tokens and a tp rank's heads, 2 bytes each
    assert sent["cp"].total == pytest.approx(64 * LAYERS * cp_parts * keys)


def test_lora_reduces_and_updates_its_adapters_alone() -> None:
    """Rank 16 on two linears: r (in + out) of each, fp32 gradients and bf16 weights over 8 ranks."""
    plain, lora = gpt(), gpt(lora={"rank": 16, "target_modules": ["o_proj", "down_proj"]})
    step, whole = (
        estimate_step(one, derive_layout(one, 8), find_device("h100"), 8, has_te=True) for one in (lora, plain)
    )
    adapters = LAYERS * 16 * ((HIDDEN + HIDDEN) + (8192 + HIDDEN))
    assert step.sent["dp"].total == pytest.approx(adapters * 6 * 7 / 8)
    assert step.update < whole.update / 50


# NVIDIA's published tables of Megatron-Bridge for DGX H100, tokens/s a GPU; our own for the H200 (root README).
PLAIN_8B = ["precision.fp8.recipe=tensorwise", "train.recompute.num_layers=5"]
LONG_1B = ["train.seq_len=8192", "train.global_batch_size=4"]
MEASURED = {
    "8b_fp8_8_h100": ("pretrain/llama3_1_8b_fp8.yaml", PLAIN_8B, "h100", 8, True, 13812),
    "70b_fp8_64_h100": ("pretrain/llama3_1_70b_fp8.yaml", [], "h100", 64, True, 1621),
    "405b_fp8_1024_h100": ("pretrain/llama3_1_405b_fp8.yaml", [], "h100", 1024, True, 315),
    "1b_bf16_h200": ("models/llama3_2_1b.yaml", LONG_1B, "h200", 1, False, 46850),
}  # fmt: skip
LIMIT = 0.10


@pytest.mark.parametrize("name", MEASURED)
def test_predicted_speed_is_near_what_was_measured(name: str) -> None:
    recipe, overrides, device, gpus, has_te, measured = MEASURED[name]
    config = load_config(str(ROOT / recipe), ["train.num_steps=10", *overrides])
    step = estimate_step(config, derive_layout(config, gpus), find_device(device), 8, has_te=has_te)
    assert step.tokens_per_second == pytest.approx(measured, rel=LIMIT)


def test_an_unknown_device_is_refused_with_the_known_ones() -> None:
    with pytest.raises(BadInput, match=r"--device: no figures for 'h10'; .*a value that would work: h100"):
        find_device("h10")
    assert all(device.source and device.bf16_flops > 1e14 for device in DEVICES.values())
