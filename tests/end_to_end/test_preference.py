"""Preferences from end to end: pairs train on any layout, the reference is in checkpoints, bad rows are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.end_to_end.conftest import write_text
from tests.pool import RankFailed
from tools.train_tokenizer import train_tokenizer

NO_DATA = ("data.train=[]", "data.validation=[]", "model.vocab_size=320", "train.seq_len=64", "schedule.kind=constant")


def pair(number: int) -> dict:
    """Return a question with a right and a wrong answer, one longer than the other."""
    wrong = "pass" * (1 + number % 3)
    return {"prompt": str(number), "chosen": f"return {number + 1}", "rejected": wrong}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a folder with `tokenizer`, which has ChatML's tokens, `pairs.jsonl` and `labels.jsonl`."""
    folder = tmp_path_factory.mktemp("pairs")
    special = ("<|im_start|>", "<|im_end|>")
    train_tokenizer([write_text(folder / "text.jsonl", 0, 300)], str(folder / "tokenizer"), 320, special_tokens=special)
    rows = [pair(number) for number in range(24)]
    labels = [
        {"prompt": row["prompt"], "completion": row["chosen" if number % 2 else "rejected"], "label": bool(number % 2)}
        for number, row in enumerate(rows)
    ]
    for name, some in (("pairs", rows), ("labels", labels)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return folder


@pytest.fixture
def prefer(folder, train, tmp_path):
    """Return a function that trains from seed weights: `prefer(world, name, *overrides) -> (code, sentence, rows)`."""
    seed, tokenizer = tmp_path / "seed", f"data.tokenizer={folder / 'tokenizer'}"
    assert train(1, *NO_DATA, tokenizer, f"run.dir={seed}", "train.num_steps=0") == (0, "")
    fixed = (*NO_DATA, tokenizer, f"checkpoint.init_from={seed}", f"preference.cache={tmp_path / 'cache'}")
    fixed += ("preference.template=chatml", "train.global_batch_size=4")

    def run(
        world: int, name: str, *overrides: str, data: Path | None = None, fault: str | None = None
    ) -> tuple[int, str, list[dict]]:
        source = f"[{{path: {data or folder / 'pairs.jsonl'}}}]"
        given = (f"preference.train={source}", f"preference.validation={source}", f"run.dir={tmp_path / name}")
        code, said = train(world, *fixed, *given, *overrides, stage="preference", fault=fault)
        metrics = tmp_path / name / "metrics.jsonl"
        return code, said, [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []

    return run


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_a_killed_run_resumes_on_another_layout_with_its_reference(prefer, folder, loss):
    given = (f"preference.loss={loss}", "checkpoint.save_every=1")
    data = folder / ("labels.jsonl" if loss == "kto" else "pairs.jsonl")
    code, said, whole = prefer(1, "whole", *given, data=data)
    assert code == 0, said
    for fault in ("killed_in_second_scores", "killed_in_second_update"):  # while the reference is scored, or in step 2
        with pytest.raises(RankFailed, match="exit code -9"):
            prefer(2, "parts", *given, data=data, fault=fault)
    code, said, parts = prefer(2, "parts", *given, "parallel.pp=2", data=data)
    assert code == 0, said
    np.testing.assert_allclose([row["loss"] for row in parts], [row["loss"] for row in whole], rtol=1e-5)
    first, last = whole[0], whole[-1]
    assert first["loss"] == pytest.approx(np.log(2) if loss == "dpo" else 0.5, rel=1e-4)  # the policy is the reference
    name = data.stem
    assert last[f"validation_loss/{name}"] < 0.9 * first["loss"] and f"validation_perplexity/{name}" not in last
    assert last[f"validation_rewards/chosen/{name}"] > last[f"validation_rewards/rejected/{name}"]
    if loss == "dpo":
        assert last[f"validation_rewards/accuracies/{name}"] > 0.9 and f"validation_exact_answers/{name}" in last


def test_the_reference_of_a_loaded_adapter_is_the_policy_as_it_starts(prefer, tmp_path):
    from tools.convert_hf import main

    lora, short = "rank: 4, alpha: 16", ("train.num_steps=2", "optimizer.lr=3e-2")
    code, said, first = prefer(2, "adapted", f"lora={{{lora}}}", *short, "parallel.tp=2")
    assert code == 0, said
    assert main(["export", str(tmp_path / "adapted"), str(tmp_path / "peft"), "--adapter"]) == 0
    code, said, again = prefer(1, "again", f"lora={{{lora}, init_from: {tmp_path / 'peft'}}}", *short)
    assert code == 0, said
    assert [one[0]["loss"] for one in (first, again)] == pytest.approx([np.log(2)] * 2, rel=1e-4)
    assert again[0]["logps/chosen"] != pytest.approx(first[0]["logps/chosen"], rel=1e-2), "the adapter was not loaded"


def test_what_a_run_did_not_begin_with_is_refused(prefer, folder, tmp_path):
    assert prefer(1, "free", "preference.loss=orpo", "train.num_steps=2")[0] == 0
    code, said, _ = prefer(1, "free", "preference.loss=dpo")
    assert code == 2 and "preference.loss: the checkpoint that is resumed has no reference" in said
    assert prefer(1, "held", "train.num_steps=2")[0] == 0
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(pair(number)) + "\n" for number in range(30, 50)))
    code, said, _ = prefer(1, "held", f"preference.validation=[{{path: {other}}}]")
    assert code == 2 and "were not there when this run began" in said


