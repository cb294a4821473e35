"""What a sweep of scaling tests is: its file, the runs that follow from it, what its directory says. Torch-free."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from configs.errors import BadInput
from configs.sections.base import PathText, PositiveFloat, PositiveInt, Section
from configs.stages import STAGE_CONFIGS, WITHOUT_STEPS

SWEEP_FILE = "sweep.json"
KINDS = ("weak", "strong")
_SETTINGS = (
    "train.eval_every=null", "train.log_every=1", "checkpoint.save_every=null", "checkpoint.resume=auto",
    "log.tensorboard=false",
)  # fmt: skip
_UNITS = ("ranks", "nodes")
_OWN_FIELDS = {
    "train.num_steps": "num_steps",
    "train.global_batch_size": "weak and strong",
    "run.name": "the sweep itself",
    "run.dir": "--out",
}
"""Fields of the recipe that each run gets from the sweep, and from what there."""
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-"
_EXAMPLE = "tools/scaling_cpu.yaml"


class Weak(Section):
    """Weak scaling: the batch grows with the ranks."""

    batch_per_rank: PositiveFloat
    """Samples of a step for each rank, whatever it is in the layout; times the ranks it must be a whole number."""


class Strong(Section):
    """Strong scaling: the same batch on all numbers of ranks."""

    global_batch_size: PositiveInt
    """Samples of a step."""


class Sweep(Section):
    """The contents of a sweep's file."""

    recipe: PathText
    """Config of the runs, as an entry point takes it; relative to where the command is started."""
    stage: str = "pretrain"
    """Stage of the recipe."""
    num_steps: PositiveInt
    """Steps of each run."""
    num_warmup: PositiveInt = 3
    """First steps of each run that no figure counts."""
    settings: list[str] = []
    """Overrides `key=value` of all runs."""
    ranks: list[PositiveInt] | None = None
    """Numbers of ranks, for `--local`."""
    nodes: list[PositiveInt] | None = None
    """Numbers of nodes, for `--cluster`."""
    layouts: dict[str, dict[str, Any]]
    """By name: fields of `parallel`, or dotted names of others; `ranks` or `nodes` where it has numbers of its own."""
    weak: Weak | None = None
    strong: Strong | None = None


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    name: str
    """Of its run directory."""
    layout: str
    num_ranks: int
    num_nodes: int | None
    """None for ranks of this machine."""
    global_batch_size: int
    overrides: tuple[str, ...]
    kinds: tuple[str, ...] = field(default=())
    """weak, strong, or both, where one run serves both."""


