"""Measure what converting a model costs: memory above the interpreter's, and MB/s next to a plain copy.

Run: python tools/bench/conversion.py [--gigabytes 4] [--out FILE.json]
Makes a Llama of random weights in a scratch directory (three times its size of disk), copies it, imports it and exports
the import, each in a process of its own, and compares the tensors at the end. Exit code 1 if they differ.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: the packages are beside tools/, which Python puts first
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.bench.report import describe_machine
from tools.console import Progress, end_process, run_command
from tools.outputs import check_file
from tools.paths import path_argument

ROOT = Path(__file__).resolve().parents[2]
SHAPE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, "hidden_size": 2048,
    "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "hidden_act": "silu", "torch_dtype": "bfloat16",
}  # fmt: skip
_LAYER_BYTES = 121_643_008
_FILE_BYTES = 10**9


def make_model(directory: Path, num_bytes: int) -> int:
    """Write a model of about `num_bytes` and return its exact size; weights are made one tensor at a time."""
    import torch

    from trainer.hf.config_json import read_model
    from trainer.hf.names import TensorNames
    from trainer.hf.safetensors_files import OutputTensor, plan_files, write_file, write_index
    from trainer.hf.tensors import model_rules

    config = SHAPE | {"num_hidden_layers": max(1, round((num_bytes - 4 * 32000 * 2048) / _LAYER_BYTES))}
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    rules = model_rules(read_model(config), TensorNames())
    tensors = [OutputTensor(part.name, torch.bfloat16, part.shape) for rule in rules for part in rule.hf]
    files = plan_files(tensors, _FILE_BYTES)
    generator = torch.Generator().manual_seed(0)
    with Progress("make", len(files)) as progress:
        for number, (name, group) in enumerate(files.items(), 1):
            write_file(
                directory / name,
                group,
                lambda tensor: torch.empty(tensor.shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator),
            )
            progress.show(number)
    write_index(directory, files)
    return sum(tensor.num_bytes for tensor in tensors)


def measure_copy(source: Path, target: Path) -> float:
    """Return the seconds that copying the files takes, until they are on disk."""
    started = time.perf_counter()
    shutil.copytree(source, target)
    os.sync()
    return time.perf_counter() - started


def measure_tool(arguments: Sequence[str]) -> dict[str, float]:
    """Run `convert_hf.py` in a process of its own and return its seconds, its peak and its baseline memory in bytes."""
    command = [sys.executable, "-m", "tools.bench.conversion", "--inner", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"convert_hf.py {' '.join(arguments)}: {done.stderr.strip().splitlines()[-1]}")
    measure: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return measure


def run_inner(arguments: Sequence[str]) -> int:
    """Import what the command will, note the memory, run it, and print what it took as JSON."""
    import torch.distributed.checkpoint  # noqa: F401  the baseline holds the libraries

    import trainer.hf.export_source  # noqa: F401
    from tools.convert_hf import main

    baseline = _peak_bytes()
    started = time.perf_counter()
    code = main(arguments)
    os.sync()
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "baseline_bytes": baseline, "peak_bytes": _peak_bytes()}))
    return code


def measure_all(num_bytes: int, scratch: Path) -> dict[str, Any]:
    """Return every figure; raises RuntimeError if what comes out is not what went in."""
    source, run_dir, out = scratch / "hf", scratch / "run", scratch / "out"
    size = make_model(source, num_bytes)
    copied = measure_copy(source, scratch / "copy")
    shutil.rmtree(scratch / "copy")
    imported = measure_tool(["import", str(source), str(run_dir)])
    exported = measure_tool(["export", str(run_dir), str(out)])
    _compare(source, out)
    return {"bytes": size, "copy": {"seconds": copied}, "import": imported, "export": exported}


def print_table(figures: dict[str, Any]) -> None:
    """Print MB/s, and memory above the baseline."""
    size = figures["bytes"]
    print(f"{'':8}{'seconds':>10}{'MB/s':>10}{'peak above baseline':>24}{'baseline':>12}")
    for name in ("copy", "import", "export"):
        row = figures[name]
        memory = ""
        if "peak_bytes" in row:
            above = (row["peak_bytes"] - row["baseline_bytes"]) / 1e6
            memory = f"{above:>21,.0f} MB{row['baseline_bytes'] / 1e6:>9,.0f} MB"
        print(f"{name:8}{row['seconds']:>10.1f}{size / 1e6 / row['seconds']:>10,.0f}{memory}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["--inner"]:
        return run_inner(words[1:])
    parser = argparse.ArgumentParser(prog="conversion.py", description="Memory and MB/s of converting a model.")
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of the model (default 4)")
    default_out = ROOT / "tools" / "bench" / "results" / "conversion_cpu.json"
    parser.add_argument("--out", type=path_argument, default=default_out, help="result file")
    arguments = parser.parse_args(words)
    if not arguments.gigabytes > 0:
        parser.error("--gigabytes must be above 0, for example 4")

    def command() -> None:
        check_file(arguments.out)
        with tempfile.TemporaryDirectory(prefix="convert-") as scratch:
            figures = measure_all(int(arguments.gigabytes * 1e9), Path(scratch))
        print_table(figures)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        machine = describe_machine("CPU", os.getloadavg()[0])
        arguments.out.write_text(json.dumps({"machine": machine, **figures}, indent=1) + "\n", encoding="utf-8")

    try:
        return run_command(command)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _compare(source: Path, out: Path) -> None:
    """Raise RuntimeError unless both hold the same tensors, bit for bit."""
    import torch

    from trainer.hf.safetensors_files import SafetensorsDirectory

    before, after = SafetensorsDirectory(source), SafetensorsDirectory(out)
    same = before.tensors.keys() == after.tensors.keys()
    if not same or not all(torch.equal(before.read(name), after.read(name)) for name in before.tensors):
        raise RuntimeError("the export differs from what was imported")


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    end_process(main)
