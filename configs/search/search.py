"""Judges every layout of a config: by the rules, by memory, by predicted time. Torch-free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from configs.fp8 import uses_te_layers
from configs.plan.derive import Layout, derive_layout
from configs.plan.devices import Device
from configs.plan.estimate import MemoryEstimate, parameters_of_stages
from configs.plan.others import Others, estimate_together
from configs.plan.step_time import StepModel, StepTime
from configs.rules.check import check_config
from configs.rules.layout import check_layout
from configs.search.candidates import MICRO_BATCHES, layouts, recomputations
from configs.sections.parallel import ParallelConfig
from configs.sections.train import RecomputeConfig, TrainConfig
from configs.stages import Config

RESERVE = 0.05
"""Of a device's memory: CUDA's context, NCCL's buffers, fragmentation, temporary buffers."""


@dataclass(frozen=True)
class Machine:
    """What the run is planned for."""

    device: Device
    gpus: int
    gpus_per_node: int
    has_te: bool
    platform: Literal["cpu", "cuda"]

    @property
    def usable_bytes(self) -> float:
        return self.device.memory_bytes * (1 - RESERVE)


@dataclass(frozen=True)
class Plan:
    """A legal layout: the whole config with it, the fullest rank's memory, and the time of a step."""

    config: Config
    layout: Layout
    memory: MemoryEstimate
    step: StepTime


@dataclass(frozen=True)
class Large:
    """A legal layout that does not fit."""

    config: Config
    layout: Layout
    memory: MemoryEstimate


@dataclass
class Found:
    """What became of all layouts."""

    plans: list[Plan] = field(default_factory=list)
    """Those that fit, fastest first."""
    too_large: list[Large] = field(default_factory=list)
    """Legal, but more than the memory, the smallest first; where a layout's smallest is, its others are not judged."""
    refused: Counter[str] = field(default_factory=Counter)
    """Layouts that break a rule, by the field that the first broken rule names."""
    examples: dict[str, str] = field(default_factory=dict)
    """Of each such field, one sentence."""


def search(
    config: Config,
    machine: Machine,
    is_wanted: Callable[[ParallelConfig], bool] = lambda _: True,
    others: Others = MappingProxyType({}),
) -> Found:
    """Judge every layout that `is_wanted`, also by the `others`, the models beside the policy.

    Layouts that break a rule are counted once, whatever their microbatch and recomputation.
    """
    found = Found()
    options = recomputations(config, has_te=uses_te_layers(config, has_te=machine.has_te))
    for parallel in layouts(config, machine.gpus, machine.gpus_per_node):
        if not is_wanted(parallel):
            continue
        train = _train(config, micro_batch_size=1, recompute=options[0])
        one = config.model_copy(update={"parallel": parallel, "train": train})
        problems = check_config(one, machine.gpus, platform=machine.platform, has_te=machine.has_te)
        problems += _check_others(one, machine, others)
        if problems:
            name = problems[0].split(":")[0]
            found.refused[name] += 1
            found.examples.setdefault(name, problems[0])
            continue
        layout = derive_layout(one, machine.gpus)
        smallest = one.model_copy(update={"train": _train(one, recompute=options[-1])})
        memory = estimate_together(smallest, layout, others)
        if memory.total > machine.usable_bytes:
            found.too_large.append(Large(smallest, layout, memory))
            continue
        _judge_variants(one, layout, machine, options, found, others)
    found.plans.sort(key=lambda plan: plan.step.total)
    found.too_large.sort(key=lambda plan: plan.memory.total)
    return found


def _check_others(config: Config, machine: Machine, others: Others) -> list[str]:
    """Return every rule of the layout that a model beside the policy breaks, one sentence each, after its role."""
    return [
        f"{role}: {problem}"
        for role, other in others.items()
        for problem in check_layout(
            other.on_layout(config), machine.gpus, platform=machine.platform, has_te=machine.has_te
        )
    ]


def _judge_variants(
    config: Config,
    layout: Layout,
    machine: Machine,
    options: Sequence[RecomputeConfig],
    found: Found,
    others: Others,
) -> None:
    """Judge a legal layout with every microbatch and recomputation."""
    use_te = uses_te_layers(config, has_te=machine.has_te)
    parameters = parameters_of_stages(config, layout)
    for size in MICRO_BATCHES:
        train = _train(config, micro_batch_size=size)
        sized = config.model_copy(update={"train": train})
        if size > 1 and check_layout(sized, machine.gpus, platform=machine.platform, has_te=use_te):
            continue
        model = None
        for recompute in options:
            one = config.model_copy(update={"train": train.model_copy(update={"recompute": recompute})})
            memory = estimate_together(one, layout, others, parameters)
            if memory.total > machine.usable_bytes:
                found.too_large.append(Large(one, layout, memory))
                continue
            model = model or StepModel(
                sized, layout, machine.device, machine.gpus_per_node, has_te=machine.has_te, parameters=parameters
            )
            found.plans.append(Plan(one, layout, memory, model.estimate(one)))


def _train(config: Config, **fields: Any) -> TrainConfig:
    return config.train.model_copy(update=fields)
