"""Generates text with the training engine on any layout.

Every token recomputes its whole prefix: right everywhere and enough for samples; a key-value cache comes with GRPO.
"""

from __future__ import annotations

import torch

from configs.sections.run import SampleConfig
from parallel.collectives import broadcast_object
from trainer.data.tokenizer import Tokenizer
from trainer.engine.sharded_model import ShardedModel


def generate_text(model: ShardedModel, tokenizer: Tokenizer, prompt: str, settings: SampleConfig, seed: int) -> str:
    """Return the continuation of `prompt`, up to `settings.num_tokens` tokens or the end of the document.

    Collective: all ranks of the world must call this.
    """
    generator = torch.Generator().manual_seed(seed)
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]  # as documents of the data begin
    prompt_ids = begin + tokenizer.encode(prompt) or [tokenizer.eod_id]
    ids = list(prompt_ids)
    longest = model.config.model.max_position_embeddings
    for _ in range(settings.num_tokens):
        logits = model.compute_logits(torch.tensor([ids[-longest:]]))[0, -1]
        # Data-parallel replicas may round differently, so rank 0 chooses for all.
        token = broadcast_object(choose_token(logits.cpu(), settings.temperature, settings.top_k, generator))
        if token == tokenizer.eod_id:
            break
        ids.append(token)
    return tokenizer.decode(ids[len(prompt_ids) :])


def choose_token(logits: torch.Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    """Sample one id from fp32 logits `[vocab]` at a temperature (0 is greedy) among the `top_k` likeliest."""
    if temperature == 0.0:
        return int(logits.argmax())
    scaled = logits / temperature
    if top_k is not None and top_k < scaled.numel():
        scaled = scaled.masked_fill(scaled < scaled.topk(top_k).values[-1], -torch.inf)
    return int(torch.multinomial(torch.softmax(scaled, dim=-1), 1, generator=generator))
