"""Distillation from end to end: teachers live and cached, own answers, resumption on other layouts, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from configs.sections.checkpoint import CheckpointConfig
from configs.sections.optimizer import OptimizerConfig
from configs.sections.train import TrainConfig
from tests.end_to_end.conftest import write_text
from tests.pool import RankFailed
from tools.train_tokenizer import train_tokenizer

DEFAULT, SAMPLES = CheckpointConfig(), TrainConfig.model_fields["eval_num_samples"].default
NO_DATA = ("data.train=[]", "data.validation=[]", "model.vocab_size=320", "train.seq_len=64", "schedule.kind=constant")
# of what a cache does not read
BACK_TO_DEFAULTS = (
    "train.num_steps=0", "schedule.kind=cosine", f"optimizer.lr={OptimizerConfig().lr}",
    f"optimizer.min_lr={OptimizerConfig().min_lr}", f"train.eval_num_samples={SAMPLES}",
    f"checkpoint.save_every={DEFAULT.save_every or 'null'}", f"checkpoint.keep_last={DEFAULT.keep_last or 'null'}",
)  # fmt: skip
ROLLOUT = ("rollout.max_new_tokens=8", "distill.lmbda=0.6")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a folder with `tokenizer`, `chats.jsonl` and `others.jsonl`."""
    folder = tmp_path_factory.mktemp("chats")
    special = ("<|im_start|>", "<|im_end|>")
    for name, size in (("tokenizer", 320), ("other_tokenizer", 300)):
        train_tokenizer([write_text(folder / "text.jsonl", 0, 300)], str(folder / name), size, special_tokens=special)
    for name, first in (("chats", 0), ("others", 50)):
        rows = [{"prompt": str(number), "completion": f"return {number + 1}"} for number in range(first, first + 24)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def distill(folder, train, tmp_path):
    """Return a function that distils a deeper seed: `distill(world, name, *overrides) -> (code, sentence, rows)`."""
    tokenizer = f"data.tokenizer={folder / 'tokenizer'}"
    fixed = (*NO_DATA, tokenizer, f"sft.cache={tmp_path / 'sft_cache'}", "sft.template=chatml")
    source = f"[{{path: {folder / 'chats.jsonl'}}}]"
    fixed += ("train.global_batch_size=4", f"sft.train={source}", f"sft.validation={source}")

    def run(
        world: int, name: str, *overrides: str, stage: str = "distill", fault: str | None = None
    ) -> tuple[int, str, list[dict]]:
        code, said = train(world, *fixed, f"run.dir={tmp_path / name}", *overrides, stage=stage, fault=fault)
        metrics = tmp_path / name / "metrics.jsonl"
        return code, said, [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []

    deep = ("model.num_layers=4", "model.init_std=0.3", "run.seed=5", "train.num_steps=0")
    assert train(1, *NO_DATA, tokenizer, f"run.dir={tmp_path / 'teacher'}", *deep) == (0, "")
    return run


def losses_of(rows: list[dict]) -> list[float]:
    return [row["loss"] for row in rows]


def test_a_student_that_is_killed_goes_on_to_near_its_teacher_on_another_layout(distill, tmp_path):
    given = (
        f"distill.teacher={tmp_path / 'teacher'}",
        "checkpoint.save_every=2",
        *ROLLOUT,
        "optimizer.lr=0.02",
        "run.seed=1",
    )
    code, said, whole = distill(1, "whole", *given, "train.num_steps=8")
    assert code == 0, said
    with pytest.raises(RankFailed):  # by kill -9, while step 4 is saved
        distill(1, "parts", *given, "train.num_steps=8", fault="killed_rename")
    code, said, parts = distill(
        2, "parts", *given, "train.num_steps=8", "parallel.pp=2", "parallel.offload_models=true"
    )
    assert code == 0, said
    np.testing.assert_allclose(losses_of(parts), losses_of(whole), rtol=1e-4)
    assert whole[-1]["validation_kl/chats"] < 0.9 * whole[0]["divergence"]
    assert "validation_exact_answers/chats" in whole[-1] and whole[-1]["validation_cross_entropy/chats"] > 0
    written = [{path.name for path in (tmp_path / name / "rollouts").iterdir()} for name in ("whole", "parts")]
    assert written[0] == written[1] and 2 < len(written[0]) < 8


def test_a_cache_teaches_as_its_teacher_does(distill, folder, tmp_path):
    cache, place = tmp_path / "cache", tmp_path / "teacher"
    writing = (f"checkpoint.init_from={place}", "model.num_layers=4", f"distill.cache={cache}", "distill.top_k=12")
    writing += BACK_TO_DEFAULTS
    code, said, _ = distill(2, "writes", *writing, "parallel.pp=2", stage="teacher_cache")
    assert code == 0, said
    code, said, live = distill(1, "live", f"distill.teacher={place}", "distill.top_k=12", "distill.beta=0.5")
    assert code == 0, said
    code, said, cached = distill(2, "cached", f"distill.cache={cache}", "distill.beta=0.5")
    assert code == 0, said
    np.testing.assert_allclose(losses_of(cached), losses_of(live), rtol=1e-5)
    for name, value in live[-1].items():
        if name.startswith("validation"):
            assert cached[-1][name] == pytest.approx(value, rel=1e-4), name

    others = f"sft.train=[{{path: {folder / 'others.jsonl'}}}]"
    refusals = {
        "distill.temperature: 2, and distill.cache": ("distill.temperature=2.0",),
        "train.seq_len: 48, and distill.cache": ("train.seq_len=48",),
        f"sft.train: {folder / 'others.jsonl'}, as it is now": (others,),
        f"distill.cache: {place} is no cache of a teacher": (f"distill.cache={place}",),
    }
    for words, overrides in refusals.items():
        code, said, rows = distill(1, "refused", f"distill.cache={cache}", *overrides)
        assert code == 2 and said.startswith(words), said
        assert not rows and not (tmp_path / "refused").exists()
    for field in ("distill.teacher", "checkpoint.init_from", "checkpoint.resume"):  # before anything is tokenised
        words = (f"sft.cache={tmp_path / 'unused'}", f"distill.teacher={place}", f"{field}={tmp_path / 'nowhere'}")
        code, said, _ = distill(1, "refused", *words)
        assert code == 2 and said.startswith(f"{field}: ") and not (tmp_path / "unused").exists(), said
    code, said, _ = distill(1, "again", *writing, stage="teacher_cache")  # as of a job that is queued again
    assert code == 0 and said == "", said
    code, said, _ = distill(1, "again", *writing, "distill.top_k=11", stage="teacher_cache")
    assert code == 2 and said.startswith(f"distill.cache: {cache}: is not empty"), said
    with next(cache.glob("*.records")).open("ab") as records:
        records.write(b" " * (8 * 12 + 4))
    code, said, _ = distill(1, "refused", f"distill.cache={cache}")
    assert code == 2 and said.startswith(f"distill.cache: {cache} is damaged, it has "), said
    code, said, _ = distill(1, "again", *writing, stage="teacher_cache")
    assert code == 2 and said.startswith(f"distill.cache: {cache} is damaged, it has "), said


def test_a_teacher_of_other_tokens_is_refused(distill, folder, train, tmp_path):
    other = (f"data.tokenizer={folder / 'other_tokenizer'}", f"run.dir={tmp_path / 'stranger'}", "train.num_steps=0")
    assert train(1, *NO_DATA, *other) == (0, "")
    code, said, _ = distill(1, "refused", f"distill.teacher={tmp_path / 'stranger'}")
    assert code == 2 and said.startswith("distill.teacher: ") and "tokenizer" in said, said
    assert not (tmp_path / "refused").exists()


def test_text_teaches_too_in_packed_rows_and_in_windows(train, corpus, tmp_path):
    teacher = tmp_path / "teacher"
    assert train(1, "model.num_layers=4", "run.seed=5", f"run.dir={teacher}", "train.num_steps=0") == (0, "")
    fixed = (f"distill.teacher={teacher}", "optimizer.lr=0.02")
    assert train(2, *fixed, f"run.dir={tmp_path / 'windows'}", "parallel.cp=2", stage="distill")[0] == 0
    packed = ("data.packing=best_fit", "data.document_mask=true", f"run.dir={tmp_path / 'packed'}")
    assert train(2, *fixed, *packed, "distill.top_k=9", "parallel.tp=2", stage="distill")[0] == 0
    for name in ("windows", "packed"):
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert rows[-1]["validation_kl/validation"] < 0.9 * rows[0]["divergence"]
