"""Measure generation in tokens/s next to `transformers.generate`: the same model, prompts and, which is checked, text.

Run: OMP_NUM_THREADS=1 python tools/bench/generation.py [--rounds 8] [--out FILE.json]
A Llama of random weights (22 million parameters), 16 prompts of 32 tokens, 128 new tokens each, greedily, in fp32 on
one rank. Both take turns in one process, so that they see the machine in the same state. Exit code 1 if they differ.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: the packages are beside tools/, which Python puts first
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from parallel.platform import detect_platform_name
from tools.bench.compare import bootstrap_interval
from tools.bench.report import describe_machine
from tools.console import Progress, end_process, run_command
from tools.open_model import open_model, read_config_of
from tools.outputs import check_file
from tools.paths import path_argument
from tools.ranks import read_environment

SHAPE = {
    "vocab_size": 8192, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 10,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.05,
    "tie_word_embeddings": False,
}  # fmt: skip
NUM_PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 16, 32, 128


def measure(directory: Path, num_rounds: int) -> dict[str, Any]:
    """Return the seconds of each round of both, from one to be thrown away on, and whether the texts are equal."""
    import torch
    import transformers

    from trainer.generate.generator import EngineGenerator
    from trainer.generate.sampling import Sampling

    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).eval()
    theirs.save_pretrained(directory)
    prompts = torch.randint(0, 8192, (NUM_PROMPTS, PROMPT_TOKENS), generator=torch.Generator().manual_seed(1))
    config = read_config_of(directory, [], seq_len=PROMPT_TOKENS, world_size=1)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    answers: dict[str, Any] = {}
    with open_model(config, directory, read_environment()) as model, Progress("generate", num_rounds) as progress:
        generator, sampling = EngineGenerator(model), Sampling(NEW_TOKENS, temperature=0.0)
        loops = {
            "ours": lambda: [one.token_ids for one in generator.generate(prompts.tolist(), sampling)],
            "theirs": lambda: theirs.generate(prompts, **options)[:, PROMPT_TOKENS:].tolist(),
        }
        for number in range(num_rounds + 1):
            for name in ("ours", "theirs") if number % 2 else ("theirs", "ours"):
                started = time.perf_counter()
                with torch.no_grad():
                    answers[name] = loops[name]()
                seconds[name].append(time.perf_counter() - started)
            progress.show(number)
    parameters = sum(one.numel() for one in theirs.parameters())
    return {
        "parameters": parameters,
        "threads": torch.get_num_threads(),
        "is_equal": answers["ours"] == answers["theirs"],
        "seconds": {name: every[1:] for name, every in seconds.items()},
    }


def report(figures: dict[str, Any]) -> dict[str, Any]:
    """Return the figures with tokens/s of both, and how many times theirs ours are."""
    seconds, tokens = figures["seconds"], NUM_PROMPTS * NEW_TOKENS
    ratios = [theirs / ours for ours, theirs in zip(seconds["ours"], seconds["theirs"], strict=True)]
    low, high = bootstrap_interval(ratios)
    rates = {name: tokens / statistics.median(every) for name, every in seconds.items()}
    return figures | {
        "tokens_per_second": rates, "ratio": {"median": statistics.median(ratios), "low": low, "high": high},
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(prog="generation.py", description="Generation next to transformers.generate.")
    parser.add_argument("--rounds", type=int, default=8, metavar="N", help="turns of each (default: 8)")
    parser.add_argument("--out", type=path_argument, help="write the figures as JSON to this file")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 2:
        parser.error(f"--rounds: {arguments.rounds} is too few; a value that would work: 8")
    is_equal = False

    def command() -> None:
        nonlocal is_equal
        if arguments.out is not None:
            check_file(arguments.out)
        load = os.getloadavg()[0]
        with tempfile.TemporaryDirectory(prefix="generation-") as folder:
            figures = report(measure(Path(folder) / "model", arguments.rounds))
        is_equal = figures["is_equal"]
        rates, ratio = figures["tokens_per_second"], figures["ratio"]
        print(
            f"{figures['parameters'] / 1e6:.1f} million parameters, {figures['threads']} thread(s), batch {NUM_PROMPTS}"
        )
        print(f"engine                 {rates['ours']:8.0f} tokens/s")
        print(f"transformers.generate  {rates['theirs']:8.0f} tokens/s")
        print(f"ratio {ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f}), text equal: {is_equal}")
        if arguments.out is not None:
            content = {"machine": describe_machine(detect_platform_name(), load), **figures}
            arguments.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    code = run_command(command)
    return code if code != 0 or is_equal else 1


if __name__ == "__main__":
    end_process(main)
