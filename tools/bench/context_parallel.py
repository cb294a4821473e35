"""Measure context parallelism: memory and processor time of a training step, and the bytes that attention sends.

Run: python tools/bench/context_parallel.py [--lengths 2048,...] [--cp 1,2,4] [--rounds 2] [--out FOLDER] (`make bench`)
Every layout and method is a run of its own, with the demo's model on one row of random tokens in fp32. Writes
context_parallel_cpu.json and .svg. Exit code 1 if a run failed or something is not as it should be.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

if not __package__:  # run as a script: the packages are beside tools/, which Python puts first
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configs.load import load_config
from configs.plan.context_bytes import Method, microbatch_bytes
from configs.plan.derive import derive_layout
from configs.plan.estimate import estimate_memory
from parallel.platform import PLATFORM_VARIABLE
from tools.bench.context_report import collect_complaints, draw, print_table
from tools.bench.launching import RunFailed, run_bench
from tools.bench.report import describe_machine
from tools.bench.throughput import CONFIG, ROOT, SETTINGS
from tools.console import Progress, end_process
from tools.paths import path_argument

LENGTHS = (2048, 4096, 8192, 16384, 32768)
SIZES = (1, 2, 4)
NAME = "context_parallel_cpu"


def methods_of(cp: int) -> list[Method | None]:
    """Return the methods that so many ranks have: none for one, `hierarchical` where there are pairs of pairs."""
    if cp == 1:
        return [None]
    return [method for method in get_args(Method) if method != "hierarchical" or cp == 4]


def measure_layout(cp: int, method: Method | None, lengths: Sequence[int], scratch: Path) -> list[dict[str, Any]]:
    """Run one layout and return a row for each length. Raises RunFailed."""
    overrides = [
        *SETTINGS, "parallel.tp=1", f"parallel.cp={cp}", "train.global_batch_size=1", "train.micro_batch_size=1",
        f"train.seq_len={max(lengths)}", f"model.max_position_embeddings={max(lengths)}", "data.train=[{path: none}]",
        *([] if method is None else [f"parallel.cp_attention={method}"]),
        *(["parallel.cp_inner=2"] if method == "hierarchical" else []),
    ]  # fmt: skip
    result, words = scratch / "result.json", ",".join(map(str, lengths))
    script = ROOT / "tools" / "bench" / "context_rank.py"
    command = [sys.executable, "-m", "launch.local", "--nproc-per-node", str(cp)]
    command += [str(script), str(result), words, str(CONFIG), *overrides]
    environment = {"PYTHONWARNINGS": "ignore"} | os.environ | {PLATFORM_VARIABLE: "cpu", "OMP_NUM_THREADS": "1"}
    with (scratch / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        try:
            code = process.wait()
        finally:
            process.terminate()
            process.wait()
    if code:
        lines = (scratch / "log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise RunFailed(f"cp{cp} {method or ''} ended with exit code {code}: {lines[-1] if lines else 'no output'}")
    measures = json.loads(result.read_text(encoding="utf-8"))
    return [_row(cp, method, measure, [*overrides, f"train.seq_len={measure['seq_len']}"]) for measure in measures]


def measure_all(sizes: Sequence[int], lengths: Sequence[int], num_rounds: int) -> Iterator[list[dict[str, Any]]]:
    """Run every layout `num_rounds` times, in turns, and yield after each all rows so far. Raises RunFailed."""
    layouts = [(cp, method) for cp in sizes for method in methods_of(cp)]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="context-") as scratch:
        with Progress("context parallelism", len(layouts) * num_rounds) as progress:
            for number in range(num_rounds):
                for place, (cp, method) in enumerate(layouts, 1):
                    new = measure_layout(cp, method, lengths, Path(scratch))
                    rows += [row | {"round": number} for row in new]
                    seconds = sum(new[-1]["processor_seconds"])
                    progress.show(number * len(layouts) + place, f"cp{cp} {method or ''}: {seconds:.1f} s of processor")
                    yield rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(prog="context_parallel.py", description="What context parallelism costs.")
    parser.add_argument("--lengths", type=_numbers, default=LENGTHS, help=f"tokens of a row ({_words(LENGTHS)})")
    parser.add_argument("--cp", type=_numbers, default=SIZES, help=f"ranks that share a row ({_words(SIZES)})")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each layout (default 2)")
    default_out = ROOT / "tools" / "bench" / "results"
    parser.add_argument("--out", type=path_argument, default=default_out, help="folder of the results")
    arguments = parser.parse_args(argv)
    if not set(arguments.cp) <= set(SIZES):
        parser.error(f"--cp must be of {_words(SIZES)}: the model has four heads; for example --cp 1,2")
    if any(length < 64 or length % 8 for length in arguments.lengths):
        parser.error("--lengths must be multiples of 8 and at least 64, for example --lengths 2048,4096")
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1, for example --rounds 2")
    complaints: list[str] = []

    def command() -> None:
        load_before = os.getloadavg()[0]
        arguments.out.mkdir(parents=True, exist_ok=True)
        rows: list[dict[str, Any]] = []
        for rows in measure_all(arguments.cp, arguments.lengths, arguments.rounds):
            # Each time, so that a stopped command keeps what it has measured.
            machine = describe_machine(f"CPU ranks of one thread, {os.cpu_count()} cores", load_before)
            content = json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n"
            (arguments.out / f"{NAME}.json").write_text(content, encoding="utf-8")
        print_table(rows)
        draw(rows, arguments.out / f"{NAME}.svg")
        complaints.extend(collect_complaints(rows))

    code = run_bench(command)
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    return code or int(bool(complaints))


def _row(cp: int, method: Method | None, measure: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return a measure with its layout, the bytes the formula says, and those of the model's own state."""
    config = load_config(str(CONFIG), overrides)
    state = estimate_memory(config, derive_layout(config, cp))
    sent = (0.0, 0.0)
    if method is not None:
        layers = microbatch_bytes(config, method) * config.model.num_layers
        sent = (layers.forward, layers.backward)
    return {
        "cp": cp,
        "method": method,
        **measure,
        "state_bytes": state.weights + state.gradients + state.optimizer,
        "planned_bytes": sent,
    }


def _numbers(text: str) -> tuple[int, ...]:
    """Read a list of numbers; raises ArgumentTypeError."""
    words = text.split(",")
    if not all(word.isdecimal() for word in words):
        raise argparse.ArgumentTypeError(f"'{text}' is no list of numbers; a value that would work: 1,2")
    return tuple(int(word) for word in words)


def _words(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))


if __name__ == "__main__":
    end_process(main)
