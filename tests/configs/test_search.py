"""The search over layouts against brute force, and the published layouts in it."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from configs.load import load_config
from configs.plan.derive import derive_layout
from configs.plan.devices import find_device
from configs.plan.estimate import estimate_memory
from configs.plan.step_time import estimate_step
from configs.rules.check import check_config
from configs.search.candidates import MICRO_BATCHES, recomputations
from configs.search.search import Machine, search
from configs.stages import Config

RECIPES = Path(__file__).parents[2] / "configs" / "pretrain"
GPUS = 4


def machine(gpus: int, device: str = "h100") -> Machine:
    return Machine(find_device(device), gpus, min(gpus, 8), has_te=True, platform="cuda")


def small(moe: dict[str, object] | None) -> Config:
    model = {"num_layers": 4, "hidden_size": 256, "ffn_hidden_size": 512, "num_attention_heads": 4, "vocab_size": 1024}
    return Config.model_validate(
        {
            "model": model | {"moe": moe, "num_query_groups": 2},
            "train": {"num_steps": 1, "seq_len": 64, "global_batch_size": 8},
            "data": {"train": [{"path": "x"}]},
        }
    )


@pytest.mark.parametrize(
    "moe", [None, {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 256}], ids=["dense", "experts"]
)
def test_the_search_finds_what_trying_everything_finds(moe: dict[str, object] | None) -> None:
    config, sizes = small(moe), range(1, GPUS + 1)
    legal = set()
    for tp, pp, vpp, cp, ep in product(sizes, sizes, sizes, sizes, sizes if moe else (1,)):
        for etp, sp, vocabulary, rows in product((None, 1) if moe else (None,), (False, True), (False, True), sizes):
            wanted = {"tp": tp, "pp": pp, "vpp": vpp, "cp": cp, "ep": ep, "etp": etp, "sp": sp}
            parallel = config.parallel.model_copy(update=wanted | {"vocabulary_counts_as_layers": vocabulary})
            train = config.train.model_copy(update={"micro_batch_size": rows})
            one = config.model_copy(update={"parallel": parallel, "train": train})
            if rows in MICRO_BATCHES and not check_config(one, GPUS, platform="cuda", has_te=True):
                legal.add((tp, pp, vpp, cp, ep, etp or tp, sp, vocabulary, rows))
    found = search(config, machine(GPUS))
    seen = {
        (*(getattr(plan.layout, axis) for axis in ("tp", "pp", "vpp", "cp", "ep", "etp", "sp")),
         plan.config.parallel.vocabulary_counts_as_layers, plan.config.train.micro_batch_size)
        for plan in found.plans
    }  # fmt: skip
    assert {one for one in seen if one[-1] in sizes} == legal
    assert len(legal) > 20
    assert len(found.plans) == len(seen) * len(recomputations(config, has_te=True))


def test_every_plan_is_legal_and_its_figures_are_those_of_its_own_config() -> None:
    config, place = small(None), machine(GPUS)
    found = search(config, place)
    for plan in found.plans[::17]:
        assert check_config(plan.config, GPUS, platform="cuda", has_te=True) == []
        layout = derive_layout(plan.config, GPUS)
        assert plan.layout == layout
        assert plan.memory == estimate_memory(plan.config, layout)
        assert plan.step == estimate_step(plan.config, layout, place.device, place.gpus_per_node, has_te=True)
    assert [plan.step.total for plan in found.plans] == sorted(plan.step.total for plan in found.plans)


@pytest.mark.parametrize(
    ("recipe", "gpus", "device", "sizes"),
    [
        ("llama3_1_405b_fp8", 1024, "h100", {"tp": 8, "pp": 8, "vpp": 8, "cp": 2}),
        pytest.param("llama3_1_405b", 16384, "h100", {"tp": 8, "pp": 16, "cp": 1, "dp": 128}, marks=pytest.mark.slow),
        pytest.param("deepseek_v3", 2048, "h800", {"tp": 1, "pp": 16, "cp": 1, "ep": 64}, marks=pytest.mark.slow),
    ],
)
def test_published_layouts_fit_and_are_in_the_first_tenth(
    recipe: str, gpus: int, device: str, sizes: dict[str, int]
) -> None:
    found = search(load_config(str(RECIPES / f"{recipe}.yaml"), ()), machine(gpus, device))
    ranks = [
        rank
        for rank, plan in enumerate(found.plans, start=1)
        if all(getattr(plan.layout, axis) == size for axis, size in sizes.items())
    ]
    assert ranks and ranks[0] <= len(found.plans) / 10
