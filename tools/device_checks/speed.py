"""Tokens per second, peak memory and MFU of whole training steps on Llama shapes."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from configs.plan.estimate import count_parameters
from configs.plan.flops import flops_per_step
from configs.stages import Config
from parallel.platform import PlatformName, has_transformer_engine
from tools.device_checks.engine import build_config, build_repeating_stage, train
from tools.device_checks.outcome import Outcome, judge
from tools.one_rank import open_engine

if TYPE_CHECKING:
    from parallel.mesh import Mesh

NUM_WARMUP = 3
MODELS = Path(__file__).resolve().parents[2] / "configs" / "models"
SMALL_SHAPE: dict[str, Any] = {
    "num_layers": 12,
    "hidden_size": 768,
    "ffn_hidden_size": 2048,
    "num_attention_heads": 12,
    "vocab_size": 32000,
}


def small_shape(compute: str) -> Config:
    """Return a 134-million-parameter Llama at 1024 tokens, 16 samples a step."""
    train_section = {"seq_len": 1024, "global_batch_size": 16, "micro_batch_size": 8}
    return build_config(compute, SMALL_SHAPE, train=train_section)


def llama_shape(model: str, compute: str, seq_len: int, fp8: Mapping[str, Any] | None = None) -> Config:
    """Return a preset of `configs/models` at a sequence length, 32,768 tokens a step, one sequence at a time.

    Llama 3.2 1B holds about 22 GB of weights, gradients and optimizer state, 3B about 58 GB; the MLPs are computed
    again in the backward pass where 3B's activations would not fit beside them.
    """
    section = yaml.safe_load((MODELS / f"{model}.yaml").read_text(encoding="utf-8"))["model"]
    train_section: dict[str, Any] = {"seq_len": seq_len, "global_batch_size": 32768 // seq_len, "micro_batch_size": 1}
    if model == "llama3_2_3b":
        train_section["recompute"] = {"granularity": "selective", "modules": ["mlp"]}
    return build_config(compute, section, train=train_section, precision={} if fp8 is None else {"fp8": fp8})


def check_speed(mesh: Mesh, title: str, config: Config, *, num_steps: int = 10) -> Outcome:
    """Measure `num_steps` whole steps after three; a shape that does not fit the device's memory is skipped.

    Peak memory is that of the process so far, so shapes go from small to large.
    """
    import torch

    name = f"speed, {title}"
    torch.compiler.reset()  # after eight shapes of a function it would compile no more
    try:
        with open_engine(config, mesh) as engine:
            stage = build_repeating_stage(engine)
            train(stage, NUM_WARMUP)
            mesh.platform.synchronize()
            started = time.perf_counter()
            train(stage, num_steps)
            mesh.platform.synchronize()
            seconds = time.perf_counter() - started
    except torch.OutOfMemoryError:
        return Outcome(name, "skipped", "the device has not enough memory for this shape")
    samples = config.train.global_batch_size
    tflops = flops_per_step(config, samples) * num_steps / seconds / 1e12
    figures = {
        "parameters": float(count_parameters(config.model).total),
        "tokens_per_second": samples * config.train.seq_len * num_steps / seconds,
        "seconds_per_step": seconds / num_steps,
        "peak_memory_gb": mesh.platform.peak_memory_bytes() / 1e9,
        "tflops": tflops,
    }
    peaks = mesh.platform.peak_tflops()
    figures |= {f"mfu_{name}": tflops / peak for name, peak in peaks.items()}
    share = "".join(f", {tflops / peak:.1%} of the {name} peak" for name, peak in peaks.items())
    planned = _planned_seconds(config, mesh)
    if planned is not None:
        figures["planned_seconds_per_step"] = planned
        share += f", {planned:.3f} s planned"
    precision = config.precision.compute if config.precision.fp8 is None else f"fp8 {config.precision.fp8.recipe}"
    found = (
        f"{figures['parameters'] / 1e6:,.0f} M parameters, {precision}, {config.train.seq_len} tokens: "
        f"{seconds / num_steps:.3f} s a step, {figures['tokens_per_second']:,.0f} tokens/s, {tflops:.1f} TFLOP/s{share}"
        f", {figures['peak_memory_gb']:.1f} GB"
    )
    return Outcome(name, "passed", found, figures)


def _planned_seconds(config: Config, mesh: Mesh) -> float | None:
    """Return what `tools/plan.py` says of a step of this device; None for one that it has no figures of."""
    from configs.plan.derive import derive_layout
    from configs.plan.devices import DEVICES
    from configs.plan.step_time import estimate_step

    words = mesh.platform.inspect().name.lower().replace("-", " ").split()
    device = next((device for name, device in DEVICES.items() if name in words), None)
    if device is None:
        return None
    step = estimate_step(config, derive_layout(config, 1), device, 1, has_te=has_transformer_engine())
    return step.total


def check_loop_cost(platform: PlatformName, *, seq_len: int = 4096) -> Outcome:
    """Compare our loop with a bare megatron-core loop, Llama 3.2 1B in bf16 at `seq_len` tokens, steps in turns.

    Both are processes of their own on this same device.
    """
    from tools.bench.compare import compare
    from tools.bench.throughput import Case, measure_case
    from tools.made_up_data import write_made_up_dataset

    with tempfile.TemporaryDirectory(prefix="loop-cost-") as scratch:
        model = yaml.safe_load((MODELS / "llama3_2_1b.yaml").read_text(encoding="utf-8"))["model"]
        overrides = (
            f"model={json.dumps(model)}",
            "precision.compute=bf16",
            f"train.seq_len={seq_len}",
            "parallel.tp=1",
        )
        case = Case("1 rank", 1, (*overrides, "train.micro_batch_size=1"), ("fit", "bare"))
        write_made_up_dataset(Path(scratch) / "tokens", num_tokens=1_000_000, vocab_size=model["vocab_size"])
        (found,) = compare(measure_case(case, 20, Path(scratch) / "tokens", platform=platform))
    ratio = found["ratio"]
    problems = ["the two loops end at different losses"] if found["is_same_loss"] is False else []
    detail = f"ours at {ratio['median']:.3f} times its speed ({ratio['low']:.3f}-{ratio['high']:.3f})"
    return judge("bare megatron-core loop", problems, detail, {"ratio": ratio["median"]})
