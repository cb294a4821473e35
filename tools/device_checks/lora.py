"""LoRA on the device: adapters learn, the frozen weights stay bit for bit and cost no gradient, merged logits agree."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tools.device_checks.engine import build_config, build_repeating_stage, train
from tools.device_checks.outcome import Outcome, judge
from tools.one_rank import open_engine

if TYPE_CHECKING:
    from parallel.mesh import Mesh

NUM_STEPS = 20
LARGEST_SHARE = 0.95
"""Of its first value, the loss after 20 steps of rank 16 on one repeated batch."""
LARGEST_DIFFERENCE = 0.05
"""Of merged from unmerged logits in bf16, as a share of the largest: each weight is rounded once more."""


def check_lora(mesh: Mesh, compute: str) -> Outcome:
    """Train adapters beside every linear of a small model, switch them off, and merge them."""
    import torch

    config = build_config(compute, lora={"rank": 16, "dropout": 0.05}, optimizer={"lr": 1e-2, "min_lr": 1e-2})
    tokens = torch.arange(128).view(2, 64) % config.model.vocab_size
    with open_engine(config, mesh) as engine:
        assert engine.adapter is not None
        frozen = [one for chunk in engine.chunks for one in chunk.parameters() if not one.requires_grad]
        before, untrained = [one.clone() for one in frozen], engine.compute_logits(tokens)
        results = train(build_repeating_stage(engine), NUM_STEPS)
        logits = engine.compute_logits(tokens)
        with engine.merged_adapter():
            merged = engine.compute_logits(tokens)
        with engine.adapter.disabled():
            alone = engine.compute_logits(tokens)
        is_kept = all(torch.equal(one, other) for one, other in zip(frozen, before, strict=True))
        trained = sum(one.numel() for chunk in engine.chunks for one in chunk.parameters() if one.requires_grad)
        buffers = [buffer for replica in engine.modules for buffer in replica.buffers]
        gradient_bytes = sum(buffer.grad_data.nbytes for buffer in buffers)
    first, last = results[0].loss, results[-1].loss
    difference = float((merged - logits).abs().max() / logits.abs().max())
    problems = [] if is_kept else ["training or merging changed the frozen weights"]
    if not torch.equal(alone, untrained):
        problems.append("without adapters the logits are not those of the frozen model")
    if not last < LARGEST_SHARE * first:
        problems.append(f"the loss went from {first:.4f} to {last:.4f} in {NUM_STEPS} steps, it should have fallen")
    if not difference <= LARGEST_DIFFERENCE:
        problems.append(f"merged logits differ by {difference:.1e} of the largest (limit {LARGEST_DIFFERENCE:g})")
    if gradient_bytes > 1.2 * 4 * trained:  # buffers are padded
        problems.append(f"{gradient_bytes} bytes of gradients for {trained} trained parameters")
    found = f"loss {first:.3f} -> {last:.3f}, merged logits within {difference:.1e}, {trained:,} parameters trained"
    figures = {"first_loss": first, "last_loss": last, "merged_difference": difference}
    return judge(f"{compute} LoRA", problems, found, figures)
