"""The order of what happens around a step."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from tests.pool import Place
from tests.small_runs import small_config


class Recorder:
    """Stands for the writer of checkpoints and the reporter: notes what is called."""

    def __init__(self, calls: list[str], owner: str, **attributes: Any) -> None:
        self._calls, self._owner = calls, owner
        vars(self).update(attributes)

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **options: self._calls.append(f"{self._owner}.{name}")


def make_hooks(calls: list[str], **sections: Any) -> Any:
    from trainer.run import hooks

    platform = SimpleNamespace(peak_memory_bytes=lambda: 0)
    signals = SimpleNamespace(is_received=False, is_agreed=False)
    writer = Recorder(calls, "checkpoints", is_writing=False)
    return hooks.Hooks(
        small_config(**sections), SimpleNamespace(platform=platform, device=None), SimpleNamespace(),
        reporter=Recorder(calls, "reporter"), checkpoints=writer, signals=signals, lock=Recorder(calls, "lock"),
        stragglers=SimpleNamespace(after_step=lambda step: {}), models={},
    )  # fmt: skip


def words_at_a_start(place: Place, num_stale_validations: int) -> list[str]:
    """Return what is said where a run with a patience of 2 goes on after step 3."""
    from unittest.mock import patch

    from trainer.run import hooks

    train, data = {"eval_every": 1, "patience": 2}, {"validation": [{"path": "held-out"}]}
    made = make_hooks([], train=train, data=data)
    with patch.object(hooks, "log") as log, patch.object(hooks, "max_over_ranks", lambda values, device: list(values)):
        made.on_start(SimpleNamespace(step=3, num_stale_validations=num_stale_validations))
    return [call.args[0] % call.args[1:] for call in log.info.call_args_list]


def test_a_run_that_patience_has_ended_says_so_and_begins_no_step(ranks):
    assert ranks.run(words_at_a_start, 1) == [["step 4 is under way, the first of this start"]]
    assert ranks.run(words_at_a_start, 2) == [["step 3: train.patience has ended this run; a larger one lets it go on"]]


def calls_after_a_validation(
    place: Place, losses: list[float], patience: int | None, run_dir: str = "runs/x"
) -> list[list[str]]:
    """Return what is called of the checkpoints after each of some steps with a validation, and what is said in the end.

    No checkpoint is due at any of them.
    """
    from unittest.mock import patch

    from trainer.engine.state import TrainState
    from trainer.run import hooks

    calls: list[str] = []
    train, data = {"eval_every": 1, "patience": patience}, {"validation": [{"path": "held-out"}]}
    made = make_hooks(calls, train=train | {"num_steps": 9}, data=data, run={"dir": run_dir})
    found, state = [], TrainState().after_validation(2.0)
    with patch.object(hooks, "log") as log, patch.object(hooks, "max_over_ranks", lambda values, device: list(values)):
        for step, loss in enumerate(losses, start=1):
            evaluation = SimpleNamespace(values={"validation_loss/held-out": loss}, answers=())
            made._stage.evaluate = lambda evaluation=evaluation: evaluation
            state = made.after_step(replace(state, step=step), SimpleNamespace(is_applied=True))
            found.append([call for call in calls if call == "checkpoints.save"])
            calls.clear()
        made.on_end(state)
    said = [call.args[0] % call.args[1:] for call in log.info.call_args_list]
    return [*found, [sentence for sentence in said if sentence.startswith("lowest")]]


def test_with_patience_the_weights_of_the_lowest_validation_loss_are_saved_and_named(ranks, tmp_path):
    told = "lowest validation loss {} after step {}, whose weights are {}"
    checkpoint, best = tmp_path / "checkpoints" / "step_00000002", tmp_path / "checkpoints" / "best"
    checkpoint.mkdir(parents=True)
    (checkpoint / "checkpoint.json").touch()
    best.symlink_to(checkpoint.name)
    kept = told.format("1.0000", 2, f"kept as {best}")
    saved = ["checkpoints.save"]
    assert ranks.run(calls_after_a_validation, [1.5, 1.0, 1.0], 3, str(tmp_path)) == [[saved, saved, [], [kept]]]
    gone = told.format("1.0000", 1, "no longer there: its checkpoint was not kept")
    assert ranks.run(calls_after_a_validation, [1.0, 1.0], 3, str(tmp_path)) == [[saved, [], [gone]]]
    begun = told.format("2.0000", 0, "those that the run began with")
    assert ranks.run(calls_after_a_validation, [2.5], 3) == [[[], [begun]]]
    assert ranks.run(calls_after_a_validation, [1.5], None) == [[[], []]]


def calls_after_a_step(place: Place, async_save: bool) -> list[str]:
    """Return what is called after a step at which the run saves."""
    from trainer.run import hooks

    calls: list[str] = []
    made = make_hooks(calls, checkpoint={"save_every": 2, "async_save": async_save})
    plain, hooks.max_over_ranks = hooks.max_over_ranks, lambda values, device: [float(value) for value in values]
    try:
        made.after_step(SimpleNamespace(step=2, num_nonfinite_in_a_row=0), SimpleNamespace(is_applied=True))
    finally:
        hooks.max_over_ranks = plain
    return calls


@pytest.mark.parametrize("async_save", [True, False])
def test_the_row_of_a_step_is_written_before_its_checkpoint_is_visible(ranks, async_save):
    """A run killed in between would continue after the step and never have its row."""
    expected = ["lock.check", "checkpoints.publish_if_written", "checkpoints.save", "reporter.write"]
    assert ranks.run(calls_after_a_step, async_save) == [expected + ["checkpoints.finish"] * (not async_save)]
