"""Rejection sampling from end to end: killed anywhere it goes on to the same data, on any layout; SFT reads it."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from configs.errors import ExitCode
from tests.end_to_end.conftest import train_on_ranks, write_text
from tests.pool import RankFailed
from tools.train_tokenizer import train_tokenizer
from trainer.report.rollouts import list_rollouts, read_rollouts

NUM_PROMPTS = 11
TOO_LONG = 4
MODEL = """
model: {num_layers: 2, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 4, vocab_size: 320,
        vocab_pad_multiple: 16, max_position_embeddings: 128, init_std: 0.2}
precision: {compute: fp32}
parallel: {timeout_seconds: 60}
"""


def prompt(number: int) -> dict:
    """Return a row that asks; one is too long, one has turns before, and all have an answer that is left off."""
    question = "x y z w " * 40 if number == TOO_LONG else f"{number} + {number}?"
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "no"}]
    if number == 1:
        before = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "0?"}]
        messages = [*before, {"role": "assistant", "content": "0"}, *messages]
    return {"messages": messages, "answer": str(2 * number)}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    """Return a folder with `tokenizer`, which has ChatML's tokens, and `asked.jsonl`."""
    folder = tmp_path_factory.mktemp("prompts")
    special = ("<|im_start|>", "<|im_end|>")
    train_tokenizer([write_text(folder / "text.jsonl", 0, 300)], str(folder / "tokenizer"), 320, special_tokens=special)
    (folder / "asked.jsonl").write_text("".join(json.dumps(prompt(n)) + "\n" for n in range(NUM_PROMPTS)))
    return folder


