"""Talk to a model in the terminal, or answer a file of prompts: a run, a checkpoint or a Hugging Face directory.

Run: [torchrun --nproc-per-node N] tools/chat.py MODEL [parallel.tp=N ...] [--raw] [--prompts FILE --out FILE.jsonl]
At the prompt, /new forgets the conversation, and the end of the input (Ctrl-D) ends it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a script: the packages are beside tools/, which Python puts first
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.errors import BadInput
from tools.console import end_process, run_command
from tools.open_model import open_model, read_config_of, read_template_of
from tools.outputs import check_file
from tools.paths import path_argument
from tools.ranks import read_environment

if TYPE_CHECKING:
    from trainer.data.chat.conversation import Message
    from trainer.data.tokenizer import Tokenizer
    from trainer.engine.sharded_model import ShardedModel
    from trainer.generate.prompts import ChatPrompts, RawPrompts
    from trainer.generate.sampling import Sampling


@dataclass(frozen=True)
class Question:
    """A row of a file of prompts."""

    row: dict[str, Any]
    """As it is written, to be told with the answer."""
    messages: list[Message]
    expected: Any = None
    """The answer that the row has: its text, or the whole turn where it holds more; None without one."""
    tools: Sequence[Mapping[str, Any]] = ()
    """Definitions of what the assistant may call."""

    def told(self, answer: dict[str, Any]) -> dict[str, Any]:
        """Return the row with its answer; what the row has under the same names is kept as `original_*`."""
        found = answer if self.expected is None else {"expected": self.expected, **answer}
        return {f"original_{key}" if key in found else key: value for key, value in self.row.items()} | found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    arguments = _parse(argv)
    return run_command(lambda: _chat(arguments), "stopped", takes_ranks=True)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="chat.py", description="Talk to a model, or answer a file of prompts.")
    parser.add_argument("model", type=path_argument, help="run directory, checkpoint, or Hugging Face directory")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields such as parallel.tp=2")
    parser.add_argument("--raw", action="store_true", help="continue the text as it is, without a chat template")
    parser.add_argument("--system", metavar="TEXT", help="the system prompt")
    parser.add_argument(
        "--template",
        metavar="NAME",
        help="chat template by name or .jinja file (default: the run's, else the tokenizer's)",
    )
    parser.add_argument(
        "--prompts", type=path_argument, metavar="FILE", help="rows as fine-tuning reads them, or lines of text"
    )
    parser.add_argument("--out", type=path_argument, metavar="FILE", help="answers to --prompts (default: printed)")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="of an answer (default: 256)")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 takes the likeliest token (default: 0.7)")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from this share of probability (default: 1.0)")
    parser.add_argument("--top-k", type=int, metavar="N", help="draw from the N likeliest tokens (default: all)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn (default: 0)")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.raw and (arguments.system is not None or arguments.template is not None):
        parser.error("--raw: continues text without a template, and takes neither --system nor --template")
    if arguments.out is not None and arguments.prompts is None:
        parser.error("--out: is for the answers to --prompts FILE")
    return arguments


def _chat(arguments: argparse.Namespace) -> None:
    from trainer.data.tokenizer import load_tokenizer
    from trainer.generate.prompts import ChatPrompts, RawPrompts
    from trainer.generate.sampling import Sampling

    environment = read_environment()
    size = environment.world_size  # a length that every layout of so many ranks can split
    config = read_config_of(arguments.model, arguments.overrides, seq_len=2 * size, world_size=size)
    if config.data.tokenizer is None:
        raise BadInput("data.tokenizer: text needs the model's tokenizer; give data.tokenizer=DIR")
    tokenizer = load_tokenizer(config.data.tokenizer)
    prompts: ChatPrompts | RawPrompts = RawPrompts(tokenizer)
    if not arguments.raw:
        try:
            prompts = ChatPrompts(tokenizer, arguments.template or read_template_of(arguments.model), "--template")
        except BadInput as error:
            raise BadInput(f"{error}; or continue plain text with --raw") from error
    sampling = Sampling(
        arguments.max_new_tokens,
        arguments.temperature,
        arguments.top_k,
        arguments.top_p,
        stop_tokens=prompts.stop_tokens,
        seed=arguments.seed,
    )
    questions = None if arguments.prompts is None else list(_read_questions(arguments.prompts, arguments))
    if arguments.out is not None:
        check_file(arguments.out)
        if arguments.out.exists() and arguments.out.samefile(arguments.prompts):
            raise BadInput(f"--out {arguments.out}: is what --prompts reads; a value that would work: answers.jsonl")
    with open_model(config, arguments.model, environment) as model:
        if questions is None:
            _talk(model, tokenizer, prompts, sampling, arguments.system)
        else:
            _answer(model, tokenizer, prompts, sampling, questions, arguments.out)


def _read_questions(path: Path, arguments: argparse.Namespace) -> Iterator[Question]:
    """Yield what a file asks: each row in the forms that fine-tuning reads, or each line of a text. Raises BadInput."""
    from configs.sections.sft import ConversationSource
    from trainer.data.chat.conversation import BadRow, Message
    from trainer.data.chat.forms import parse_prompt
    from trainer.data.chat.rows import open_rows
    from trainer.data.making.documents import list_inputs

    begin = [] if arguments.system is None else [Message("system", arguments.system)]
    files, _ = list_inputs([str(path)])
    if all(file.kind == "text" for file in files):
        lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        if not lines:
            raise BadInput(f"{path}: holds no prompts; write one a line")
        yield from (Question({"prompt": line}, [*begin, Message("user", line)]) for line in lines)
        return
    source = ConversationSource(path=str(path))
    for file, number, row in open_rows(source, "--prompts"):
        if arguments.raw:
            if not isinstance(row.get("prompt"), str):
                raise BadInput(f'--prompts: row {number} of {file} has no text to go on with; give "prompt": "text"')
            yield Question(row, [Message("user", row["prompt"])])
            continue
        try:
            asked, expected = parse_prompt(row, source)
        except BadRow as error:
            raise BadInput(f"--prompts: row {number} of {file}: {error}") from error
        messages = list(asked.messages)
        yield Question(row, messages if messages[0].role == "system" else [*begin, *messages], expected, asked.tools)


def _answer(
    model: ShardedModel,
    tokenizer: Tokenizer,
    prompts: ChatPrompts | RawPrompts,
    sampling: Sampling,
    questions: Sequence[Question],
    out: Path | None,
) -> None:
    """Answer all at once and write a line of JSON each. Collective: all ranks of the world must call this."""
    from trainer.generate.generator import EngineGenerator

    completions = EngineGenerator(model).generate(
        [prompts.encode(one.messages, one.tools) for one in questions], sampling
    )
    if model.mesh.rank != 0:
        return
    lines = [
        json.dumps(
            one.told({
                "answer": tokenizer.decode(completion.answer_ids),
                "finish": completion.finish,
                "num_tokens": len(completion.token_ids),
            }),
            ensure_ascii=False,
            default=str,  # a table's dates
        )
        for one, completion in zip(questions, completions, strict=True)
    ]  # fmt: skip
    if out is None:
        print("\n".join(lines))
        return
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{out}: {len(lines)} answers")


def _talk(
    model: ShardedModel,
    tokenizer: Tokenizer,
    prompts: ChatPrompts | RawPrompts,
    sampling: Sampling,
    system: str | None,
) -> None:
    """Answer what is typed until the input ends. Collective: all ranks of the world must call this."""
    from parallel.collectives import broadcast_object
    from trainer.data.chat.conversation import Message
    from trainer.generate.generator import EngineGenerator

    begin = [] if system is None else [Message("system", system)]
    messages, generator, is_speaking = list(begin), EngineGenerator(model), model.mesh.rank == 0
    while True:
        text = broadcast_object(_read_line() if is_speaking else None)
        if text is None:
            return
        if text == "/new":
            messages = list(begin)
        if text == "/new" or not text.strip():
            continue
        messages.append(Message("user", text))
        show = _streamer(tokenizer, sampling.stop_tokens) if is_speaking else None
        (completion,) = generator.generate([prompts.encode(messages)], sampling, show)
        messages.append(Message("assistant", tokenizer.decode(completion.answer_ids)))
        if is_speaking:
            print(flush=True)


def _read_line() -> str | None:
    """Return a typed line, or None at the end of the input."""
    if sys.stdin.isatty():
        print("> ", end="", flush=True)
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None


def _streamer(tokenizer: Tokenizer, stop_tokens: Sequence[int]) -> Callable[[int, int, int], None]:
    """Return what prints an answer as its tokens come; a letter that is not yet whole waits for the next token."""
    ids: list[int] = []
    shown = 0

    def show(prompt: int, sample: int, token: int) -> None:
        nonlocal shown
        if token in stop_tokens:
            return
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):
            print(text[shown:], end="", flush=True)
            shown = len(text)

    return show


if __name__ == "__main__":
    end_process(main)
