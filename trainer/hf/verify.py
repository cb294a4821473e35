"""Do the engine and `transformers` compute the same from the same weights? Logits, where the two part, and tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from trainer.engine.engine import Engine


@dataclass(frozen=True)
class Comparison:
    """How far the engine's logits are from those of `transformers`, both in fp32."""

    num_tokens: int
    max_difference: float
    """Largest absolute difference of a logit."""
    mean_difference: float
    """Mean absolute difference of the logits."""
    kl_divergence: float
    """Mean over tokens of KL(transformers || engine), in nats."""
    modules: list[tuple[str, float]]
    """Each module in the order it runs, with the largest difference of its output relative to the largest value."""

    def first_difference(self, tolerance: float) -> str | None:
        """Return the first module whose output differs by more than `tolerance` of its largest value."""
        return next((name for name, difference in self.modules if not difference <= tolerance), None)


def compare_with_transformers(engine: Engine, directory: Path, tokens: torch.Tensor) -> Comparison:
    """Run both models on `tokens [batch, seq]`. For an engine on one rank, which alone has every module's output."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    ours, theirs = _Recorder(), _Recorder()
    chunk = engine.chunks[0]
    modules = {"embedding": chunk.embedding}
    modules |= {f"layer {number}": layer for number, layer in enumerate(chunk.decoder.layers)}
    modules |= {"final norm": chunk.decoder.final_layernorm}
    ours.watch(modules, lambda hidden: hidden.transpose(0, 1))  # [seq, batch, hidden] -> [batch, seq, hidden]
    our_logits = engine.compute_logits(tokens)
    ours.stop()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    modules = {"embedding": model.model.embed_tokens}
    modules |= {f"layer {number}": layer for number, layer in enumerate(model.model.layers)}
    modules |= {"final norm": model.model.norm}
    theirs.watch(modules, lambda hidden: hidden)
    with torch.no_grad():
        their_logits = model(tokens).logits.float()
    differences = [(name, _relative(ours.outputs[name], theirs.outputs[name])) for name in theirs.outputs]
    difference = (our_logits - their_logits).abs()
    ours_log, theirs_log = our_logits.log_softmax(-1), their_logits.log_softmax(-1)
    return Comparison(
        num_tokens=tokens.numel(),
        max_difference=float(difference.max()),
        mean_difference=float(difference.mean()),
        kl_divergence=max(0.0, float((theirs_log.exp() * (theirs_log - ours_log)).sum(-1).mean())),
        modules=[*differences, ("logits", _relative(our_logits, their_logits))],
    )


@dataclass
class _Recorder:
    """Keeps what modules return."""

    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    _hooks: list[Any] = field(default_factory=list)

    def watch(self, modules: dict[str, Any], arrange: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Record each module's (first) output, arranged as `[batch, seq, hidden]`."""
        for name, module in modules.items():

            def record(_module: Any, _inputs: Any, output: Any, name: str = name) -> None:
                hidden = output[0] if isinstance(output, tuple) else output
                self.outputs[name] = arrange(hidden.detach()).float()

            self._hooks.append(module.register_forward_hook(record))

    def stop(self) -> None:
        """Leave the modules alone again."""
        for hook in self._hooks:
            hook.remove()


def _relative(left: torch.Tensor, right: torch.Tensor) -> float:
    length = min(left.shape[1], right.shape[1])  # the engine may pad the sequence
    left, right = left[:, :length], right[:, :length]
    return float((left - right).abs().max() / right.abs().max().clamp_min(1e-30))
