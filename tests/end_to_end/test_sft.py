"""Supervised fine-tuning from end to end: chats become samples in a cache, training on any layout, resume, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from configs.errors import ExitCode
from configs.load import load_config
from tests.end_to_end.conftest import write_text
from tools.train_tokenizer import train_tokenizer
from trainer.data.chat.cache import prepare_conversations, read_summary

NUM_CHATS = 16
NO_DATA = ("data.train=[]", "data.validation=[]", "model.vocab_size=320")


def chat(number: int) -> dict:
    """Return a conversation of one or two questions."""
    turns = [(f"{number} + {k}?", f"return {number + k}") for k in range(1 + number % 2)]
    messages = [
        {"role": "user" if k % 2 == 0 else "assistant", "content": text} for k, text in enumerate(sum(turns, ()))
    ]
    return {"messages": messages}


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> Path:
    """Return a folder with `tokenizer`, which has ChatML's tokens, and `chats.jsonl`."""
    folder = tmp_path_factory.mktemp("chats")
    special = ("<|im_start|>", "<|im_end|>")
    train_tokenizer([write_text(folder / "text.jsonl", 0, 300)], str(folder / "tokenizer"), 320, special_tokens=special)
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat(n)) + "\n" for n in range(NUM_CHATS)))
    return folder


@pytest.fixture
def sft(chats, train, tmp_path):
    """Return a function that fine-tunes from seed weights: `sft(world, name, *overrides) -> (code, sentence, rows)`."""
    seed = tmp_path / "seed"
    tokenizer = f"data.tokenizer={chats / 'tokenizer'}"
    assert train(1, *NO_DATA, tokenizer, f"run.dir={seed}", "train.num_steps=0") == (ExitCode.DONE, "")
    fixed = (*NO_DATA, tokenizer, f"checkpoint.init_from={seed}", f"sft.cache={tmp_path / 'cache'}")
    fixed += ("sft.template=chatml", f"sft.train=[{{path: {chats / 'chats.jsonl'}}}]", "train.seq_len=64")

    def run(world: int, name: str, *overrides: str) -> tuple[int, str, list[dict]]:
        run_dir = tmp_path / name
        code, said = train(world, *fixed, f"run.dir={run_dir}", *overrides, stage="sft")
        metrics = run_dir / "metrics.jsonl"
        return code, said, [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []

    return run


def losses_of(rows: list[dict]) -> list[float]:
    return [row["loss"] for row in rows]


def test_packed_and_padded_rows_train_alike_and_as_transformers_says(sft, chats, tmp_path):
    padded = ("sft.packing=false", f"train.global_batch_size={NUM_CHATS}", "train.num_steps=3")
    validation = (
        f"sft.validation=[{{path: {chats / 'chats.jsonl'}}}]",
        "checkpoint.export_hf=true",
        "train.eval_num_samples=16",
    )
    code, said, alone = sft(1, "alone", *padded, *validation)
    assert code == 0, said
    (cached,) = (tmp_path / "cache").glob("*/chats.meta.json")
    summary = read_summary(str(cached).removesuffix(".meta.json"))
    assert (summary.num_rows, summary.num_samples, summary.dropped) == (NUM_CHATS, NUM_CHATS, {})
    assert alone[0]["num_tokens"] == summary.num_trained_tokens
    code, said, spread = sft(2, "spread", *padded, "parallel.pp=2")
    assert code == 0, said
    np.testing.assert_allclose(losses_of(spread), losses_of(alone), rtol=1e-5)
    last = alone[-1]
    assert last["validation_loss/chats"] < alone[0]["loss"] and 0 < last["validation_accuracy/chats"] < 1
    assert_transformers_agrees(last, tmp_path / "alone", str(cached).removesuffix(".meta.json"))


def assert_transformers_agrees(row: dict, run_dir: Path, prefix: str) -> None:
    """Compare the last validation with the exported model in float64, each chat alone with the cached mask."""
    import torch
    from transformers import AutoModelForCausalLM

    from trainer.data.indexed import TokenDataset

    exported = (run_dir / "checkpoints" / "latest" / "hf").resolve()
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float64, attn_implementation="eager")
    dataset, total, right, count = TokenDataset(prefix), 0.0, 0, 0
    for document, length in enumerate(dataset.lengths.tolist()):
        ids = torch.from_numpy(dataset.read(document, 0, length).astype(np.int64))[None]
        mask = torch.from_numpy(dataset.read_mask(document, 0, length).astype(bool))
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        wanted = ids[0, 1:]
        losses = torch.nn.functional.cross_entropy(logits, wanted, reduction="none")
        total += float(losses[mask[1:]].sum())
        right += int((logits.argmax(-1) == wanted)[mask[1:]].sum())
        count += int(mask[1:].sum())
    assert row["validation_loss/chats"] == pytest.approx(total / count, rel=1e-5)
    assert row["validation_accuracy/chats"] == pytest.approx(right / count)


