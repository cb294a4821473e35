"""Models beside the policy: what lies at a place is found, and what does not fit is refused with the field."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from configs.errors import BadInput
from configs.load import resolved_dict
from configs.plan.derive import padded_vocab_size
from configs.roles import CRITIC, TEACHER, HeadKind, SecondModel
from configs.sections.optimizer import OptimizerConfig
from configs.stages import SftConfig
from tests.small_runs import DENSE_MODEL, small_config
from trainer.checkpoint.manifest import Manifest, read_manifest
from trainer.engine.state import TrainState
from trainer.run.second_models import find_second_models

OWN = OptimizerConfig(lr=1e-5, clip_grad=0.2)


class TwoModelConfig(SftConfig):
    """A run with a model beside the policy."""

    teacher: str
    is_trained: bool = False
    is_start: bool = False
    wanted: HeadKind = "vocabulary"

    @property
    def second_models(self):
        optimizer = OWN if self.is_trained else None
        kind = {"head": self.wanted, "optimizer": optimizer, "is_start": self.is_start}
        return {TEACHER: SecondModel("distill.teacher", self.teacher, **kind)}


def make_config(place: Path | str, **fields) -> TwoModelConfig:
    base = resolved_dict(small_config())
    sections = {name: base.get(name, {}) | value for name, value in fields.items() if isinstance(value, dict)}
    plain = {name: value for name, value in fields.items() if not isinstance(value, dict)}
    return TwoModelConfig.model_validate(base | {"teacher": str(place)} | sections | plain)


def make_tokenizer(folder: Path, words: str) -> Path:
    folder.mkdir()
    vocabulary = {word: number for number, word in enumerate(["<end>", *words])}
    Tokenizer(WordLevel(vocabulary, unk_token="<end>")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    return folder


def make_checkpoint(
    run: Path, *, head="vocabulary", tokenizer=None, models=None, digest="a", template=None, **model
) -> Path:
    """Write what is read of a checkpoint without its weights: the manifest."""
    config = resolved_dict(small_config(model=model, data={"tokenizer": None if tokenizer is None else str(tokenizer)}))
    if template is not None:
        config["reward"] = {"template": template}
    folder = run / "checkpoints" / "step_00000005"
    folder.mkdir(parents=True)
    files = {"weights": {"bytes": 1, "sha256": digest}}
    state, stage = TrainState(step=5).as_dict(), {"name": "pretrain" if template is None else "reward", "state": {}}
    Manifest(5, state, stage, {}, config, {}, files, models=models, head=head).write(folder)
    return folder


def test_a_run_directory_gives_architecture_and_place_and_the_run_the_rest(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "run", num_layers=6, hidden_size=32, vocab_pad_multiple=64)
    found = find_second_models(make_config(tmp_path / "run", is_trained=True), 1, "cpu")[TEACHER]
    assert found.start == str(checkpoint)
    assert (found.config.model.num_layers, found.config.model.hidden_size) == (6, 32)
    assert found.config.model.vocab_pad_multiple == DENSE_MODEL["vocab_pad_multiple"]
    assert found.config.optimizer == OWN and found.config.schedule == make_config("x").schedule
    assert found.record["path"] == str(checkpoint) and found.record["model"]["num_layers"] == 6


def test_a_dense_model_stands_beside_a_mixture_whose_experts_are_spread(tmp_path):
    make_checkpoint(tmp_path / "run")
    model = {"moe": {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 32}}
    config = make_config(tmp_path / "run", model=model, parallel={"tp": 2, "sp": True, "ep": 2, "etp": 1})
    found = find_second_models(config, 2, "cpu")[TEACHER]
    assert found.config.model.moe is None
    assert (found.config.parallel.ep, found.config.parallel.etp, found.config.parallel.tp) == (1, None, 2)


def test_a_hugging_face_model_gives_its_architecture(tmp_path):
    make_hf_model(tmp_path / "hf")
    found = find_second_models(make_config(tmp_path / "hf"), 1, "cpu")[TEACHER]
    assert found.start == str(tmp_path / "hf") and found.config.model.ffn_hidden_size == 112


def make_hf_model(folder: Path) -> None:
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 250, "hidden_size": 32,
        "intermediate_size": 112, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("model", "fields", "told"),
    [
        ({"vocab_size": 300}, {}, r"a vocabulary of 300 and the policy one of 250"),
        ({"num_layers": 3}, {"parallel": {"pp": 2}}, r"parallel\.pp.*3"),
        (
            {"num_attention_heads": 1, "num_query_groups": 1},
            {"parallel": {"tp": 2}},
            r"parallel\.tp: 2 does not",
        ),
        ({"max_position_embeddings": 32}, {"train": {"seq_len": 64}}, r"train\.seq_len: 64 exceeds"),
        ({"head": "scalar"}, {}, r"holds a model with a scalar head"),
        ({}, {"wanted": "scalar"}, r"holds a language model, which has no scalar head"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_field(tmp_path, model, fields, told):
    make_checkpoint(tmp_path / "run", **model)
    config = make_config(tmp_path / "run", **fields)
    with pytest.raises(BadInput, match=f"^distill\\.teacher: .*{told}"):
        find_second_models(config, config.parallel.tp * config.parallel.pp, "cpu")


def test_a_place_without_a_model_is_refused(tmp_path):
    for place in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(
            BadInput, match="^distill.teacher: .* holds no complete checkpoint and no Hugging.*hf download"
        ):
            find_second_models(make_config(place), 1, "cpu")


def test_another_tokenizer_is_refused(tmp_path):
    ours, theirs = make_tokenizer(tmp_path / "ours", "abc"), make_tokenizer(tmp_path / "theirs", "abd")
    make_checkpoint(tmp_path / "same", tokenizer=make_tokenizer(tmp_path / "alike", "abc"))
    make_checkpoint(tmp_path / "other", tokenizer=theirs)
    data = {"tokenizer": str(ours)}
    find_second_models(make_config(tmp_path / "same", data=data), 1, "cpu")
    with pytest.raises(BadInput, match="^distill.teacher: .* was trained with the tokenizer in .*theirs"):
        find_second_models(make_config(tmp_path / "other", data=data), 1, "cpu")


def test_rows_beyond_the_tokens_are_free_where_the_tokenizer_is_known(tmp_path):
    """Published models of one family are padded to different sizes; of a teacher's ids the student's are taken."""
    ours = make_tokenizer(tmp_path / "ours", "abc")
    data = {"tokenizer": str(ours)}
    for size in (3, 4, 320):
        make_checkpoint(tmp_path / f"{size}", head="scalar", tokenizer=ours, vocab_size=size)
    for size in (4, 320):
        found = find_second_models(make_config(tmp_path / f"{size}", data=data, wanted="scalar"), 1, "cpu")
        assert found[TEACHER].config.model.vocab_size == size
    with pytest.raises(BadInput, match="a vocabulary of 3 and"):
        find_second_models(make_config(tmp_path / "3", data=data, wanted="scalar"), 1, "cpu")
    for size, known in ((200, 200), (320, 250)):
        make_checkpoint(tmp_path / f"teacher{size}", tokenizer=ours, vocab_size=size)
        found = find_second_models(make_config(tmp_path / f"teacher{size}", data=data), 1, "cpu")[TEACHER]
        model = found.config.model
        assert model.vocab_size == known and padded_vocab_size(model) == padded_vocab_size(make_config("x").model)
        assert found.record["model"]["vocab_size"] == size
    for head in ("scalar", "vocabulary"):
        make_checkpoint(tmp_path / f"unknown_{head}", head=head, vocab_size=320)
        with pytest.raises(BadInput, match="a vocabulary of 320 and .*data.tokenizer"):
            find_second_models(make_config(tmp_path / f"unknown_{head}", data=data, wanted=head), 1, "cpu")


def test_a_reward_model_of_another_template_is_told(tmp_path, caplog):
    ours = make_tokenizer(tmp_path / "ours", "abc")
    make_checkpoint(tmp_path / "reward", head="scalar", tokenizer=ours, template="chatml")
    fields = {"data": {"tokenizer": str(ours)}, "wanted": "scalar"}
    for template, told in (("chatml", False), ("llama3", True)):
        caplog.clear()
        config = make_config(tmp_path / "reward", **fields, sft={"template": template})
        find_second_models(config, 1, "cpu")
        assert ("in the chat template chatml, and is shown them in llama3 (sft.template)" in caplog.text) == told


def test_a_critic_that_begins_as_the_policy_is_used_as_the_policy(tmp_path):
    """Its rotation, stretched by the run, among it; once saved, what was saved is what counts."""
    make_checkpoint(tmp_path / "run")
    model = {"rope": {"base": 5e5}, "max_position_embeddings": 4096, "hidden_dropout": 0.3}
    for is_start in (False, True):
        fields = {"model": resolved_dict(small_config())["model"] | model, "is_trained": True}
        config = make_config(tmp_path / "run", **fields, is_start=is_start)
        found = find_second_models(config, 1, "cpu")[TEACHER]
        assert (found.config.model == config.model) == is_start
        resumed = make_checkpoint(tmp_path / f"resumed{is_start}", models={TEACHER: dict(found.record)})
        again = find_second_models(make_config("gone", **fields, is_start=True), 1, "cpu", resumed)[TEACHER]
        assert again.config.model == found.config.model


def test_a_critic_of_a_run_of_ppo_keeps_its_own_rotation(tmp_path):
    """But for what this run stretches; and it has rows, of zeros, for ids that the policy has and it has not."""
    critic = resolved_dict(small_config(model={"rope": {"base": 5e4}, "vocab_size": 100}))["model"]
    ours = make_tokenizer(tmp_path / "ours", "abc")
    make_checkpoint(tmp_path / "ppo", models={CRITIC: {"model": critic}}, tokenizer=ours)
    fields = {"data": {"tokenizer": str(ours)}, "is_trained": True, "wanted": "scalar"}
    for rope, expected in (({}, 5e4), ({"base": 1e6}, 1e6)):
        model = resolved_dict(small_config(model={"rope": rope}))["model"]
        for is_start in (False, True):
            config = make_config(tmp_path / "ppo", model=model, is_start=is_start, **fields)
            found = find_second_models(config, 1, "cpu")[TEACHER]
            assert found.is_start_critic and found.config.model.vocab_size == 100
            assert found.config.model.rope.base == (expected if is_start else 5e4)
            assert padded_vocab_size(found.config.model) == padded_vocab_size(config.model)


def test_a_frozen_model_must_be_the_same_when_a_run_goes_on(tmp_path):
    """It may have moved, and its run may have trained on."""
    first = make_checkpoint(tmp_path / "teacher")
    record = find_second_models(make_config(tmp_path / "teacher"), 1, "cpu")[TEACHER].record
    resumed = make_checkpoint(tmp_path / "run", models={TEACHER: dict(record)})
    assert read_manifest(resumed).models == {TEACHER: record}
    later = first.with_name("step_00000009")
    later.mkdir()
    read_manifest(first).write(later)
    config = make_config(tmp_path / "teacher")
    assert find_second_models(config, 1, "cpu", resumed)[TEACHER].start == str(first)
    (tmp_path / "teacher").rename(tmp_path / "moved")
    moved = make_config(tmp_path / "moved" / "checkpoints" / first.name)
    found = find_second_models(moved, 1, "cpu", resumed)[TEACHER]
    assert found.start == str(tmp_path / "moved" / "checkpoints" / first.name)


def test_a_trained_model_comes_from_the_checkpoint_wherever_it_began(tmp_path):
    make_checkpoint(tmp_path / "critic", num_layers=6)
    config = make_config(tmp_path / "critic", is_trained=True)
    record = find_second_models(config, 1, "cpu")[TEACHER].record
    resumed = make_checkpoint(tmp_path / "run", models={TEACHER: dict(record)})
    found = find_second_models(make_config(tmp_path / "gone", is_trained=True), 1, "cpu", resumed)[TEACHER]
    assert found.start is None and found.config.model.num_layers == 6
