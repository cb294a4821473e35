"""Measure what our training loop costs: tokens/s of `fit` against a bare megatron-core loop and Hugging Face's Trainer.

Run: python tools/bench/throughput.py [--steps 120] [--out FILE.json]   (`make bench`)
Every loop is a run of its own, with the demo's model on made-up tokens in fp32; the runs take turns step by step.
On CPU ranks (tools/gpu_check.py runs it on a GPU). Exit code 1 if a run failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

if not __package__:  # run as a script: the packages are beside tools/, which Python puts first
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from parallel.platform import PLATFORM_VARIABLE, PlatformName
from tools.bench.clock import RunReport
from tools.bench.compare import Measure, compare
from tools.bench.launching import RunFailed, run_bench
from tools.bench.report import describe_machine, print_report, write_report
from tools.bench.turns import Conductor
from tools.console import Progress, end_process
from tools.made_up_data import write_made_up_dataset
from tools.outputs import check_file
from tools.paths import path_argument

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "demo" / "pretrain.yaml"
NUM_WARMUP = 2
ALONE = ("hf", "trl", "trl_dpo", "trl_grpo")
"""Loops that need no launcher."""
_SETTINGS = (
    "train.eval_every=null",
    "precision.compute=fp32",
    "schedule.kind=constant",
    "schedule.warmup_steps=0",
    "checkpoint.save_every=null",
    "parallel.pp=1",
)
SETTINGS = (
    *_SETTINGS,
    "data.tokenizer=null",
    "data.validation=[]",
    "sample.prompts=[]",
    "train.global_batch_size=4",
)
_ON_CHATS = (*_SETTINGS, "checkpoint.init_from=null", "train.log_every=10")
FINE_TUNING = (*_ON_CHATS, "sft.validation=[]", "sft.num_answers=0")
PREFERENCES = (*_ON_CHATS, "preference.validation=[]", "preference.num_answers=0")
REINFORCEMENT = (
    *_ON_CHATS,
    "grpo.validation=[]",
    "grpo.rewards=[{function: 'tools.bench.vowel_reward:share_of_vowels'}]",
)


@dataclass(frozen=True)
class Case:
    """One layout and the loops that run on it; `fit`, the first, is compared with each of the others."""

    layout: str
    num_ranks: int
    overrides: tuple[str, ...]
    loops: tuple[str, ...]
    stage: str = "pretrain"

    def words(self, data: Path, run_dir: Path) -> list[str]:
        """Return stage, config and overrides of a run on a dataset, or on a file of conversations."""
        settings, field = {
            "pretrain": (SETTINGS, "data.train"),
            "sft": (FINE_TUNING, "sft.train"),
            "preference": (PREFERENCES, "preference.train"),
            "grpo": (REINFORCEMENT, "grpo.prompts"),
        }[self.stage]
        paths = [f"{field}=[{{path: {data}}}]", f"run.dir={run_dir}"]
        if self.stage in ("sft", "preference"):
            paths.append(f"{self.stage}.cache={run_dir.parent / 'cache'}")
        config = CONFIG.with_name(f"{self.stage}.yaml")
        return [self.stage, str(config), *settings, *self.overrides, *paths]


CASES = (
    Case("1 rank", 1, ("parallel.tp=1",), ("fit", "bare", "hf")),
    Case("tp2", 2, ("parallel.tp=2",), ("fit", "bare")),
    # Four microbatches, as the demo has: with one, a stage would only ever wait for the other.
    Case("pp2", 2, ("parallel.tp=1", "parallel.pp=2", "train.micro_batch_size=1"), ("fit", "bare")),
)


class _Run:
    """One loop's processes."""

    def __init__(
        self, case: Case, loop: str, num_steps: int, data: Path, scratch: Path, platform: PlatformName
    ) -> None:
        self.loop, self._layout = loop, case.layout
        self._result, self._log = scratch / f"{loop}.json", scratch / f"{loop}.log"
        script = ROOT / "tools" / "bench" / "one_run.py"
        launcher = ["-m", "launch.local", "--nproc-per-node", str(case.num_ranks)] if loop not in ALONE else []
        words = [loop, str(self._result), str(scratch), str(NUM_WARMUP), str(num_steps)]
        words += case.words(data, scratch / loop)
        environment = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"} | os.environ | {PLATFORM_VARIABLE: platform}
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *launcher, str(script), *words], cwd=ROOT, env=environment, stdout=log, stderr=log
            )

    def check(self) -> None:
        """Raise RunFailed if the run has ended with an error."""
        if self.process.poll():
            lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            code, last = self.process.returncode, lines[-1] if lines else "no output"
            raise RunFailed(f"{self.loop} on {self._layout} ended with exit code {code}: {last}")

    def report(self) -> RunReport:
        """Wait for the run's end and return what it reported. Raises RunFailed."""
        self.process.wait()
        self.check()
        return RunReport(**json.loads(self._result.read_text(encoding="utf-8")))


def measure_case(
    case: Case, num_steps: int, data: Path, progress: Progress | None = None, platform: PlatformName = "cpu"
) -> list[Measure]:
    """Run every loop of a case at once, in turns, and return what each measured. Raises RunFailed."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        runs: list[_Run] = []

        def check() -> None:
            for run in runs:
                run.check()

        with Conductor(Path(name), case.loops, case.num_ranks, check) as conductor, _ending(runs):
            runs += [_Run(case, loop, num_steps, data, Path(name), platform) for loop in case.loops]
            rounds = []
            for number in range(NUM_WARMUP + num_steps):
                rounds.append(conductor.take_round(is_backwards=number % 2 == 1))
                if progress is not None:
                    progress.show(number + 1, ", ".join(f"{key} {value:.2f} s" for key, value in rounds[-1].items()))
            conductor.release()
            reports = [run.report() for run in runs]
    steps = rounds[NUM_WARMUP:]
    return [Measure(case.layout, report, [step[report.loop] for step in steps]) for report in reports]


@contextmanager
def _ending(runs: list[_Run]) -> Iterator[None]:
    """Leave no process behind, whatever happens."""
    try:
        yield
    finally:
        for run in runs:
            run.process.terminate()
        for run in runs:
            run.process.wait()


def measure_all(num_steps: int) -> list[Measure]:
    """Measure every case on made-up tokens. Raises RunFailed."""
    measures = []
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        data = Path(scratch) / "tokens"
        write_made_up_dataset(data, num_tokens=500_000, vocab_size=4096)
        for case in CASES:
            with Progress(case.layout, NUM_WARMUP + num_steps) as progress:
                measures += measure_case(case, num_steps, data, progress)
    return measures


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(prog="throughput.py", description="Tokens/s of our loop against two others.")
    parser.add_argument(
        "--steps", type=int, default=120, help=f"measured steps of each loop, after {NUM_WARMUP} (default 120)"
    )
    default_out = ROOT / "tools" / "bench" / "results" / "throughput_cpu.json"
    parser.add_argument("--out", type=path_argument, default=default_out, help="result file")
    arguments = parser.parse_args(argv)
    if arguments.steps < 2:
        parser.error("--steps must be at least 2, for example --steps 20")

    def command() -> None:
        check_file(arguments.out)
        load_before = os.getloadavg()[0]
        measures = measure_all(arguments.steps)
        machine = describe_machine(measures[0].report.device, load_before)
        comparisons = compare(measures)
        write_report(arguments.out, machine, comparisons, [asdict(measure) for measure in measures])
        print_report(machine, comparisons)

    return run_bench(command)


if __name__ == "__main__":
    end_process(main)
