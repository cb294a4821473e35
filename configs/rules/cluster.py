"""Rules of a cluster file: its fields against each other, and a run's layout against its nodes. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Iterator

from configs.sections.cluster import ClusterConfig, time_limit_seconds
from configs.stages import Config

_INSTEAD = {
    "--account": "account", "--array": "--chain on the command line", "--chdir": "the directory of the command",
    "--constraint": "constraint", "--cpus-per-task": "cpus_per_rank", "--exclude": "exclude", "--export": "environment",
    "--gpus-per-node": "gpus_per_node", "--mem": "memory_per_node", "--nodes": "--nodes on the command line",
    "--ntasks": "ranks_per_node", "--ntasks-per-node": "ranks_per_node", "--output": "run.dir",
    "--partition": "partition",
    "--qos": "qos", "--reservation": "reservation", "--signal": "signal_seconds", "--time": "time_limit",
}  # fmt: skip
"""Options that the script sets: the last of two wins in sbatch, and the rest of the script would not know."""


def check_cluster(cluster: ClusterConfig) -> Iterator[str]:
    """Yield every rule that the cluster file breaks by itself, one sentence each."""
    if cluster.num_local_ranks == 0:
        yield "ranks_per_node: missing, and gpus_per_node is 0; a value that would work: ranks_per_node: 2"
    elif 0 < cluster.gpus_per_node < cluster.num_local_ranks:
        yield (
            f"ranks_per_node: {cluster.ranks_per_node} ranks for gpus_per_node: {cluster.gpus_per_node}, and each "
            f"needs one; a value that would work: {cluster.gpus_per_node}"
        )
    limit = time_limit_seconds(cluster.time_limit)
    if limit <= cluster.signal_seconds:
        yield (
            f"signal_seconds: {cluster.signal_seconds} before a limit of {limit} seconds (time_limit, --time) leaves "
            f"no time to train; a value that would work: {max(1, limit // 10)}, or a longer time limit"
        )
    for option in cluster.sbatch_options:
        name = re.split("[= ]", option, maxsplit=1)[0]
        if name in _INSTEAD:
            yield f"sbatch_options: {name} is set by the script itself; remove it here and use {_INSTEAD[name]}"
    both = sorted({"NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"} & cluster.environment.keys())
    if cluster.interface is not None and both:
        yield f"interface: sets {both[0]}, which environment: sets too; keep one of the two"


def check_nodes(config: Config, cluster: ClusterConfig) -> Iterator[str]:
    """Yield why a run's layout does not suit nodes of this size."""
    tp, ranks = config.parallel.tp, cluster.num_local_ranks
    if not cluster.tp_across_nodes and ranks % tp:
        works = ", ".join(str(size) for size in range(1, ranks + 1) if ranks % size == 0 and tp % size == 0)
        yield (
            f"parallel.tp: {tp} does not divide the {ranks} ranks of a node, so its all-reduces would cross nodes; "
            f"values that would work: {works}; where fast links span nodes, set tp_across_nodes: true in the cluster "
            "file"
        )
