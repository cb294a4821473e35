"""Reading YAML: base chains, overrides by type, and every problem in one message."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from configs import sentences
from configs.errors import BadInput
from configs.fields import schema_fields
from configs.load import load_config, read_config, resolved_dict
from configs.plan.show import field_help
from configs.sections.base import Section
from configs.stages import STAGE_CONFIGS, Config

TINY = """
model: {num_layers: 4, hidden_size: 64, ffn_hidden_size: 128, num_attention_heads: 4, vocab_size: 512}
train: {num_steps: 10, seq_len: 32}
"""


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    return write(tmp_path / "tiny.yaml", TINY)


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


def problems_of(path: str, overrides: list[str]) -> list[str]:
    with pytest.raises(BadInput) as caught:
        load_config(path, overrides)
    return str(caught.value).split("\n")


def test_bases_are_relative_to_their_file_and_later_ones_win(tmp_path: Path, tiny: str) -> None:
    write(tmp_path / "deep" / "middle.yaml", "base: ../tiny.yaml\ntrain: {seq_len: 64, num_steps: 20}\n")
    write(tmp_path / "last.yaml", "train: {seq_len: 16}\ndata: {train: [{path: b}]}\n")
    top = write(
        tmp_path / "top.yaml",
        "base: [deep/middle.yaml, last.yaml]\ndata: {train: [{path: c}, {path: d}]}\nmodel: {rope: {base: 5e5}}\n",
    )
    config = load_config(top)
    assert (config.train.num_steps, config.train.seq_len, config.model.num_layers) == (20, 16, 4)
    assert [source.path for source in config.data.train] == ["c", "d"]
    assert config.model.rope.base == 500000.0  # `base` is a field below the top level


def test_cycle_is_refused_by_name_and_a_diamond_is_not(tmp_path: Path, tiny: str) -> None:
    one = write(tmp_path / "one.yaml", "base: two.yaml\n")
    write(tmp_path / "two.yaml", "base: one.yaml\n")
    (line,) = problems_of(one, [])
    assert "one.yaml -> " in line and "two.yaml -> " in line and "cycle" in line
    write(tmp_path / "left.yaml", "base: tiny.yaml\n")
    write(tmp_path / "right.yaml", "base: tiny.yaml\n")
    assert load_config(write(tmp_path / "top.yaml", "base: [left.yaml, right.yaml]\n")).train.num_steps == 10


@pytest.mark.parametrize(
    ("override", "section", "field", "expected"),
    [
        ("optimizer.lr=3e-4", "optimizer", "lr", 3e-4),
        ("run.name=0123", "run", "name", "0123"),
        ("run.name=true", "run", "name", "true"),
        ('run.name="null"', "run", "name", "null"),
        ("run.dir=a#b: c", "run", "dir", "a#b: c"),
        ("parallel.sp=on", "parallel", "sp", True),
        ("parallel.sp=False", "parallel", "sp", False),
        ("checkpoint.save_every=null", "checkpoint", "save_every", None),
        ("train.num_steps=1000", "train", "num_steps", 1000),
        ("parallel.etp = 2", "parallel", "etp", 2),
    ],
)
def test_override_is_converted_by_the_fields_type(
    tiny: str, override: str, section: str, field: str, expected: object
) -> None:
    value = getattr(getattr(load_config(tiny, [override]), section), field)
    assert value == expected and type(value) is type(expected)


def test_overrides_set_lists_maps_and_whole_sections(tiny: str) -> None:
    config = load_config(
        tiny,
        [
            "data.train=[{path: x, weight: 2}, {path: '7'}]",
            "model.moe={num_experts: 4, ffn_hidden_size: 64}",
            "model.moe.top_k=1",
            "train.recompute.modules=[mlp, moe]",
        ],
    )
    assert [(source.path, source.weight) for source in config.data.train] == [("x", 2.0), ("7", 1.0)]
    assert config.model.moe is not None and (config.model.moe.num_experts, config.model.moe.top_k) == (4, 1)
    assert config.train.recompute.modules == ("mlp", "moe")
    assert load_config(tiny, ["model.moe={num_experts: 4, ffn_hidden_size: 64}", "model.moe=null"]).model.moe is None


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("grpo.num_generations=8", "grpo.group_size"),
        ("rollout.n=8", "grpo.group_size"),
        ("grpo.beta=0.1", "grpo.kl.coefficient"),
        ("rollout.max_completion_length=64", "rollout.max_new_tokens"),
        ("grpo.epsilon=0.1", "grpo.clip_low"),
    ],
)
def test_names_of_other_trainers_of_policies_lead_to_ours(override: str, field: str, tiny: str) -> None:
    name = override.partition("=")[0].rpartition(".")[2]
    with pytest.raises(BadInput, match=f"unknown field; what other trainers call {name} is {field} here$"):
        load_config(tiny, [override], "grpo")
    with pytest.raises(BadInput, match="unknown field|belongs to the stage") as refusal:
        load_config(tiny, [override])
    assert "other trainers" not in str(refusal.value), "pretraining has no such field"


@pytest.mark.parametrize(
    ("stage", "override", "sentence"),
    [
        ("ppo", "learning_rate=1e-5", "what other trainers call learning_rate is optimizer.lr here"),
        ("ppo", "lam=0.9", "what other trainers call lam is ppo.gae_lambda here"),
        ("ppo", "beta=0.1", "what other trainers call beta is grpo.kl.coefficient here"),
        ("online_dpo", "beta=0.1", "did you mean online_dpo.beta?"),
        ("online_dpo", "loss_type=ipo", "what other trainers call loss_type is online_dpo.loss here"),
        ("preference", "loss_type=ipo", "what other trainers call loss_type is preference.loss here"),
        ("ppo", "temperature=0.7", "did you mean rollout.temperature?"),
        ("ppo", "lora_r=8", "what other trainers call lora_r is lora.rank here"),
        ("ppo", "critic.cliprange_value=0.5", "what other trainers call cliprange_value is ppo.critic.value_clip here"),
        ("ppo", "algorithm.kl_ctrl.kl_coef=0.1", "what other trainers call kl_coef is grpo.kl.coefficient here"),
        ("reward", "dataset_name=x", "what other trainers call dataset_name is reward.train here"),
        ("distill", "lmbda=0.5", "did you mean distill.lmbda?"),
        ("distill", "teacher_model_name_or_path=x", "what other trainers call teacher_model_name_or_path is dis"),
    ],
)
def test_names_of_other_trainers_lead_to_the_field_of_the_stage(
    stage: str, override: str, sentence: str, tiny: str
) -> None:
    with pytest.raises(BadInput) as refusal:
        load_config(tiny, [override], stage)
    assert f"{override.partition('=')[0].partition('.')[0]}: unknown field; {sentence}" in str(refusal.value)


def test_every_name_of_another_trainer_leads_to_a_field_that_some_stage_has() -> None:
    fields = {field.path for schema in STAGE_CONFIGS.values() for field in schema_fields(schema)}
    assert {ours for several in sentences._NAMES_IN_OTHERS.values() for ours in several} <= fields


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.num_stepss=5", "train.num_stepss: unknown field; did you mean train.num_steps?"),
        ("train.lr=1", "train.lr: unknown field; did you mean optimizer.lr?"),
        (
            "optimizer.momentum=1",
            "optimizer.momentum: unknown field; optimizer has lr, min_lr, weight_decay, beta1, beta2, eps, clip_grad",
        ),
        ("tp=2", "tp: unknown field; did you mean parallel.tp?"),
        ("parralel.tp=2", "parralel: unknown field; did you mean parallel?"),
        ("parallel.tp=x", "parallel.tp: 'x' is not a whole number; a value that would work: 1"),
        ("parallel.tp=1.5", "parallel.tp: '1.5' is not a whole number; a value that would work: 1"),
        ("model.rope.base=1", "model.rope.base: 1 must be above 1.0; a value that would work: 10000.0"),
        (
            "model.num_layers=1000000000000",
            "model.num_layers: 1000000000000 must be at most 100000; a value that would work: 32",
        ),
        (
            "data.train=[{path: ''}]",
            "data.train[0].path: is empty; a value that would work: data/corpus_train",
        ),
        (
            "train.num_steps=!!int abc",
            "train.num_steps: '!!int abc' is not a whole number; a value that would work: 1000",
        ),
        ("parallel.pp=0", "parallel.pp: 0 must be at least 1; a value that would work: 1"),
        ("parallel.sp=maybe", "parallel.sp: 'maybe' is not true or false; a value that would work: false"),
        ("optimizer.lr=nan", "optimizer.lr: 'nan' is not a finite number; a value that would work: 0.0003"),
        ("schedule.warmup_fraction=1", "schedule.warmup_fraction: 1 must be below 1.0; a value that would work: 0"),
        ("optimizer.beta1=2", "optimizer.beta1: 2 must be at most 1.0; a value that would work: 0.9"),
        ("run.name=null", "run.name: null is not text; a value that would work: run"),
        (
            "precision.compute=fp8",
            "precision.compute: 'fp8' is not one of bf16, fp16, fp32; a value that would work: bf16",
        ),
        (
            "schedule.kind=linea",
            "schedule.kind: 'linea' is not one of cosine, linear, wsd, constant; a value that would work: linear",
        ),
        (
            "data.train=[a]",
            "data.train[0]: 'a' is not a section with fields; a value that would work: {path: data/corpus_train}",
        ),
        (
            "data.train=[{path: a, wight: 3}]",
            "data.train[0].wight: unknown field; its fields are {path, weight, long_document_tokens, "
            "long_document_share}",
        ),
        ("data.train=a", "data.train: 'a' is not a list; a value that would work: [{path: data/corpus_train}]"),
        ("model.moe={top_k: 1, ffn_hidden_size: 8}", "model.moe.num_experts: missing; a value that would work: 2"),
        ("foo", "override 'foo': not of the form section.field=value, such as train.num_steps=100"),
        ("base=x", "base: cannot be overridden on the command line; name the base in the YAML file"),
    ],
)
def test_each_problem_is_one_exact_sentence(tiny: str, override: str, sentence: str) -> None:
    assert problems_of(tiny, [override]) == [sentence]


def test_override_below_a_list_or_value_says_to_give_it_whole(tiny: str) -> None:
    (line,) = problems_of(tiny, ["data.train=[{path: a}]", "data.train.0.path=b"])
    assert (
        line.startswith("data.train.0.path: data.train has no fields")
        and "data.train=[{path: data/corpus_train}]" in line
    )


def test_override_with_an_open_bracket_is_one_sentence(tiny: str) -> None:
    (line,) = problems_of(tiny, ["data.train=[{path: a}"])
    assert line.startswith("data.train: '[{path: a}' cannot be read")


def test_all_problems_come_at_once(tiny: str) -> None:
    lines = problems_of(tiny, ["train.num_stepss=5", "parallel.tp=x", "broken", "optimizer.eps=-1", "zzz.q=1"])
    assert len(lines) == 5
    for start in ("override 'broken'", "train.num_stepss:", "parallel.tp:", "optimizer.eps:", "zzz:"):
        assert sum(line.startswith(start) for line in lines) == 1, start


def test_missing_sections_are_named(tmp_path: Path) -> None:
    lines = problems_of(write(tmp_path / "a.yaml", "run: {name: x}\n"), [])
    assert lines == [f"{name}: missing section; add one, or a base: that has it" for name in ("model", "train")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train: {num_steps: 1\nmodel: 2\n", "bad.yaml:2: "),
        ("train:\n  seq_len: 1\n  seq_len: 2\n", "bad.yaml:3: key 'seq_len' is given twice (first in line 2)"),
        ("- a\n- b\n", "holds no sections"),
        ("# nothing\n", "is empty"),
        ("base: 3: 4\n", "bad.yaml:1: "),
        ("base: {a: b}\n", "base: must be a path or a list of paths"),
        ("model: !!python/object:os.system {}\n", "bad.yaml:1: "),
        ("train: {num_steps: !!int abc}\n", "bad.yaml: not YAML (invalid literal"),
        ("model: &again {moe: *again}\n", "an anchor that holds itself"),
        (f"model: {'[' * 3000}{']' * 3000}\n", "nested too deep"),
    ],
)
def test_unreadable_yaml_is_named_with_its_line(tmp_path: Path, text: str, expected: str) -> None:
    (line,) = problems_of(write(tmp_path / "bad.yaml", text), [])
    assert expected in line


def test_missing_files_are_named_with_the_file_that_wants_them(tmp_path: Path) -> None:
    (line,) = problems_of(str(tmp_path / "none.yaml"), [])
    assert "none.yaml cannot be read (no such file or directory)" in line
    (line,) = problems_of(write(tmp_path / "a.yaml", "base: gone.yaml\n"), [])
    assert "gone.yaml, which" in line and "a.yaml names as its base, cannot be read" in line
    (line,) = problems_of(str(tmp_path), [])
    assert "cannot be read (is a directory)" in line
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    (line,) = problems_of(str(binary), [])
    assert "is not UTF-8 text" in line


def test_run_dir_defaults_to_the_name_and_can_be_set(tiny: str) -> None:
    assert load_config(tiny, ["run.name=abc"]).run.dir == "runs/abc"
    assert load_config(tiny, ["run.dir=elsewhere"]).run.dir == "elsewhere"


def test_resolved_config_loads_back_equal(tmp_path: Path, tiny: str) -> None:
    config = load_config(tiny, ["optimizer.lr=1e-5", "run.name=77", "data.train=[{path: x}]"])
    again = load_config(write(tmp_path / "config.json", json.dumps(resolved_dict(config))))
    assert again == config


class ChatConfig(Section):
    """A section of one stage."""

    template: str = "plain"
    """What turns look like."""


class ChatStageConfig(Config):
    """A stage with a section of its own."""

    chat: ChatConfig = ChatConfig()


def test_a_stage_is_validated_by_its_own_class_and_its_keys_are_refused_in_another(
    monkeypatch: pytest.MonkeyPatch, tiny: str
) -> None:
    monkeypatch.setattr("configs.load.STAGE_CONFIGS", {**STAGE_CONFIGS, "chat": ChatStageConfig})
    monkeypatch.setattr("configs.sentences.STAGE_CONFIGS", {**STAGE_CONFIGS, "chat": ChatStageConfig})
    monkeypatch.setattr("configs.plan.show.STAGE_CONFIGS", {**STAGE_CONFIGS, "chat": ChatStageConfig})
    config = load_config(tiny, ["chat.template=short"], "chat")
    assert isinstance(config, ChatStageConfig) and config.chat.template == "short"
    assert type(load_config(tiny)) is STAGE_CONFIGS["pretrain"]
    belongs = "belongs to the stage chat (launch/chat.py), this is pretrain; remove it, or start that one"
    assert problems_of(tiny, ["chat.template=short"]) == [f"chat: {belongs}"]
    assert problems_of(tiny, ["chta.template=short"]) == [
        "chta: unknown field; the sections are " + ", ".join(Config.model_fields)
    ]
    with pytest.raises(BadInput, match="did you mean chat.template"):
        load_config(tiny, ["chat.tempalte=short"], "chat")
    assert "chat.template = plain" in field_help("chat") and "chat.template" not in field_help("pretrain")


def test_a_config_with_unknown_fields_alone_can_still_be_judged(tiny):
    config, problems = read_config(tiny, ["foo.bar=1", "train.sequence_length=9", "parallel.tp=3"], "pretrain")
    assert {problem.split(":")[0] for problem in problems} == {"foo", "train.sequence_length"}
    assert config is not None and config.parallel.tp == 3
    config, problems = read_config(tiny, ["train.sequence_length=9", "parallel.tp=x"], "pretrain")
    assert config is None and len(problems) == 2
