"""Rules of FP8: what a backend and a machine cannot do, and the sizes that its units want. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from configs.fp8 import RECIPES, Recipe, resolve_backend
from configs.plan.tensors import distinct_linears
from configs.sections.precision import Fp8Config
from configs.stages import Config


def check_backend(fp8: Fp8Config, *, platform: Literal["cpu", "cuda"], has_te: bool) -> Iterator[str]:
    """Yield why this machine cannot run the recipe, if so; a plan for another machine is not asked."""
    path, backend = "precision.fp8.backend", resolve_backend(fp8, has_te=has_te)
    if backend == "emulated":
        return
    if platform == "cpu":
        yield f"{path}: {fp8.backend} needs a GPU with FP8 units; a value that would work here: emulated"
    elif backend == "te" and not has_te:
        works = "torch" if "torch" in RECIPES[fp8.recipe].backends else "emulated"
        yield f"{path}: te needs Transformer Engine, which is not installed here; a value that would work: {works}"
    elif backend not in RECIPES[fp8.recipe].backends:
        yield (
            f"{path}: {fp8.recipe} needs Transformer Engine, which is not installed here; a value that would work: "
            "emulated, or precision.fp8.recipe=tensorwise"
        )
    else:
        yield from _check_of_backend(fp8, backend)


def _check_of_backend(fp8: Fp8Config, backend: str) -> Iterator[str]:
    """Yield what one backend cannot do of what is asked for."""
    path = "precision.fp8"
    if backend == "te" and RECIPES[fp8.recipe].has_history and fp8.num_first_layers_kept + fp8.num_last_layers_kept:
        yield (
            f"{path}.num_first_layers_kept: Transformer Engine's delayed scaling keeps no layer out of FP8; a value "
            f"that would work: 0, or {path}.recipe=tensorwise, or {path}.backend=torch"
        )
    if backend != "te" and fp8.param_gather:
        yield f"{path}.param_gather: needs {path}.backend=te, here it is {backend}; a value that would work: false"


def check_fp8(config: Config) -> Iterator[str]:
    """Yield what no machine could run, one sentence each with a value that would work."""
    fp8, path = config.precision.fp8, "precision.fp8"
    if fp8 is None:
        return
    recipe = RECIPES[fp8.recipe]
    if config.precision.compute == "fp16":
        yield "precision.compute: FP8 with fp16 is not supported; a value that would work: bf16"
    if fp8.backend not in ("auto", *recipe.backends):
        yield (
            f"{path}.backend: {fp8.backend} does not run the recipe {fp8.recipe}; values that would work: "
            f"{', '.join(recipe.backends)}"
        )
    kept, layers = fp8.num_first_layers_kept + fp8.num_last_layers_kept, config.model.num_layers
    if kept >= layers:
        most = 0 if recipe.has_history and fp8.backend == "te" else 1
        yield (
            f"{path}.num_first_layers_kept: with num_last_layers_kept {kept} layers stay out of FP8, which leaves none "
            f"of {layers}; a value that would work: {most} each" + (", or precision.fp8=null" if layers < 3 else "")
        )
    if fp8.backend != "auto":
        yield from _check_of_backend(fp8, fp8.backend)
    elif "te" not in recipe.backends:
        yield from _check_of_backend(fp8, "torch")
    yield from _check_sizes(config, fp8, recipe)


def _check_sizes(config: Config, fp8: Fp8Config, recipe: Recipe) -> Iterator[str]:
    """FP8 units want multiples, and blocks that a split over tp cut differently would give each layout other scales."""
    of_units = 1 if fp8.backend == "emulated" else 32 if fp8.recipe == "mxfp8" else 16
    for name, size, ways, axis in _split_sizes(config):
        share, blocks = size // ways, recipe.alignment if ways > 1 else None
        step = max(of_units, blocks or 1)
        if share % step:
            why = f"in blocks of {step}" if blocks else f"by {step}, as FP8 units need"
            what = f"{size} split over {axis}={ways} is {share}, which" if ways > 1 else f"{size}"
            others = [f"{axis}=1"] if ways > 1 else []
            others += [] if blocks else ["precision.fp8.backend=emulated"]
            yield (
                f"{name}: {what} cannot be divided {why}; a value that would work: "
                f"{-(-size // (step * ways)) * step * ways}, or {' or '.join(others)}"
            )


def _split_sizes(config: Config) -> Iterator[tuple[str, int, int, str]]:
    """Yield the sizes of the layers' linears and over what each is split: field, size, ranks, the axis's field."""
    parallel = config.parallel
    most_ways: dict[tuple[str, int], tuple[int, str]] = {}
    for linear in distinct_linears(config.model):
        if linear.is_router:
            continue
        ways, axis = parallel.tp, "parallel.tp"
        if linear.num_experts is not None:
            ways, axis = parallel.etp or parallel.tp, "parallel.etp"
        for width in (linear.input, linear.output):
            split = (ways, axis) if width is linear.split_width else (1, "parallel.tp")
            key = (width.field, width.size)
            most_ways[key] = max(most_ways.get(key, split), split)
    for (field, size), (ways, axis) in most_ways.items():
        yield field, size, ways, axis
