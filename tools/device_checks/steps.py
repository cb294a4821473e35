"""Checks of collectives and training steps: does every number format learn, and does fp16 find its loss scale?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tools.device_checks.engine import build_config, build_repeating_stage, train
from tools.device_checks.outcome import Outcome, judge
from tools.one_rank import open_engine

if TYPE_CHECKING:
    from parallel.mesh import Mesh

NUM_STEPS = 20
LARGEST_SHARE = 0.9
"""Of its first value, the loss after 20 steps on one repeated batch; well under it in every format."""


def check_collectives(mesh: Mesh) -> Outcome:
    """Run each kind of collective the trainer uses and compare with what a world of one must give."""
    import torch
    import torch.distributed as dist

    values = torch.arange(1024, dtype=torch.float32, device=mesh.device)
    results = {name: torch.zeros_like(values) for name in ("all_gather", "reduce_scatter")}
    results |= {name: values.clone() for name in ("all_reduce", "broadcast")}
    dist.all_reduce(results["all_reduce"])
    dist.broadcast(results["broadcast"], src=0)
    dist.all_gather_into_tensor(results["all_gather"], values)
    dist.reduce_scatter_tensor(results["reduce_scatter"], values)
    dist.barrier()
    mesh.platform.synchronize()
    problems = [f"{name} changed the values" for name, result in results.items() if not torch.equal(result, values)]
    found = f"{mesh.platform.describe()['collectives']}: {', '.join(sorted(results))}, barrier"
    return judge("collectives", problems, found, {})


def check_steps(mesh: Mesh, compute: str, fp8: Mapping[str, Any] | None = None) -> Outcome:
    """Train on one repeated batch: losses and gradient norms finite, steps applied, the loss falls.

    fp16 may skip steps while it looks for its loss scale. `fp8` is the section of that name.
    """
    name = f"{compute} steps" if fp8 is None else f"fp8 {fp8['recipe']} steps ({fp8['backend']})"
    refusal = mesh.platform.check_precision(compute)
    if fp8 is not None and fp8["backend"] != "emulated":
        refusal = refusal or mesh.platform.check_fp8(fp8["recipe"])
    if refusal:
        return Outcome(name, "skipped", refusal)
    config = build_config(compute, precision={} if fp8 is None else {"fp8": fp8})
    with open_engine(config, mesh) as engine:
        results = train(build_repeating_stage(engine), NUM_STEPS)
    first, last = results[0].loss, results[-1].loss
    problems = []
    faults = [number for number, one in enumerate(results, 1) if not (one.is_applied or one.is_overflow_expected)]
    if faults or not math.isfinite(last):
        problems.append(f"loss or gradient of step {(faults or [NUM_STEPS])[0]} is not finite")
    elif last > LARGEST_SHARE * first:
        problems.append(f"the loss went from {first:.4f} to {last:.4f} in {NUM_STEPS} steps, it should have fallen")
    num_skipped = sum(not one.is_applied for one in results)
    if num_skipped > NUM_STEPS // 4:
        problems.append(f"{num_skipped} of {NUM_STEPS} updates were skipped")
    figures = {"first_loss": first, "last_loss": last, "num_skipped": float(num_skipped)}
    return judge(name, problems, f"loss {first:.3f} -> {last:.3f} in {NUM_STEPS} steps", figures)


def check_loss_scaler(mesh: Mesh) -> Outcome:
    """Start fp16 at a loss scale that must overflow: the first steps are skipped, the scale halves, then it learns.

    The gradient of a token's loss by its logit is near -1, so a scale of 2^20 exceeds fp16's 65504 with certainty.
    """
    initial = 2.0**20
    config = build_config("fp16", precision={"initial_loss_scale": initial, "loss_scale_hysteresis": 1})
    with open_engine(config, mesh) as engine:
        results = train(build_repeating_stage(engine), NUM_STEPS)
    skipped = [one for one in results if not one.is_applied]
    first, last, scale = results[0].loss, results[-1].loss, results[-1].loss_scale
    problems = []
    if not skipped or results[0].is_applied:
        problems.append(f"a loss scale of {initial:g} did not overflow")
    if not all(one.is_overflow_expected for one in skipped):
        problems.append("a skipped step was not taken for an overflow")
    if not results[-1].is_applied or scale >= initial:
        problems.append(f"the scale did not settle: {scale:g} after {len(skipped)} skipped steps")
    elif not last < LARGEST_SHARE * first:
        problems.append(f"the loss went from {first:.4f} to {last:.4f}, it should have fallen")
    figures = {"num_skipped": float(len(skipped)), "last_loss_scale": scale, "last_loss": last}
    found = f"scale {initial:g} -> {scale:g} in {len(skipped)} skipped steps, loss {first:.3f} -> {last:.3f}"
    return judge("fp16 loss scaler", problems, found, figures)
