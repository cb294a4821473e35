"""The preview of fine-tuning data and the small tasks of its demo."""

from __future__ import annotations

import json
import random
import re

import pytest

from configs.errors import ExitCode
from tests.end_to_end.conftest import write_text
from tools import make_small_tasks, preview_sft
from tools.train_tokenizer import train_tokenizer
from trainer.environments.calculator import Calculator
from trainer.environments.small_tasks import draw_task, is_right


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Return a recipe of three rows: a chat, one that is no chat, and one that is too long."""
    folder = tmp_path_factory.mktemp("preview")
    special = ("<|im_start|>", "<|im_end|>")
    train_tokenizer([write_text(folder / "text.jsonl", 0, 200)], str(folder / "tokenizer"), 320, special_tokens=special)
    ask, long = {"role": "user", "content": "1 + 1?"}, "x y z w " * 40
    rows = [[ask, {"role": "assistant", "content": "zwei é"}], [ask], [ask, {"role": "assistant", "content": long}]]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    path = folder / "recipe.yaml"
    path.write_text(
        f"""
model: {{num_layers: 1, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 2, vocab_size: 320}}
data: {{tokenizer: {folder / "tokenizer"}}}
sft: {{template: chatml, train: [{{path: {folder / "chats.jsonl"}}}]}}
train: {{num_steps: 1, seq_len: 64}}
checkpoint: {{init_from: none}}
"""
    )
    return path


def test_every_token_is_shown_and_written_with_its_mask(recipe, tmp_path, capsys):
    out, page = tmp_path / "samples.json", tmp_path / "page.html"
    assert preview_sft.main([str(recipe), "--json", str(out), "--html", str(page)]) == ExitCode.DONE
    said = capsys.readouterr().out
    assert "<|im_start|>assistant\n[[zwei é<|im_end|>]]" in said
    assert "1 rows, which a run refuses (sft.bad_rows=refuse)" in said
    (whole,) = re.findall(r"chats.jsonl, row 2, cut to 65 of (\d+) tokens", said)
    assert int(whole) > 160 and re.search(rf"cut at train.seq_len +1 samples, the longest of {whole} tokens", said)
    entries = [json.loads(line) for line in out.read_text().splitlines()]
    assert [entry["row"] for entry in entries] == [0, 1, 2] and entries[1]["dropped"] and not entries[1]["input_ids"]
    first, _, last = entries
    assert first.keys() == {"source", "row", "input_ids", "loss_mask", "dropped"} and first["dropped"] is None
    assert len(first["input_ids"]) == len(first["loss_mask"]) and len(last["input_ids"]) == 65
    from trainer.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(recipe.parent / "tokenizer"))
    trained = [token for token, one in zip(first["input_ids"], first["loss_mask"], strict=True) if one]
    assert tokenizer.backend.decode(trained, skip_special_tokens=False) == "zwei é<|im_end|>"
    text = page.read_text()
    assert "class=trained-special>&lt;|im_end|&gt;" in text and "class=trained>" in text


def test_answers_of_preferences_are_shown_with_their_sides(recipe, tmp_path, capsys):
    pairs, out = tmp_path / "pairs.jsonl", tmp_path / "samples.json"
    rows = [{"prompt": "1 + 1?", "chosen": "zwei", "rejected": "drei"}, {"prompt": "a", "chosen": "b", "rejected": "b"}]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    other = tmp_path / "preference.yaml"
    text = recipe.read_text().replace("sft:", "preference:")
    other.write_text(text.replace(str(recipe.parent / "chats.jsonl"), str(pairs)))
    assert preview_sft.main([str(other), "--json", str(out)]) == ExitCode.DONE
    said = capsys.readouterr().out
    assert re.search(r"row 0, rejected\n.*\n.*\n<\|im_start\|>assistant\n\[\[drei<\|im_end\|>\]\]", said)
    assert "1 chosen, 1 rejected" in said and "chosen and rejected are equal" in said
    assert "which a run refuses (preference.bad_rows=refuse)" in said
    entries = [json.loads(line) for line in out.read_text().splitlines()]
    assert [entry.get("side") for entry in entries] == ["chosen", "rejected", None]
    assert all(set(entry["loss_mask"]) == {0, 1} for entry in entries[:2])


@pytest.mark.parametrize(
    ("stage", "field"), [("distill", "distill: {teacher: runs/t}"), ("teacher_cache", "distill: {cache: c, top_k: 4}")]
)
def test_conversations_of_distillation_are_shown_as_those_of_fine_tuning(recipe, tmp_path, capsys, stage, field):
    other = tmp_path / "recipe.yaml"
    other.write_text(recipe.read_text() + field + "\n")
    assert preview_sft.main([str(other), "--stage", stage]) == ExitCode.DONE
    assert "<|im_start|>assistant\n[[zwei é<|im_end|>]]" in capsys.readouterr().out
    text = ["sft.train=[]", "data.train=[{path: text}]"]
    assert preview_sft.main([str(other), *text, "--stage", stage]) == ExitCode.BAD_INPUT
    assert "sft.train: names no conversations" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--split", "validation"], "sft.validation: the recipe names no source"),
        (["sft.train=[]"], "sft.train: 1 steps need at least one source"),
        (["data.tokenizer=null"], "data.tokenizer: is needed"),
        (["sft.template=nothing"], "sft.template"),
        (
            ["--json", "nowhere/samples.json"],
            "nowhere/samples.json: cannot be written, as there is no directory nowhere",
        ),
        (["--html", "."], "--html .: a directory, and a file is needed; a value that would work: page.html"),
        (["--html", "a", "--json", "a"], "--json a: is the file of --html too; a value that would work: samples.jsonl"),
    ],
)
def test_what_cannot_be_shown_is_one_sentence(recipe, capsys, words, named):
    assert preview_sft.main([str(recipe), *words]) == ExitCode.BAD_INPUT
    said = capsys.readouterr()
    assert named in said.err and said.err.count("\n") == 1 and not said.out


def test_a_negative_number_of_samples_is_refused(recipe, capsys):
    with pytest.raises(SystemExit) as refusal:
        preview_sft.main([str(recipe), "--show", "-1"])
    assert refusal.value.code == ExitCode.BAD_INPUT and "--show: -1 is less than 0" in capsys.readouterr().err


def test_small_tasks_are_right_and_none_held_out_is_trained(tmp_path, capsys):
    assert make_small_tasks.main(["--out", str(tmp_path), "--rows", "500", "--held-out", "50"]) == ExitCode.DONE
    read = {name: (tmp_path / f"{name}.jsonl").read_text().splitlines() for name in ("train", "held_out")}
    rows = {name: [json.loads(line) for line in lines] for name, lines in read.items()}
    asked = {name: {row["messages"][0]["content"] for row in some} for name, some in rows.items()}
    assert len(rows["train"]) == 500 and len(asked["held_out"]) == 50 and not asked["train"] & asked["held_out"]
    assert {row["kind"] for row in rows["train"]} == {"sum", "larger", "letter", "reverse"}
    source = random.Random(3)
    for task in (draw_task(source) for _ in range(200)):
        assert is_right(task, task.worked) and not is_right(task, task.worked.replace("The answer is ", ""))
        assert not is_right(task, f"The answer is {task.answer}x.")
        if task.kind == "sum":  # an answer of its own, from the question's numbers
            numbers = [int(word) for word in "".join(c if c.isdigit() else " " for c in task.question).split()]
            assert task.answer == str(sum(numbers))


def test_calculator_tasks_are_rows_whose_worked_answers_the_environment_takes(tmp_path, capsys):
    options = ["--out", str(tmp_path), "--tasks", "calculator", "--rows", "50", "--held-out", "5"]
    assert make_small_tasks.main(options) == ExitCode.DONE
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 50
    for row in rows:
        asked, *_, last = row["messages"]
        assert Calculator().begin(row, 0) == [asked] and row["tools"] == list(Calculator.tools)
        assert Calculator().answer(row, [asked], last["content"]).reward == 1.0
