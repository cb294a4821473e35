"""What --help and --dry-run print: complete, and what they show of a config loads back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from configs.fields import schema_fields
from configs.load import load_config
from configs.plan.derive import derive_layout
from configs.plan.show import data_rows, describe, field_help
from configs.stages import STAGE_CONFIGS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("stage", STAGE_CONFIGS)
def test_help_names_every_field_with_a_default_and_a_doc(stage: str) -> None:
    lines = field_help(stage).splitlines()
    fields = [field for field in schema_fields(STAGE_CONFIGS[stage]) if field.section is None]
    assert len(fields) > 100
    for field in fields:
        position = next(number for number, line in enumerate(lines) if line.startswith(f"  {field.path} = "))
        has_steps = field.path != "train.num_steps" or STAGE_CONFIGS[stage].is_training
        assert (field.default_text if has_steps else " = 0 ") in lines[position]
        assert lines[position + 1].strip() == field.doc != ""


def test_words_that_stand_for_a_path_are_shown_as_values() -> None:
    assert "checkpoint.resume = auto   <auto | never | path>" in field_help("pretrain")


@pytest.mark.parametrize("stage", STAGE_CONFIGS)
def test_every_example_value_in_help_is_accepted(stage: str) -> None:
    """The value offered in "a value that would work" must itself pass the field's rules."""
    tiny = str(ROOT / "configs" / "models" / "tiny.yaml")
    whole = {"model.moe": "{num_experts: 8, ffn_hidden_size: 64}"}
    whole["model.mla"] = "{kv_lora_rank: 8, qk_nope_head_dim: 8, qk_rope_head_dim: 8, v_head_dim: 8}"
    whole["precision.fp8"] = "{recipe: delayed}"
    whole["train.batch_ramp"] = "{start: 1, increment: 1, num_samples: 1}"
    whole["grpo.reward_model"] = "{init_from: runs/demo_reward}"
    fields = [field for field in schema_fields(STAGE_CONFIGS[stage]) if field.section is None]
    for field in fields:
        parent = field.path.rpartition(".")[0]
        overrides = ["train.num_steps=1", *([f"{parent}={whole[parent]}"] if parent in whole else [])]
        load_config(tiny, [*overrides, f"{field.path}={field.example}"], stage)


def test_a_plan_of_fine_tuning_says_what_its_data_has_yet_to_say(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"base: {ROOT / 'configs' / 'models' / 'tiny.yaml'}\ntrain: {{num_epochs: 2}}\n", encoding="utf-8"
    )
    config = load_config(str(recipe), ["sft.train=[{path: nowhere.jsonl}]"], "sft")
    text = describe(config, derive_layout(config, 1))
    assert "2 epochs; the start of a run counts their steps" in text
    assert "sft.train                   nowhere.jsonl: not on this machine" in text


def test_dry_run_text_holds_config_and_consequences(tmp_path: Path) -> None:
    config = load_config(
        str(ROOT / "configs" / "pretrain" / "llama3_1_70b.yaml"),
        ["train.batch_ramp={start: 128, increment: 128, num_samples: 1000000}"],
    )
    text = describe(config, derive_layout(config, 512))
    resolved, _, derived = text.partition("# What follows from it")
    again = tmp_path / "again.yaml"
    again.write_text(resolved, encoding="utf-8")
    assert load_config(str(again)) == config
    for expected in (
        "512 = dp 16 x tp 4 x pp 8 x cp 1",
        "10 (0-1, 16-17, 32-33, 48-49, 64-65)",
        "8 rising to 32 of 1 x 8192 tokens",
        "4,194,304 at the full batch",
        "70,553,706,496 (2,101,346,304 in the vocabulary)",
        "model TFLOPs per step",
        "  gradients ",
    ):
        assert expected in derived, expected


