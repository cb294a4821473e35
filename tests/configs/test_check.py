"""Cross-field rules: each broken rule is one sentence with its field first and a value that works after it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from configs.context_parallel import resolve_cp_attention
from configs.load import load_config
from configs.plan.derive import derive_layout
from configs.plan.show import describe
from configs.rules.check import check_config
from configs.stages import Config

ROOT = Path(__file__).parents[2] / "configs"

DENSE = ["data.train=[{path: a}]", "train.num_steps=100", "train.seq_len=64", "train.global_batch_size=16"]
MOE = [*DENSE, "model.moe={num_experts: 8, ffn_hidden_size: 64}"]
MLA = [
    *DENSE,
    "model.num_query_groups=null",
    "model.rope.interleaved=true",
    "model.mla={kv_lora_rank: 32, qk_nope_head_dim: 16, qk_rope_head_dim: 8, v_head_dim: 16}",
]


def config_of(overrides: list[str]) -> Config:
    return load_config(str(ROOT / "models" / "tiny.yaml"), overrides)


def problems_of(overrides: list[str], world_size: int = 1, platform: str = "cuda", has_te: bool = False) -> list[str]:
    config = config_of(overrides)
    return check_config(config, world_size, platform=platform, has_te=has_te)


@pytest.mark.parametrize(
    ("overrides", "world_size"),
    [
        (DENSE, 1),
        (DENSE, 16),
        ([*DENSE, "parallel.tp=2", "parallel.sp=true", "parallel.pp=2", "parallel.vpp=2"], 8),
        ([*DENSE, "parallel.tp=4"], 4),  # two key-value heads on four ranks, as megatron-core allows
        ([*DENSE, "model.num_query_groups=1", "parallel.tp=4"], 4),
        ([*DENSE, "model.num_layers=5", "parallel.pp=2", "parallel.num_layers_in_last_pp_stage=2"], 2),
        ([*DENSE, "train.batch_ramp={start: 4, increment: 4, num_samples: 100}"], 4),
        (MOE, 1),
        ([*MOE, "parallel.ep=2"], 2),
        ([*MOE, "parallel.ep=4", "parallel.tp=2", "parallel.sp=true", "parallel.etp=1"], 4),
        (MLA, 1),
        ([*MLA, "parallel.tp=4", "parallel.sp=true"], 4),
        (["train.num_steps=0", "train.seq_len=64"], 1),
    ],
)
def test_valid_runs_have_no_problem(overrides: list[str], world_size: int) -> None:
    assert problems_of(overrides, world_size) == []


LAYOUT_RULES = [
    (
        ["parallel.pp=2", "parallel.vocabulary_counts_as_layers=true", "model.num_layers=4", "parallel.vpp=2"],
        2,
        "parallel.vocabulary_counts_as_layers: 4 layers and two more do not divide among pp*vpp = 4 chunks of two or "
        "more; products that would work: 2, 3",
    ),
    (["parallel.vocabulary_counts_as_layers=true"], 1, "parallel.vocabulary_counts_as_layers: has no meaning"),
    (["parallel.tp=2", "parallel.pp=2"], 3, "parallel: world size 3 is no multiple of tp*pp*cp = 2*2*1 = 4; start 4"),
    (
        ["parallel.tp=3"],
        3,
        "parallel.tp: 3 does not divide model.num_attention_heads=4; values that would work: 1, 2, 4",
    ),
    (
        ["model.num_attention_heads=12", "model.num_query_groups=4", "model.head_dim=32", "parallel.tp=6"],
        6,
        "parallel.tp: 6 is neither a divisor nor a multiple of model.num_query_groups=4; values that would work: 1, 2",
    ),
    (["model.ffn_hidden_size=690", "parallel.tp=4"], 4, "model.ffn_hidden_size: 690 is not divisible by parallel.tp=4"),
    (
        ["model.vocab_size=4097", "model.vocab_pad_multiple=1", "parallel.tp=2"],
        2,
        "model.vocab_pad_multiple: the padded vocabulary of 4097 is not divisible by parallel.tp=2; a value that would "
        "work: 2",
    ),
    (["parallel.sp=true"], 1, "parallel.sp: there is nothing to split"),
    (["parallel.tp=4", "parallel.sp=true", "train.seq_len=63"], 4, "train.seq_len: 63 is not divisible by 4"),
    (["train.seq_len=4096"], 1, "train.seq_len: 4096 exceeds model.max_position_embeddings=2048; a value that would "),
    (["parallel.pp=3"], 3, "parallel.pp: 4 layers do not divide evenly among 3 pipeline stages"),
    (["parallel.vpp=2"], 1, "parallel.vpp: 2 virtual stages need parallel.pp > 1; a value that would work: 1"),
    (["parallel.pp=2", "parallel.vpp=4"], 2, "parallel.vpp: 4 does not divide the 2 layers of pipeline stage 0"),
    (["parallel.num_layers_in_first_pp_stage=2"], 1, "parallel.num_layers_in_first_pp_stage: has no meaning"),
    (["parallel.ep=2"], 2, "parallel.ep: 2 needs a mixture of experts (model.moe); a value that would work: 1"),
    (["parallel.etp=2"], 2, "parallel.etp: has no effect without model.moe; a value that would work: null"),
    (
        ["parallel.overlap_param_gather=true", "parallel.overlap_grad_reduce=false"],
        1,
        "parallel.overlap_param_gather: needs parallel.overlap_grad_reduce=true",
    ),
    (
        ["train.global_batch_size=10"],
        4,
        "train.global_batch_size: 10 is no multiple of train.micro_batch_size * dp = 1 * 4; a value that would work",
    ),
    (
        ["parallel.pp=2", "parallel.vpp=2", "train.global_batch_size=15"],
        2,
        "train.global_batch_size: 15 makes 15 microbatches, and parallel.vpp > 1 needs a multiple of parallel.pp=2; a "
        "value that would work: 16",
    ),
    (
        ["train.batch_ramp={start: 2, increment: 2, num_samples: 9}", "train.global_batch_size=4"],
        4,
        "train.batch_ramp: 2 is no multiple of train.micro_batch_size * dp = 1 * 4; multiples of 4 would work",
    ),
]

TRAINING_RULES = [
    (["data.train=[]"], "data.train: 100 steps need at least one source"),
    (["data.train=[{path: a/b}, {path: a//b}]"], "data.train: a/b is listed more than once"),
    (
        ["data.validation=[{path: a/c}, {path: b/c}]"],
        "data.validation: several sources are logged under the file name c",
    ),
    (["train.eval_every=5"], "train.eval_every: has no effect without data.validation"),
    (["train.batch_ramp={start: 16, increment: 1, num_samples: 9}"], "train.batch_ramp.start: 16 is not below"),
    (
        ["train.batch_ramp={start: 4, increment: 5, num_samples: 9}"],
        "train.batch_ramp.increment: steps of 5 do not lead from 4 to train.global_batch_size=16; a value that would "
        "work: 4",
    ),
    (
        ["train.recompute.num_layers=2"],
        "train.recompute.num_layers: has no effect with train.recompute.granularity=none",
    ),
    (["train.recompute.method=block"], "train.recompute.method: has no effect"),
    (["train.recompute.modules=[mlp]"], "train.recompute.modules: has no effect"),
    (
        ["train.recompute={granularity: full, num_layers: 5}"],
        "train.recompute.num_layers: 5 exceeds the 4 layers of the largest model chunk; a value that would work: 4",
    ),
    (["train.recompute={granularity: selective, modules: []}"], "train.recompute.modules: is empty"),
    (["train.recompute={granularity: selective, modules: [moe]}"], "train.recompute.modules: moe needs model.moe"),
    (
        ["train.recompute={granularity: selective, modules: [mlp]}", "model.linear_bias=true"],
        "train.recompute.modules: an MLP with the biases of model.linear_bias cannot be recomputed alone",
    ),
    (["train.recompute={granularity: selective, modules: [moe_act]}"], "train.recompute.modules: moe_act needs model."),
    (
        ["train.recompute={granularity: selective, modules: [mla_up_proj]}"],
        "train.recompute.modules: mla_up_proj needs",
    ),
    (["precision.min_loss_scale=2"], "precision.min_loss_scale: has no effect with precision.compute=bf16"),
    (
        ["precision={compute: fp16, initial_loss_scale: 4, min_loss_scale: 8}"],
        "precision.min_loss_scale: 8 exceeds precision.initial_loss_scale=4",
    ),
    (["optimizer.beta2=1"], "optimizer.beta2: 1.0 never forgets"),
    (["optimizer.lr=1e-5"], "optimizer.min_lr: 3e-05 exceeds optimizer.lr=1e-05; a value that would work: 1e-06"),
    (["optimizer.min_lr=0", "schedule={kind: wsd, wsd_decay: exponential}"], "optimizer.min_lr: an exponential decay"),
    (["schedule.wsd_decay_steps=5"], "schedule.wsd_decay_steps: has no effect with schedule.kind=cosine"),
    (["schedule.wsd_decay=cosine"], "schedule.wsd_decay: has no effect with schedule.kind=cosine"),
    (["schedule={kind: constant, decay_steps: 5}"], "schedule.decay_steps: has no effect with schedule.kind=constant"),
    (["schedule.warmup_steps=100"], "schedule.warmup_steps: 100 is not below train.num_steps=100; a value that would"),
    (["schedule={warmup_steps: 9, decay_steps: 9}"], "schedule.warmup_steps: 9 is not below schedule.decay_steps=9"),
    (
        ["schedule={warmup_fraction: 0.5, decay_steps: 9}"],
        "schedule.warmup_fraction: 0.5 makes 50 steps, which is not below schedule.decay_steps=9; a value that would "
        "work: 0.03",
    ),
    (
        ["schedule={warmup_fraction: 0.03, warmup_steps: 3}"],
        "schedule.warmup_fraction: schedule.warmup_steps=3 says too how long it is; a value that would work: null",
    ),
    (
        ["schedule={kind: wsd, warmup_steps: 20, wsd_decay_steps: 90}"],
        "schedule.wsd_decay_steps: 90 do not fit between the 20 warm-up steps and step 100",
    ),
    (["checkpoint={resume: a/b, init_from: c}"], "checkpoint.init_from: checkpoint.resume names a checkpoint too"),
    (["checkpoint.keep_every=5"], "checkpoint.keep_every: has no effect without checkpoint.save_every"),
    (
        ["checkpoint={save_every: 4, keep_every: 6}"],
        "checkpoint.keep_every: 6 is no multiple of checkpoint.save_every=4",
    ),
    (["sample.prompts=[a]"], "data.tokenizer: sample.prompts need a tokenizer directory"),
    (["sample={prompts: [a], num_tokens: 2048}", "data.tokenizer=t"], "sample.num_tokens: 2048 leaves no room"),
    (["sample={prompts: [a], top_k: 5000}", "data.tokenizer=t"], "sample.top_k: 5000 exceeds model.vocab_size=4096"),
    (["run.name='  '"], "run.name: is empty"),
]

MODEL_RULES = [
    (
        ["model.hidden_size=250"],
        "model.head_dim: model.hidden_size=250 is not divisible by model.num_attention_heads=4",
    ),
    (
        ["model.num_query_groups=3"],
        "model.num_query_groups: 3 does not divide model.num_attention_heads=4; values that ",
    ),
    (["model.linear_bias=true", "model.qkv_bias=true"], "model.qkv_bias: model.linear_bias already gives it"),
    (["model.head_dim=33"], "model.head_dim: 33 dimensions cannot be rotated in pairs; a value that would work: 34"),
    (
        ["model.rope.factor=8"],
        "model.rope.factor: has no effect with model.rope.scaling=none; a value that would work: 1",
    ),
    (["model.rope.beta_fast=8"], "model.rope.beta_fast: has no effect with model.rope.scaling=none"),
    (["model.rope.scaling=yarn"], "model.rope.original_max_position_embeddings: 4096 exceeds"),
    (["model.rope={scaling: linear}"], "model.rope.factor: 1 extends nothing; a value that would work: 8.0"),
    (
        ["model.rope={scaling: llama3, factor: 2, original_max_position_embeddings: 1024, low_freq_factor: 5}"],
        "model.rope.high_freq_factor: 4 must be above model.rope.low_freq_factor=5",
    ),
    (
        ["model.rope={scaling: yarn, factor: 2, original_max_position_embeddings: 1024, beta_slow: 40}"],
        "model.rope.beta_fast: 32 must be at least model.rope.beta_slow=40",
    ),
]

MOE_RULES = [
    (
        ["parallel.ep=3"],
        3,
        "parallel.ep: 3 does not divide model.moe.num_experts=8; values that would work: 1, 2, 4, 8",
    ),
    (["parallel.ep=2"], 1, "parallel.ep: ep*etp = 2*1 does not divide dp*cp*tp = 1; values that would work: 1"),
    (["parallel.tp=2"], 2, "parallel.sp: mixture of experts with parallel.tp=2 needs the sequence split"),
    (
        ["parallel.etp=2", "model.moe.ffn_hidden_size=63"],
        2,
        "parallel.etp: 2 does not divide model.moe.ffn_hidden_size=63; a value that would work: 1",
    ),
    (["parallel.etp=2", "model.linear_bias=true"], 2, "model.linear_bias: experts with a bias need Transformer Engine"),
    (["model.moe.top_k=9"], 1, "model.moe.top_k: 9 exceeds the 8 experts"),
    (["model.moe.top_k=1"], 1, "model.moe.softmax_before_topk: a softmax over one chosen expert"),
    (["model.moe.num_dense_layers=4"], 1, "model.moe.num_dense_layers: 4 leaves no layer"),
    (["model.moe.balancing=bias"], 1, "model.moe.balancing: bias needs model.moe.score_function=sigmoid"),
    (["model.moe.balancing=none", "model.moe.aux_loss_coeff=1"], 1, "model.moe.aux_loss_coeff: has no effect"),
    (["model.moe.bias_update_rate=1"], 1, "model.moe.bias_update_rate: has no effect"),
    (
        ["model.moe.score_function=sigmoid", "model.moe.softmax_before_topk=true"],
        1,
        "model.moe.softmax_before_topk: has no effect",
    ),
    (["model.moe.num_groups=2"], 1, "model.moe.group_top_k: num_groups and group_top_k go together"),
    (["model.moe.num_groups=3", "model.moe.group_top_k=1"], 1, "model.moe.num_groups: 3 does not divide 8 experts"),
    (["model.moe.num_groups=2", "model.moe.group_top_k=3"], 1, "model.moe.group_top_k: 3 exceeds"),
    (
        ["model.moe.num_groups=4", "model.moe.group_top_k=3"],
        1,
        "model.moe.group_top_k: 3 groups cannot share model.moe.top_k=2 experts evenly; values that would work: 1, 2",
    ),
    (
        ["model.moe.shared_expert_ffn_hidden_size=64", "model.linear_bias=true"],
        1,
        "model.linear_bias: shared experts have no biases",
    ),
    (["train.recompute={granularity: selective, modules: [mlp]}"], 1, "train.recompute.modules: mlp needs a dense MLP"),
    (
        ["train.recompute={granularity: selective, modules: [moe_act]}"],
        1,
        "train.recompute.modules: moe_act needs Trans",
    ),
]

MLA_RULES = [
    (["model.qk_norm=true"], "model.qk_norm: has no effect with model.mla"),
    (["model.qkv_bias=true"], "model.qkv_bias: has no effect with model.mla"),
    (["model.head_dim=64"], "model.head_dim: has no effect with model.mla"),
    (["model.num_query_groups=2"], "model.num_query_groups: has no effect with model.mla"),
    (["model.linear_bias=true"], "model.linear_bias: latent attention has no biases"),
    (["model.rope.interleaved=false"], "model.rope.interleaved: latent attention rotates neighbouring pairs"),
    (["model.rope.fraction=0.5"], "model.rope.fraction: model.mla.qk_rope_head_dim says what is rotated"),
    (["model.rope.scaling=linear", "model.rope.factor=2"], "model.rope.scaling: latent attention has no linear"),
    (["model.mla.qk_rope_head_dim=7"], "model.mla.qk_rope_head_dim: 7 dimensions cannot be rotated in pairs"),
]


@pytest.mark.parametrize(
    ("base", "overrides", "world_size", "start"),
    [(DENSE, *rule) for rule in LAYOUT_RULES]
    + [(DENSE, overrides, 1, start) for overrides, start in TRAINING_RULES + MODEL_RULES]
    + [(MOE, *rule) for rule in MOE_RULES]
    + [(MLA, overrides, 1, start) for overrides, start in MLA_RULES],
)
def test_each_rule_gives_its_sentence(base: list[str], overrides: list[str], world_size: int, start: str) -> None:
    problems = problems_of([*base, *overrides], world_size)
    assert any(problem.startswith(start) for problem in problems), problems
    assert all("\n" not in problem and ";" in problem for problem in problems), problems


CP4 = ["parallel.cp=4", "train.seq_len=64"]
CP_RULES = [
    (["parallel.cp_attention=te"], "parallel.cp_attention: te needs layers of Transformer Engine; a value that would"),
    (["model.attention_dropout=0.1"], "model.attention_dropout: 0.1 is not drawn alike on the ranks of parallel.cp=4"),
    (["parallel.cp_inner=2"], "parallel.cp_inner: is for parallel.cp_attention=hierarchical, which is ring; set it to"),
    (["parallel.cp_attention=hierarchical"], "parallel.cp_inner: is needed for parallel.cp_attention="),
    (["parallel.cp_attention=hierarchical", "parallel.cp_inner=4"], "parallel.cp_inner: 4 does not suit "),
    (
        ["parallel.cp_attention=ulysses", "model.num_attention_heads=6", "model.num_query_groups=6"]
        + ["model.hidden_size=96", "model.head_dim=16"],
        "parallel.cp_attention: 4 ranks cannot divide 6 query heads and 6 key-value heads (of a tp rank)",
    ),
    (
        ["parallel.cp_attention=ulysses", "model.num_attention_heads=12", "model.num_query_groups=3"]
        + ["model.hidden_size=96", "model.head_dim=8"],
        "parallel.cp_attention: 4 ranks cannot divide 12 query heads and 3 key-value heads",
    ),
]


@pytest.mark.parametrize(("overrides", "start"), CP_RULES)
def test_context_parallel_attention_that_cannot_be(overrides: list[str], start: str) -> None:
    problems = problems_of([*DENSE, *CP4, *overrides], 4)
    assert any(problem.startswith(start) for problem in problems), problems


def test_documents_are_not_for_the_split_of_transformer_engine() -> None:
    overrides = [*DENSE, *CP4, "data.document_mask=true"]
    assert problems_of(overrides, 4, has_te=True) == []
    (problem,) = problems_of([*overrides, "parallel.cp_attention=te"], 4, has_te=True)
    assert problem.startswith("parallel.cp_attention: te splits each document for itself")
    assert resolve_cp_attention(config_of(overrides), has_te=True) == "ring"
    assert resolve_cp_attention(config_of([*DENSE, *CP4]), has_te=True) == "te"
    assert resolve_cp_attention(config_of([*DENSE, *CP4]), has_te=False) == "ring"


def test_a_row_is_cut_into_two_chunks_a_rank() -> None:
    overrides = [*DENSE, "parallel.cp=2"]
    assert problems_of(overrides, 2) == problems_of(overrides, 2, has_te=True) == []
    (problem,) = problems_of([*overrides, "train.seq_len=66"], 2, has_te=True)
    assert problem.startswith("train.seq_len: 66 is not divisible by 4") and problem.endswith("work: 64")


def test_overlap_defaults_follow_the_platform() -> None:
    overrides = [*DENSE, "parallel.overlap_param_gather=true"]
    assert problems_of(overrides, platform="cuda") == []
    assert len(problems_of(overrides, platform="cpu")) == 1


def test_every_problem_comes_at_once() -> None:
    problems = problems_of(
        ["train.num_steps=10", "train.seq_len=9999", "parallel.tp=3", "parallel.ep=2", "optimizer.lr=1e-9"], 4
    )
    fields = {problem.split(":")[0] for problem in problems}
    assert {"data.train", "train.seq_len", "parallel.tp", "parallel", "parallel.ep", "optimizer.min_lr"} <= fields


def test_the_layout_suggested_for_a_world_works() -> None:
    (problem,) = problems_of([*DENSE, "parallel.tp=4", "parallel.pp=2"], 4)
    suggested = problem.split("or set ")[1].split()
    assert suggested == ["parallel.tp=4", "parallel.pp=1", "parallel.cp=1"]
    assert problems_of([*DENSE, *suggested], 4) == []


@pytest.mark.parametrize("path", sorted((ROOT / "models").glob("*.yaml")), ids=lambda path: path.stem)
def test_model_presets_break_no_rule(path: Path) -> None:
    config = load_config(str(path), ["train.num_steps=0", "train.seq_len=1024", "train.global_batch_size=8"])
    assert check_config(config, 8, platform="cuda", has_te=False) == []


def test_whatever_passes_the_check_can_be_described() -> None:
    """Random layouts: what check_config accepts must derive, estimate and describe without an error."""
    choose = random.Random(0)
    accepted = 0
    for _ in range(400):
        world_size = choose.choice([1, 2, 4, 8, 16])
        overrides = [
            *choose.choice([DENSE, MOE, MLA]),
            f"model.num_layers={choose.choice([3, 4, 5, 8])}",
            f"parallel.tp={choose.choice([1, 1, 2, 4])}",
            f"parallel.sp={choose.choice(['true', 'false'])}",
            f"parallel.pp={choose.choice([1, 1, 2, 4])}",
            f"parallel.vpp={choose.choice([1, 1, 2])}",
            f"parallel.ep={choose.choice([1, 1, 2])}",
            f"parallel.num_layers_in_last_pp_stage={choose.choice(['null', 'null', 1, 2])}",
            f"train.batch_ramp={choose.choice(['null', '{start: 8, increment: 8, num_samples: 40}'])}",
            f"train.recompute.granularity={choose.choice(['none', 'selective', 'full'])}",
        ]
        config = load_config(str(ROOT / "models" / "tiny.yaml"), overrides)
        if check_config(config, world_size, platform="cpu", has_te=False):
            continue
        accepted += 1
        assert "model TFLOPs per step" in describe(config, derive_layout(config, world_size))
    assert accepted > 20
