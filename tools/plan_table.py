"""The text of `tools/plan.py`: the ranked table, the winner in full, why layouts are out. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from configs.search.search import Found, Large, Machine, Plan

GIB = 2**30
HEAD = (
    "rank", "tp", "pp", "vpp", "cp", "dp", "ep", "etp", "sp", "layers", "mbs", "recompute",
    "GiB", "s/step", "tokens/s/GPU", "TFLOP/s", "bubble", "waiting",
)  # fmt: skip
TIME_PARTS = ("compute", "host", "tp", "cp", "ep", "pp", "bubble", "dp", "update")
MEMORY_PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "other_models")


def split_text(plan: Plan | Large) -> str:
    """Return how the layers lie over the stages: even, +vocabulary, or the first and last stages' numbers."""
    parallel = plan.config.parallel
    if parallel.vocabulary_counts_as_layers:
        return "+vocab"
    first, last = parallel.num_layers_in_first_pp_stage, parallel.num_layers_in_last_pp_stage
    return "even" if first is None and last is None else f"{first or '='}..{last or '='}"


def recompute_text(plan: Plan | Large) -> str:
    """Return what is recomputed."""
    recompute = plan.config.train.recompute
    return "+".join(recompute.modules) if recompute.granularity == "selective" else recompute.granularity


def layout_cells(plan: Plan | Large) -> tuple[str, ...]:
    """Return the cells of a table that say which layout it is."""
    layout = plan.layout
    sizes = (layout.tp, layout.pp, layout.vpp, layout.cp, layout.dp, layout.ep, layout.etp)
    sp = "yes" if layout.sp else "no"
    return (*map(str, sizes), sp, split_text(plan), str(plan.config.train.micro_batch_size), recompute_text(plan))


def plan_row(rank: int, plan: Plan) -> tuple[str, ...]:
    """Return a layout as a row under `HEAD`."""
    step = plan.step
    waiting = step.tp + step.cp + step.ep + step.pp + step.dp + step.host
    return (
        str(rank),
        *layout_cells(plan),
        f"{plan.memory.total / GIB:.1f}",
        f"{step.total:.3f}",
        f"{step.tokens_per_second:,.0f}",
        f"{step.model_flops_per_second / 1e12:.0f}",
        f"{step.bubble / step.total:.1%}",
        f"{waiting / step.total:.1%}",
    )


def table_text(rows: Sequence[Sequence[str]]) -> str:
    """Return rows under each other, columns to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def overrides_of(plan: Plan | Large) -> list[str]:
    """Return the overrides that make the recipe this layout, each as it is typed in a shell."""
    parallel, train = plan.config.parallel, plan.config.train
    fields = ["tp", "pp", "vpp", "cp", "sp", "num_layers_in_first_pp_stage", "num_layers_in_last_pp_stage"]
    fields += ["vocabulary_counts_as_layers", *(("ep", "etp") if plan.config.model.moe is not None else ())]
    if parallel.cp == 1:
        fields += ["cp_attention", "cp_inner"]
    texts = [f"parallel.{name}={_value(getattr(parallel, name))}" for name in fields]
    texts.append(f"train.micro_batch_size={train.micro_batch_size}")
    texts.append(f"train.recompute.granularity={train.recompute.granularity}")
    if train.recompute.granularity == "selective":
        texts.append(f"'train.recompute.modules=[{', '.join(train.recompute.modules)}]'")
    if train.recompute.granularity == "full":
        texts += [
            f"train.recompute.method={train.recompute.method}",
            f"train.recompute.num_layers={train.recompute.num_layers}",
        ]
    return texts


def describe_plan(plan: Plan, machine: Machine) -> Iterator[str]:
    """Yield the lines that say what a layout takes: memory by kind, time by kind, bytes over each axis."""
    memory, step = plan.memory, plan.step
    sizes = {kind.replace("_", " "): getattr(memory, kind) / GIB for kind in MEMORY_PARTS}
    parts = ", ".join(f"{kind} {size:.2f}" for kind, size in sizes.items() if size or kind != "other models")
    reserve = (machine.device.memory_bytes - machine.usable_bytes) / GIB
    yield f"memory, GiB  {memory.total / GIB:.2f} of {machine.device.memory_bytes / GIB:.1f} on pipeline stage " + (
        f"{memory.pp_rank}: {parts}; {reserve:.1f} kept for buffers and fragmentation"
    )
    spent = ", ".join(f"{part} {getattr(step, part):.3f}" for part in TIME_PARTS if getattr(step, part))
    yield f"seconds      {step.total:.3f} a step: {spent}"
    moved = ", ".join(
        f"{axis} {sent.inside / GIB:.2f} inside the node and {sent.across / GIB:.2f} across"
        for axis, sent in step.sent.items()
        if sent.total
    )
    yield f"GiB sent     by a rank of the slowest stage a step: {moved or 'nothing'}"


def describe_refused(found: Found) -> Iterator[str]:
    """Yield why layouts are out, the most frequent reason first."""
    for name, count in found.refused.most_common():
        yield f"{count:>7,}  {name.strip()}  (such as: {found.examples[name]})"
    if found.too_large:
        yield f"{len(found.too_large):>7,}  memory  ({nearest_text(found.too_large[0])} is the smallest of these)"


def nearest_text(large: Large) -> str:
    """Return a layout that does not fit, in words."""
    names = ("tp", "pp", "vpp", "cp", "dp", "ep", "etp", "sp", "layers", "mbs", "recompute")
    cells = " ".join(f"{name}={text}" for name, text in zip(names, layout_cells(large), strict=True))
    return f"{cells}, {large.memory.total / GIB:.1f} GiB"


def _value(value: object) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
