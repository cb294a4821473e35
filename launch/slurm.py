"""Submit a run, a chain of jobs or a row of stages to SLURM. Needs no torch; trains nothing itself.

Run: python launch/slurm.py configs/demo/pretrain.yaml --cluster configs/clusters/lab.yaml --nodes 2 [key=value ...]
"""

from __future__ import annotations

import math
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: the packages are beside launch/, which Python puts first
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from configs.errors import BadInput, ExitCode
from configs.load import load_cluster, read_config, resolved_dict
from configs.rules.cluster import check_cluster, check_nodes
from configs.sections.cluster import ClusterConfig
from configs.stages import Config, DistillConfig, TeacherCacheConfig
from launch.batch_script import GOES_ON, RECIPE_NAME, Job, batch_script
from launch.checks import find_others
from launch.dry_run import plan_problems
from launch.other_launchers import pytorchjob, torchrun_script
from launch.scheduler import cancel, check_partition, find_owner, has_slurm, list_partitions, submit
from launch.slurm_cli import USAGE, Request, StageRequest, parse_request
from parallel.failures import flush_streams, report
from parallel.platform import CLUSTER_PLATFORM

_OTHER_FORMATS = {"torchrun": ("torchrun.sh", torchrun_script), "pytorchjob": ("pytorchjob.yaml", pytorchjob)}


def main(argv: Sequence[str]) -> int:
    """Run the command line `argv` and return the exit code for the shell."""
    try:
        request = parse_request(argv)
        if request is None:
            print(USAGE)
        else:
            run_request(request, shlex.join(["python", "launch/slurm.py", *argv]).replace("\n", " "))
        flush_streams()
        return ExitCode.DONE
    except BadInput as error:
        report(str(error), error.exit_code)
        return error.exit_code
    except OSError as error:
        report(f"{error.filename}: cannot be written ({(error.strerror or str(error)).lower()})", ExitCode.BAD_INPUT)
        return ExitCode.BAD_INPUT


def run_request(request: Request, command: str) -> list[str]:
    """Check everything, write the run directories' files, submit, and return the numbers of the jobs in their order.

    Raises BadInput with every problem, one a line, before anything is written.
    """
    jobs, configs = plan_jobs(request, command)
    if request.format != "sbatch":
        name, text_of = _OTHER_FORMATS[request.format]
        for job, config in zip(jobs, configs, strict=True):
            _write_or_show(job, config, name, text_of(job), is_shown=request.dry_run)
        return []
    for job, config in zip(jobs, configs, strict=True):
        _write_or_show(job, config, job.script.name, batch_script(job), is_shown=request.dry_run)
    if request.dry_run:
        if not has_slurm():
            print("this machine has no SLURM: partition, nodes and time limit were not checked", file=sys.stderr)
        return []
    return _submit_all(jobs, request.chain)


def plan_jobs(request: Request, command: str) -> tuple[list[Job], list[Config]]:
    """Return a job and a config for each stage. Raises BadInput with every problem, one a line."""
    cluster = load_cluster(request.cluster)
    if request.time_limit is not None:
        cluster = cluster.model_copy(update={"time_limit": request.time_limit})
    problems = [f"{request.cluster}: {problem}" for problem in check_cluster(cluster)]
    if problems:
        raise BadInput("\n".join(problems))
    jobs: list[Job] = []
    configs: list[Config] = []
    for stage in request.stages:
        config, found = _plan_stage(stage, cluster, configs)
        prefix = f"{stage.stage}: " if len(request.stages) > 1 else ""
        problems += [f"{prefix}{problem}" for problem in found]
        if config is None:
            continue
        job = _job(stage, config, cluster, command, ends_at_limit=request.chain > 1)
        problems += [f"{prefix}{problem}" for problem in _place_problems(job, [one.run_dir for one in jobs], request)]
        jobs.append(job)
        configs.append(config)
    if problems:
        raise BadInput("\n".join(problems))
    return jobs, configs


