"""Every YAML that is shipped loads, and every run among them passes all checks at the world size it states."""

import re
import shlex

import pytest
import yaml

from configs.load import load_cluster, load_config
from configs.rules.check import check_config
from configs.sections.model import ModelConfig
from configs.stages import STAGE_CONFIGS
from launch.slurm import plan_jobs
from launch.slurm_cli import parse_request

NOT_RUNS = {"models", "clusters"}


def world_size_of(text):
    """Return nodes x ranks a node of the torchrun line in the comment at the top, or None."""
    head = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    ranks, nodes = re.search(r"--nproc-per-node[ =](\d+)", head), re.search(r"--nnodes[ =](\d+)", head)
    return int(ranks.group(1)) * (int(nodes.group(1)) if nodes else 1) if ranks else None


@pytest.fixture(scope="session")
def run_files(root):
    files = [path for path in sorted((root / "configs").rglob("*.yaml")) if path.parent.name not in NOT_RUNS]
    assert {"pretrain", "long_context", "demo"} <= {path.parent.name for path in files}
    return files


def test_every_run_states_its_size_and_passes_all_checks(run_files, root):
    problems = []
    for path in run_files:
        name = path.relative_to(root).as_posix()
        text = path.read_text(encoding="utf-8")
        world_size = world_size_of(text)
        if world_size is None or name not in text:
            problems.append(f"{name}: the comment at the top lacks its torchrun line with --nproc-per-node")
            continue
        on_cpu = path.parent.name == "demo"
        stage = re.search(r"launch/(\w+)\.py", text)
        assert stage is not None, name
        config = load_config(str(path), (), stage.group(1))
        found = check_config(config, world_size, platform="cpu" if on_cpu else "cuda", has_te=not on_cpu)
        problems += [f"{name} on {world_size} ranks: {one}" for one in found]
    assert not problems, "\n".join(problems)


def test_every_architecture_is_a_model_section_and_nothing_else(root):
    files = sorted((root / "configs" / "models").glob("*.yaml"))
    assert len(files) >= 11
    for path in files:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert content.keys() == {"model"}, f"{path.name}: {set(content)}"
        assert ModelConfig(**content["model"]).num_layers > 0


def test_every_cluster_names_a_command_that_passes_all_checks(root, monkeypatch):
    for place in ("launch.slurm", "launch.scheduler"):  # another site's partitions say nothing
        monkeypatch.setattr(f"{place}.has_slurm", lambda: False)
    monkeypatch.chdir(root)
    files = sorted((root / "configs" / "clusters").glob("*.yaml"))
    assert len(files) >= 3
    for path in files:
        name = path.relative_to(root).as_posix()
        command = re.search(r"^# +python launch/slurm\.py (.+)$", path.read_text(encoding="utf-8"), flags=re.M)
        assert command is not None and name in command.group(1), f"{name}: the comment at the top lacks its command"
        request = parse_request(shlex.split(command.group(1)))
        jobs, _ = plan_jobs(request, command.group(1))
        assert [job.cluster for job in jobs] == [load_cluster(str(path))]


def test_every_yaml_is_in_a_known_folder(root):
    folders = {path.parent.name for path in (root / "configs").rglob("*.yaml")}
    assert folders <= {*STAGE_CONFIGS, "models", "demo", "clusters"}, folders