def test_configs_and_topology_import_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; "
        "import configs.plan.show, configs.rules.check, configs.load, parallel.topology;"
        "print(any(name.split('.')[0] in ('megatron', 'transformers', 'numpy') for name in sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_a_dry_run_of_epochs_counts_no_steps_and_names_the_conversations(tmp_path: Path) -> None:
    chats = tmp_path / "chats.jsonl"
    chats.write_text("{}\n")
    gone = tmp_path / "gone.jsonl"
    sources = [f"sft.train=[{{path: {chats}}}]", f"sft.validation=[{{path: {gone}}}]"]
    words = [*sources, "train.num_steps=null", "train.num_epochs=1.5", "data.tokenizer=none"]
    config = load_config(str(ROOT / "configs" / "models" / "tiny.yaml"), words, "sft")
    _, _, derived = describe(config, derive_layout(config, 1)).partition("# What follows from it")
    assert "1.5 epochs; " in derived and "total tokens" not in derived and "1,000,000,000,000" not in derived
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in derived.strip().splitlines()}
    assert rows["sft.train"] == f"{chats}: found, 0.0 MiB"
    assert rows["sft.validation"] == f"{gone}: not on this machine"


def test_a_plan_of_reinforcement_says_what_a_step_takes_and_what_the_algorithm_means() -> None:
    words = ["grpo.algorithm=dapo", "grpo.num_minibatches=3", "grpo.num_epochs=2", "grpo.clip_low=0.1"]
    config = load_config(str(ROOT / "configs" / "demo" / "grpo.yaml"), words, "grpo")
    _, _, derived = describe(config, derive_layout(config, 2)).partition("# What follows from it")
    rows = {line[:28].strip(): line[28:].strip() for line in derived.strip().splitlines()}
    assert rows["a step"] == "96 prompts x 8 answers, 6 updates of 256 answers; 200 steps"
    assert rows["microbatches per update"] == "64 of 2 x 256 tokens at most; answers are packed"
    assert rows["method"] == (
        "advantages group_std; clip of token ratios below 0.9, above 1.28; token_mean; no divergence; 10 refills"
    )
    assert "tokens per step" not in rows and "model TFLOPs per update" in rows


def test_a_plan_of_ppo_says_what_its_critic_is() -> None:
    config = load_config(str(ROOT / "configs" / "demo" / "ppo.yaml"), ["ppo.length_alpha=0.05"], "ppo")
    _, _, derived = describe(config, derive_layout(config, 2)).partition("# What follows from it")
    rows = {line[:28].strip(): line[28:].strip() for line in derived.strip().splitlines()}
    assert rows["updates of the critic"] == "lr 0.0002, lambda 1; alone in the first 5 steps"
    assert rows["method"].startswith(
        "advantages of a critic, gamma 1, lambda 1 - 1 / (0.05 tokens); clip of token ratios"
    )


def test_help_has_the_defaults_of_the_stage_and_not_of_a_section_alone() -> None:
    assert "  grpo.algorithm = ppo " in field_help("ppo") and "  grpo.algorithm = grpo " in field_help("grpo")
    for stage in ("rft", "teacher_cache"):
        assert "  train.num_steps = 0 " in field_help(stage)


def test_a_plan_of_a_teachers_cache_counts_its_weights_alone_and_a_student_of_one_names_it() -> None:
    config = load_config(str(ROOT / "configs" / "demo" / "teacher_cache.yaml"), [], "teacher_cache")
    _, _, derived = describe(config, derive_layout(config, 2)).partition("# What follows from it")
    rows = {line[:28].strip(): line[28:].strip() for line in derived.strip().splitlines()}
    assert rows["a pass"] == "over all data, 16 ids of each trained token written down"
    assert "weights" in rows and not rows.keys() & {"gradients", "optimizer", "total tokens", "model TFLOPs per step"}
    words = ["distill.teacher=null", "distill.cache=nowhere"]
    config = load_config(str(ROOT / "configs" / "demo" / "distill.yaml"), words, "distill")
    assert dict(data_rows(config))["distill.cache"] == "nowhere: not on this machine"
