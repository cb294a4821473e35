"""Rejection sampling on the command line: help, plan and refusals, as training has them."""

from __future__ import annotations

from pathlib import Path

from configs.errors import ExitCode
from launch.main import main

ROOT = Path(__file__).parents[2]


def test_help_plan_and_refusal(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = str(ROOT / "configs" / "demo" / "rft.yaml")
    assert main("rft", ["--help"]) == ExitCode.DONE
    said = capsys.readouterr().out
    assert "launch/rft.py CONFIG" in said and "rft.min_score = 1.0" in said
    assert main("rft", [recipe, "--dry-run"]) == ExitCode.DONE
    said = " ".join(capsys.readouterr().out.split())
    assert "a round 64 prompts x 4 answers" in said and "train.num_steps" not in said and " gradients " not in said
    assert "grpo.prompts data/tasks/train.jsonl: not on this machine" in said
    assert main("rft", [recipe, "optimizer.lr=1e-4", "rft.most=3"]) == ExitCode.BAD_INPUT
    told = capsys.readouterr().err
    assert "rft.most: unknown field" in told and "optimizer.lr: has no effect in rejection sampling" in told
    assert not list(tmp_path.iterdir())
