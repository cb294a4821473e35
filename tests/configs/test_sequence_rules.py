"""Rules of the length of samples: what is advised breaks no other rule."""

from __future__ import annotations

import pytest

from configs.stages import Config, SftConfig
from tests.configs.test_check import DENSE, problems_of


@pytest.mark.parametrize(
    ("seq_len", "longest", "works"),
    [
        (130, 128, "128, or 132 with model.max_position_embeddings=132"),
        (127, 127, "124"),
        (128, 126, "124, or 128 with model.max_position_embeddings=128"),
        (3, 128, "4"),
        (3, 3, "4 with model.max_position_embeddings=4"),
    ],
)
def test_a_length_that_is_advised_breaks_no_other_rule(seq_len: int, longest: int, works: str) -> None:
    overrides = [*DENSE, "parallel.cp=2"]
    (problem,) = problems_of([*overrides, f"train.seq_len={seq_len}", f"model.max_position_embeddings={longest}"], 2)
    assert problem.endswith(f"; a value that would work: {works}")
    for advice in works.split(", or "):
        length, *longer = advice.split(" with ")
        words = longer or [f"model.max_position_embeddings={longest}"]
        assert problems_of([*overrides, f"train.seq_len={length}", *words], 2) == []


def test_the_setting_that_packs_samples_is_named_by_stage() -> None:
    assert Config.model_construct().packing_setting("concat") == ("data.packing", "concat")
    for packing, value in (("best_fit", "true"), ("padded", "false")):
        assert SftConfig.model_construct().packing_setting(packing) == ("sft.packing", value)
