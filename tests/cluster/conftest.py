"""A SLURM of four nodes on this machine, a tiny recipe, and what tests ask of jobs. Skips where it cannot be."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAB = ROOT / "tests" / "cluster" / "slurm_lab.sh"
CLUSTER = ROOT / "configs" / "clusters" / "lab.yaml"
SENTENCES = ["def add(a, b):\n    return a + b\n", "import os\nprint(os.getcwd())\n", "for i in range(9):\n    pass\n"]


@dataclass(frozen=True)
class Lab:
    """A running SLURM."""

    folder: Path

    def ask(self, *words: str) -> str:
        """Return what a command says."""
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, cwd=ROOT)
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        return done.stdout.strip()

    def submit(self, *words: str) -> list[str]:
        """Submit by `launch/slurm.py` and return the numbers of the jobs."""
        said = self.ask(sys.executable, "launch/slurm.py", *words)
        return [line.split(":")[0].removeprefix("job ") for line in said.splitlines() if line.startswith("job ")]

    def state(self, job: str) -> str:
        """Return a job's state, such as RUNNING."""
        return self.show(job, "JobState")

    def show(self, job: str, field: str) -> str:
        """Return a field that SLURM knows of a job."""
        shown = self.ask("scontrol", "show", "job", job).split()
        return next(word.removeprefix(f"{field}=") for word in shown if word.startswith(f"{field}="))

    def nodes_of(self, job: str) -> list[str]:
        """Return the names of the nodes that a job runs on."""
        return self.ask("scontrol", "show", "hostnames", self.show(job, "NodeList")).split()

    def wait(self, what: Callable[[], bool], run_dir: Path, seconds: float = 180.0) -> None:
        """Wait until something is so."""
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, self.describe(run_dir)
            time.sleep(0.1)

    def wait_for_end(self, job: str, run_dir: Path) -> str:
        """Return the state in which a job ends."""
        self.wait(lambda: self.state(job) not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"), run_dir)
        return self.state(job)

    def wait_for_requeue(self, job: str, run_dir: Path) -> None:
        """Wait until a job is back in the queue.

        It begins again after SLURM's delay, here 6 seconds: StartTime=now, in the second of the requeue, would have its
        new credential taken for the old one, which is revoked.
        """
        self.wait(lambda: self.state(job) == "PENDING" and self.show(job, "Restarts") != "0", run_dir)

    def describe(self, run_dir: Path) -> str:
        """Return what a test that fails should show."""
        logs = [path.read_text() for path in sorted((run_dir / "logs" / "slurm").glob("*.log"))]
        return "\n".join([self.ask("squeue"), self.ask("sinfo"), *logs])[-6000:]

    def pids_of(self, node: str) -> list[int]:
        """Return the processes of a node: those that share its host name; none where its daemon is gone."""
        file = self.folder / "run" / f"slurmd.{node}.pid"
        mine = _namespace(int(file.read_text())) if file.exists() else None
        if mine is None:
            return []
        pids = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
        return [pid for pid in pids if _namespace(pid) == mine]


def _namespace(pid: int) -> str | None:
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{pid}/ns/uts")
    return None


def _why_not() -> str | None:
    """Return why no SLURM can run here."""
    if os.geteuid() != 0:
        return "starting SLURM's daemons needs root"
    if shutil.which("slurmctld") is None or shutil.which("munged") is None:
        return "SLURM is not installed (tests/cluster/slurm_lab.sh install, as root on Debian)"
    if subprocess.run(["unshare", "--uts", "--mount", "true"], capture_output=True).returncode != 0:
        return "this machine gives no namespaces (unshare), by which the nodes have host names of their own"
    return None


@pytest.fixture(scope="session")
def lab(tmp_path_factory) -> Iterator[Lab]:
    """Start SLURM, and stop it again with all that it has started."""
    reason = _why_not()
    if reason is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("slurm")
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    running = Lab(folder)
    try:
        subprocess.run([LAB, "start", folder, "4"], check=True, timeout=60)
        yield running
        running.ask("scancel", "--user=root")
    finally:
        left = [pid for number in range(1, 5) for pid in running.pids_of(f"n{number}")]
        subprocess.run([LAB, "stop", folder], timeout=60)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        del os.environ["SLURM_CONF"]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Return a directory with `tokenizer` and `train.*`."""
    from tools.preprocess_data import preprocess
    from tools.train_tokenizer import train_tokenizer
    from trainer.data.making.documents import InputFile
    from trainer.data.making.workers import Recipe

    folder = tmp_path_factory.mktemp("corpus")
    texts = (SENTENCES[number % 3] * (1 + number % 5) for number in range(300))
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = InputFile(str(folder / "train.jsonl"), "jsonl")
    train_tokenizer([source], str(folder / "tokenizer"), 300)
    preprocess([source], Recipe(str(folder / "tokenizer")), str(folder / "train"))
    return folder


@pytest.fixture
def recipe(corpus, tmp_path) -> Path:
    """Return the YAML of a tiny run on the corpus."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"""
model: {{num_layers: 2, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 4, num_query_groups: 2,
         vocab_size: 300, vocab_pad_multiple: 16, max_position_embeddings: 64, tie_embeddings: true}}
precision: {{compute: fp32}}
parallel: {{timeout_seconds: 300}}
data: {{tokenizer: {corpus / "tokenizer"}, train: [{{path: {corpus / "train"}}}]}}
train: {{num_steps: 60, seq_len: 32, global_batch_size: 8, micro_batch_size: 2}}
optimizer: {{lr: 1.0e-2, min_lr: 1.0e-3}}
checkpoint: {{save_every: 10, keep_last: 20}}
""",
        encoding="utf-8",
    )
    return path


def losses(run_dir: Path) -> list[float]:
    """Return the loss of every step that metrics.jsonl has."""
    with contextlib.suppress(FileNotFoundError):
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        return [row["loss"] for row in rows if row["step"] > 0]
    return []
