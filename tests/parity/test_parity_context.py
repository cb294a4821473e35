"""Context parallelism: every way of sharing attention, with every other axis, gives one rank's losses and gradients."""

from __future__ import annotations

import pytest

CP2, CP4 = {"cp": 2}, {"cp": 4}
ULYSSES = {"cp_attention": "ulysses"}
HIERARCHICAL = {"cp": 4, "cp_attention": "hierarchical", "cp_inner": 2}
METHODS = {
    "ring_cp2": (2, CP2),
    "ring_cp4": (4, CP4),
    "all_gather_cp2": (2, CP2 | {"cp_attention": "all_gather"}),
    "all_gather_cp4": (4, CP4 | {"cp_attention": "all_gather"}),
    "ulysses_cp2": (2, CP2 | ULYSSES),
    "ulysses_cp4_more_ranks_than_key_heads": (4, CP4 | ULYSSES),
    "hierarchical_cp4": (4, HIERARCHICAL),
}
LAYOUTS = {
    "cp2_dp2": (4, CP2),
    "cp2_tp2": (4, CP2 | {"tp": 2}),
    "cp2_tp2_sp": (4, CP2 | {"tp": 2, "sp": True}),
    "cp2_pp2": (4, CP2 | {"pp": 2}),
    "cp2_pp2_vpp2": (4, CP2 | {"pp": 2, "vpp": 2}),
    "ulysses_cp2_tp2": (4, CP2 | ULYSSES | {"tp": 2}),
    "all_gather_cp2_pp2": (4, CP2 | {"cp_attention": "all_gather", "pp": 2}),
}


@pytest.mark.parametrize("masks", ["uneven", "documents"])
@pytest.mark.parametrize("name", METHODS)
def test_method_equals_one_rank(judge, name, masks):
    sections = {"data": {"document_mask": True}} if masks == "documents" else {}
    judge.check(*METHODS[name], masks=masks, **sections)


@pytest.mark.parametrize("masks", ["uneven", "documents"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_rank(judge, name, masks):
    judge.check(*LAYOUTS[name], masks=masks)


WINDOWS_AND_SINKS = {"window_size": 7, "window_pattern": [True, True, False], "attention_sinks": True}
MOE = {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 64}
MODELS = {
    "experts_balanced": {"moe": MOE | {"z_loss_coeff": 1e-2}},
    "experts_bias": {"moe": MOE | {"score_function": "sigmoid", "balancing": "bias"}},
    "latent": {
        "num_query_groups": None,
        "rope": {"interleaved": True},
        "mla": {
            "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16
        },
    },
    "one_key_head": {"num_query_groups": 1},
    "windows_and_sinks": WINDOWS_AND_SINKS,
    "yarn": {"rope": {"scaling": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
}  # fmt: skip


@pytest.mark.parametrize("masks", ["uneven", "documents"])
@pytest.mark.parametrize("name", MODELS)
def test_architecture_equals_one_rank(judge, name, masks):
    judge.check(2, CP2, masks=masks, model=MODELS[name])


@pytest.mark.parametrize(
    "world, parallel",
    [(2, {"tp": 2, "sp": True}), (2, {"pp": 2}), (4, CP2 | ULYSSES | {"tp": 2})],
    ids=["tp2_sp", "pp2", "ulysses_cp2_tp2"],
)
def test_windows_and_sinks_equal_one_rank(judge, world, parallel):
    """Two layers of three have the window, whatever stage they are on; sinks lie over tp with their heads."""
    judge.check(world, parallel, masks="documents", model=WINDOWS_AND_SINKS)


CP4_CASES = {
    "latent_hierarchical": (4, HIERARCHICAL, MODELS["latent"]),
    "windows_and_sinks_ulysses": (4, CP4 | ULYSSES, WINDOWS_AND_SINKS),
    "experts_hierarchical_ep2": (4, HIERARCHICAL | {"ep": 2}, MODELS["experts_balanced"]),
    "vpp2_all_gather": (8, CP4 | {"cp_attention": "all_gather", "pp": 2, "vpp": 2}, {}),
}


@pytest.mark.parametrize("name", CP4_CASES)
def test_four_ranks_equal_one_rank_with_every_kind_of_model(judge, name):
    world, parallel, model = CP4_CASES[name]
    judge.check(world, parallel, masks="documents", model=model)


@pytest.mark.parametrize("parallel", [CP2 | {"ep": 2}, CP2 | {"ep": 2, "tp": 2, "sp": True}], ids=["ep2", "ep2_tp2_sp"])
@pytest.mark.parametrize("name", ["experts_balanced", "experts_bias"])
def test_experts_equal_one_rank(judge, name, parallel):
    judge.check(2 * parallel.get("tp", 1), parallel, masks="uneven", model=MODELS[name])


@pytest.mark.parametrize("fields", [{"granularity": "selective"}, {"granularity": "full", "num_layers": 1}])
def test_recomputation_equals_one_rank(judge, fields):
    judge.check(2, CP2, masks="documents", train={"recompute": fields})
