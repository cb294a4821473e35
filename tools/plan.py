"""Find a recipe's fastest layout on a cluster before a GPU-hour is spent: legal, fitting, by predicted time.

Run: python tools/plan.py configs/pretrain/llama3_1_405b_fp8.yaml --gpus 1024 --device h100 [key=value ...]
Exit code 0 done, 1 rehearsed ranks disagree, 2 bad input. Torch-free; how time is predicted: configs/README.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

if not __package__:  # run as a script: the packages are beside tools/, which Python puts first
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.errors import BadInput
from configs.load import load_config, stage_of_recipe
from configs.plan.devices import DEVICES, find_device
from configs.plan.others import OtherModel, Others
from configs.search.search import RESERVE, Found, Machine, Plan, search
from configs.sections.parallel import ParallelConfig
from configs.stages import STAGE_CONFIGS, WITHOUT_STEPS, Config, GrpoConfig
from parallel.platform import CLUSTER_PLATFORM
from tools.console import end_process, run_command
from tools.outputs import check_file
from tools.paths import path_argument
from tools.plan_rehearse import ENDS, rehearse
from tools.plan_table import (
    GIB,
    HEAD,
    describe_plan,
    describe_refused,
    nearest_text,
    overrides_of,
    plan_row,
    table_text,
)

_STAGES = tuple(stage for stage in STAGE_CONFIGS if stage not in WITHOUT_STEPS)
_SIZES = ("tp", "pp", "vpp", "cp", "ep", "etp", "dp", "mbs")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, plan, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="plan.py", description=(__doc__ or "").partition("\n")[0], formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("recipe", type=path_argument, help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of its fields")
    parser.add_argument("--gpus", type=int, required=True, help="GPUs of the run")
    parser.add_argument("--device", required=True, help=f"one of {', '.join(DEVICES)}")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="GPUs that share links (default 8)")
    parser.add_argument("--stage", choices=_STAGES, help="default: that of the recipe's folder or file, else pretrain")
    parser.add_argument("--top", type=int, default=20, help="layouts to show (default 20)")
    parser.add_argument("--why", metavar="tp=8,pp=4", help="what became of the layouts with these sizes")
    parser.add_argument("--without-te", action="store_true", help="plan without Transformer Engine")
    parser.add_argument("--json", type=path_argument, help="write the layouts that fit as JSON")
    parser.add_argument("--html", type=path_argument, help="write a page with a picture")
    parser.add_argument(
        "--rehearse",
        nargs="?",
        const=ENDS,
        metavar="RANKS",
        help="take a step of some ranks of the recipe's own layout: ends (default), corners, or such as 0,8",
    )
    arguments = parser.parse_intermixed_args(argv)
    named = stage_of_recipe(str(arguments.recipe))
    arguments.stage = arguments.stage or (named if named in _STAGES else "pretrain")
    if "=" in (arguments.rehearse or ""):  # the word behind it is an override
        arguments.overrides.insert(0, arguments.rehearse)
        arguments.rehearse = ENDS
    differing: list[str] = []
    return run_command(lambda: _run(arguments, differing), when_stopped="stopped") or int(bool(differing))


def _run(arguments: argparse.Namespace, differing: list[str]) -> None:
    machine = _machine(arguments)
    for option, out in (("--json", arguments.json), ("--html", arguments.html)):
        if out is not None:
            check_file(out, option)
            if arguments.why or arguments.rehearse is not None:
                raise BadInput(f"{option}: is of the whole table; remove --why or --rehearse, or {option}")
    config = _load(arguments)
    if arguments.rehearse is not None:
        if not rehearse(config, arguments.stage, machine, arguments.rehearse):
            differing.append(arguments.rehearse)
        return
    wanted = _wanted(arguments.why)
    others = _others(config)
    found = search(config, machine, others=others)
    if wanted:
        print("\n".join(_why(config, machine, found, wanted, others)))
        return
    if not found.plans:
        raise BadInput(_nothing(found, machine))
    shown = found.plans[: max(1, arguments.top)]
    print(table_text([HEAD, *(plan_row(rank, plan) for rank, plan in enumerate(shown, start=1))]))
    refused = sum(found.refused.values())
    print(f"\n{len(found.plans):,} layouts fit, {len(found.too_large):,} do not, {refused:,} break a rule:")
    print("\n".join(describe_refused(found)))
    print("\nthe first:")
    print("\n".join(describe_plan(shown[0], machine)))
    if isinstance(config, GrpoConfig):
        print("left out     answers, rewards and scores of a step, and the memory of their keys and values")
    print("overrides    " + " ".join(overrides_of(shown[0])))
    if arguments.json is not None:
        _write_json(arguments.json, found.plans)
    if arguments.html is not None:
        from tools.plan_page import write_plan_page

        title = f"{config.run.name} on {machine.gpus:,} {machine.device.name}"
        write_plan_page(arguments.html, title, found, machine)


def _machine(arguments: argparse.Namespace) -> Machine:
    device = find_device(arguments.device)
    for name in ("gpus", "gpus_per_node"):
        if getattr(arguments, name) < 1:
            raise BadInput(f"--{name.replace('_', '-')}: {getattr(arguments, name)} is no number of GPUs; such as 8")
    return Machine(device, arguments.gpus, arguments.gpus_per_node, not arguments.without_te, CLUSTER_PLATFORM)


def _load(arguments: argparse.Namespace) -> Config:
    """Return the recipe; what of it no layout could mend is wrong input."""
    config = load_config(str(arguments.recipe), arguments.overrides, arguments.stage)
    if not arguments.without_te or config.precision.fp8 is None or config.precision.fp8.backend != "te":
        return config
    raise BadInput("--without-te: the recipe has precision.fp8.backend=te; a value that would work: torch")


def _wanted(text: str | None) -> dict[str, int]:
    """Return the sizes that --why asks for."""
    wanted = {}
    for part in (text or "").split(",") if text is not None else ():
        name, _, value = part.strip().partition("=")
        if name not in _SIZES or not value.isdecimal():
            raise BadInput(f"--why: {part!r} is not a size; write some of {', '.join(_SIZES)}, such as tp=8,pp=4")
        wanted[name] = int(value)
    return wanted


def _others(config: Config) -> Others:
    """Return the models beside the policy, whatever layout they fit; those that are not on this machine are told."""
    from trainer.run.second_models import look_at

    others = {}
    for role, second in config.second_models.items():
        if Path(second.place).exists():
            others[role] = OtherModel(look_at(second, config), second.head, second.is_trained)
            print(f"{role:<12} {others[role].describe()} ({second.field}: {second.place})")
        else:
            print(f"{role:<12} {second.field}: {second.place} is not on this machine, and not counted")
    return others


def _why(config: Config, machine: Machine, all_found: Found, wanted: dict[str, int], others: Others) -> Iterator[str]:
    """Yield what became of the layouts with some sizes, beside the fastest of all."""
    found = search(config, machine, lambda parallel: _has_sizes(parallel, machine, wanted), others)
    micro_batch = wanted.get("mbs")
    plans = [one for one in found.plans if micro_batch in (None, one.config.train.micro_batch_size)]
    refused = sum(found.refused.values())
    if not plans and not found.too_large and not refused:
        yield (
            "none is searched: sizes are divisors of the GPUs (ep of the experts, vpp of a stage's layers), etp is tp "
            f"or 1, tp stays within {machine.gpus_per_node} GPUs, and microbatches are 1, 2, 4 or 8"
        )
        return
    yield f"{len(plans):,} of these layouts fit, {len(found.too_large):,} do not, {refused:,} break a rule:"
    yield from describe_refused(found)
    if plans:
        rank = sum(one.step.total < plans[0].step.total for one in all_found.plans) + 1
        yield f"the fastest of them is number {rank:,} of {len(all_found.plans):,}:"
        yield table_text([HEAD, plan_row(rank, plans[0]), plan_row(1, all_found.plans[0])])
        yield from describe_plan(plans[0], machine)


def _has_sizes(parallel: ParallelConfig, machine: Machine, wanted: dict[str, int]) -> bool:
    """Return whether a layout has the sizes asked for."""
    etp = parallel.tp if parallel.etp is None else parallel.etp
    dp = machine.gpus // (parallel.tp * parallel.pp * parallel.cp)
    known = {"tp": parallel.tp, "pp": parallel.pp, "vpp": parallel.vpp, "cp": parallel.cp, "ep": parallel.ep}
    known |= {"etp": etp, "dp": dp}
    return all(known.get(name, size) == size for name, size in wanted.items())


def _nothing(found: Found, machine: Machine) -> str:
    """Return why no layout is left, as one sentence."""
    if not found.too_large:
        name, count = found.refused.most_common(1)[0]
        if len(found.refused) == 1 and name.partition(".")[0] not in ("parallel", "train", "model"):
            return found.examples[name]  # which has nothing to do with the layout
        return (
            f"--gpus: {machine.gpus} GPUs fit no layout of this recipe; {count:,} of {sum(found.refused.values()):,} "
            f"fail for one reason, such as {found.examples[name]}"
        )
    nearest = found.too_large[0]
    beyond = (nearest.memory.total - machine.usable_bytes) / GIB
    return (
        f"--gpus: no layout fits in the {machine.device.memory_bytes / GIB:.1f} GiB of {machine.device.name}, of which "
        f"{RESERVE:.0%} are kept free; the nearest is {nearest_text(nearest)}, {beyond:.1f} GiB too much; what takes "
        "less: more GPUs, or a shorter train.seq_len"
    )


def _write_json(path: Path, plans: Sequence[Plan]) -> None:
    rows = [
        {
            "rank": rank,
            "layout": asdict(plan.layout),
            "overrides": overrides_of(plan),
            "memory_bytes": asdict(plan.memory) | {"total": plan.memory.total},
            "step_seconds": asdict(plan.step) | {"total": plan.step.total},
        }
        for rank, plan in enumerate(plans, start=1)
    ]
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    end_process(main)
