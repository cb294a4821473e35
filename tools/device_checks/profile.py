"""Where a training step's time goes on the device, and where the host waits for it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from configs.stages import Config
from tools.device_checks.engine import build_repeating_stage, train
from tools.device_checks.outcome import Outcome, judge
from tools.one_rank import open_engine

if TYPE_CHECKING:
    from parallel.mesh import Mesh

NUM_WARMUP = 3
MOST_WAITS = 4
"""In a step of a dense model on one rank: its sums of losses, the gradient norm, and twice the loss scale in fp16."""
NUM_KERNELS = 12
KINDS = (
    ("attention", ("flash", "fmha", "sdpa", "attention", "cudnn_generated")),
    ("matrix products", ("gemm", "nvjet", "cutlass", "xmma", "matmul", "addmm", "bmm")),
    (
        "collectives",
        ("allreduce", "all_reduce", "reducescatter", "reduce_scatter", "allgather", "all_gather", "sendrecv"),
    ),
    ("optimizer and norm", ("multi_tensor", "adam", "foreach", "lpnorm")),
    ("FP8 conversion", ("_cast_kernel", "_scale_kernel")),
    ("compiled", ("triton",)),
    ("copies", ("memcpy", "memset", "copy")),
)
"""Kinds of kernels by a part of their names; the first that fits."""


def check_profile(mesh: Mesh, title: str, config: Config) -> Outcome:
    """Profile one step after three: seconds by kind of kernel, the longest kernels, and the places of waiting.

    More than four waits fail: something within the forward or backward pass stops the host.
    """
    import torch
    from torch.profiler import profile, supported_activities

    name = f"profile, {title}"
    torch.compiler.reset()
    try:
        with open_engine(config, mesh) as engine:
            stage = build_repeating_stage(engine)
            train(stage, NUM_WARMUP)
            with mesh.platform.record_waits() as waits:
                train(stage, 1)
            mesh.platform.synchronize()
            started = time.perf_counter()
            with profile(activities=supported_activities()) as profiled:
                train(stage, 1)
                mesh.platform.synchronize()
            seconds = time.perf_counter() - started
    except torch.OutOfMemoryError:
        return Outcome(name, "skipped", "the device has not enough memory for this shape")
    return _judge(name, waits, _seconds_of_kernels(profiled.key_averages()), seconds)


def kind_of(kernel: str) -> str:
    """Return what kind of work a kernel of this name does."""
    lower = kernel.lower()
    return next((kind for kind, parts in KINDS if any(part in lower for part in parts)), "element by element")


def _seconds_of_kernels(events: Sequence[Any]) -> dict[str, float]:
    """Return the seconds of each kernel; an operation's own entry tells those of its kernels once more."""
    from torch.autograd import DeviceType

    on_device = [event for event in events if event.device_type != DeviceType.CPU]
    if on_device:
        return {event.key: event.self_device_time_total / 1e6 for event in on_device}
    # where the device is the host, its operations are the kernels
    return {event.key: event.self_cpu_time_total / 1e6 for event in events}


def _judge(name: str, waits: Sequence[str], kernels: dict[str, float], seconds: float) -> Outcome:
    busy = sum(kernels.values())
    by_kind: dict[str, float] = {}
    for kernel, spent in kernels.items():
        by_kind[kind_of(kernel)] = by_kind.get(kind_of(kernel), 0.0) + spent
    figures = {"waits": float(len(waits)), "seconds_profiled": seconds, "seconds_busy": busy}
    figures |= {f"seconds {kind}": spent for kind, spent in by_kind.items()}
    longest = sorted(kernels, key=lambda kernel: -kernels[kernel])[:NUM_KERNELS]
    figures |= {f"kernel {kernel[:100]}": kernels[kernel] for kernel in longest}
    largest_first = sorted(by_kind.items(), key=lambda item: -item[1])
    shares = ", ".join(f"{kind} {spent / busy:.0%}" for kind, spent in largest_first)
    places = f" ({', '.join(sorted(set(waits)))})" if waits else ""
    problems = [f"the host waits {len(waits)} times in a step{places}"] if len(waits) > MOST_WAITS else []
    return judge(
        name, problems, f"{shares}; busy {busy / seconds:.0%} of the time, {len(waits)} waits{places}", figures
    )
