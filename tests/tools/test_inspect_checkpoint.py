"""inspect_checkpoint: what a manifest says in words, verification by hash, tensors by name, bad input."""

import json

import pytest

from configs.load import resolved_dict
from configs.stages import Config
from tools.inspect_checkpoint import TensorEntry, list_tensors, main
from trainer.checkpoint.manifest import Manifest, hash_file

MODEL = {
    "num_layers": 4,
    "hidden_size": 256,
    "ffn_hidden_size": 688,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "vocab_size": 4096,
    "tie_embeddings": True,
}


def write_tensors(folder):
    """Write a distributed checkpoint with torch's own writer, as Megatron-Core does."""
    import torch
    import torch.distributed.checkpoint as dcp

    state = {"b.weight": torch.zeros(3, 2, dtype=torch.bfloat16), "a.weight": torch.ones(4), "note": {"text": "x"}}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(str(folder)), no_dist=True)


@pytest.fixture
def run(tmp_path):
    """A run directory with one whole checkpoint of the demo's model."""
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000050"
    checkpoint.mkdir(parents=True)
    write_tensors(checkpoint)
    config = Config.model_validate({"model": MODEL, "train": {"num_steps": 200}, "run": {"name": "demo"}})
    source = {"identity": "abc", "weight": 1.0, "consumed_samples": 800}
    Manifest(
        step=50,
        state={
            "step": 50, "consumed_samples": 800, "consumed_tokens": 204800,
            "num_skipped_steps": 3, "num_nonfinite_in_a_row": 0,
        },
        stage={"name": "pretrain", "state": {"data": {"sources": {"data/one": source, "data/two": source}}}},
        layout={"world": 4, "tp": 2, "pp": 2},
        config=resolved_dict(config),
        versions={"torch": "2.11.0"},
        files={path.name: hash_file(path) for path in checkpoint.iterdir()},
    ).write(checkpoint)  # fmt: skip
    (checkpoint.parent / "latest").symlink_to(checkpoint.name)
    return tmp_path / "run"


def facts_of(text):
    lines = [line.strip().split("  ", 1) for line in text.splitlines() if line.startswith("  ")]
    return [(name, value.strip()) for name, value in lines]


@pytest.mark.parametrize("part", ["", "checkpoints/latest", "checkpoints/step_00000050"])
def test_it_tells_what_the_checkpoint_holds(run, part, capsys):
    assert main([str(run / part)]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].endswith("run/checkpoints/step_00000050")
    facts = facts_of(out)
    expected = {
        "step": "50 of 200",
        "consumed": "800 samples, 204,800 tokens",
        "skipped steps": "3",
        "stage": "pretrain",
        "layout": "world 4, tp 2, pp 2",
        "versions": "torch 2.11.0",
        "parameters": "3,950,848",  # counted by hand for the demo's model
        "model.num_query_groups": "2",
    }
    assert expected.items() <= dict(facts).items()
    assert "model.activation" not in dict(facts)  # a default
    ledger = [value for name, value in facts if name == "data.sources"]
    assert ledger == [f"data/{name}: identity=abc, weight=1.0, consumed_samples=800" for name in ("one", "two")]


def test_verify_finds_a_flipped_bit_and_a_missing_file(run, capsys):
    assert main([str(run), "--verify"]) == 0
    assert "whole: all 2 files" in capsys.readouterr().out
    shard = next((run / "checkpoints" / "latest").glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert main([str(run)]) == 0  # nobody asked
    capsys.readouterr()
    assert main([str(run), "--verify", "--tensors"]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("damaged: ") and captured.err.count("\n") == 1
    assert "its content has changed" in captured.err and "a.weight" not in captured.out
    shard.unlink()
    assert main([str(run), "--verify"]) == 1
    assert f"{shard.name}: missing" in capsys.readouterr().err


def test_tensors_are_listed_by_name(run, capsys):
    checkpoint = run / "checkpoints" / "step_00000050"
    assert list_tensors(checkpoint) == [
        TensorEntry("a.weight", (4,), "float32"),
        TensorEntry("b.weight", (3, 2), "bfloat16"),
    ]
    assert main([str(run), "--tensors"]) == 0
    assert "b.weight  bfloat16  [3, 2]\n2 tensors" in capsys.readouterr().out


def test_bad_input_is_one_sentence_and_code_two(run, tmp_path, capsys):
    checkpoint = run / "checkpoints" / "step_00000050"
    assert main([str(tmp_path / "absent")]) == 2
    assert "holds no complete checkpoint; give a run directory" in capsys.readouterr().err
    (checkpoint / ".metadata").write_bytes(b"not a pickle")
    assert main([str(run), "--tensors"]) == 2
    assert ".metadata: unreadable" in capsys.readouterr().err
    (checkpoint / "checkpoint.json").write_text(json.dumps({"step": 1, "format_version": 99}))
    assert main([str(run)]) == 2
    assert "written in format 99" in capsys.readouterr().err


def test_a_model_section_of_another_version_is_still_shown(run, capsys):
    path = run / "checkpoints" / "step_00000050" / "checkpoint.json"
    content = json.loads(path.read_text())
    content["config"]["model"]["of_the_future"] = 7
    path.write_text(json.dumps(content))
    assert main([str(run)]) == 0
    facts = dict(facts_of(capsys.readouterr().out))
    assert facts["model.of_the_future"] == "7" and facts["parameters"].startswith("unknown")
