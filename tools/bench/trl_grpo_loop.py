"""TRL's `GRPOTrainer` under the clock: the same Llama, prompts, groups, lengths and reward on one rank.

It generates with `transformers.generate`, its way without a server. One update a step, no reference, Dr. GRPO's loss;
its other defaults stay, but for recomputing activations and bf16, which are off as ours are.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.stages import Config, GrpoConfig
from parallel.platform import PlatformName
from tools.bench.chats import TAGGED_CHATML
from tools.bench.hf_loop import build_llama, ticking, training_arguments
from tools.bench.vowel_reward import count_vowels

if TYPE_CHECKING:
    from tools.bench.clock import StepClock


def run_trl_grpo(config: Config, platform_name: PlatformName, clock: StepClock) -> None:
    """Train a Llama of the config's sizes for the clock's steps, alone in this process, in fp32."""
    import datasets
    import transformers
    import trl

    assert isinstance(config, GrpoConfig)

    class Counting(trl.GRPOTrainer):
        """Counts the tokens of answers."""

        def compute_loss(self, model: Any, inputs: Any, *words: Any, **options: Any) -> Any:
            clock.count(int(inputs["completion_mask"].sum()))
            return super().compute_loss(model, inputs, *words, **options)

    def reward(completions: list[Any], **unused: Any) -> list[float]:
        return [count_vowels(answer[0]["content"]) for answer in completions]

    tokenizer = transformers.AutoTokenizer.from_pretrained(str(config.data.tokenizer))
    tokenizer.chat_template = TAGGED_CHATML
    with tempfile.TemporaryDirectory() as scratch:
        arguments = trl.GRPOConfig(
            **training_arguments(config, platform_name, clock.total_steps, scratch),
            num_generations=config.grpo.group_size,
            max_completion_length=config.rollout.max_new_tokens,
            temperature=config.rollout.temperature,
            beta=0.0,
            loss_type="dr_grpo",
            scale_rewards="none",
            logging_steps=config.train.log_every,
            gradient_checkpointing=False,
            bf16=False,
            seed=config.run.seed,
        )
        trainer = Counting(
            model=build_llama(config.model),
            reward_funcs=reward,
            args=arguments,
            train_dataset=datasets.Dataset.from_list(_read_prompts(Path(config.grpo.prompts[0].path))),
            processing_class=tokenizer,
            callbacks=[ticking(clock)],
        )
        trainer.train()


def _read_prompts(path: Path) -> list[dict[str, Any]]:
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [{"prompt": row["messages"][:1]} for row in rows]
