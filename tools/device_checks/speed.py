"""Tokens per second, peak memory and MFU of whole training steps on Llama shapes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from configs.estimate import count_parameters, flops_per_step
from configs.schema import Config
from tools.device_checks.engine import build_config, build_repeating_stage, train
from tools.device_checks.outcome import Outcome
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


def billion_shape(compute: str) -> Config:
    """Return Llama 3.2 1B at 2048 tokens, 8 samples a step; about 25 GB of weights, gradients and optimizer state."""
    model = yaml.safe_load((MODELS / "llama3_2_1b.yaml").read_text(encoding="utf-8"))["model"]
    train_section = {"seq_len": 2048, "global_batch_size": 8, "micro_batch_size": 2}
    return build_config(compute, model, train=train_section)


def check_speed(mesh: Mesh, title: str, config: Config, *, num_steps: int = 10) -> Outcome:
    """Measure `num_steps` whole steps after three; a shape that does not fit the device's memory is skipped.

    Peak memory is that of the process so far, so shapes go from small to large.
    """
    import torch

    name = f"speed, {title}"
    try:
        with open_engine(config, mesh) as engine:
            stage = build_repeating_stage(config)
            train(engine, stage, NUM_WARMUP)
            mesh.platform.synchronize()
            started = time.perf_counter()
            train(engine, stage, num_steps)
            mesh.platform.synchronize()
            seconds = time.perf_counter() - started
    except torch.OutOfMemoryError:
        return Outcome(name, "skipped", "the device has not enough memory for this shape")
    samples = config.train.global_batch_size
    tflops = flops_per_step(config, samples) * num_steps / seconds / 1e12
    figures = {
        "parameters": float(count_parameters(config.model).total),
        "tokens_per_second": samples * config.train.seq_len * num_steps / seconds,
        "peak_memory_gb": mesh.platform.peak_memory_bytes() / 1e9,
        "tflops": tflops,
    }
    peak = mesh.platform.peak_tflops().get(config.precision.compute)
    if peak is not None:
        figures["mfu"] = tflops / peak
    share = f", MFU {figures['mfu']:.1%}" if peak is not None else ""
    found = (
        f"{figures['parameters'] / 1e6:,.0f} M parameters, {config.precision.compute}, {config.train.seq_len} tokens: "
        f"{figures['tokens_per_second']:,.0f} tokens/s, {tflops:.1f} TFLOP/s{share}, {figures['peak_memory_gb']:.1f} GB"
    )
    return Outcome(name, "passed", found, figures)