@pytest.fixture
def start(ranks, prompts, tmp_path):
    """Return a function that runs a stage: `start(stage, world, *overrides, fault=None) -> (code, sentence)`."""
    seed = tmp_path / "seed.yaml"
    seed.write_text(
        f"{MODEL}data: {{tokenizer: {prompts / 'tokenizer'}}}\nrun: {{dir: {tmp_path / 'seed'}}}\n"
        "train: {num_steps: 0, seq_len: 128, global_batch_size: 2, micro_batch_size: 1}\n"
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""{MODEL}
run: {{dir: {tmp_path / "rft"}}}
data: {{tokenizer: {prompts / "tokenizer"}}}
grpo:
  template: chatml
  prompts: [{{path: {prompts / "asked.jsonl"}}}]
  rewards: [{{function: regex, options: {{pattern: "[a-m]"}}}}]
  group_size: 4
  num_reward_workers: 1
rollout: {{max_new_tokens: 12, stop_strings: ["e", "o", " "]}}
rft: {{max_per_prompt: 2}}
train: {{seq_len: 128, global_batch_size: 16}}
checkpoint: {{init_from: {tmp_path / "seed"}}}
"""
    )

    def run(stage: str, world: int, *overrides: str, fault: str | None = None) -> tuple[int, str]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        path = {"rft": recipe}.get(stage, seed)
        return ranks.run(train_on_ranks, str(path), overrides, port, fault, stage, world=world)[0]

    assert run("pretrain", 1) == (ExitCode.DONE, "")
    return run


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_killed_and_continued_on_other_ranks_it_writes_the_same_and_fine_tuning_reads_it(start, prompts, tmp_path):
    assert start("rft", 1, f"run.dir={tmp_path / 'whole'}") == (ExitCode.DONE, "")
    whole = (tmp_path / "whole" / "accepted.jsonl").read_bytes()
    check_accepted(tmp_path / "whole", prompts)
    with pytest.raises(RankFailed):
        start("rft", 1, fault="killed_in_second_round")
    run_dir = tmp_path / "rft"
    assert len(list_rollouts(run_dir)) == 1 and list((run_dir / "rollouts").glob("*.tmp"))
    assert not (run_dir / "accepted.jsonl").exists()
    assert start("rft", 2, "train.global_batch_size=8", fault="sigterm_in_round") == (ExitCode.STOPPED_AFTER_SAVING, "")
    assert len(list_rollouts(run_dir)) == 2 and whole.startswith((run_dir / "accepted.jsonl").read_bytes())
    assert start("rft", 2, "parallel.pp=2") == (ExitCode.DONE, "")
    assert (run_dir / "accepted.jsonl").read_bytes() == whole

    cut = ("rft.min_score=0", "rft.max_per_prompt=1", "rft.num_prompts=3")
    assert start("rft", 1, *cut, fault="no_model") == (ExitCode.DONE, "")  # what is accepted needs no new answers
    rows = read(run_dir / "accepted.jsonl")
    assert len({row["provenance"]["row"] for row in rows}) == len(rows) <= 3
    chats = f"sft.train=[{{path: {tmp_path / 'whole' / 'accepted.jsonl'}}}]"
    tuned = ("sft.template=chatml", f"sft.cache={tmp_path / 'cache'}", f"checkpoint.init_from={tmp_path / 'seed'}")
    run_sft = (f"run.dir={tmp_path / 'sft'}", "train.num_steps=1", chats, *tuned)
    assert start("sft", 1, *run_sft) == (ExitCode.DONE, "")


def check_accepted(run_dir: Path, prompts: Path) -> None:
    """Check the data against the rollouts that are kept of the run."""
    answers = {(one["row"], one["sample"]): one for path in list_rollouts(run_dir) for one in read_rollouts(path)}
    assert {row for row, _ in answers} == set(range(NUM_PROMPTS)) - {TOO_LONG} and len(answers) == 4 * (NUM_PROMPTS - 1)
    rows = read(run_dir / "accepted.jsonl")
    assert len(rows) > 4, "too few answers of the random model are accepted for this test to tell anything"
    places = [(row["provenance"]["row"], row["provenance"]["sample"]) for row in rows]
    assert places == sorted(set(places)) and max(places.count(place) for place in places) == 1
    (weights,) = {(row["provenance"]["checkpoint"], row["provenance"]["step"]) for row in rows}
    assert weights[0].endswith("seed/checkpoints/step_00000000") and weights[1] == 0
    for row, place in zip(rows, places, strict=True):
        found, provenance = answers[place], row["provenance"]
        assert row["messages"][-1] == {"role": "assistant", "content": found["answers"][-1]}
        assert (found["score"], found["rewards"]) == (1.0, {"regex": 1.0}) and found["finish"] != "length"
        assert provenance["source"] == str(prompts / "asked.jsonl") and provenance["seed"] == 1234
        assert provenance["sampling"]["stop_strings"] == ["e", "o", " "] and len(provenance["sha256"]) == 64
        asked = prompt(place[0])["messages"][:-1]
        assert [(one["role"], one["content"]) for one in row["messages"][:-1]] == [
            (one["role"], one["content"]) for one in asked
        ]
        assert all(one["train"] is False for one in row["messages"][:-1] if one["role"] == "assistant")


def test_answers_of_other_weights_settings_and_prompts_are_not_mixed(start, prompts, tmp_path):
    assert start("rft", 1, "rft.num_prompts=4") == (ExitCode.DONE, "")
    before = {path: path.read_bytes() for path in (tmp_path / "rft").rglob("*") if path.is_file()}

    def refused(*overrides: str) -> str:
        code, said = start("rft", 1, *overrides)
        assert code == ExitCode.BAD_INPUT
        assert {path: path.read_bytes() for path in (tmp_path / "rft").rglob("*") if path.is_file()} == before
        return said

    said = refused("rollout.temperature=0.5", "run.seed=7")
    assert "run.seed is 7, it was 1234; rollout.temperature is 0.5, it was 1.0; name another run" in said
    assert start("pretrain", 1, "run.seed=7", f"run.dir={tmp_path / 'other'}") == (ExitCode.DONE, "")
    assert "these are other weights" in refused(f"checkpoint.init_from={tmp_path / 'other'}")
    (tmp_path / "asked.jsonl").write_text(json.dumps(prompt(0)) + "\n")
    source = f"grpo.prompts=[{{path: {tmp_path / 'asked.jsonl'}}}]"
    assert "grpo.prompts: the rows of asked are not those that" in refused(source)
    (first,) = list_rollouts(tmp_path / "rft")
    first.rename(first.with_name("step_00000002.jsonl"))
    lines = first.with_name("step_00000002.jsonl").read_text().splitlines(keepends=True)
    first.with_name("step_00000002.jsonl").write_text("".join(lines[4:]))
    code, said = start("rft", 1)
    assert code == ExitCode.BAD_INPUT and "has the answers to prompt 1 where those to prompt 0 are expected" in said


def test_a_reward_model_says_what_is_accepted_and_another_one_is_refused(start, tmp_path):
    pairs, reward = tmp_path / "pairs.jsonl", tmp_path / "reward"
    rows = [{"prompt": f"{n}?", "chosen": f"is {n}", "rejected": f"no {n}"} for n in range(8)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = (
        f"checkpoint.init_from={tmp_path / 'seed'}", f"run.dir={reward}", f"reward.train=[{{path: {pairs}}}]",
        f"reward.cache={tmp_path / 'cache'}", "reward.template=chatml",
    )  # fmt: skip
    assert start("reward", 1, *given, "train.num_steps=1") == (ExitCode.DONE, "")
    scored = ("grpo.rewards=[]", f"grpo.reward_model={{init_from: {reward}, weight: 2}}", "rft.num_prompts=6")
    assert start("rft", 2, "parallel.pp=2", *scored, "rft.min_score=-100") == (ExitCode.DONE, "")
    kept = [one for path in list_rollouts(tmp_path / "rft") for one in read_rollouts(path)]
    assert len(kept) == 24 and len({one["score"] for one in kept}) > 4
    assert all(one["score"] == pytest.approx(2 * one["rewards"]["reward_model"]) for one in kept)
    assert start("reward", 1, *given, "train.num_steps=2") == (ExitCode.DONE, "")
    code, said = start("rft", 1, *scored)
    assert code == ExitCode.BAD_INPUT
    assert said.startswith("grpo.reward_model.init_from: the answers in ") and "scored by another one" in said
