"""Check one GPU from end to end: collectives, steps, attention, FP8, checkpoints, speed. No network, a few minutes.

Run: python tools/gpu_check.py [--out gpu.json] [--quick] [--only PART_OF_A_NAME ...]
Exit code 0 all passed, 1 a check failed, 2 bad input or no GPU here. A failed check does not stop the others.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a script: the packages are beside tools/, which Python puts first
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.errors import BadInput
from configs.fp8 import RECIPES
from parallel.platform import PlatformName, detect_platform_name, has_transformer_engine
from tools.console import Progress, end_process, run_command
from tools.device_checks.outcome import Outcome, run_check
from tools.outputs import check_file
from tools.paths import path_argument

if TYPE_CHECKING:
    from parallel.mesh import Mesh

HOST: PlatformName = "cpu"
"""The platform that every machine has; checkpoints are moved to it and back."""
PACKAGES = ("torch", "megatron-core", "transformer-engine", "flash-attn", "apex")
STYLES = {"passed": "green", "failed": "bold red", "skipped": "yellow"}

Check = tuple[str, Callable[[], Outcome]]


def list_checks(mesh: Mesh, platform: PlatformName, folder: Path, *, quick: bool) -> Iterator[Check]:
    """Yield every check with its name, the speed of large shapes last since peak memory only grows."""
    from tools.device_checks.attention import check_attention
    from tools.device_checks.checkpoint import check_checkpoint
    from tools.device_checks.hosts import check_device_facts, check_flight_recorder
    from tools.device_checks.lora import check_lora
    from tools.device_checks.models import check_turns
    from tools.device_checks.rewards import check_rewards
    from tools.device_checks.speed import check_speed, small_shape
    from tools.device_checks.steps import check_collectives, check_control_group, check_loss_scaler, check_steps

    yield "device facts", lambda: check_device_facts(mesh)
    yield "collectives", lambda: check_collectives(mesh)
    yield "flight recorder", lambda: check_flight_recorder(mesh)
    yield "control group", lambda: check_control_group(mesh)
    yield from _model_checks(mesh)
    for compute in ("fp32", "bf16", "fp16"):
        yield f"{compute} steps", lambda compute=compute: check_steps(mesh, compute)  # type: ignore[misc]
    yield "fp16 loss scaler", lambda: check_loss_scaler(mesh)
    for compute in ("fp32", "bf16", "fp16"):
        yield (
            f"{compute} attention",
            lambda compute=compute: check_attention(mesh, compute, use_te=False),  # type: ignore[misc]
        )
    if has_transformer_engine():
        # its kernels for packed documents take no fp32
        for compute in ("bf16", "fp16"):
            yield (
                f"{compute} attention (Transformer Engine)",
                lambda compute=compute: check_attention(mesh, compute, use_te=True),  # type: ignore[misc]
            )
    yield from _fp8_checks(mesh)
    compute = "fp16" if mesh.platform.check_precision("bf16") else "bf16"
    yield "LoRA", lambda: check_lora(mesh, compute)
    yield "rewards with LoRA", lambda: check_rewards(mesh, compute, has_adapters=True)
    yield "models by turns", lambda: check_turns(mesh, compute)
    yield "checkpoint", lambda: check_checkpoint(platform, HOST, folder)
    yield "speed, small", lambda: check_speed(mesh, "small", small_shape(compute), num_steps=5 if quick else 20)
    if not quick:
        yield from _speed_checks(mesh, platform, compute)


def _model_checks(mesh: Mesh) -> Iterator[Check]:
    """Yield what a model must do on any device, beside learning: names replaced, scores, rotation, nothing to learn."""
    from tools.device_checks.conversations import check_conversations
    from tools.device_checks.critic import check_critic
    from tools.device_checks.distill import check_distillation
    from tools.device_checks.model import check_generation, check_replaced_names, check_rotation, check_scores
    from tools.device_checks.policy import check_policy
    from tools.device_checks.preferences import check_preferences
    from tools.device_checks.rewards import check_rewards
    from tools.device_checks.routers import check_router_gradient
    from tools.device_checks.steps import check_empty_batch

    yield "replaced names", lambda: check_replaced_names(mesh)
    yield "scores", lambda: check_scores(mesh)
    yield "router losses", lambda: check_router_gradient(mesh)
    yield "empty batch", lambda: check_empty_batch(mesh)
    yield "rotation", lambda: check_rotation(mesh)
    yield "conversations", lambda: check_conversations(mesh)
    yield "preferences", lambda: check_preferences(mesh)
    for compute in ("fp32", "bf16", "fp16"):
        yield f"{compute} generation", lambda compute=compute: check_generation(mesh, compute)  # type: ignore[misc]
        yield f"{compute} policy", lambda compute=compute: check_policy(mesh, compute)  # type: ignore[misc]
        yield f"{compute} rewards", lambda compute=compute: check_rewards(mesh, compute)  # type: ignore[misc]
        yield f"{compute} distillation", lambda compute=compute: check_distillation(mesh, compute)  # type: ignore[misc]
    for compute in ("fp32", "bf16"):
        yield f"{compute} critic", lambda compute=compute: check_critic(mesh, compute)  # type: ignore[misc]


def _fp8_checks(mesh: Mesh) -> Iterator[Check]:
    """Yield what FP8 units can show, or that there are none, and Transformer Engine's recipes where it is installed."""
    from tools.device_checks.fp8 import check_cast, check_multiply
    from tools.device_checks.steps import check_steps

    refusal = mesh.platform.check_fp8("tensorwise")
    if refusal:
        yield "fp8", lambda: Outcome("fp8", "skipped", refusal)
        return
    yield "fp8 cast kernel", lambda: check_cast(mesh)
    backends = ("torch", "te") if has_transformer_engine() else ("torch",)
    for name, recipe in RECIPES.items():
        if "torch" in recipe.backends and not recipe.has_history:
            yield f"fp8 {name} products", lambda name=name: check_multiply(mesh, name)  # type: ignore[misc]
        for backend in backends:
            if backend in recipe.backends:
                section = {"recipe": name, "backend": backend}
                title = f"fp8 {name} steps ({backend})"
                yield title, lambda section=section: check_steps(mesh, "bf16", section)  # type: ignore[misc]


