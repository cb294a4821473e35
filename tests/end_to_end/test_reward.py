"""Reward models from end to end: pairs train on any layout, a killed run goes on, exports score as `transformers`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.end_to_end.test_preference import NO_DATA, folder, pair
from tests.pool import RankFailed
from tests.tools.test_score_answers import run_tool

__all__ = ["folder"]  # the fixture


@pytest.fixture
def reward(folder, train, tmp_path):
    """Return a function that trains from seed weights: `reward(world, name, *overrides) -> (code, sentence, rows)`."""
    seed, tokenizer = tmp_path / "seed", f"data.tokenizer={folder / 'tokenizer'}"
    assert train(1, *NO_DATA, tokenizer, f"run.dir={seed}", "train.num_steps=0") == (0, "")
    fixed = (*NO_DATA, tokenizer, f"checkpoint.init_from={seed}", f"reward.cache={tmp_path / 'cache'}")
    fixed += ("reward.template=chatml", "train.global_batch_size=4", "train.eval_num_samples=100")

    def run(world: int, name: str, *overrides: str, data: Path | None = None, fault: str | None = None) -> tuple:
        source = f"[{{path: {data or folder / 'pairs.jsonl'}}}]"
        given = (f"reward.train={source}", f"reward.validation={source}", f"run.dir={tmp_path / name}")
        code, said = train(world, *fixed, *given, *overrides, stage="reward", fault=fault)
        metrics = tmp_path / name / "metrics.jsonl"
        return code, said, [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []

    return run


def scores_of_transformers(export: Path, cache: Path) -> np.ndarray:
    """Return the scores `[num_pairs, 2]` that the export gives to the answers of a cache, in batches of two rows."""
    import torch
    import transformers

    from trainer.data.indexed import TokenDataset

    model = transformers.AutoModelForSequenceClassification.from_pretrained(export, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(export)
    assert tokenizer.pad_token_id == model.config.pad_token_id is not None
    dataset, scores = TokenDataset(str(cache)), []
    for first in range(0, dataset.num_documents, 2):
        rows = []
        for document in (first, first + 1):
            length = int(dataset.lengths[document])
            ids, mask = dataset.read(document, 0, length), dataset.read_mask(document, 0, length)
            rows.append({"input_ids": ids[: int(np.flatnonzero(mask)[-1]) + 1].tolist()})
        with torch.no_grad():
            scores.append(model(**tokenizer.pad(rows, return_tensors="pt")).logits[:, 0].tolist())
    return np.array(scores)


def test_a_killed_run_goes_on_elsewhere_and_its_export_scores_as_it_does(reward, folder, tmp_path):
    rows = [pair(number) | {"margin": number % 3 / 2} for number in range(24)]
    data = tmp_path / "margins.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ("checkpoint.save_every=2", "checkpoint.export_hf=true", "reward.center_rewards_coefficient=0.01")
    code, said, whole = reward(1, "whole", *given, data=data)
    assert code == 0, said
    with pytest.raises(RankFailed):
        reward(2, "parts", *given, "parallel.tp=2", "checkpoint.keep_last=1", data=data, fault="killed_rename")
    code, said, parts = reward(2, "parts", *given, "parallel.pp=2", data=data)
    assert code == 0, said
    losses = {row["step"]: row["loss"] for row in parts}
    np.testing.assert_allclose(list(losses.values()), [row["loss"] for row in whole], rtol=1e-5)
    last = parts[-1]
    for figure in ("accuracy", "margin", "mean_reward", "min_reward", "max_reward"):
        assert figure in last and f"validation_{figure}/margins" in last
    assert last["validation_loss/margins"] < 0.1 < np.log(2) < whole[0]["loss"]
    (cached,) = (tmp_path / "cache").glob("*/margins.bin")
    export = tmp_path / "parts" / "checkpoints" / "step_00000006" / "hf"
    chosen, rejected = scores_of_transformers(export, cached.with_suffix("")).T
    margin = np.array([row["margin"] for row in rows])
    expected = {
        "loss": np.log1p(np.exp(rejected - chosen + margin)).mean(),
        "accuracy": (chosen > rejected).mean(),
        "margin": (chosen - rejected).mean(),
        "min_reward": min(chosen.min(), rejected.min()),
        "mean_reward": (chosen.mean() + rejected.mean()) / 2,
        "max_reward": max(chosen.max(), rejected.max()),
    }
    for figure, value in expected.items():
        assert last[f"validation_{figure}/margins"] == pytest.approx(value, abs=1e-5), figure
    # what was exported is a reward model to go on from, on another layout
    there = (f"checkpoint.init_from_hf={export}", "checkpoint.init_from=null", "train.num_steps=1")
    code, said, again = reward(2, "again", *there, "optimizer.lr=1e-9", "optimizer.min_lr=1e-9", data=data)
    assert code == 0, said
    assert again[-1]["validation_loss/margins"] == pytest.approx(expected["loss"], abs=1e-5)


def test_adapters_and_a_head_go_on_elsewhere_and_score_alike_however_they_are_read(reward, ranks, folder, tmp_path):
    from tools.convert_hf import main
    from trainer.checkpoint.tensors import CheckpointTensors

    assert main(["export", str(tmp_path / "seed"), str(tmp_path / "base")]) == 0
    base = (f"checkpoint.init_from_hf={tmp_path / 'base'}", "checkpoint.init_from=null")
    given = (*base, "lora={rank: 4, alpha: 16}", "train.num_steps=4", "checkpoint.save_every=2")
    code, said, whole = reward(1, "whole", *given)
    assert code == 0, said
    with pytest.raises(RankFailed):
        reward(2, "parts", *given, "parallel.tp=2", "checkpoint.keep_last=1", fault="killed_rename")
    code, said, parts = reward(2, "parts", *given, "parallel.pp=2")
    assert code == 0, said
    losses = {row["step"]: row["loss"] for row in parts}
    np.testing.assert_allclose(list(losses.values()), [row["loss"] for row in whole], rtol=1e-5)
    assert losses[4] < losses[1] - 0.1
    last = tmp_path / "parts" / "checkpoints" / "step_00000004"
    keys = CheckpointTensors(last).keys
    assert "output_layer.weight" in keys and all("lora." in key or "output_layer." in key for key in keys)
    # merged for transformers, and by our own tool
    assert main(["export", str(last), str(tmp_path / "hf")]) == 0
    (cached,) = (tmp_path / "cache").glob("*/pairs.bin")
    expected = scores_of_transformers(tmp_path / "hf", cached.with_suffix(""))
    accuracy, most = (expected[:, 0] > expected[:, 1]).mean(), np.abs(expected).max()
    assert parts[-1]["validation_accuracy/pairs"] == pytest.approx(accuracy)
    assert parts[-1]["validation_max_reward/pairs"] == pytest.approx(expected.max(), abs=1e-5 * most)
    argv = [str(tmp_path / "parts"), str(folder / "pairs.jsonl"), "--length", "64", "--out", str(tmp_path / "scored")]
    ((code, _, told),) = ranks.run(run_tool, argv, 0)
    assert code == 0, told
    scored = [json.loads(line) for line in (tmp_path / "scored").read_text().splitlines()]
    found = np.array([[row["chosen_reward"], row["rejected_reward"]] for row in scored])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * most)


BAD_ROWS = {
    "equal": ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are equal"),
    "empty": ({"prompt": "a", "chosen": "", "rejected": "b"}, "chosen is empty"),
    "margin": ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": True}, "margin is True; give a number"),
    "label": ({"prompt": "a", "completion": "b", "label": "good"}, "no preference in its columns"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_refused_before_anything_is_written(reward, folder, tmp_path, name):
    row, words = BAD_ROWS[name]
    file = tmp_path / "bad.jsonl"
    file.write_text((folder / "pairs.jsonl").read_text() + json.dumps(row) + "\n")
    code, said, _ = reward(1, "refused", data=file)
    assert code == 2 and said.startswith(f"reward.train[0]: row 24 of {file}: {words}"), said
    assert said.endswith("reward.bad_rows=drop") and not (tmp_path / "refused").exists()