BAD_ROWS = {
    "equal": ({"prompt": "a", "chosen": "b", "rejected": "b"}, "dpo", "chosen and rejected are equal"),
    "empty": ({"prompt": "a", "chosen": "", "rejected": "b"}, "dpo", "chosen is empty"),
    "label": ({"prompt": "a", "completion": "b", "label": "good"}, "kto", "label is 'good', neither true nor false"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_refused_before_anything_is_written(prefer, folder, tmp_path, name):
    row, loss, words = BAD_ROWS[name]
    file = tmp_path / "bad.jsonl"
    good = (folder / ("labels.jsonl" if loss == "kto" else "pairs.jsonl")).read_text()
    file.write_text(good + json.dumps(row) + "\n")
    code, said, _ = prefer(1, "refused", f"preference.loss={loss}", data=file)
    assert code == 2 and said.startswith(f"preference.train[0]: row 24 of {file}: {words}"), said
    assert said.endswith("preference.bad_rows=drop") and not (tmp_path / "refused").exists()


def test_answers_that_the_template_makes_alike_are_refused(prefer, folder, tmp_path):
    file, template = tmp_path / "alike.jsonl", tmp_path / "trims.jinja"
    turn = "<|im_start|>{{ one.role }}\n{{ one.content | trim }}<|im_end|>\n"
    asked = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    template.write_text("{% for one in messages %}" + turn + "{% endfor %}" + asked)
    row = {"prompt": "a", "chosen": "b", "rejected": " b "}
    file.write_text((folder / "pairs.jsonl").read_text() + json.dumps(row) + "\n")
    code, said, _ = prefer(1, "alike", f"preference.template={template}", data=file)
    assert code == 2 and f"row 24 of {file}: chosen and rejected are the same tokens" in said


def test_a_pair_that_no_row_holds_is_left_out_and_counted(prefer, folder, tmp_path):
    from trainer.data.chat.cache import read_summary

    file = tmp_path / "long.jsonl"
    long = {"prompt": "1?", "chosen": "return " * 30, "rejected": "pass " * 30}
    file.write_text((folder / "pairs.jsonl").read_text() + json.dumps(long) + "\n")
    assert prefer(1, "long", "train.num_steps=1", data=file)[0] == 0
    (cached,) = (tmp_path / "cache").glob("*/long.meta.json")
    summary = read_summary(str(cached).removesuffix(".meta.json"))
    assert (summary.num_rows, summary.num_samples) == (25, 48)
    assert summary.dropped == {"longer than train.seq_len": 1}
