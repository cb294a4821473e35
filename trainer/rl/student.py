"""A student's own answers, for its teacher to judge: prompts of conversations, drawn anew each step, and their rows."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from configs.stages import DistillConfig
from parallel.watch.phases import phase
from trainer.data.batch import Batch
from trainer.data.chat.encode import ChatEncoder
from trainer.data.chat.prompts import Prompt, PromptFile, PromptReader
from trainer.data.chat.template import load_template
from trainer.data.tokenizer import Tokenizer
from trainer.engine.engine import Engine
from trainer.environments.scoring import Score
from trainer.generate.rows import Completion
from trainer.rl.collect import as_rollout, choose_sampling, open_generator
from trainer.rl.placement import Placement
from trainer.rl.rollout import Rollout
from trainer.rl.talk import Talk, spoken


class StudentAnswers:
    """Lets the student answer the next prompts; which steps do, and what is drawn, follows from the seed."""

    def __init__(self, config: DistillConfig, engine: Engine, encoder: ChatEncoder, reader: PromptReader) -> None:
        self._config, self._engine, self._encoder, self.reader = config, engine, encoder, reader
        self._generator = open_generator(config.rollout, engine, self.spell)
        self._sampling = choose_sampling(config.rollout, encoder, config.run.seed)

    def is_due(self, step: int) -> bool:
        """Return whether a step, counted from 1, learns from the student's answers: `distill.lmbda` of all do."""
        digest = hashlib.blake2b(f"{self._config.run.seed}/{step}/lmbda".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") < self._config.distill.lmbda * 2**64

    def answer(self, step: int) -> list[Rollout]:
        """Return an answer to each of the next `train.global_batch_size` prompts. Collective: all ranks."""
        prompts = self.reader.draw(self._config.train.global_batch_size)
        keys = [(step, number) for number in range(len(prompts))]
        with self._engine.merged_adapter(), phase("generate"):
            completions = self._generator.generate([one.token_ids for one in prompts], self._sampling, keys=keys)
        return [
            self._rollout(number, prompt, completion)
            for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        ]

    def lay(self, rollouts: Sequence[Rollout]) -> list[Batch]:
        """Return this rank's microbatches of packed answers, of which what was drawn is trained."""
        train = self._config.train
        lengths = [len(rollout.token_ids) - 1 for rollout in rollouts]
        placement = Placement(lengths, train.seq_len, train.micro_batch_size, self._engine.mesh)
        return placement.build(rollouts)

    def spell(self, ids: Sequence[int]) -> str:
        """Return the text of tokens, special ones spelled out."""
        return self._encoder.tokenizer.backend.decode(list(ids), skip_special_tokens=False)

    def record(self, step: int, rollouts: Sequence[Rollout]) -> list[Mapping[str, Any]]:
        """Return what is kept of the answers in `rollouts/`."""
        return [one.record(step, self.spell, None) for one in rollouts]

    def _rollout(self, number: int, prompt: Prompt, completion: Completion) -> Rollout:
        talk = Talk.begin(prompt, number, 0)
        talk.add_reply(completion, spoken(completion, self.spell, self._config.rollout.stop_strings))
        return as_rollout(talk, Score(None, {}))


def open_student(config: DistillConfig, engine: Engine, tokenizer: Tokenizer) -> StudentAnswers:
    """Open the prompts, which are those of the training conversations. Raises BadInput for what cannot be."""
    encoder = ChatEncoder(load_template(config.sft.template, tokenizer.directory, "sft.template"), tokenizer)
    sources = config.sources("train")
    files = [
        PromptFile(source, f"{config.source_field('train')}[{number}]", encoder, config.longest_prompt)
        for number, source in enumerate(sources)
    ]
    weights = [source.weight for source in sources]
    reader = PromptReader(files, weights, config.run.seed, config.source_field("train"))
    return StudentAnswers(config, engine, encoder, reader)
