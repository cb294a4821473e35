"""Text that goes on from a prompt, as the samples at the end of a run are made."""

from __future__ import annotations

from configs.sections.run import SampleConfig
from trainer.data.tokenizer import Tokenizer
from trainer.engine.sharded_model import ShardedModel
from trainer.generate.generator import EngineGenerator
from trainer.generate.sampling import Sampling


def generate_text(model: ShardedModel, tokenizer: Tokenizer, prompt: str, settings: SampleConfig, seed: int) -> str:
    """Return the continuation of `prompt`, up to `settings.num_tokens` tokens or the end of the document.

    Where the model's context is full, its later half goes on as the prompt. Collective: all ranks of the world must
    call this.
    """
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]  # as documents of the data begin
    prompt_ids = begin + tokenizer.encode(prompt) or [tokenizer.eod_id]
    generator, context = EngineGenerator(model), model.config.model.max_position_embeddings
    ids = list(prompt_ids)
    end = len(ids) + settings.num_tokens
    while len(ids) < end:
        seen = ids if len(ids) < context else ids[-max(1, context // 2) :]
        sampling = Sampling(
            min(end - len(ids), context - len(seen)),
            settings.temperature,
            settings.top_k,
            stop_tokens=(tokenizer.eod_id,),
            seed=seed + len(ids) - len(prompt_ids),
        )
        (completion,) = generator.generate([seen], sampling)
        if completion.finish == "stop_token":
            ids += completion.token_ids[:-1]
            break
        ids += completion.token_ids
    return tokenizer.decode(ids[len(prompt_ids) :])
