"""A cluster file: what SLURM is asked for, and what the ranks' environment is there. Torch-free plain data."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from configs.sections.base import Count, NonNegativeInt, PositiveInt, Section

_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


def time_limit_seconds(text: str) -> int:
    """Return the seconds that a SLURM time means: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S.

    Raises ValueError, with what is wrong in words, for text that is none.
    """
    found = _TIME.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"{text!r} is not a time as SLURM writes it")
    days, *rest = found.groups()
    numbers = [int(number) for number in rest if number is not None]
    if days is not None:
        hours, minutes, seconds = (*numbers, 0, 0)[:3]
        return ((int(days) * 24 + hours) * 60 + minutes) * 60 + seconds
    if len(numbers) == 3:
        return (numbers[0] * 60 + numbers[1]) * 60 + numbers[2]
    return numbers[0] * 60 + (numbers[1] if len(numbers) == 2 else 0)


def _time_limit(text: str) -> str:
    if time_limit_seconds(text) < 60:
        raise ValueError(f"{text!r} is below a minute, the shortest that SLURM knows")
    return text.strip()


def _one_line(text: str) -> str:
    if "\n" in text or not text.strip():
        raise ValueError(f"{text[:40]!r} must be one line of text")
    return text


def _matching(pattern: str, wanted: str) -> AfterValidator:
    """Return a check that all of a text matches `pattern`, which is `wanted` in words."""

    def check(text: str) -> str:
        if re.fullmatch(pattern, text) is None:
            raise ValueError(f"{text[:40]!r} is not {wanted}")
        return text

    return AfterValidator(check)


Line = Annotated[str, AfterValidator(_one_line)]
Word = Annotated[str, _matching(r"[^\s'\"#;|&]+", "one word without quotes")]
Image = Annotated[str, _matching(r"\S+", "one word")]
Mount = Annotated[str, _matching(r"[^\s,:]+:[^\s,]+", "of the form SOURCE:TARGET")]
Name = Annotated[str, _matching(r"[A-Za-z_][A-Za-z0-9_]*", "the name of a variable")]
Option = Annotated[str, _matching(r"--[^\n]+", "an option of sbatch")]
TimeLimit = Annotated[str, AfterValidator(_time_limit)]


class ContainerConfig(Section):
    """The image that the ranks run in; the repository, the working and the run directory are mounted in any case."""

    runtime: Literal["pyxis", "apptainer"]
    """pyxis: `srun --container-image` (enroot); apptainer: `apptainer exec` on each node."""
    image: Annotated[Image, Field(examples=["nvcr.io#nvidia/pytorch:25.06-py3"])]
    """Image as the runtime names it: a .sqsh or .sif file, or a place in a registry."""
    mounts: tuple[Mount, ...] = Field((), examples=[["/data:/data"]])
    """More mounts, `SOURCE:TARGET`."""


class ClusterConfig(Section):
    """What `launch/slurm.py --cluster` reads: the machine room's side of a job, whatever recipe it runs."""

    gpus_per_node: Annotated[int, Field(ge=0, le=64, examples=[8])]
    """GPUs asked for on each node, a rank each; 0 for ranks on the CPU."""
    gpu_type: Word | None = Field(None, examples=["h100"])
    """Type of the GPUs where a partition has several, such as h100."""
    ranks_per_node: Count | None = None
    """Ranks on each node; default `gpus_per_node`, and must be given where that is 0."""
    tp_across_nodes: bool = False
    """Allow tensor parallelism across nodes: true where fast links span nodes (racks of NVL72)."""
    partition: Word | None = Field(None, examples=["gpu"])
    """Partition to submit to; null for the site's default."""
    account: Word | None = Field(None, examples=["my_project"])
    """Account that is charged; null for the user's default."""
    qos: Word | None = Field(None, examples=["normal"])
    """Quality of service; null for the default."""
    reservation: Word | None = Field(None, examples=["maintenance_1"])
    """Reservation to run in."""
    constraint: Word | None = Field(None, examples=["ib"])
    """Features that the nodes must have (`--constraint`)."""
    exclude: Word | None = Field(None, examples=["node[07-09,12]"])
    """Nodes not to run on, as SLURM writes lists: node[07-09,12]."""
    exclusive: bool = True
    """Take whole nodes; false shares them with other jobs."""
    cpus_per_rank: PositiveInt | None = None
    """CPUs asked for per rank; null for all of an exclusive node, else for the site's default, which is SLURM's one CPU
    for all ranks of a node where the site says nothing."""
    memory_per_node: Word = "0"
    """Memory asked for on each node, such as 500G; 0 for all of it, also of a node that is shared."""
    time_limit: TimeLimit = "24:00:00"
    """Wall time of a job; `--time` replaces it."""
    signal_seconds: Annotated[int, Field(ge=1, le=65535)] = 600
    """Seconds before the limit at which the run is told to save: longer than a step and a save take."""
    max_idle_restarts: NonNegativeInt = 3
    """Restarts in a row without a new checkpoint after which a job gives up."""
    container: ContainerConfig | None = None
    """Image that the ranks run in; null for none."""
    setup: tuple[Line, ...] = Field((), examples=[["module load cuda/12.8"]])
    """Shell lines to run on the first node before the ranks start; the environment they leave goes to all ranks."""
    python: Word | None = Field(None, examples=["/opt/venv/bin/python"])
    """Python on the nodes; default the one that submits, and in a container `python`."""
    interface: Word | None = Field(None, examples=["ib0"])
    """Network interface that ranks meet on: sets NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME."""
    environment: dict[Name, str] = Field({}, examples=["{NCCL_IB_HCA: mlx5}"])
    """Variables of all ranks: nothing else is taken from the shell that submits."""
    sbatch_options: tuple[Option, ...] = Field((), examples=[["--mail-type=END"]])
    """More options of sbatch, one each."""

    @property
    def num_local_ranks(self) -> int:
        """Ranks on each node."""
        return self.ranks_per_node or self.gpus_per_node