def _plan_stage(
    stage: StageRequest, cluster: ClusterConfig, earlier: Sequence[Config]
) -> tuple[Config | None, list[str]]:
    """Return a stage's config and what is wrong with it; it starts from what an earlier stage will have written."""
    overrides, before = list(stage.overrides), _stage_before(stage, earlier)
    if before is not None:
        overrides += ["checkpoint.init_from_hf=null", f"checkpoint.init_from={_absolute(before)}"]
    config, problems = read_config(stage.recipe, overrides, stage.stage)
    if config is None:
        return None, problems
    world_size = stage.num_nodes * cluster.num_local_ranks
    platform_name = CLUSTER_PLATFORM if cluster.gpus_per_node else "cpu"
    unit = math.lcm(config.parallel.tp * config.parallel.pp * config.parallel.cp, cluster.num_local_ranks)
    works = ", ".join(str(times * unit // cluster.num_local_ranks) for times in (1, 2, 3))
    ranks = f" (--nodes {stage.num_nodes}, {cluster.num_local_ranks} ranks each; such as --nodes {works})"
    found = plan_problems(config, stage.stage, world_size, platform_name, is_start_to_come=before is not None)
    problems += [one + ranks if one.startswith("parallel: world size") else one for one in found]
    problems += check_nodes(config, cluster)
    if not any(_is_left(second.place, earlier) for second in config.second_models.values()):
        problems += find_others(config, world_size, platform_name)[1]
    if before is not None:
        problems += _other_architecture(before, config)
    return config, problems


def _stage_before(stage: StageRequest, earlier: Sequence[Config]) -> Config | None:
    """Return the last of the earlier stages that leaves what this one can begin with; None for where its recipe says.

    A reward model's scalar head only another reward model can begin with, and of some stages data is all that is left.
    The student of an earlier stage, or of what one wrote of a teacher, is another model than that.
    """
    if stage.stage == "distill" and _is_taught(stage, earlier):
        return None
    heads = {"vocabulary", "scalar"} if stage.stage == "reward" else {"vocabulary"}
    return next((one for one in reversed(earlier) if one.is_training and one.head in heads), None)


def _is_taught(stage: StageRequest, earlier: Sequence[Config]) -> bool:
    """Return whether the teacher of a stage is one of the earlier ones, or what one of them writes."""
    config, _ = read_config(stage.recipe, stage.overrides, stage.stage)
    if not isinstance(config, DistillConfig):
        return False
    named = [place for place in (config.distill.teacher, config.distill.cache) if place is not None]
    return any(_is_left(place, earlier) for place in named)


def _is_left(place: str, earlier: Sequence[Config]) -> bool:
    """Return whether a place is what an earlier stage leaves: in its run directory, or the cache of a teacher."""
    left = [str(one.run.dir) for one in earlier]
    left += [str(one.distill.cache) for one in earlier if isinstance(one, TeacherCacheConfig)]
    return any(Path(place).resolve().is_relative_to(Path(one).resolve()) for one in left)


def _other_architecture(before: Config, config: Config) -> list[str]:
    """Return why this stage could not take over the weights of the one before."""
    from trainer.checkpoint.manifest import FREE_WARM_START_FIELDS, describe_differences

    different = describe_differences(
        resolved_dict(before)["model"], resolved_dict(config)["model"], FREE_WARM_START_FIELDS
    )
    return [f"model: cannot take over the weights of the stage before: {'; '.join(different)}"] if different else []


def _place_problems(job: Job, earlier: Sequence[Path], request: Request) -> list[str]:
    """Return what is wrong with where a job would run and write."""
    problems = []
    if job.run_dir in earlier:
        problems.append(f"run.dir: {job.run_dir} is that of an earlier stage too; give each stage its own run.name")
    if request.format != "sbatch":
        return problems
    refused = r"[\s%\"'#\\]" if job.cluster.container is None else r"[\s%\"'#\\,:]"  # as srun and apptainer list mounts
    for name, place in (("run.dir", job.run_dir), ("the directory of the command", job.working_dir)):
        if re.search(refused, str(place)):
            works = re.sub(refused, "_", str(place))
            problems.append(f"{name}: '{place}' has letters that sbatch does not take in paths; such as {works} works")
    try:
        if has_slurm() or not request.dry_run:
            problems += check_partition(job.cluster, job.num_nodes, list_partitions())
        owner = find_owner(job.run_dir, job.script)
    except BadInput as error:
        if not request.dry_run:
            return [*problems, str(error)]
        print(f"partition, nodes, time limit and owner were not checked ({error})", file=sys.stderr)
        return problems
    if owner is not None:
        problems.append(f"run.dir: {job.run_dir} belongs to {owner}; wait for it, end it, or choose another run.name")
    return problems


def _job(stage: StageRequest, config: Config, cluster: ClusterConfig, command: str, *, ends_at_limit: bool) -> Job:
    python = cluster.python or ("python" if cluster.container is not None else sys.executable)
    return Job(
        stage=stage.stage,
        name="".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in config.run.name),
        run_dir=_absolute(config),
        working_dir=Path.cwd(),
        command=command,
        num_nodes=stage.num_nodes,
        cluster=cluster,
        python=python,
        ends_at_limit=ends_at_limit,
    )


def _absolute(config: Config) -> Path:
    return Path(str(config.run.dir)).absolute()


def _write_or_show(job: Job, config: Config, name: str, text: str, *, is_shown: bool) -> None:
    """Write the recipe as it was checked, whatever becomes of the YAML files meanwhile, and the script beside it."""
    from configs.plan.show import data_rows

    for field, found in data_rows(config):
        if found.endswith("not on this machine") and field != "checkpoint.init_from":
            print(f"{field} {found}", file=sys.stderr)
    if is_shown:
        print(text)
        return
    import yaml

    resolved: dict[str, Any] = resolved_dict(config)
    resolved["run"]["dir"] = str(job.run_dir)
    job.log_dir.mkdir(parents=True, exist_ok=True)
    recipe = yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True, width=120)
    (job.run_dir / RECIPE_NAME).write_text(f"# Written by: {job.command}\n{recipe}", encoding="utf-8")
    (job.run_dir / name).write_text(text, encoding="utf-8")
    print(f"wrote {job.run_dir / name}")


def _submit_all(jobs: Sequence[Job], chain: int) -> list[str]:
    """Submit every stage's jobs, each after the one before; none stays where one is refused."""
    numbers: list[str] = []
    try:
        for job in jobs:
            for place in range(chain):
                after = numbers[-1] if numbers else None
                numbers.append(submit(job.script, after, [GOES_ON] if place < chain - 1 else []))
                waits = f", once job {after} has ended well" if after else ""
                print(f"job {numbers[-1]}: {job.stage} on {job.num_nodes} nodes{waits}")
                print(f"  log: {job.log_dir / numbers[-1]}.log")
    except BadInput:
        cancel(numbers)
        raise
    return numbers


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
