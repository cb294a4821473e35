"""Do the engine and `transformers` compute the same from the same weights? Logits or values, and where they part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from trainer.data.batch import Batch
from trainer.engine.engine import Engine
from trainer.engine.forward import forward_values


@dataclass(frozen=True)
class Comparison:
    """How far the engine's logits are from those of `transformers`, both in fp32."""

    num_tokens: int
    max_difference: float
    """Largest absolute difference of a logit."""
    mean_difference: float
    """Mean absolute difference of the logits."""
    kl_divergence: float | None
    """Mean over tokens of KL(transformers || engine), in nats; None of reward models, whose one logit is a value."""
    modules: list[tuple[str, float]]
    """Each module in the order it runs, with the largest difference of its output relative to the largest value."""

    def first_difference(self, tolerance: float) -> str | None:
        """Return the first module whose output differs by more than `tolerance` of its largest value."""
        return next((name for name, difference in self.modules if not difference <= tolerance), None)


def compare_with_transformers(engine: Engine, directory: Path, tokens: torch.Tensor) -> Comparison:
    """Run both models on `tokens [batch, seq]`. For an engine on one rank, which alone has every module's output."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    ours, theirs = _Recorder(), _Recorder()
    chunk = engine.chunks[0]
    modules = {"embedding": chunk.embedding}
    modules |= {f"layer {number}": layer for number, layer in enumerate(chunk.decoder.layers)}
    modules |= {"final norm": chunk.decoder.final_layernorm}
    ours.watch(modules, lambda hidden: hidden.transpose(0, 1))  # [seq, batch, hidden] -> [batch, seq, hidden]
    is_scalar = engine.head == "scalar"
    our_logits = _values_of(engine, tokens) if is_scalar else engine.compute_logits(tokens)
    ours.stop()
    auto = AutoModelForSequenceClassification if is_scalar else AutoModelForCausalLM
    model = auto.from_pretrained(directory, dtype=torch.float32).eval()
    modules = {"embedding": model.model.embed_tokens}
    modules |= {f"layer {number}": layer for number, layer in enumerate(model.model.layers)}
    modules |= {"final norm": model.model.norm}
    theirs.watch(modules, lambda hidden: hidden)
    with torch.no_grad():
        # A classifier's own logits are those of the last tokens alone.
        their_logits = model.score(model.model(tokens).last_hidden_state) if is_scalar else model(tokens).logits.float()
    differences = [(name, _relative(ours.outputs[name], theirs.outputs[name])) for name in theirs.outputs]
    difference = (our_logits - their_logits).abs()
    ours_log, theirs_log = our_logits.log_softmax(-1), their_logits.log_softmax(-1)
    divergence = max(0.0, float((theirs_log.exp() * (theirs_log - ours_log)).sum(-1).mean()))
    return Comparison(
        num_tokens=tokens.numel(),
        max_difference=float(difference.max()),
        mean_difference=float(difference.mean()),
        kl_divergence=None if is_scalar else divergence,
        modules=[*differences, ("logits", _relative(our_logits, their_logits))],
    )


def _values_of(engine: Engine, tokens: torch.Tensor) -> torch.Tensor:
    """Return the value of each token as its one logit, `[batch, seq, 1]`."""
    positions = torch.arange(tokens.shape[1]).expand(len(tokens), -1).contiguous()
    [values] = engine.score([Batch(tokens, tokens, positions, torch.ones(tokens.shape))], forward_values)
    return values.cpu().unsqueeze(-1)


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
