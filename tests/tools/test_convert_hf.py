"""The command: in, verified, out again; and one sentence for everything that is wrong, with nothing half-written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import forked
from tests.pool import Place

ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.06,
}  # fmt: skip


def run_tool(place: Place, argv: list[str]) -> tuple[int, str, str]:
    """Run the command in a worker and return its exit code, stdout and stderr."""
    import contextlib
    import io

    from tools.convert_hf import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(argv)
    return int(code), out.getvalue(), err.getvalue()


@pytest.fixture
def convert(ranks):
    """Return a function that runs the command on one rank."""

    def run(*argv: object) -> tuple[int, str, str]:
        return ranks.run(run_tool, [str(word) for word in argv])[0]

    return run


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """Return the directory of a small Llama in bf16, with a chat template and a generation config."""
    import transformers

    directory = tmp_path_factory.mktemp("llama")
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).bfloat16()
    model.save_pretrained(directory)
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    return directory


@pytest.fixture
def copy(llama, tmp_path) -> Path:
    """Return a copy of the small Llama that a test may spoil."""
    return Path(shutil.copytree(llama, tmp_path / "hf"))


def test_in_verified_and_out_again(convert, llama, tmp_path):
    run_dir, out = tmp_path / "run", tmp_path / "out"
    code, said, _ = convert("import", llama, run_dir)
    assert code == 0 and "21 tensors" in said and "MB/s" in said
    assert sorted(path.name for path in run_dir.iterdir()) == ["checkpoints", "hf", "model.yaml"]
    code, said, _ = convert("verify", llama, run_dir)
    assert code == 0 and "the same within 0.0001" in said
    code, said, err = convert("export", run_dir, out)
    assert code == 0 and "no tokenizer" in err
    before, after = load_file(llama / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}" and (out / "generation_config.json").exists()
    wanted, got = (json.loads((folder / "config.json").read_text()) for folder in (llama, out))
    assert {key: got[key] for key in wanted} == wanted
    code, _, _ = convert("export", run_dir / "checkpoints" / "latest", tmp_path / "single", "--dtype", "fp32")
    single = load_file(tmp_path / "single" / "model.safetensors")
    assert code == 0 and all(torch.equal(before[name].float(), single[name]) for name in before)
    assert not list(tmp_path.glob("*.growing"))


def test_verify_names_the_first_module_that_parts(convert, copy, llama, tmp_path):
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1.5
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    convert("import", llama, tmp_path / "run")
    code, said, _ = convert("verify", copy, tmp_path / "run")
    assert code == 1 and "they part first at: layer 1" in said


def test_the_model_section_is_printed(convert, llama):
    code, said, _ = convert("model", llama)
    assert code == 0 and said.startswith("model:\n") and "num_layers: 2" in said


def test_nan_is_counted(convert, copy, tmp_path):
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    code, _, err = convert("import", copy, tmp_path / "run")
    assert code == 0 and "decoder.layers.0.mlp.linear_fc2.weight holds 3 NaN or infinite values" in err


def spoil(copy: Path, how: str) -> None:
    """Spoil a model directory."""
    weights, config = copy / "model.safetensors", copy / "config.json"
    tensors = load_file(weights)
    content = json.loads(config.read_text())
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "no_weights":
        weights.unlink()
    elif how == "shape":
        config.write_text(json.dumps(content | {"intermediate_size": 64}))
    elif how == "missing":
        del tensors["model.norm.weight"]
    elif how == "unknown":
        tensors["model.layers.0.adapter.weight"] = torch.zeros(2)
    elif how == "option":
        config.write_text(json.dumps(content | {"is_causal": False}))
    elif how == "family":
        config.write_text(json.dumps(content | {"architectures": ["Gemma2ForCausalLM"]}))
    elif how == "no_config":
        config.unlink()
    elif how == "int8":
        tensors = {name: tensor.to(torch.int8) for name, tensor in tensors.items()}
    elif how == "mixed":
        tensors["model.layers.0.self_attn.k_proj.weight"] = tensors["model.layers.0.self_attn.k_proj.weight"].float()
    if how in ("missing", "unknown", "mixed", "int8"):
        save_file(tensors, weights, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("truncated", "model.safetensors: truncated"),
        ("no_weights", "model.safetensors: missing"),
        ("shape", "has shape [48, 32], config.json says [64, 32]"),
        ("missing", "lacks model.norm.weight"),
        ("unknown", "has no place for: model.layers.0.adapter.weight"),
        ("option", "is_causal: False is not supported"),
        ("family", "architectures ['Gemma2ForCausalLM'] cannot be converted"),
        ("no_config", "config.json: cannot be read"),
        ("mixed", "differ in their number format"),
        ("int8", "quantised weights cannot be converted"),
    ],
)
def test_a_bad_model_is_one_sentence_and_leaves_nothing(convert, copy, tmp_path, how, expected):
    spoil(copy, how)
    code, _, err = convert("import", copy, tmp_path / "run")
    assert code == 2 and expected in err and len(err.strip().splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_bad_checkpoints_and_targets_are_one_sentence(convert, llama, tmp_path):
    run_dir = tmp_path / "run"
    convert("import", llama, run_dir)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    cases = [
        (("import", llama, tmp_path / "full"), "full: is not empty"),
        (("import", llama, run_dir), "run: is not empty"),
        (("import", tmp_path / "nothing", tmp_path / "x"), "nothing: no such directory"),
        (("export", run_dir, tmp_path / "full"), "full: is not empty"),
        (("export", tmp_path, tmp_path / "x"), "holds no complete checkpoint"),
        (("verify", llama, tmp_path), "holds no complete checkpoint"),
    ]
    for argv, expected in cases:
        code, _, err = convert(*argv)
        assert code == 2 and expected in err and len(err.strip().splitlines()) == 1, err
    shard = next((run_dir / "checkpoints" / "latest").glob("__0_*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    code, _, err = convert("export", run_dir, tmp_path / "x")
    assert code == 2 and "its content has changed" in err
    (run_dir / "checkpoints" / "step_00000000" / "checkpoint.json").unlink()
    code, _, err = convert("export", run_dir, tmp_path / "x")
    assert code == 2 and "holds no complete checkpoint" in err
    assert not (tmp_path / "x").exists()


def test_two_conversions_to_one_target_do_not_meet(convert, llama, tmp_path):
    """The second one is refused while the first one's process lives; what a dead one left is taken over."""
    growing = tmp_path / "run.growing"
    growing.mkdir()
    holder = (
        "import fcntl, sys\n"
        f"file = open(r'{growing}/.lock', 'w')\n"
        "fcntl.lockf(file, fcntl.LOCK_EX)\n"
        "file.write('process 7 on elsewhere')\n"
        "file.flush()\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    (growing / "half").write_text("half-written")
    with subprocess.Popen([sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        code, _, err = convert("import", llama, tmp_path / "run")
        assert code == 2 and "is being written by process 7 on elsewhere" in err
        assert (growing / "half").exists()
        other.stdin.close()
    assert convert("import", llama, tmp_path / "run")[0] == 0
    assert not growing.exists() and not (tmp_path / "run" / "half").exists()


def test_a_directory_of_the_users_own_is_not_taken_for_a_leftover(convert, llama, tmp_path):
    (tmp_path / "run.growing").mkdir()
    (tmp_path / "run.growing" / "mine").touch()
    code, _, err = convert("import", llama, tmp_path / "run")
    assert code == 2 and "no leftover of a conversion" in err and (tmp_path / "run.growing" / "mine").exists()


def test_a_link_in_the_place_of_a_leftover_is_not_followed(convert, llama, tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    for name in (".lock", "mine"):
        (precious / name).touch()
    (tmp_path / "run.growing").symlink_to(precious)
    code, _, err = convert("import", llama, tmp_path / "run")
    assert code == 2 and "no leftover of a conversion" in err and (precious / "mine").exists()


def test_an_empty_leftover_is_taken_over(convert, llama, tmp_path):
    """A kill may come between making the directory and locking it."""
    (tmp_path / "run.growing").mkdir()
    assert convert("import", llama, tmp_path / "run")[0] == 0


@pytest.mark.parametrize(("target", "code"), [(".", 0), ("/", 2)])
def test_targets_without_a_name_of_their_own(convert, llama, tmp_path, monkeypatch, target, code):
    (tmp_path / "empty").mkdir()
    argv = ["import", str(llama), target]
    command = [sys.executable, str(ROOT / "tools" / "convert_hf.py"), *argv]
    done = subprocess.run(command, cwd=tmp_path / "empty", capture_output=True, text=True)
    assert done.returncode == code and "Traceback" not in done.stderr
    assert (tmp_path / "empty" / "model.yaml").exists() == (code == 0)


def test_a_full_disk_and_a_stop_are_one_sentence(ranks, llama, tmp_path):
    """`torch.save` hides what its stream raised."""
    for fault, expected in (("full", (2, "No space left")), ("ctrl-c", (130, "nothing was written"))):
        code, _, err = ranks.run(run_with_fault, fault, ["import", str(llama), str(tmp_path / "run")])[0]
        assert code == expected[0] and expected[1] in err and len(err.strip().splitlines()) == 1, err
        assert not list(tmp_path.glob("run*"))


def run_with_fault(place: Place, fault: str, argv: list[str]) -> tuple[int, str, str]:
    """Run the command with a file system that fails, or a Ctrl-C that comes, while a tensor is written."""
    from unittest.mock import patch

    from trainer.checkpoint.writing import TensorFileWriter

    class Failing:
        """A file that fails when it is written to."""

        def write(self, content):
            raise OSError(28, "No space left on device") if fault == "full" else KeyboardInterrupt

        def tell(self):
            return 0

        def flush(self):
            pass

    with patch.object(TensorFileWriter, "_open", lambda self: Failing()):
        return run_tool(place, argv)


def test_other_architectures_are_not_compared(convert, copy, llama, tmp_path):
    convert("import", llama, tmp_path / "run")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    code, _, err = convert("verify", copy, tmp_path / "run")
    assert code == 2 and "another architecture" in err and "model.norm_eps" in err


def test_values_beyond_fp16_are_not_written_as_infinities(convert, copy, tmp_path):
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"][3] = 1e6
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    convert("import", copy, tmp_path / "run")
    code, _, err = convert("export", tmp_path / "run", tmp_path / "out", "--dtype", "fp16")
    assert code == 2 and "model.norm.weight holds values beyond the 65504" in err and not (tmp_path / "out").exists()


def test_a_distance_that_is_none_is_refused(capsys):
    from tools.convert_hf import main

    with pytest.raises(SystemExit):
        main(["verify", "a", "b", "--tolerance", "nan"])
    assert "--tolerance" in capsys.readouterr().err


@pytest.mark.slow
def test_ranks_share_the_work_and_a_kill_leaves_nothing_half(llama, tmp_path):
    tool = [sys.executable, *forked.LAUNCHER, "2", "tools/convert_hf.py"]
    run_dir = tmp_path / "run"
    forked.run([*tool, "import", str(llama), str(run_dir)], cwd=ROOT, check=True)
    checkpoint = run_dir / "checkpoints" / "latest"
    assert {path.name for path in checkpoint.glob("__*_0.distcp")} == {"__0_0.distcp", "__1_0.distcp"}
    forked.run([*tool, "export", str(run_dir), str(tmp_path / "out")], cwd=ROOT, check=True)
    before, after = load_file(llama / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    command = [sys.executable, "tools/convert_hf.py", "export", str(run_dir), str(tmp_path / "killed")]
    process = forked.Popen(command, cwd=ROOT)
    deadline = time.monotonic() + 60
    while not (tmp_path / "killed.growing").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.kill()
    process.wait()
    killed = tmp_path / "killed"
    assert not killed.exists() or (killed / "config.json").exists(), "half-written"
    if not killed.exists():
        forked.run(command, cwd=ROOT, check=True)
    assert (killed / "config.json").exists() and not (tmp_path / "killed.growing").exists()


def test_tokens_that_transformers_makes_otherwise_are_noticed(tmp_path):
    """transformers 5 builds Qwen2's splitting of words itself, whatever tokenizer.json says."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    from trainer.hf.tokenizer_check import tokenizer_difference

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"])
    tokenizer.train_from_iterator(["def f(x):\n    return x\n\n\n" * 9, "naïve café 12345"], trainer)
    for model_type, is_same in (("llama", True), ("qwen2", False)):
        directory = tmp_path / model_type
        directory.mkdir()
        tokenizer.save(str(directory / "tokenizer.json"))
        (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
        (directory / "tokenizer_config.json").write_text("{}")
        assert (tokenizer_difference(directory) is None) == is_same, model_type


EXPORT_AND_CHECK = """
import sys
import trainer.hf.export_source, trainer.hf.exporting
from trainer.hf.tokenizer_check import tokenizer_difference
assert tokenizer_difference(__import__("pathlib").Path(sys.argv[1])) is None
heavy = {name for name in sys.modules if name.split(".")[0] == "megatron" or name.startswith("trainer.engine.engine")}
assert not heavy, sorted(heavy)[:3]
"""


def test_neither_an_export_nor_the_check_of_its_tokenizer_imports_the_engine(tokenizer_directory):
    command = [sys.executable, "-W", "ignore", "-c", EXPORT_AND_CHECK, tokenizer_directory]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_folder_of_the_cache_is_imported_and_told_of_what_is_left_out(convert, copy, tmp_path):
    """Its code is missing, a key says nothing to transformers; the export is whole all the same."""
    config = json.loads((copy / "config.json").read_text())
    config |= {"auto_map": {"AutoModelForCausalLM": "modeling_some.Some"}, "is_llama_config": True}
    (copy / "config.json").write_text(json.dumps(config))
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    shutil.copytree(copy, snapshot)
    code, said, err = convert("import", snapshot.parents[1], tmp_path / "run")
    assert code == 0 and "note: config.json: is_llama_config left aside, as transformers' LlamaForCausalLM does" in err
    code, said, err = convert("export", tmp_path / "run", tmp_path / "out")
    assert code == 0 and "note: config.json: auto_map named modeling_some.py, which is not there; left out" in err
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert convert("model", snapshot.parents[1])[0] == 0