def _speed_checks(mesh: Mesh, platform: PlatformName, compute: str) -> Iterator[Check]:
    """Yield the Llama shapes, small ones first, each in FP8 too where there are units for it."""
    from tools.device_checks.profile import check_profile
    from tools.device_checks.speed import check_loop_cost, check_speed, llama_shape

    formats: list[dict[str, str] | None] = [None]
    if mesh.platform.check_fp8("tensorwise") is None:
        formats.append({"recipe": "tensorwise", "backend": "torch"})
    yield "bare megatron-core loop", lambda: check_loop_cost(platform)
    for model in ("llama3_2_1b", "llama3_2_3b"):
        for seq_len in (4096, 8192):
            for fp8 in formats:
                config = llama_shape(model, compute, seq_len, fp8)
                title = f"{model}, {seq_len}, {'fp8' if fp8 else compute}"
                yield title, lambda t=title, c=config: check_speed(mesh, t, c, num_steps=8)  # type: ignore[misc]
                if seq_len == 8192:
                    yield f"{title}, profile", lambda t=title, c=config: check_profile(mesh, t, c)  # type: ignore[misc]


def run_checks(checks: Sequence[Check], keep: Callable[[list[Outcome]], None] | None = None) -> list[Outcome]:
    """Run all checks, whatever becomes of each, and return their outcomes; `keep` is given what there is after each."""
    outcomes: list[Outcome] = []
    with Progress("gpu_check", len(checks)) as progress:
        for name, check in checks:
            progress.show(len(outcomes), name)
            outcomes.append(run_check(name, check))
            progress.show(len(outcomes), f"{name}: {outcomes[-1].status}")
            if keep is not None:
                keep(outcomes)
    return outcomes


def describe_machine(device: Mapping[str, str]) -> dict[str, Any]:
    """Return the date, the device and the versions of everything that computes."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **device,
        "python": sys.version.split()[0],
        "versions": {name: _version(name) for name in PACKAGES},
    }


def print_table(machine: Mapping[str, Any], outcomes: Sequence[Outcome]) -> None:
    """Print one line a check."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    title = f"{machine['device']}, {machine['collectives']}, torch {machine['torch']}, {machine['date']}"
    table = Table(title=escape(title), title_justify="left")
    for column in ("check", "result", "found", "seconds"):
        table.add_column(column, justify="right" if column == "seconds" else "left")
    for one in outcomes:
        result = f"[{STYLES[one.status]}]{one.status}[/]"
        table.add_row(escape(one.name), result, escape(one.detail), f"{one.seconds:.1f}")
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)


def write_json(path: Path, machine: Mapping[str, Any], outcomes: Sequence[Outcome], *, quick: bool) -> None:
    """Write the outcomes, atomically."""
    content = {"machine": machine, "quick": quick, "checks": [dataclasses.asdict(one) for one in outcomes]}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def choose(checks: Sequence[Check], only: Sequence[str]) -> Sequence[Check]:
    """Return the checks whose name contains one of the texts `only`, or all where there is none. Raises BadInput."""
    chosen = [(name, check) for name, check in checks if not only or any(part in name for part in only)]
    if not chosen:
        raise BadInput(
            f"--only: no check's name contains {' or '.join(only)}; names are {', '.join(n for n, _ in checks)}"
        )
    return chosen


def check_platform(platform: PlatformName, *, quick: bool, out: Path | None, only: Sequence[str] = ()) -> bool:
    """Run the checks on a platform, write `out` after each, print the table, and return whether none failed."""
    from tools.one_rank import open_world

    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder, open_world(platform) as mesh:
        machine = describe_machine(mesh.platform.describe())
        keep = None if out is None else functools.partial(write_json, out, machine, quick=quick)
        checks = choose(list(list_checks(mesh, platform, Path(folder), quick=quick)), only)
        outcomes = run_checks(checks, keep)
    print_table(machine, outcomes)
    return all(one.status != "failed" for one in outcomes)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(prog="gpu_check.py", description="Check one GPU from end to end.")
    parser.add_argument("--out", type=path_argument, help="write the results as JSON to this file")
    parser.add_argument("--quick", action="store_true", help="fewer steps and no large models")
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="checks whose name contains this")
    arguments = parser.parse_args(argv)
    all_passed = True

    def command() -> None:
        nonlocal all_passed
        if arguments.out is not None:
            check_file(arguments.out)
        platform = detect_platform_name()
        if platform == HOST:
            raise BadInput("no GPU here (or it is hidden by SHARDWRIGHT_PLATFORM or the driver's variables).")
        all_passed = check_platform(platform, quick=arguments.quick, out=arguments.out, only=arguments.only)

    code = run_command(command)
    return code if code != 0 or all_passed else 1


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    end_process(main)
