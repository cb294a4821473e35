"""The command line of `launch/slurm.py`: what was typed, not what it means. Torch-free."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pydantic import TypeAdapter, ValidationError

from configs.errors import BadInput
from configs.load import stage_of_recipe
from configs.sections.cluster import TimeLimit
from configs.stages import STAGE_CONFIGS

USAGE = (
    """\
usage: slurm.py RECIPE [key=value ...] --cluster FILE --nodes N [options]
       slurm.py RECIPE [key=value ...] RECIPE [key=value ...] ... --stages A,B,... --cluster FILE --nodes N [options]

  RECIPE             YAML file of the run, as launch/STAGE.py takes it; several are stages, one after the other
  key=value          override of the recipe before it; before the first recipe, of all
  --cluster FILE     what the machine room has and wants, such as configs/clusters/h100.yaml
  --nodes N          nodes of the job; N,M,... for a number of each stage
  --stage NAME       stage of the recipe: """
    + ", ".join(STAGE_CONFIGS)
    + """; default: the
                     one that the recipe's folder or file is named after
  --stages A,B,...   stages of the recipes; each starts from the weights of the one before, once that has ended well
                     (after a reward model, which is to be named where it scores, from those of the one before it; a
                     student of one of them from where its recipe says)
  --chain K          K jobs one after the other instead of one that goes back into the queue at its time limit
  --time LIMIT       wall time of each job, such as 4:00:00, in place of the cluster file's
  --format NAME      sbatch (default); torchrun: plain commands for N hosts; pytorchjob: YAML for Kubernetes
  --dry-run          check everything and print what would be written; write and submit nothing
  --help             print this

Writes submit.sbatch and recipe.yaml, the recipe as it was checked, into the run directory, and submits. To submit
again: sbatch RUN_DIR/submit.sbatch. Exit codes: 0 submitted, 2 bad input."""
)

_VALUED = ("--cluster", "--nodes", "--stage", "--stages", "--chain", "--time", "--format")
_OPTIONS = (*_VALUED, "--dry-run", "--help", "-h")
FORMATS = ("sbatch", "torchrun", "pytorchjob")


@dataclass(frozen=True)
class StageRequest:
    """One recipe of the command line."""

    stage: str
    recipe: str
    overrides: tuple[str, ...]
    num_nodes: int


@dataclass(frozen=True)
class Request:
    """What was asked for."""

    stages: tuple[StageRequest, ...]
    cluster: str
    chain: int = 1
    time_limit: str | None = None
    format: str = "sbatch"
    dry_run: bool = False


def parse_request(argv: Sequence[str]) -> Request | None:
    """Parse the command line; None where help is asked for. Raises BadInput naming the word that is wrong."""
    if not argv or "--help" in argv or "-h" in argv:
        return None
    options, words = _split(argv)
    recipes, overrides = _recipes(words)
    if "--cluster" not in options:
        raise BadInput("--cluster: missing; a value that would work: configs/clusters/h100.yaml")
    if "--nodes" not in options:
        raise BadInput("--nodes: missing; a value that would work: 2")
    stages = _stages(options, recipes)
    nodes = list(_numbers(options["--nodes"], "--nodes"))
    if len(nodes) not in (1, len(recipes)):
        raise BadInput(f"--nodes: {len(nodes)} numbers for {len(recipes)} recipes; give one for all, or one for each")
    chain = list(_numbers(options.get("--chain", "1"), "--chain"))
    if len(chain) != 1:
        raise BadInput(f"--chain: '{options['--chain']}' is not a number of jobs; a value that would work: 3")
    form = options.get("--format", "sbatch")
    if form not in FORMATS:
        raise BadInput(f"--format: '{form}' is not one of {', '.join(FORMATS)}; a value that would work: sbatch")
    return Request(
        stages=tuple(
            StageRequest(stage, recipe, tuple(own), nodes[number % len(nodes)])
            for number, (stage, recipe, own) in enumerate(zip(stages, recipes, overrides, strict=True))
        ),
        cluster=options["--cluster"],
        chain=chain[0],
        time_limit=_time_limit(options.get("--time")),
        format=form,
        dry_run="--dry-run" in options,
    )


def _split(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Return the options and their values, and the words between them."""
    options: dict[str, str] = {}
    words: list[str] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if name == "--dry-run" and not equals:
            options[name] = ""
        elif name in _VALUED:
            if not equals and (not rest or re.match("-(?![0-9])", rest[0])):  # -2 is a value, and a wrong one
                raise BadInput(f"{name}: lacks its value; --help shows one")
            options[name] = value if equals else rest.pop(0)
        elif word.startswith("-"):
            near = difflib.get_close_matches(name, _OPTIONS, n=1)
            raise BadInput(f"{word}: unknown option; {f'did you mean {near[0]}?' if near else '--help lists them'}")
        else:
            words.append(word)
    return options, words


def _recipes(words: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Return the recipes and the overrides of each."""
    recipes: list[str] = []
    overrides: list[list[str]] = []
    common: list[str] = []
    for word in words:
        if "=" in word and "/" not in word.partition("=")[0]:  # as launch.cli tells them apart
            (overrides[-1] if overrides else common).append(word)
        else:
            recipes.append(word)
            overrides.append([])
    if not recipes:
        raise BadInput("no recipe given; for example: slurm.py configs/demo/pretrain.yaml (--help lists the options)")
    return recipes, [[*common, *own] for own in overrides]


def _stages(options: dict[str, str], recipes: Sequence[str]) -> list[str]:
    if "--stage" in options and len(recipes) > 1:
        raise BadInput(f"--stage: names one stage, and there are {len(recipes)} recipes; use --stages A,B,...")
    option = "--stages" if "--stages" in options else "--stage"
    given = options.get(option)
    stages = given.split(",") if given is not None else [_stage_of(recipe) for recipe in recipes]
    for stage in stages:
        if stage not in STAGE_CONFIGS:
            near = next(iter(difflib.get_close_matches(stage, STAGE_CONFIGS, n=1)), "pretrain")
            known = ", ".join(STAGE_CONFIGS)
            raise BadInput(f"{option}: '{stage}' is not one of {known}; a value that would work: {near}")
    if len(stages) != len(recipes):
        raise BadInput(f"--stages: {len(stages)} stages for {len(recipes)} recipes; name a recipe for each stage")
    return stages


def _stage_of(recipe: str) -> str:
    stage = stage_of_recipe(recipe)
    if stage is not None:
        return stage
    raise BadInput(f"--stage: missing, and {recipe} is not named after one; a value that would work: pretrain")


def _numbers(text: str, option: str) -> Iterator[int]:
    for word in text.split(","):
        if not word.isdecimal() or int(word) < 1 or len(word) > 6:
            raise BadInput(f"{option}: '{text}' is not a number from 1; a value that would work: 2")
        yield int(word)


def _time_limit(text: str | None) -> str | None:
    if text is None:
        return None
    try:
        return TypeAdapter(TimeLimit).validate_python(text)
    except ValidationError as error:
        reason = error.errors()[0]["ctx"]["error"]
        raise BadInput(f"--time: {reason}; a value that would work: 24:00:00") from None
