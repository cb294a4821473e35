"""Checks of collectives and training steps: does every format learn, fp16 find its scale, nothing teach nothing?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tools.device_checks.engine import build_config, build_repeating_stage, made_up_batches, train
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


def check_control_group(mesh: Mesh) -> Outcome:
    """Tell Python values through a control group made beside the device's world, with work queued in that.

    A world of one has none of its own (`parallel/control.py`), so this makes what several ranks have.
    """
    import torch
    import torch.distributed as dist

    from parallel.collectives import broadcast_object, gather_objects, on_rank_zero

    value = {"step": 3, "path": "runs/demo", "loss": 2.5}
    queued = torch.ones(1 << 20, device=mesh.device)
    dist.all_reduce(queued)
    group = dist.new_group(backend=mesh.platform.control_backend)
    gathered, sent = [None], [value]
    dist.all_gather_object(gathered, value, group=group)
    dist.broadcast_object_list(sent, src=0, group=group)
    dist.barrier(group=group)
    dist.destroy_process_group(group)
    told = {
        "all_gather_object": gathered[0],
        "broadcast_object_list": sent[0],
        "gather_objects": gather_objects(value)[0],
    }
    told |= {"broadcast_object": broadcast_object(value), "on_rank_zero": on_rank_zero(lambda: value)}
    problems = [f"{name} changed the value" for name, one in told.items() if one != value]
    if not bool((queued == 1).all()):
        problems.append("all_reduce beside it changed the values")
    found = f"{mesh.platform.control_backend} beside {mesh.platform.backend}: {', '.join(sorted(told))}, barrier"
    return judge("control group", problems, found, {})


def check_empty_batch(mesh: Mesh) -> Outcome:
    """Take a step of which no token counts between two of which all do: no update, the loss scale stays, no fault."""
    import torch

    from trainer.stages.next_token import NextTokenObjective

    config = build_config("fp16", precision={"initial_loss_scale": 1024.0})
    batches, empty = made_up_batches(config), made_up_batches(config)
    for batch in empty:
        batch.loss_mask.zero_()
    with open_engine(config, mesh) as engine:
        objective = NextTokenObjective()
        before = engine.train_step(batches, objective, 1e-3)
        weights = [one.detach().clone() for chunk in engine.chunks for one in chunk.parameters()]
        nothing = engine.train_step(empty, objective, 1e-3)
        after = [one for chunk in engine.chunks for one in chunk.parameters()]
        is_kept = all(torch.equal(one, other) for one, other in zip(weights, after, strict=True))
        again = engine.train_step(batches, objective, 1e-3)
    problems = [] if is_kept else ["a step of which nothing counts changed the weights"]
    if nothing.count or nothing.is_applied or nothing.loss or nothing.next_loss_scale != before.next_loss_scale:
        problems.append(f"it was taken for a step: {nothing.count} tokens, loss {nothing.loss}")
    if not (before.is_applied and again.is_applied and again.loss < before.loss):
        problems.append(f"the steps around it: loss {before.loss:.4f}, then {again.loss:.4f}")
    found = f"no update; loss {before.loss:.4f} before, {again.loss:.4f} after"
    return judge("empty batch", problems, found, {"loss_before": before.loss, "loss_after": again.loss})


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
