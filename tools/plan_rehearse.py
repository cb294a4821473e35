"""`tools/plan.py --rehearse`: a real step of chosen ranks of the recipe's own layout, in one process without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import BadInput
from configs.fp8 import RECIPES
from configs.plan.derive import Layout, derive_layout
from configs.plan.estimate import MemoryEstimate, estimate_stages
from configs.rules.check import check_config
from configs.search.search import Machine
from configs.stages import Config
from parallel.platform.fake.runtime import build_runtime, fake_environment
from parallel.topology import coordinates_of, rank_of
from tools.plan_table import GIB, table_text

_ROOT = Path(__file__).resolve().parents[1]
ENDS, CORNERS = "ends", "corners"


@dataclass(frozen=True)
class _Call:
    """A collective, send or receive, as the process wrote it down."""

    operation: str
    group: tuple[int, ...]
    name: str
    num_elements: int
    dtype: str
    peer: int | None


def rehearse(config: Config, stage: str, machine: Machine, which: str) -> bool:
    """Rehearse the ranks that `which` names and print what they did; return whether all that they share agrees.

    `which` is ranks with commas between, `ends` (the first rank and its like on the last pipeline stage) or `corners`
    (the first rank, and its neighbour and the last rank on each axis). Raises BadInput for what cannot be rehearsed,
    and for a step that fails.
    """
    config, changes = _without_te(config)
    problems = check_config(config, machine.gpus, platform=machine.platform, has_te=False)
    if problems:
        raise BadInput(f"--rehearse, which has no Transformer Engine: {problems[0]}")
    layout = derive_layout(config, machine.gpus)
    ranks = choose_ranks(which, layout)
    plans = estimate_stages(config, layout)
    for change in changes:
        print(f"rehearsed with {change}: Transformer Engine's kernels run on GPUs alone")
    calls: dict[int, list[_Call]] = {}
    for outcome in _run(config, stage, machine.gpus, ranks):
        rank = outcome["rank"]
        if outcome["error"] is not None:
            where = " < ".join(outcome["places"][:3])
            raise BadInput(
                f"--rehearse: rank {rank} ({coordinates_of(rank, layout)}) fails: {outcome['error']}; {where}"
            )
        calls[rank] = [_Call(**call | {"group": tuple(outcome["groups"][call["group"]])}) for call in outcome["calls"]]
        plan = plans[coordinates_of(rank, layout).pp]
        what = f"{outcome['num_microbatches']} microbatches, {len(calls[rank]):,} collectives, sends and receives"
        print(f"\n{outcome['place']}: {what}, {outcome['seconds']:.1f} s")
        print("\n".join(_memory_lines(outcome["memory"], plan, machine)))
    return _tell_order(calls)


def choose_ranks(which: str, layout: Layout) -> list[int]:
    """Return the ranks that `which` names, ascending; raise BadInput for ranks that the job does not have."""
    if which == ENDS:
        return sorted({0, rank_of(layout, pp=layout.pp - 1)})
    if which == CORNERS:
        sizes = {"tp": layout.tp, "cp": layout.cp, "dp": layout.dp, "pp": layout.pp}
        near = {rank_of(layout, **{axis: min(1, size - 1)}) for axis, size in sizes.items()}
        return sorted({0, *near, *(rank_of(layout, **{axis: size - 1}) for axis, size in sizes.items())})
    ranks = set()
    for word in which.split(","):
        if not word.strip().isdecimal() or int(word) >= layout.world_size:
            raise BadInput(
                f"--rehearse: {word.strip()!r} is not a rank of {layout.world_size}; write ranks such as "
                f"0,{layout.world_size - 1}, or {ENDS} or {CORNERS}"
            )
        ranks.add(int(word))
    return sorted(ranks)


def _without_te(config: Config) -> tuple[Config, list[str]]:
    """Return the config on torch's own kernels, and what that changes."""
    fp8 = config.precision.fp8
    if fp8 is None or fp8.backend == "torch":
        return config, []
    if "torch" not in RECIPES[fp8.recipe].backends:
        raise BadInput(
            f"--rehearse: precision.fp8.recipe={fp8.recipe} runs in Transformer Engine alone, whose kernels need a "
            "GPU; a value that would work: precision.fp8=null, which rehearses all else"
        )
    changed = fp8.model_copy(update={"backend": "torch", "param_gather": False})
    precision = config.precision.model_copy(update={"fp8": changed})
    texts = ["precision.fp8.backend=torch"] + ["precision.fp8.param_gather=false"] * fp8.param_gather
    return config.model_copy(update={"precision": precision}), [" ".join(texts)]


def _run(config: Config, stage: str, world_size: int, ranks: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yield what became of each rank, as soon as it is known."""
    asked = {"stage": stage, "config": config.model_dump(mode="json"), "world_size": world_size, "ranks": list(ranks)}
    with tempfile.TemporaryDirectory() as folder:
        environment = fake_environment(build_runtime(Path(folder)), _ROOT)
        command = [sys.executable, "-m", "trainer.rehearse.worker"]
        errors = Path(folder) / "errors"
        with (
            errors.open("w") as stderr,
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, env=environment, text=True
            ) as process,
        ):
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(json.dumps(asked))
            process.stdin.close()
            try:
                yield from map(json.loads, process.stdout)
            finally:
                process.terminate()
        if process.returncode not in (0, -15):
            last = errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise BadInput(f"--rehearse: the process ended with {process.returncode}: {last[-1] if last else ''}")


def _memory_lines(memory: dict[str, int], plan: MemoryEstimate, machine: Machine) -> Iterator[str]:
    """Yield the bytes at the peak by kind, beside the plan's."""
    rows = [("", "rehearsed", "planned", "of rehearsed")]
    seen_and_planned = {kind: (memory[kind], getattr(plan, kind)) for kind in ("weights", "gradients", "optimizer")}
    moving = memory["activations"] + memory["logits"], plan.activations + plan.logits
    for kind, (seen, planned) in (seen_and_planned | {"activations and logits": moving}).items():
        share = f"{planned / seen:.3f}" if seen else "-"
        rows.append((kind, f"{seen:,}", f"{planned:,}", "equal" if seen == planned else share))
    total = sum(memory.values())
    rows.append(("buffers", f"{memory['buffers']:,}", "-", "-"))
    rows.append(("bytes in all", f"{total:,}", f"{plan.total:,}", f"{plan.total / total:.3f}"))
    yield table_text(rows)
    if total > machine.usable_bytes:
        yield f"more than {machine.device.name} has to give: {total / GIB:.1f} of {machine.usable_bytes / GIB:.1f} GiB"


def _tell_order(calls: dict[int, list[_Call]]) -> bool:
    """Print whether ranks that share a group agree; return it."""
    from trainer.rehearse.compare import compare_ranks, count_shared

    differences = list(compare_ranks(calls))
    if differences:
        print("\n" + "\n".join(differences))
    elif len(calls) > 1:
        print(f"\norder: {count_shared(calls):,} collectives, sends and receives that these ranks share agree")
    return not differences
