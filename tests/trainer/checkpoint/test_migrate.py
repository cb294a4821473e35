"""Checkpoints of other versions: an old one goes on where it stopped, unknown fields are one sentence."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.errors import BadInput
from configs.load import load_config, resolved_dict
from tests.pool import Place
from trainer.checkpoint import migrate
from trainer.checkpoint.manifest import check_architecture, read_manifest

# What that version went on to compute for its steps 3 and 4.
OLD_LOSSES = [3.926421642303467, 3.9011682271957397]
OLD_GRAD_NORMS = [0.6875035112464712, 0.6802670430603815]


def resume_old_run(place: Place, folder: str) -> list[dict[str, Any]]:
    """Train on as the command line does, in the old run's directory, and return the metrics of all steps.

    That version let norms and biases decay too, which was wrong, and is done here alone.
    """
    from unittest.mock import patch

    from trainer.engine import engine

    def let_all_decay(optimizer: Any, learning_rate: float, weight_decay: float) -> None:
        for group in optimizer.param_groups:
            group |= {"lr": learning_rate, "weight_decay": weight_decay}

    from parallel.environment import Environment
    from trainer.report.log import start_console
    from trainer.run.run import run

    before = os.getcwd()
    os.chdir(folder)
    try:
        start_console(place.rank)
        environment = Environment(rank=0, world_size=1, master_port=0)
        with patch.dict(os.environ, environment.as_variables()), patch.object(engine, "set_rates", let_all_decay):
            assert run(load_config("tiny.yaml"), "pretrain", environment, "cpu") == 0
        return [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    finally:
        os.chdir(before)


def test_a_run_of_60ed303_goes_on_where_it_stopped(ranks, old_run):
    steps = ranks.run(resume_old_run, str(old_run))[0]
    assert [step["step"] for step in steps] == [3, 4]
    assert [step["loss"] for step in steps] == pytest.approx(OLD_LOSSES, rel=1e-6)
    assert [step["grad_norm"] for step in steps] == pytest.approx(OLD_GRAD_NORMS, rel=1e-6)


@pytest.fixture
def checkpoint(old_run: Path) -> Path:
    return old_run / "run" / "checkpoints" / "step_00000002"


@pytest.fixture
def edited(checkpoint: Path) -> Callable[[Callable[[dict[str, Any]], Any]], Path]:
    """Return a function that changes the manifest and returns the checkpoint."""

    def edit(change: Callable[[dict[str, Any]], Any]) -> Path:
        path = checkpoint / "checkpoint.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
        return checkpoint

    return edit


def drop_new_fields(content: dict[str, Any]) -> None:
    """Take away fields that exist today, as if they had been added since: of a model, a nested section, a whole one."""
    for name in ("window_size", "window_pattern", "attention_sinks"):
        content["config"]["model"].pop(name, None)
    del content["config"]["model"]["qk_norm"], content["config"]["model"]["rope"]["interleaved"]
    del content["config"]["log"], content["config"]["precision"]["fp8"]
    del content["state"]["num_nonfinite_in_a_row"]


def test_missing_fields_are_their_defaults(old_run, edited):
    whole = read_manifest(edited(lambda content: None))
    path = edited(drop_new_fields)
    manifest = read_manifest(path)
    assert manifest.state == whole.state
    assert manifest.config == {**whole.config, "log": manifest.config["log"]}
    model = resolved_dict(load_config(str(old_run / "tiny.yaml")))["model"]
    check_architecture(manifest, model, path, is_warm_start=False)
    with pytest.raises(BadInput, match=r"model\.qk_norm is False there and True here; use"):
        check_architecture(manifest, model | {"qk_norm": True}, path, is_warm_start=False)
    changed = model | {"rope": model["rope"] | {"interleaved": True}}
    with pytest.raises(BadInput, match=r"model\.rope\.interleaved is False there and True here; use"):
        check_architecture(manifest, changed, path, is_warm_start=False)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda content: content["config"].update(reward={"scale": 8}), "config.reward"),
        (lambda content: content["config"]["model"].update(of_the_future=7), "config.model.of_the_future"),
        (lambda content: content["config"]["data"]["train"][0].update(part="a"), "config.data.train[0].part"),
        (lambda content: content["state"].update(num_rollouts=1), "state.num_rollouts"),
        (lambda content: content.update(parts=["reward"]), "parts"),
    ],
)
def test_fields_of_another_version_are_named_in_one_sentence(edited, change, name):
    path = edited(change)
    with pytest.raises(BadInput) as refused:
        read_manifest(path)
    sentence = str(refused.value)
    assert f"is unreadable to this version, which does not know {name}; use the version" in sentence
    assert "\n" not in sentence and sentence.startswith(str(path))


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["config"]["model"].update(num_layers="many"),
        lambda content: content["config"].update(model=None),
        lambda content: content.update(config=[1]),
        lambda content: content.update(state=None),
        lambda content: content.update(stage="pretrain"),
        lambda content: content.update(format_version="new"),
        lambda content: content.pop("files"),
    ],
)
def test_values_of_the_wrong_kind_are_one_sentence(edited, change):
    with pytest.raises(BadInput, match=r"checkpoint\.json: unreadable \(.*; there is no other checkpoint") as refused:
        read_manifest(edited(change))
    assert "\n" not in str(refused.value)


def test_renamed_fields_are_found_under_their_new_names(edited, monkeypatch):
    monkeypatch.setattr(
        migrate,
        "RENAMED_AFTER",
        {0: {"model.norm": "model.never"}, 1: {"train.width": "model.hidden_size", "old.epsilon": "model.norm_eps"}},
    )

    def with_old_names(content: dict[str, Any]) -> None:
        content["config"]["train"]["width"] = content["config"]["model"].pop("hidden_size")
        content["config"]["old"] = {"epsilon": content["config"]["model"].pop("norm_eps")}

    whole = read_manifest(edited(lambda content: None))
    assert read_manifest(edited(with_old_names)).config == whole.config


def test_padding_of_the_vocabulary_is_no_architecture(checkpoint, old_run):
    model = resolved_dict(load_config(str(old_run / "tiny.yaml"), ["model.vocab_pad_multiple=1"]))["model"]
    for is_warm_start in (False, True):
        check_architecture(read_manifest(checkpoint), model, checkpoint, is_warm_start=is_warm_start)


@pytest.mark.parametrize(
    "fields", ["model.window_size=8 model.window_pattern=[true,false]", "model.attention_sinks=true"]
)
def test_windows_may_begin_with_a_new_stage_and_sinks_may_not(checkpoint, old_run, fields):
    """That version had neither; a window shapes no weight."""
    manifest = read_manifest(checkpoint)
    model = resolved_dict(load_config(str(old_run / "tiny.yaml"), fields.split()))["model"]
    with pytest.raises(BadInput, match=fields.split("=")[0]):
        check_architecture(manifest, model, checkpoint, is_warm_start=False)
    if "window" in fields:
        check_architecture(manifest, model, checkpoint, is_warm_start=True)
    else:
        with pytest.raises(BadInput, match="model.attention_sinks is False there and True here"):
            check_architecture(manifest, model, checkpoint, is_warm_start=True)
