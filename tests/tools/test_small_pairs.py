"""Pairs of small tasks: the chosen answer is right, the rejected one is not, and labels can be shuffled."""

from __future__ import annotations

import json
import random

from tools.make_small_tasks import main
from trainer.environments.small_tasks import draw_task, is_right


def test_of_a_pair_one_answer_is_right():
    source = random.Random(3)
    for task in (draw_task(source) for _ in range(2000)):
        assert is_right(task, task.worked) and not is_right(task, task.wrong)


def test_shuffled_labels_prefer_the_wrong_answer_in_half_of_what_is_trained(tmp_path):
    rows = {}
    for name, shuffle in (("pairs", []), ("shuffled", ["--shuffle-labels"])):
        assert main(["--tasks", "pairs", "--rows", "400", "--out", str(tmp_path / name), *shuffle]) == 0
        for part in ("train", "held_out"):
            text = (tmp_path / name / f"{part}.jsonl").read_text(encoding="utf-8")
            rows[name, part] = [json.loads(line) for line in text.splitlines()]
    assert rows["pairs", "held_out"] == rows["shuffled", "held_out"]
    pairs = list(zip(rows["pairs", "train"], rows["shuffled", "train"], strict=True))
    turned = sum(one["chosen"] == other["rejected"] and one["rejected"] == other["chosen"] for one, other in pairs)
    assert 150 < turned < 250 and all(one["prompt"] == other["prompt"] for one, other in pairs)
