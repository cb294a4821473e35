"""The same job for machines without SLURM, as text: torchrun on hosts of one's own, and Kubeflow's PyTorchJob."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from typing import Any

from configs.errors import BadInput
from launch.batch_script import ROOT, Job, rank_variables

_PORT = 29400  # torchrun's own default


def torchrun_script(job: Job) -> str:
    """Return a script to run on every host. Restarts and time limits are whoever's who starts it."""
    cluster = job.cluster
    exports = [f"export {name}={shlex.quote(value)}" for name, value in rank_variables(cluster).items()]
    sizes = [f"--nnodes={job.num_nodes}", f"--nproc-per-node={cluster.num_local_ranks}", "--rdzv-backend=c10d"]
    return "\n".join(
        [
            "#!/bin/bash",
            f"# Written by: {job.command}",
            f"# Run this on each of the {job.num_nodes} hosts, in any order: bash torchrun.sh FIRST_HOST",
            "first=${1:?is missing: bash torchrun.sh FIRST_HOST}",
            "set -e",
            f"cd {shlex.quote(str(job.working_dir))}",
            *exports,
            *cluster.setup,
            f"exec {shlex.join([job.python, '-m', 'torch.distributed.run', *sizes, f'--rdzv-id={job.name}'])} \\",
            f'  --rdzv-endpoint="$first:{_PORT}" {shlex.join(job.training)}',
            "",
        ]
    )


def pytorchjob(job: Job) -> str:
    """Return a PyTorchJob (kubeflow.org/v1). Raises BadInput where the cluster file names no image."""
    import yaml

    container = job.cluster.container
    if container is None:
        raise BadInput("container: missing in the cluster file, and a PyTorchJob runs in an image; add its section")
    if container.image.startswith(("/", ".")) or container.image.endswith((".sif", ".sqsh")):
        raise BadInput(
            f"container.image: {container.image} is a file, and Kubernetes takes images from registries; a value that "
            "would work: nvcr.io/nvidia/pytorch:25.06-py3"
        )
    volumes, mounts = _volumes(job, container.mounts)
    sizes = [f"--nnodes={job.num_nodes}", f"--nproc-per-node={job.cluster.num_local_ranks}"]
    # The operator numbers the pods as ranks, and says where the first one is.
    torchrun = f"exec {shlex.join([job.python, '-m', 'torch.distributed.run', *sizes])} " + (
        '--node-rank="$RANK" --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" ' + shlex.join(job.training)
    )
    pod: dict[str, Any] = {
        "name": "pytorch",  # by this name the operator finds it
        "image": container.image.removeprefix("docker://").replace("#", "/"),
        "workingDir": str(job.working_dir),
        "command": ["bash", "-c", "\n".join(["set -e", *job.cluster.setup, torchrun])],
        "env": [{"name": name, "value": value} for name, value in rank_variables(job.cluster).items()],
        "volumeMounts": mounts,
    }
    if job.cluster.gpus_per_node:
        pod["resources"] = {"limits": {"nvidia.com/gpu": job.cluster.gpus_per_node}}
    replica = {"restartPolicy": "OnFailure", "template": {"spec": {"containers": [pod], "volumes": volumes}}}
    replicas: dict[str, Any] = {"Master": {"replicas": 1, **replica}}
    if job.num_nodes > 1:
        replicas["Worker"] = {"replicas": job.num_nodes - 1, **replica}
    # A Service of this name with -worker-N is made, whose names begin with a letter and have 63 characters at most.
    name = re.sub(r"^(?![a-z])", "run-", re.sub(r"[^a-z0-9]+", "-", job.name.lower()).strip("-"))[:48].strip("-")
    whole = {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": name},
        "spec": {
            "runPolicy": {"backoffLimit": job.cluster.max_idle_restarts},
            "pytorchReplicaSpecs": replicas,
        },
    }
    head = f"# Written by: {job.command}\n# To start it: kubectl apply -f {job.run_dir / 'pytorchjob.yaml'}\n"

    class Plain(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    return head + yaml.dump(whole, Dumper=Plain, sort_keys=False, width=120)


def _volumes(job: Job, more: Sequence[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return a pod's volumes and where they are mounted: what every run needs, and the cluster file's `mounts`."""
    places = {str(place): (str(place), "") for place in (ROOT, job.working_dir, job.run_dir)}
    for mount in more:
        source, target, *options = mount.split(":", 2)
        if options not in ([], ["ro"], ["rw"]):
            raise BadInput(
                f"container.mounts: {mount} ends in {options[0]}, which Kubernetes lacks; ro or rw would work"
            )
        places[target] = (source, options[0] if options else "")
    # 64 MiB by default, too little for NCCL.
    volumes: list[dict[str, Any]] = [{"name": "shm", "emptyDir": {"medium": "Memory"}}]
    mounts: list[dict[str, Any]] = [{"name": "shm", "mountPath": "/dev/shm"}]
    for number, (target, (source, option)) in enumerate(places.items()):
        volumes.append({"name": f"mount-{number}", "hostPath": {"path": source}})
        mounts.append({"name": f"mount-{number}", "mountPath": target, "readOnly": option == "ro"})
    return volumes, mounts
