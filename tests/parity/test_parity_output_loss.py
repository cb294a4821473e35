"""Logits made piece by piece give the losses, gradients and weights of logits made at once."""

from __future__ import annotations

from typing import Any

import pytest

from configs.stages import Config
from tests.pool import Place
from tests.small_runs import RunRecord, run_from_seed


def run_in_pieces(place: Place, config: Config, run_dir: str, masks: str = "all") -> RunRecord:
    """Run with pieces of some ten tokens and require that they were made."""
    from configs.plan import logits

    largest, calls = logits.LARGEST_PIECE_BYTES, []
    logits.LARGEST_PIECE_BYTES = 8192 // config.parallel.tp

    def count(*args: Any) -> int:
        calls.append(num_pieces(*args))
        return calls[-1]

    from trainer.model import output_loss

    num_pieces, output_loss.num_logit_pieces = output_loss.num_logit_pieces, count
    try:
        record = run_from_seed(place, config, run_dir, masks)
    finally:
        logits.LARGEST_PIECE_BYTES, output_loss.num_logit_pieces = largest, num_pieces
    last_stage = place.rank >= place.world_size * (config.parallel.pp - 1) // config.parallel.pp
    assert all(number > 3 for number in calls) and bool(calls) == last_stage
    return record


LAYOUTS = {
    "one": (1, {}),
    "tp2": (2, {"tp": 2}),
    "tp2_sp": (2, {"tp": 2, "sp": True}),
    "pp2": (2, {"pp": 2}),
    "cp2": (2, {"cp": 2}),
    "cp2_tp2_sp": (4, {"cp": 2, "tp": 2, "sp": True}),
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_pieces_equal_the_whole(judge, name, tied):
    judge.check(*LAYOUTS[name], masks="uneven", case=run_in_pieces, model={"tie_embeddings": tied})


def test_pieces_of_documents_equal_the_whole(judge):
    judge.check(1, {}, masks="documents", case=run_in_pieces, data={"document_mask": True})
