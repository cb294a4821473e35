"""Two hosts with addresses and names of their own, as network namespaces with a link between them, under torchrun."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs.errors import ExitCode

ROOT = Path(__file__).resolve().parents[2]
ADDRESS = "10.213.77.1"


class Hosts:
    """Two network namespaces, `names`, joined by one cable."""

    def __init__(self) -> None:
        self.names = [f"sw{os.getpid()}a", f"sw{os.getpid()}b"]
        self._runs: list[subprocess.Popen[str]] = []

    def open(self) -> None:
        for name in self.names:
            ip("netns", "add", name)
        first, second = self.names
        ip("link", "add", "cable", "netns", first, "type", "veth", "peer", "name", "cable", "netns", second)
        for number, name in enumerate(self.names, start=1):
            ip("-n", name, "addr", "add", f"10.213.77.{number}/24", "dev", "cable")
            ip("-n", name, "link", "set", "lo", "up")
        self.connect()

    def connect(self) -> None:
        for name in self.names:
            ip("-n", name, "link", "set", "cable", "up")

    def cut(self) -> None:
        ip("-n", self.names[1], "link", "set", "cable", "down")

    def start(self, recipe: Path, *overrides: str) -> list[subprocess.Popen[str]]:
        """Start one rank on each host with torchrun."""
        self._runs = [self._start(node, recipe, overrides) for node in range(2)]
        return self._runs

    def _start(self, node: int, recipe: Path, overrides: tuple[str, ...]) -> subprocess.Popen[str]:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
        torchrun += ["--node-rank", str(node), "--master-addr", ADDRESS, "--master-port", "29400"]
        words = [*torchrun, "launch/pretrain.py", str(recipe), *overrides]
        command = f"hostname node{node} && exec " + " ".join(words)
        return subprocess.Popen(
            ["ip", "netns", "exec", self.names[node], "unshare", "--uts", "sh", "-c", command],
            cwd=ROOT,
            env={**os.environ, "GLOO_SOCKET_IFNAME": "cable", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def close(self) -> None:
        for one in self._runs:
            if one.poll() is None:
                os.killpg(one.pid, signal.SIGKILL)
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "unshare"))):
        pytest.skip("network namespaces need root, and ip and unshare of iproute2 and util-linux")
    two = Hosts()
    try:
        two.open()
    except subprocess.CalledProcessError as error:
        two.close()
        pytest.skip(f"this kernel makes no network namespaces: {error.stderr.decode().strip()}")
    try:
        yield two
    finally:
        two.close()


def losses(run_dir: Path) -> dict[int, float]:
    try:
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    except (FileNotFoundError, ValueError):
        return {}
    return {row["step"]: row["loss"] for row in rows}


@pytest.mark.slow
def test_a_cut_link_is_named_and_the_rerun_ends_with_the_losses_of_one_host(hosts, train, recipe, tmp_path):
    run_dir, options = tmp_path / "run", ("train.num_steps=40", "checkpoint.save_every=5", "parallel.tp=2")
    assert train(2, *options, f"run.dir={tmp_path}/one_host")[0] == ExitCode.DONE
    options += ("parallel.timeout_seconds=8",)
    runs = hosts.start(recipe, *options)
    deadline = time.monotonic() + 120
    while len(losses(run_dir)) < 12 and time.monotonic() < deadline and runs[0].poll() is None:
        time.sleep(0.01)
    hosts.cut()
    cut = time.monotonic()
    said = [one.communicate(timeout=90)[0] for one in runs]
    took = time.monotonic() - cut
    assert all("exitcode  : 5" in one for one in said), said
    assert took < 15  # seconds; torchrun takes some of its own
    named = r"nothing passes between the hosts node0 and node1: rank 0 \(tp 0/2, .*\) on node0 waits in .*, rank 1 \(tp"
    assert re.search(named, said[0]), said[0]
    hosts.connect()
    runs = hosts.start(recipe, *options)
    said = [one.communicate(timeout=120)[0] for one in runs]
    assert [one.returncode for one in runs] == [0, 0], said
    assert losses(run_dir) == losses(tmp_path / "one_host")