def read_sweep(path: Path) -> Sweep:
    """Return a sweep's file. Raises BadInput with one line for each problem."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(
            f"{path}: cannot be read ({(error.strerror or str(error)).lower()}); name a sweep such as {_EXAMPLE}"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: is no YAML ({' '.join(str(error).split())}); {_EXAMPLE} shows what works") from None
    if not isinstance(content, Mapping):
        raise BadInput(f"{path}: holds no fields; {_EXAMPLE} shows what works")
    try:
        sweep = Sweep.model_validate(content)
    except ValidationError as error:
        lines = [_sentence(path, one) for one in error.errors()]
        raise BadInput("\n".join(lines)) from None
    problems = list(_problems(sweep))
    if problems:
        raise BadInput("\n".join(f"{path}: {one}" for one in problems))
    return sweep


def _sentence(path: Path, error: Any) -> str:
    name = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        known = Sweep.model_fields if len(error["loc"]) == 1 else {**Weak.model_fields, **Strong.model_fields}
        return f"{path}: {name}: unknown field; the fields are {', '.join(known)}"
    return f"{path}: {name}: {error['msg'][:1].lower()}{error['msg'][1:]}; {_EXAMPLE} shows a value that would work"


def _problems(sweep: Sweep) -> Iterator[str]:
    """Yield what no machine could run."""
    if sweep.stage not in STAGE_CONFIGS or sweep.stage in WITHOUT_STEPS:
        yield f"stage: '{sweep.stage}' takes no steps; a value that would work: pretrain"
    if not Path(sweep.recipe).is_file():
        works = Path(__file__).parents[1] / "configs/demo/pretrain.yaml"
        yield f"recipe: {sweep.recipe} does not exist, seen from {Path.cwd()}; a value that would work: {works}"
    if (sweep.ranks is None) == (sweep.nodes is None):
        yield "ranks: give either ranks (of this machine) or nodes (of a cluster); a value that would work: [1, 2]"
    if sweep.weak is None and sweep.strong is None:
        yield "weak: neither weak nor strong scaling is asked for; what would work: weak: {batch_per_rank: 4}"
    if not sweep.layouts:
        yield "layouts: there is none; a value that would work: {dp: {}}"
    if sweep.num_warmup >= sweep.num_steps:
        yield (
            f"num_warmup: {sweep.num_warmup} of {sweep.num_steps} steps leave none to measure; a value that would "
            f"work: {max(1, sweep.num_steps // 4)} with num_steps of {max(4, sweep.num_steps)}"
        )
    for name, sizes in (("ranks", sweep.ranks), ("nodes", sweep.nodes)):
        if sizes == []:
            yield f"{name}: there is none; a value that would work: [1, 2]"
    for setting in sweep.settings:
        yield from _problems_of_field(setting.partition("=")[0].strip(), "settings")
    for name, layout in sweep.layouts.items():
        yield from _problems_of_layout(name, layout, "ranks" if sweep.nodes is None else "nodes")


def _problems_of_layout(name: str, layout: Mapping[str, Any], unit: str) -> Iterator[str]:
    where = f"layouts.{name}"
    if not name or not set(name) <= set(_LETTERS):
        yield f"{where}: is part of the names of directories; use letters, digits, - and _"
    for key, value in layout.items():
        if key not in _UNITS:
            yield from _problems_of_field(key, where)
            if not _is_plain(value):
                yield f"{where}.{key}: {value} is neither text nor number; write it in quotes"
        elif key != unit:
            yield f"{where}.{key}: the sweep's numbers are {unit}; what would work: {unit}: [2, 4]"
        elif not (isinstance(value, list) and value and all(type(one) is int and one > 0 for one in value)):
            yield f"{where}.{key}: {value} is no list of numbers of {unit}; a value that would work: [2, 4]"


def _problems_of_field(key: str, where: str) -> Iterator[str]:
    if key in _OWN_FIELDS:
        yield f"{where}: {key} is set by {_OWN_FIELDS[key]}; leave it out here"


def _is_plain(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def plan_points(sweep: Sweep, sweep_dir: Path, ranks_per_node: int | None) -> list[Point]:
    """Return the runs, smallest first; `ranks_per_node` None is for ranks of this machine. Raises BadInput."""
    points: dict[str, Point] = {}
    problems = []
    for layout, fields in sweep.layouts.items():
        own = fields.get("ranks", fields.get("nodes"))
        for size in sorted(set(own or sweep.ranks or sweep.nodes or [])):
            num_ranks = size * (ranks_per_node or 1)
            for kind, batch in _batches(sweep, num_ranks):
                if batch != int(batch):
                    works = math.ceil(batch) / num_ranks
                    problems.append(
                        f"weak.batch_per_rank: {num_ranks} ranks would have {batch:g} samples; a value that would "
                        f"work: {works:g}"
                    )
                    continue
                unit = f"{size}nodes" if ranks_per_node else f"{num_ranks}ranks"
                name = f"{layout}_{unit}_batch{int(batch)}"
                before = points[name].kinds if name in points else ()
                points[name] = Point(
                    name, layout, num_ranks, size if ranks_per_node else None, int(batch),
                    _overrides(sweep, sweep_dir, name, fields, int(batch)), (*before, kind),
                )  # fmt: skip
    if problems:
        raise BadInput("\n".join(dict.fromkeys(problems)))
    return sorted(points.values(), key=lambda point: (point.num_ranks, point.global_batch_size))


def _batches(sweep: Sweep, num_ranks: int) -> Iterator[tuple[str, float]]:
    if sweep.weak is not None:
        yield "weak", sweep.weak.batch_per_rank * num_ranks
    if sweep.strong is not None:
        yield "strong", sweep.strong.global_batch_size


def _overrides(sweep: Sweep, sweep_dir: Path, name: str, fields: Mapping[str, Any], batch: int) -> tuple[str, ...]:
    words = [
        f"{key if '.' in key else f'parallel.{key}'}={json.dumps(value)}"
        for key, value in fields.items()
        if key not in _UNITS
    ]
    return (
        *_SETTINGS, *sweep.settings, *words, f"train.num_steps={sweep.num_steps}", f"train.global_batch_size={batch}",
        f"run.name={name}", f"run.dir={sweep_dir / name}",
    )  # fmt: skip


def write_sweep(sweep: Sweep, points: list[Point], sweep_dir: Path) -> None:
    """Say in the directory what sweep it holds; more layouts, ranks and kinds may come, nothing else may change.

    Raises BadInput where it holds another sweep, or something else.
    """
    before = sweep_dir / SWEEP_FILE
    known: list[Point] = []
    if before.is_file():
        old, known = read_sweep_dir(sweep_dir)
        fixed = ("recipe", "stage", "num_steps", "num_warmup", "settings")
        changed = [name for name in fixed if getattr(old, name) != getattr(sweep, name)]
        overrides = {point.name: point.overrides for point in points}
        changed += [f"{point.name}" for point in known if overrides.get(point.name, point.overrides) != point.overrides]
        if changed:
            raise BadInput(
                f"{sweep_dir}: holds another sweep, which differs in {', '.join(changed)}; give another directory, "
                f"such as --out {sweep_dir}-2"
            )
    elif sweep_dir.exists() and (not sweep_dir.is_dir() or any(sweep_dir.iterdir())):
        raise BadInput(f"{sweep_dir}: holds no sweep but something else; give a directory that does not exist yet")
    names = {point.name for point in points}
    all_points = [*(point for point in known if point.name not in names), *points]
    content = {"sweep": sweep.model_dump(mode="json"), "points": [asdict(point) for point in all_points]}
    sweep_dir.mkdir(parents=True, exist_ok=True)
    temporary = before.with_suffix(".new")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(before)


def read_sweep_dir(sweep_dir: Path) -> tuple[Sweep, list[Point]]:
    """Return the sweep that a directory holds and its runs. Raises BadInput where it holds none."""
    try:
        content = json.loads((sweep_dir / SWEEP_FILE).read_text(encoding="utf-8"))
        points = [
            Point(**one | {"overrides": tuple(one["overrides"]), "kinds": tuple(one["kinds"])})
            for one in content["points"]
        ]
        return Sweep.model_validate(content["sweep"]), points
    except FileNotFoundError:
        raise BadInput(
            f"{sweep_dir}: holds no {SWEEP_FILE}; give the directory of a sweep that tools/scaling.py has begun"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{sweep_dir / SWEEP_FILE}: unreadable ({error}); run tools/scaling.py again") from None
