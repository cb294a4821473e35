"""Score answers by a reward model: a run, a checkpoint, or a Hugging Face sequence classifier of one label.

Run: [torchrun --nproc-per-node N] tools/score_answers.py MODEL FILE [parallel.tp=N ...] [--out FILE.jsonl]
Rows of FILE are conversations, whose last answer is scored (`reward`), or pairs (`chosen_reward`, `rejected_reward`),
in the forms that training reads; each comes with what it got added. With --out the figures of pairs are told too.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a script: the packages are beside tools/, which Python puts first
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.errors import BadInput
from configs.sections.reward_model import RewardModelSection
from configs.sections.sft import ConversationSource, SftSection
from tools.console import end_process, run_command
from tools.open_model import open_model, read_config_of, read_template_of
from tools.outputs import check_file
from tools.paths import path_argument
from tools.ranks import read_environment

if TYPE_CHECKING:
    from trainer.data.chat.worker import EncodedRow


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    arguments = _parse(argv)
    return run_command(lambda: _score(arguments), "stopped", takes_ranks=True)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="score_answers.py", description="Score answers by a reward model.")
    parser.add_argument("model", type=path_argument, help="run directory, checkpoint, or Hugging Face directory")
    parser.add_argument("file", type=path_argument, help="rows of conversations, or of chosen and rejected answers")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields such as parallel.tp=2")
    parser.add_argument(
        "--template", metavar="NAME", help="chat template by name or .jinja file (default: the run's, the tokenizer's)"
    )
    parser.add_argument("--length", type=int, default=2048, metavar="N", help="tokens of a row at most (default: 2048)")
    parser.add_argument("--out", type=path_argument, metavar="FILE", help="rows with rewards (default: printed)")
    return parser.parse_intermixed_args(argv)


def _score(arguments: argparse.Namespace) -> None:
    import numpy as np

    from trainer.evaluate.rewards import judge_rewards, score_rows

    if arguments.out is not None:
        check_file(arguments.out)
        if arguments.out.exists() and arguments.out.samefile(arguments.file):
            raise BadInput(f"--out {arguments.out}: is what is read; a value that would work: scored.jsonl")
    environment = read_environment()
    config = read_config_of(
        arguments.model,
        arguments.overrides,
        seq_len=arguments.length,
        world_size=environment.world_size,
        seq_len_option="--length",
    )
    if config.data.tokenizer is None:
        raise BadInput("data.tokenizer: text needs the model's tokenizer; give data.tokenizer=DIR")
    template = arguments.template or read_template_of(arguments.model)
    rows = list(_encode(arguments.file, config.data.tokenizer, template, arguments.length))
    samples = [sample for _, encoded in rows for sample in encoded.samples]
    answers = [_up_to_end(sample.input_ids, sample.loss_mask) for sample in samples]
    with open_model(config, arguments.model, environment, head="scalar") as model:
        rewards = iter(score_rows(model, answers))
        is_telling = model.mesh.rank == 0
    if not is_telling:
        return
    lines, pairs = [], []
    for row, encoded in rows:
        own = [next(rewards) for _ in encoded.samples]
        if "chosen" in row:
            pairs += [[*own, encoded.margins[0]]] if own else []
        lines.append(json.dumps(row | _told(row, own, encoded.dropped), ensure_ascii=False, default=str))
    if arguments.out is None:
        print("\n".join(lines))
    else:
        arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{arguments.out}: {len(lines)} rows, {len(answers)} answers")
        if pairs:
            figures = judge_rewards(np.array(pairs))
            print("  ".join(f"{name} {value:.4g}" for name, value in figures.items()))


def _encode(
    file: Path, tokenizer: str, template: str | None, length: int
) -> Iterator[tuple[dict[str, Any], EncodedRow]]:
    """Yield every row with the samples of its answers; too long a row has none. Raises BadInput for a bad one."""
    from trainer.data.chat.preference_worker import PreferenceWorker
    from trainer.data.chat.rows import iter_blocks, read_block
    from trainer.data.chat.worker import ConversationWorker, Recipe

    source = ConversationSource(path=str(file))
    worker: ConversationWorker | None = None
    for block in iter_blocks(source, "FILE"):
        rows = read_block(block)
        if worker is None:
            if "chosen" in rows[0][1]:  # pairs are scored one by one, and may each be as long
                chats = RewardModelSection(template=template)
                worker = PreferenceWorker(Recipe(source, "FILE", tokenizer, chats, 2 * length, "reward"))
            else:
                last = SftSection(template=template, train_on="last", too_long="drop")
                worker = ConversationWorker(Recipe(source, "FILE", tokenizer, last, length - 1))
        yield from ((row, encoded) for (_, row), encoded in zip(rows, worker.encode(block), strict=True))


def _up_to_end(ids: Sequence[int], mask: Sequence[int]) -> list[int]:
    """Return the tokens up to the last that is trained, where the reward stands."""
    return list(ids[: max(place for place, trained in enumerate(mask) if trained) + 1])


def _told(row: dict[str, Any], rewards: Sequence[float], dropped: str | None) -> dict[str, Any]:
    names = ("chosen_reward", "rejected_reward") if "chosen" in row else ("reward",)
    if not rewards:
        return dict.fromkeys(names) | {"left_out": dropped}
    return dict(zip(names, rewards[-len(names) :], strict=True))


if __name__ == "__main__":
    end_process(main)
