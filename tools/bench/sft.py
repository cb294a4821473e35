"""Measure fine-tuning: tokens/s of our loop against TRL's `SFTTrainer`, MB/s of our cache against `datasets.map`.

Run: python tools/bench/sft.py [--steps 60] [--rounds 3] [--chats FILE.jsonl --tokenizer DIR] [--out FILE.json]
On made-up chats, both on one rank of the CPU and with the demo's model, both packed and with one mask; the loops take
turns step by step. Both tokenise one file with the same processes, in turns too, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: the packages are beside tools/, which Python puts first
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.bench.chats import write_chats, write_tokenizer
from tools.bench.compare import Measure, bootstrap_interval, compare
from tools.bench.launching import RunFailed, run_bench
from tools.bench.report import PACKAGES, describe_machine, print_report
from tools.bench.throughput import NUM_WARMUP, ROOT, Case, measure_case
from tools.console import Progress, end_process
from tools.outputs import check_file
from tools.paths import path_argument

SIDES = ("ours", "datasets", "datasets_without_mask")
_MEGABYTES = 10
_MODEL_VOCABULARY, _REAL_VOCABULARY = 4096, 32_000


def measure_loops(num_steps: int, scratch: Path) -> list[Measure]:
    """Return what both loops measured. Raises RunFailed."""
    chats, tokenizer = scratch / "chats.jsonl", scratch / "small"
    write_chats(chats)
    write_tokenizer(chats, tokenizer, _MODEL_VOCABULARY)
    overrides = ("parallel.tp=1", f"data.tokenizer={tokenizer}")
    case = Case("SFT, 1 rank", 1, overrides, ("fit", "trl"), stage="sft")
    with Progress(case.layout, NUM_WARMUP + num_steps) as progress:
        return measure_case(case, num_steps, chats, progress)


def measure_tokenising(chats: Path, tokenizer: Path, num_rounds: int, num_processes: int) -> dict[str, Any]:
    """Return each round's seconds of every side, and what it made. Raises RunFailed."""
    rounds: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    with Progress("tokenise", num_rounds) as progress:
        for number in range(num_rounds):
            for side in reversed(SIDES) if number % 2 else SIDES:
                rounds[side].append(_tokenise(side, chats, tokenizer, num_processes))
            progress.show(number + 1)
    made = {side: (every[0]["num_samples"], every[0]["num_tokens"]) for side, every in rounds.items()}
    if len(set(made.values())) > 1:
        raise RunFailed(f"the sides made other samples and tokens: {made}")
    size = chats.stat().st_size / 1e6
    figures: dict[str, Any] = {"megabytes": size, "processes": num_processes, "rounds": rounds}
    for side in SIDES:
        seconds = [one["seconds"] for one in rounds[side]]
        ratios = [theirs / one["seconds"] for theirs, one in zip(seconds, rounds["ours"], strict=True)]
        processor = [one["processor_seconds"] for one in rounds[side]]
        figures[side] = {
            "megabytes_per_second": size / statistics.median(seconds),
            "megabytes_per_processor_second": size / statistics.median(processor),
            "ours_to_it": statistics.median(ratios),
            "interval": bootstrap_interval(ratios),
        }
    return figures


def _tokenise(side: str, chats: Path, tokenizer: Path, num_processes: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="tokenise-") as cache:
        words = ["-m", "tools.bench.tokenising", side, str(chats), str(tokenizer), cache, str(num_processes)]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
        done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RunFailed(f"tokenising by {side}: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
    figures: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


def print_tokenising(figures: dict[str, Any]) -> None:
    """Print MB/s of every side."""
    names = {
        "ours": "our cache",
        "datasets": "datasets.map, with a mask",
        "datasets_without_mask": "datasets.map, without one",
    }
    print(f"{figures['megabytes']:.1f} MB of chats, {figures['processes']} processes, {_num_made(figures)}")
    for side in SIDES:
        row = figures[side]
        print(
            f"{names[side]:28}{row['megabytes_per_second']:8.2f} MB/s {row['megabytes_per_processor_second']:8.2f} MB "
            f"a processor second; ours is {row['ours_to_it']:.2f} times as fast"
        )


def _num_made(figures: dict[str, Any]) -> str:
    made = figures["rounds"]["ours"][0]
    return f"{made['num_samples']:,} samples of {made['num_tokens']:,} tokens"


def measure_all(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure both and print them. Raises RunFailed."""
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        measures = measure_loops(arguments.steps, Path(name))
        chats, tokenizer = arguments.chats, arguments.tokenizer
        if chats is None:
            chats, tokenizer = Path(name) / "many.jsonl", Path(name) / "large"
            write_chats(chats, _MEGABYTES * 10**6)
            write_tokenizer(Path(name) / "chats.jsonl", tokenizer, _REAL_VOCABULARY)
        tokenising = measure_tokenising(chats, tokenizer, arguments.rounds, arguments.processes)
    packages = (*PACKAGES, "trl", "datasets")
    machine = describe_machine(measures[0].report.device, load_before, packages)
    comparisons = compare(measures)
    print_report(machine, comparisons)
    print_tokenising(tokenising)
    runs = [asdict(measure) for measure in measures]
    return {"machine": machine, "comparisons": comparisons, "runs": runs, "tokenising": tokenising}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(prog="sft.py", description="Our fine-tuning against TRL's and datasets.map.")
    parser.add_argument("--steps", type=int, default=60, metavar="N", help="measured steps of each loop (default 60)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="turns of tokenising (default 3)")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="that tokenise, of either (default 2)")
    parser.add_argument("--chats", type=path_argument, metavar="FILE", help="JSON Lines with `messages` to tokenise")
    parser.add_argument("--tokenizer", type=path_argument, metavar="DIR", help="with ChatML's tokens; for --chats")
    default_out = ROOT / "tools" / "bench" / "results" / "sft_cpu.json"
    parser.add_argument("--out", type=path_argument, default=default_out, metavar="FILE", help="result file")
    arguments = parser.parse_args(argv)
    if arguments.steps < 2 or arguments.rounds < 1 or arguments.processes < 1:
        parser.error("--steps must be at least 2, --rounds and --processes at least 1; try 60, 3 and 2")
    if (arguments.chats is None) != (arguments.tokenizer is None):
        parser.error("--chats and --tokenizer go together: a tokenizer of 32,000 tokens is made for made-up chats")

    def command() -> None:
        check_file(arguments.out)
        figures = measure_all(arguments)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")

    return run_bench(command)


if __name__ == "__main__":
    end_process(main)
