"""`tools/plan.py`: the table, reasons, files, wrong input, and single ranks rehearsed against the plan."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from configs.load import load_config
from configs.rules.check import check_config
from tools import plan

MODEL = {
    "num_layers": 8, "hidden_size": 2048, "ffn_hidden_size": 8192, "num_attention_heads": 16, "num_query_groups": 8,
    "vocab_size": 32000,
}  # fmt: skip
RECIPES = Path(__file__).parents[2] / "configs"
MOE = {"num_experts": 16, "top_k": 4, "ffn_hidden_size": 1024, "shared_expert_ffn_hidden_size": 1024}
LATENT = {"q_lora_rank": 768, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}

BLOCKS = "precision.fp8={recipe: blockwise, backend: te}"


@pytest.fixture
def recipe(tmp_path):
    """A small recipe, with fields changed."""

    def write(**sections):
        fields = {
            "run": {"name": "small"},
            "model": MODEL,
            "train": {"num_steps": 1, "seq_len": 4096, "global_batch_size": 64},
            "data": {"train": [{"path": "made-up"}]},
        }
        for name, section in sections.items():
            fields[name] = fields.get(name, {}) | section
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(fields))
        return str(path)

    return write


def test_the_first_layout_can_be_pasted(recipe, tmp_path, capsys):
    page, figures = tmp_path / "plan.html", tmp_path / "plan.json"
    path = recipe()
    assert (
        plan.main([path, "--gpus", "16", "--device", "h100", "--top", "3", f"--html={page}", f"--json={figures}"]) == 0
    )
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("overrides"))
    config = load_config(path, shlex.split(line)[1:])
    assert check_config(config, 16, platform="cuda", has_te=True) == []
    rows = json.loads(figures.read_text())
    assert rows[0]["layout"]["tp"] == config.parallel.tp
    assert rows[0]["step_seconds"]["total"] == min(row["step_seconds"]["total"] for row in rows)
    text = page.read_text()
    assert text.count("<svg") == 2 and "NVIDIA H100 datasheet" in text and "small on 16 h100" in text
    assert "break a rule" in out and out.splitlines()[0].split()[:3] == ["rank", "tp", "pp"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--gpus", "16", "--device", "h1000"], "--device: no figures for 'h1000'; .*would work: h100"),
        (["--gpus", "13", "--device", "h100"], "13 GPUs fit no layout.*train.global_batch_size: 64 is no multiple"),
        (["--gpus", "8", "--device", "h100", "schedule.warmup_steps=1"], "error: schedule.warmup_steps: 1 is not"),
        (["--gpus", "0", "--device", "h100"], "--gpus: 0 is no number of GPUs"),
        (["--gpus", "16", "--device", "h100", "--why", "tp=x"], "--why: 'tp=x' is not a size; .*such as tp=8,pp=4"),
        (["--gpus", "16", "--device", "h100", "--rehearse", "16"], "--rehearse: '16' is not a rank of 16; .*0,15"),
        (["--gpus", "8", "--device", "h100", BLOCKS, "--rehearse"], "blockwise runs in Transformer Engine alone"),
        (["--gpus", "16", "--device", "h100", "--html", "none/p.html"], "p.html: cannot be written, as there is no"),
        (["--gpus", "16", "--device", "h100", "--why", "tp=2", "--json", "p.json"], "--json: is of the whole table"),
        (["--gpus", "1", "--device", "h100", "model.num_layers=100"], "no layout fits .* nearest is tp=1 .* too much"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_sentence(recipe, capsys, arguments, sentence):

    assert plan.main([recipe(), *arguments]) == 2
    captured = capsys.readouterr()
    assert re.search(sentence, captured.err) and captured.err.count("\n") == 1


def test_why_tells_what_became_of_a_layout(recipe, capsys):
    path = recipe()
    assert plan.main([path, "--gpus", "16", "--device", "h100", "--why", "tp=8,pp=2"]) == 0
    assert "the fastest of them is number" in capsys.readouterr().out
    assert plan.main([path, "--gpus", "16", "--device", "h100", "--why", "vpp=3"]) == 0
    assert "none is searched: sizes are divisors" in capsys.readouterr().out


def test_what_a_step_of_grpo_takes_besides_is_said_to_be_left_out(recipe, capsys):
    arguments = [str(RECIPES / "grpo" / "qwen3_8b_dapo.yaml"), "--gpus", "8", "--device", "h100"]
    assert plan.main(arguments) == 0
    assert "left out     answers, rewards and scores of a step, and the memory" in capsys.readouterr().out


def rehearsed(capsys, arguments):
    """Rehearse and return the output, and how often a kind of memory is equal to the plan."""
    code = plan.main(arguments)
    captured = capsys.readouterr()
    if "needs a C compiler" in captured.err or "PyTorch's build" in captured.err:
        pytest.skip(captured.err)
    assert code == 0, captured.err
    rows = [line.split() for line in captured.out.splitlines()]
    equal = [row[0] for row in rows if row and row[-1] == "equal"]
    shares = [float(row[-1]) for row in rows if row[:1] == ["activations"]]
    return captured.out, equal, shares


def test_ranks_rehearsed_take_what_the_plan_says(recipe, capsys):
    """tp, sp, interleaved stages and ZeRO-1 of 64 ranks: a first, its neighbour on tp, and one of the last stage."""
    layout = ["parallel.tp=2", "parallel.sp=true", "parallel.pp=2", "parallel.vpp=2"]
    arguments = [recipe(), "--gpus", "64", "--device", "h100", *layout, "--rehearse", "0,1,32"]
    out, equal, shares = rehearsed(capsys, arguments)
    assert equal == ["weights", "gradients", "optimizer"] * 3
    assert len(shares) == 3 and all(0.9 < share < 1.1 for share in shares), out
    assert "collectives, sends and receives that these ranks share agree" in out


@pytest.mark.slow
def test_experts_rehearsed_take_what_the_plan_says(recipe, capsys):
    model = {"moe": MOE, "mla": LATENT, "num_query_groups": None, "rope": {"interleaved": True}}
    layout = ["parallel.ep=8", "parallel.pp=2"]
    arguments = [recipe(model=model), "--gpus", "64", "--device", "h100", *layout, "--rehearse", "0,32"]
    out, equal, shares = rehearsed(capsys, arguments)
    assert equal == ["weights", "gradients", "optimizer"] * 2, out
    assert len(shares) == 2 and all(0.9 < share < 1.1 for share in shares), out