def test_epochs_resume_on_another_layout_and_patience_ends_a_run(sft, chats, tmp_path):
    epochs = ("train.num_epochs=2", "train.global_batch_size=2", "train.eval_every=2", "schedule.warmup_fraction=0.4")
    validation = f"sft.validation=[{{path: {chats / 'chats.jsonl'}}}]"
    code, said, whole = sft(1, "whole", *epochs, validation)
    assert code == 0, said
    packed = prepare_conversations(load_config(str(tmp_path / "whole" / "config.json"), (), "sft"))  # type: ignore[arg-type]
    num_rows = round(sum(row["num_input_tokens"] for row in whole) / 64)
    assert packed.train[0].path.startswith(str(tmp_path / "cache")) and num_rows == 2 * len(whole)
    assert sum(row["num_tokens"] for row in whole) >= 2 * read_summary(packed.train[0].path).num_trained_tokens
    resumed = (f"checkpoint.resume={tmp_path}/whole/checkpoints/step_00000002", "checkpoint.init_from=null")
    code, said, moved = sft(2, "moved", *epochs, validation, "parallel.cp=2", *resumed)
    assert code == 0, said
    np.testing.assert_allclose(losses_of(moved), losses_of(whole)[2:], rtol=1e-5)
    constant = ("optimizer.lr=1e-30", "optimizer.min_lr=0", "train.eval_every=1", "train.patience=2")
    code, said, short = sft(1, "short", *constant, validation)
    assert code == 0, said
    assert [row["step"] for row in short] == [1, 2], "none is lower than that before the first step"
    code, said, again = sft(1, "short", *constant, validation)
    assert (code, losses_of(again)) == (0, losses_of(short)), "a run that has ended so stays ended"


def test_the_checkpoint_of_the_lowest_validation_loss_outlives_retention(sft, chats, tmp_path):
    validation = (f"sft.validation=[{{path: {chats / 'chats.jsonl'}}}]", "sft.num_answers=0", "train.eval_every=1")
    fixed = (*validation, "train.patience=2", "schedule={kind: constant}")
    fixed += ("checkpoint.keep_last=1", "checkpoint.save_every=null")
    assert sft(1, "run", *fixed, "train.num_steps=2")[0] == 0
    code, said, rows = sft(1, "run", *fixed, "train.num_steps=9", "optimizer.lr=1e-30", "optimizer.min_lr=0")
    assert code == 0, said
    assert [row["step"] for row in rows] == [1, 2, 3, 4], "with weights that stay, no validation is lower"
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["best", "latest", "step_00000002", "step_00000004"]
    assert (folder / "best").resolve().name == "step_00000002"
    code, said, _ = sft(1, "second", f"checkpoint.init_from={folder / 'best'}", "train.num_steps=1")
    assert code == 0, said
    other = ("optimizer.lr=1e-30", "optimizer.min_lr=0", "train.eval_num_samples=1")
    code, said, rows = sft(1, "run", *fixed, "train.num_steps=9", *other)
    assert code == 0, said
    assert [row["step"] for row in rows][4:] == [5, 6, 7], "losses of other samples say nothing of these"
    assert (folder / "best").resolve().name == "step_00000005"


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("sft.template=nowhere.jinja", "nowhere.jinja"),
        ("sft.template=llama3", "<\\|start_header_id\\|>"),
        ("sft.train=[{path: nowhere.jsonl}]", "nowhere.jsonl"),
        ("sft.template=null", "sft.template"),
    ],
)
def test_what_cannot_be_tokenised_is_one_sentence(sft, override, named):
    import re

    code, said, rows = sft(1, "refused", override)
    assert code == ExitCode.BAD_INPUT and not rows and "\n" not in said
    assert re.search(named, said), said


def test_bad_rows_are_refused_or_dropped_and_counted(sft, chats, tmp_path):
    source = tmp_path / "odd.jsonl"
    odd = [chat(1), {"messages": [{"role": "robot", "content": "x"}]}, chat(2), chat(3)]
    source.write_text("".join(json.dumps(one) + "\n" for one in odd))
    code, said, _ = sft(1, "refused", f"sft.train=[{{path: {source}}}]")
    assert code == ExitCode.BAD_INPUT and f"sft.train[0]: row 1 of {source}" in said and "robot" in said
    assert not list((tmp_path / "cache").glob("*/odd*")), "nothing of what is refused is kept"
    dropped = ("sft.bad_rows=drop", "train.num_steps=1", "train.global_batch_size=1", "train.micro_batch_size=1")
    assert sft(1, "kept", f"sft.train=[{{path: {source}}}]", *dropped)[0] == 0
    (cached,) = (tmp_path / "cache").glob("*/odd.meta.json")
    summary = read_summary(str(cached).removesuffix(".meta.json"))
    assert (summary.num_rows, summary.num_samples) == (4, 3) and list(summary.dropped.values()) == [1]
