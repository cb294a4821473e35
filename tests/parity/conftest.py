"""The judge of parity: one seed checkpoint and one single-rank run per model and data, made when first asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.pool import RankPool
from tests.small_runs import RunRecord, run_from_seed, small_config, write_seed_checkpoint

TOLERANCE = 1e-5


class ParityJudge:
    """Runs a layout from the seed checkpoint and compares it with one rank."""

    def __init__(self, ranks: RankPool, folder: Path) -> None:
        self._ranks = ranks
        self._folder = folder
        self._seeds: dict[str, Path] = {}
        self._references: dict[str, RunRecord] = {}

    def seed(self, model: Mapping[str, Any]) -> Path:
        """Return the run directory with the seed checkpoint of this model."""
        key = json.dumps(model, sort_keys=True)
        if key not in self._seeds:
            run_dir = self._folder / f"seed_{len(self._seeds)}"
            self._ranks.run(write_seed_checkpoint, small_config(model=model), str(run_dir))
            self._seeds[key] = run_dir
        return self._seeds[key]

    def reference(self, masks: str = "all", **sections: Mapping[str, Any]) -> RunRecord:
        """Return the record of the single-rank run."""
        key = json.dumps([masks, sections], sort_keys=True)
        if key not in self._references:
            seed = self.seed(sections.get("model", {}))
            (record,) = self._ranks.run(run_from_seed, small_config(**sections), str(seed), masks)
            assert np.ptp(record.losses) > 0.01, "a run that does not move proves nothing"
            self._references[key] = record
        return self._references[key]

    def run(
        self,
        world: int,
        parallel: Mapping[str, Any],
        masks: str = "all",
        case: Callable[..., RunRecord] = run_from_seed,
        **sections: Mapping[str, Any],
    ) -> RunRecord:
        """Return the record of the run on a layout, after checking that all ranks agree."""
        seed = self.seed(sections.get("model", {}))
        config = small_config(world, parallel=parallel, **sections)
        records = self._ranks.run(case, config, str(seed), masks, world=world)
        for record in records[1:]:
            assert record.losses == records[0].losses and record.grad_norms == records[0].grad_norms
        return records[0]

    def check(
        self,
        world: int,
        parallel: Mapping[str, Any],
        masks: str = "all",
        train: Mapping[str, Any] | None = None,
        case: Callable[..., RunRecord] = run_from_seed,
        **sections: Mapping[str, Any],
    ) -> None:
        """Run the layout and require one rank's losses, gradient norms, token counts and trained weights.

        `train` and `case` change the run but not the single rank it is compared with.
        """
        run = self.run(world, parallel, masks, case, **sections | ({"train": train} if train else {}))
        assert_equal_runs(run, self.reference(masks, **sections))


def assert_equal_runs(run: RunRecord, reference: RunRecord, tolerance: float = TOLERANCE) -> None:
    """Require equal runs: figures within the relative tolerance, and logits within it of the largest logit."""
    assert run.num_tokens == reference.num_tokens
    np.testing.assert_allclose(run.losses, reference.losses, rtol=tolerance)
    np.testing.assert_allclose(run.grad_norms, reference.grad_norms, rtol=tolerance)
    # Adam divides by the gradient's size, so rounding in a tiny gradient moves its weight by a visible part of lr.
    atol = 10 * tolerance * float(np.abs(reference.logits).max())
    np.testing.assert_allclose(run.logits, reference.logits, rtol=0, atol=atol)


@pytest.fixture(scope="session")
def judge(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> ParityJudge:
    return ParityJudge(ranks, tmp_path_factory.mktemp("parity"))
