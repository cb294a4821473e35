"""A run that starts from a Hugging Face model and writes one beside each checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from configs.errors import ExitCode


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """Return a random Llama of the recipe's shape."""
    import transformers

    directory = tmp_path_factory.mktemp("llama")
    torch.manual_seed(2)
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    return directory


def test_from_a_model_to_a_model_through_the_engine(train, tmp_path, llama):
    import json

    import transformers

    options = (f"checkpoint.init_from_hf={llama}", "checkpoint.export_hf=true", "checkpoint.save_every=3")
    assert train(2, "parallel.tp=2", *options) == (ExitCode.DONE, "")
    exports = sorted((tmp_path / "run" / "checkpoints").glob("step_*/hf"))
    assert [export.parent.name for export in exports] == ["step_00000003", "step_00000006"]
    for name in ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"):
        assert (exports[-1] / name).is_file(), name
    before = transformers.AutoModelForCausalLM.from_pretrained(llama)
    after = transformers.AutoModelForCausalLM.from_pretrained(exports[-1])
    moved = [not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    assert all(moved), "some weights were not trained, or not exported"
    tokens = torch.arange(64).view(1, 64) * 5 % 300
    first = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert first[0]["loss"] > first[-1]["loss"]
    assert torch.isfinite(after(tokens).logits).all()
    again = (f"checkpoint.init_from={tmp_path}/run", f"run.dir={tmp_path}/next", "train.num_steps=0")
    assert train(1, *again, "schedule.warmup_steps=0")[0] == ExitCode.DONE
    assert (tmp_path / "next" / "hf" / "chat_template.jinja").is_file(), "companions follow the weights"


def test_an_export_that_a_kill_prevented_is_made_when_the_run_goes_on(train, tmp_path):
    options = ("checkpoint.export_hf=true", "train.num_steps=2", "schedule.warmup_steps=0")
    assert train(1, *options)[0] == ExitCode.DONE
    export = tmp_path / "run" / "checkpoints" / "step_00000002" / "hf"
    export.rename(export.with_name("hf.growing"))
    (export.with_name("hf.growing") / ".lock").touch()
    assert train(1, *options)[0] == ExitCode.DONE
    assert (export / "config.json").is_file() and not export.with_name("hf.growing").exists()


def test_weights_beyond_fp16_are_refused(train, tmp_path, llama):
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(llama, tmp_path / "big")
    weights = load_file(tmp_path / "big" / "model.safetensors")
    weights["model.norm.weight"] += 1e6
    save_file(weights, tmp_path / "big" / "model.safetensors", metadata={"format": "pt"})
    code, sentence = train(1, f"checkpoint.init_from_hf={tmp_path}/big", "precision.compute=fp16")
    assert code == ExitCode.BAD_INPUT and "precision.compute: fp16 cannot hold these weights" in sentence


def test_the_two_kinds_of_models_are_not_mixed_up(train, tmp_path, llama):
    assert train(1, "train.num_steps=0", "schedule.warmup_steps=0")[0] == ExitCode.DONE
    again = f"run.dir={tmp_path}/next"
    code, sentence = train(1, again, f"checkpoint.init_from={llama}")
    assert code == ExitCode.BAD_INPUT and "name it as checkpoint.init_from_hf" in sentence
    code, sentence = train(1, again, f"checkpoint.init_from_hf={tmp_path}/run")
    assert code == ExitCode.BAD_INPUT and "name it as checkpoint.init_from" in sentence


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.num_layers=3", "model.num_layers: 3, not 2"),
        ("model.norm_eps=1e-6", "model.norm_eps: 1e-06, not 1e-05"),
    ],
)
def test_another_architecture_is_refused(train, tmp_path, llama, override, expected):
    code, sentence = train(1, f"checkpoint.init_from_hf={llama}", override)
    assert code == ExitCode.BAD_INPUT and expected in sentence
    assert not (tmp_path / "run").exists()


def test_a_model_that_no_family_has_cannot_be_exported(train, tmp_path):
    code, sentence = train(1, "checkpoint.export_hf=true", "model.norm=layernorm")
    assert code == ExitCode.BAD_INPUT and "cannot express model.norm" in sentence
    assert not (tmp_path / "run").exists()
