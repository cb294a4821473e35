"""Rules of FP8: what no machine can run, what this machine lacks, which backend is chosen."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.fp8 import resolve_backend, uses_te_layers
from configs.load import load_config
from configs.rules.check import check_config
from configs.rules.fp8 import check_backend
from configs.sections.precision import Fp8Config
from configs.stages import Config

TINY = Path(__file__).parents[2] / "configs" / "models" / "tiny.yaml"
RUN = ["data.train=[{path: a}]", "train.num_steps=100", "train.seq_len=64", "train.global_batch_size=16"]


def config_of(overrides: list[str]) -> Config:
    return load_config(str(TINY), [*RUN, *overrides])


FP8_RULES = [
    (["precision.fp8={recipe: delayed}", "precision.compute=fp16"], 1, "precision.compute: FP8 with fp16"),
    (
        ["precision.fp8={recipe: mxfp8, backend: torch}"],
        1,
        "precision.fp8.backend: torch does not run the recipe mxfp8",
    ),
    (["precision.fp8={recipe: rowwise, backend: te}"], 1, "precision.fp8.backend: te does not run the recipe rowwise"),
    (
        ["precision.fp8={recipe: tensorwise, num_first_layers_kept: 2, num_last_layers_kept: 2}"],
        1,
        "precision.fp8.num_first_layers_kept: with num_last_layers_kept 4 layers stay out of FP8",
    ),
    (
        ["precision.fp8={recipe: delayed, backend: te, num_last_layers_kept: 1}"],
        1,
        "precision.fp8.num_first_layers_kept: Transformer Engine's delayed scaling keeps no layer",
    ),
    (
        ["precision.fp8={recipe: tensorwise, backend: torch, param_gather: true}"],
        1,
        "precision.fp8.param_gather: needs",
    ),
    (["precision.fp8={recipe: rowwise, param_gather: true}"], 1, "precision.fp8.param_gather: needs"),
    (
        ["precision.fp8={recipe: tensorwise}", "model.hidden_size=72", "model.head_dim=16"],
        1,
        "model.hidden_size: 72 can",
    ),
    (["precision.fp8={recipe: mxfp8, backend: te}", "model.ffn_hidden_size=100"], 1, "model.ffn_hidden_size: 100 can"),
    (["precision.fp8={recipe: tensorwise, amax_history_len: 2}"], 1, "precision.fp8.amax_history_len: has no effect"),
    (
        ["precision.fp8={recipe: blockwise, backend: emulated}", "parallel.tp=2", "model.ffn_hidden_size=384"],
        2,
        "model.ffn_hidden_size: 384 split over parallel.tp=2 is 192, which cannot be divided in blocks of 128; a value "
        "that would work: 512, or parallel.tp=1",
    ),
    (
        ["precision.fp8={recipe: tensorwise}", "model.ffn_hidden_size=500"],
        1,
        "model.ffn_hidden_size: 500 cannot be divided by 16",
    ),
]


@pytest.mark.parametrize(("overrides", "world_size", "start"), FP8_RULES)
def test_each_rule_gives_its_sentence(overrides: list[str], world_size: int, start: str) -> None:
    problems = check_config(config_of(overrides), world_size, platform="cuda", has_te=False)
    assert any(problem.startswith(start) for problem in problems), problems
    assert all("\n" not in problem and ";" in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("fp8", "platform", "has_te", "start"),
    [
        (
            "{recipe: delayed, num_last_layers_kept: 1}",
            "cuda",
            True,
            "precision.fp8.num_first_layers_kept: Transformer",
        ),
        (
            "{recipe: delayed, param_gather: true}",
            "cuda",
            False,
            "precision.fp8.param_gather: needs precision.fp8.back",
        ),
        ("{recipe: delayed}", "cpu", True, "precision.fp8.backend: auto needs a GPU"),
        ("{recipe: delayed, backend: torch}", "cpu", False, "precision.fp8.backend: torch needs a GPU"),
        ("{recipe: blockwise, backend: te}", "cuda", False, "precision.fp8.backend: te needs Transformer Engine"),
        ("{recipe: mxfp8}", "cuda", False, "precision.fp8.backend: mxfp8 needs Transformer Engine"),
    ],
)
def test_what_a_machine_lacks_for_fp8_is_said(fp8: str, platform: str, has_te: bool, start: str) -> None:
    config = config_of([f"precision.fp8={fp8}", "model.ffn_hidden_size=704"])
    (problem,) = check_backend(config.precision.fp8, platform=platform, has_te=has_te)
    assert problem.startswith(start) and "a value that would work" in problem
    assert check_config(config, 1, platform=platform, has_te=has_te) == [], "a plan for another machine may name it"


def test_backends_are_chosen_by_what_is_there() -> None:
    def backend(recipe: str, has_te: bool) -> str:
        return resolve_backend(Fp8Config(recipe=recipe), has_te=has_te)

    assert [backend("delayed", True), backend("delayed", False), backend("rowwise", True)] == ["te", "torch", "torch"]
    config = config_of(["precision.fp8={recipe: rowwise}"])
    assert not uses_te_layers(config, has_te=True)
