"""The `run`, `log` and `sample` sections: identity of the run, and what is written beside metrics. Torch-free."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from configs.sections.base import Count, NonNegativeFloat, PathText, PositiveFloat, PositiveInt, Section


class RunConfig(Section):
    """Identity of the run and where it writes."""

    name: str = "run"
    """Name of the run; the default of `run.dir` is `runs/<name>`."""
    dir: PathText | None = None
    """Run directory: everything the run writes. Default `runs/<run.name>`."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1234
    """Seed of the weights, of dropout and of the data order."""


class SampleConfig(Section):
    """Text generated after training, so that a person can see what was learnt."""

    prompts: tuple[str, ...] = ()
    """Prompts to continue; none for no sample."""
    num_tokens: Count = 64
    """Tokens generated per prompt."""
    temperature: NonNegativeFloat = 0.8
    """Sampling temperature; 0 is greedy."""
    top_k: PositiveInt | None = 50
    """Sample from this many likeliest tokens; null for all."""


class LogConfig(Section):
    """What is written beside metrics.jsonl."""

    tensorboard: bool = True
    """Write TensorBoard event files under `<run.dir>/tensorboard`."""
    device_peak_tflops: PositiveFloat | None = None
    """Dense BF16 peak of one device in TFLOP/s for MFU; default looked up by the device's name, none on CPU."""
