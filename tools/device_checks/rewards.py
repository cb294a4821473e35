"""Reward models on the device: packed answers score as each alone, and pairs' rule is learnt, whole and with LoRA."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from configs.roles import HEAD
from tools.device_checks.engine import build_config
from tools.device_checks.outcome import Outcome, judge

if TYPE_CHECKING:
    from parallel.mesh import Mesh

TOLERANCES = {"fp32": 1e-4, "bf16": 0.1, "fp16": 0.02}
"""Of a reward in a packed row and alone."""
NUM_PAIRS, NUM_STEPS, RATE = 8, 30, 1e-3
LEAST_ACCURACY, LARGEST_SHARE = 0.9, 0.5
"""Of pairs after the steps, and of the first loss."""


def check_rewards(mesh: Mesh, compute: str, *, has_adapters: bool = False) -> Outcome:
    """Prefer answers of the lower half of the vocabulary, with a margin, centred, in one repeated batch.

    With adapters they and the head are trained, and all else stays.
    """
    import torch

    from trainer.data.sequences import sum_by_sequence
    from trainer.engine.build import ModelPlan, open_models
    from trainer.engine.forward import forward_values
    from trainer.evaluate.rewards import score_rows
    from trainer.stages.reward import RewardObjective

    sections: dict[str, Any] = {"lora": {"rank": 16}} if has_adapters else {}
    config = build_config(compute, data={"document_mask": True}, **sections)
    plan = ModelPlan(config, is_trained=True, head="scalar")
    problems: list[str] = []
    with open_models({"reward": plan}, mesh) as models:
        model: Any = models["reward"]
        batch, answers = _make_batch(config.model.vocab_size, config.train.seq_len)
        [values] = model.score([batch], forward_values)
        counted = torch.where(batch.loss_mask > 0, values.cpu(), 0.0)
        packed = sum_by_sequence(counted, batch.columns["sequence"], len(answers))
        alone = torch.tensor(score_rows(model, answers))
        worst = float((packed - alone).abs().max())
        objective = RewardObjective(0.01, mesh.cp_group)
        before = {name: one.clone() for name, one in _weights(model)} if has_adapters else {}
        rate = 5 * RATE if has_adapters else RATE
        results = [model.train_step([batch], objective, rate) for _ in range(NUM_STEPS)]
        changed = [name for name, one in _weights(model) if name in before and not torch.equal(one, before[name])]
    if has_adapters and changed != [HEAD]:
        problems.append(f"beside the adapters {', '.join(changed) or 'nothing'} changed, where {HEAD} alone should")
    first, last, accuracy = results[0].loss, results[-1].loss, results[-1].metrics["accuracy"]
    if not worst <= TOLERANCES[compute]:
        problems.append(f"rewards in packed rows differ by {worst:.1e} (limit {TOLERANCES[compute]:g})")
    if not (last < LARGEST_SHARE * first and accuracy >= LEAST_ACCURACY):
        problems.append(f"the loss went from {first:.4f} to {last:.4f}, and {accuracy:.0%} of the pairs are right")
    found = f"loss {first:.3f} -> {last:.3f}, {accuracy:.0%} of the pairs right, rewards within {worst:.1e}"
    name = f"{compute} rewards" + (" with LoRA" if has_adapters else "")
    return judge(name, problems, found, {"difference": worst, "last_loss": last, "accuracy": accuracy})


def _weights(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield the model's own parameters by name, adapters left out."""
    for chunk in model.chunks:
        yield from ((name, one) for name, one in chunk.named_parameters() if not name.startswith("lora."))


def _make_batch(vocab_size: int, seq_len: int) -> tuple[Any, list[list[int]]]:
    """Return a batch of packed pairs, and their answers alone in the order of the batch."""
    import numpy as np

    from trainer.data.batch import build_packed_batch
    from trainer.data.indexed import MemoryDataset
    from trainer.data.packed_source import ScoredPairSource
    from trainer.data.sequences import with_margins

    random, half = np.random.default_rng(5), vocab_size // 2
    lengths = random.integers(5, seq_len // 2, 2 * NUM_PAIRS).astype(np.int32)
    documents = [
        random.integers(half * (number % 2), half * (number % 2 + 1), length) for number, length in enumerate(lengths)
    ]
    tokens = np.concatenate(documents).astype(np.int32)
    source = ScoredPairSource(
        MemoryDataset("made-up", tokens, np.ones(len(tokens), np.uint8), lengths), seq_len, seed=1
    )
    rows = source.read(np.arange(source.num_samples))
    batch = with_margins(build_packed_batch(rows, tuple(range(len(rows)))))
    assert batch.documents is not None
    flat, number = batch.tokens.flatten(), batch.columns["sequence"].flatten()
    bounds = batch.documents.bounds
    spans = [(start, end) for start, end in zip(bounds[:-1], bounds[1:], strict=True) if number[start] >= 0]
    return batch, [flat[start:end].tolist() for start, end in spans]
