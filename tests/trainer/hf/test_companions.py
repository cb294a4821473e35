"""What a model has beside its weights comes along: tokenizer, templates, code; nothing is named that is not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer.hf.companions import carry, companion_files, drop_missing_code, set_token_limit, write_companions

CODE = {
    "AutoConfig": "configuration_some.SomeConfig",
    "AutoModelForCausalLM": "modeling_some.SomeForCausalLM",
    "AutoModel": "elsewhere/model--modeling_other.Other",
}
FILES = {
    "configuration_some.py": "", "modeling_some.py": "from .configuration_some import Some\nfrom .parts import x\n",
    "parts.py": "import torch\n  from .deeper import y\n", "deeper.py": "", "tokenization_some.py": "", "train.py": "",
    "tokenizer.model.v3": "v3", "tokenizer.model": "v1", "tokenizer.json": "{}", "merges.txt": "", "README.md": "",
    "additional_chat_templates/tool_use.jinja": "{{ tools }}", "chat_template.jinja": "",
    "generation_config.json": "{}",
    "consolidated.safetensors.index.json": "{}", "model.safetensors.index.json": "{}", "tiktoken.model": "",
    "tokenizer_config.json": json.dumps({"auto_map": {"AutoTokenizer": ["tokenization_some.Some", None]}}),
    "config.json": json.dumps({"architectures": ["LlamaForCausalLM"], "auto_map": CODE}),
}  # fmt: skip
CARRIED = set(FILES) - {
    "train.py", "README.md", "consolidated.safetensors.index.json", "model.safetensors.index.json", "config.json",
}  # fmt: skip


@pytest.fixture
def model(tmp_path) -> Path:
    for name, content in FILES.items():
        file = tmp_path / "model" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    return tmp_path / "model"


def names(directory: Path) -> set[str]:
    return {file.relative_to(directory).as_posix() for file in directory.rglob("*") if file.is_file()}


def test_everything_that_belongs_to_a_model_is_carried_and_written(model, tmp_path):
    assert {file.relative_to(model).as_posix() for file in companion_files(model)} == CARRIED
    carry(model, tmp_path / "run")
    assert names(tmp_path / "run" / "hf") == CARRIED | {"config.json"}
    out = tmp_path / "out"
    out.mkdir()
    write_companions(out, tmp_path / "run" / "hf", str(model))
    assert names(out) == CARRIED


def test_the_tokenizer_may_lie_in_a_folder_of_the_cache(model, tmp_path):
    top, out = tmp_path / "models--org--name", tmp_path / "out"
    (top / "snapshots").mkdir(parents=True)
    model.rename(top / "snapshots" / "abc")
    out.mkdir()
    write_companions(out, None, str(top))
    assert names(out) == CARRIED


def test_a_whole_auto_map_is_left_as_it_is(model):
    before = {name: (model / name).read_text() for name in FILES}
    assert drop_missing_code(model) == []
    assert {name: (model / name).read_text() for name in FILES} == before


@pytest.mark.parametrize("missing", ["modeling_some.py", "deeper.py"])
def test_code_that_is_not_there_is_not_named(model, missing):
    """Also where only what it imports is missing."""
    (model / missing).unlink()
    (note,) = drop_missing_code(model)
    assert note == f"config.json: auto_map named {missing}, which is not there; left out"
    kept = json.loads((model / "config.json").read_text())["auto_map"]
    assert kept == {key: CODE[key] for key in ("AutoConfig", "AutoModel")}
    assert drop_missing_code(model) == []


def test_an_auto_map_of_which_nothing_is_there_goes(model):
    (model / "tokenization_some.py").unlink()
    (note,) = drop_missing_code(model)
    assert note.startswith("tokenizer_config.json: auto_map named tokenization_some.py")
    assert "auto_map" not in json.loads((model / "tokenizer_config.json").read_text())


@pytest.mark.parametrize(("limit", "is_changed"), [(2048, True), (131072, True), (32768, False), (int(1e30), False)])
def test_a_tokenizer_names_the_longest_sequence_of_a_stretched_model(tmp_path, limit, is_changed):
    """One that sets no limit, which transformers writes as 1e30, is left alone byte for byte."""
    file = tmp_path / "tokenizer_config.json"
    file.write_text(text := json.dumps({"model_max_length": limit, "unk_token": "ß"}))
    notes = set_token_limit(tmp_path, 32768)
    said = f"tokenizer_config.json: model_max_length was {limit}, now 32768 as the model's"
    assert notes == ([said] if is_changed else [])
    assert json.loads(file.read_text()) == {"model_max_length": 32768 if is_changed else limit, "unk_token": "ß"}
    assert is_changed or file.read_text() == text


@pytest.mark.parametrize("content", [None, "{}", '{"model_max_length": null}'])
def test_a_tokenizer_without_a_limit_is_left_alone(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer_config.json").write_text(content)
    assert set_token_limit(tmp_path, 32768) == []
