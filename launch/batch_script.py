"""The text of `submit.sbatch`: what SLURM is asked for, the settings of one run, and a part that is the same for all.

Torch-free; knows no SLURM command's answer, that is `launch.scheduler`. The script can be submitted again as it is.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from configs.sections.cluster import ClusterConfig

ROOT = Path(__file__).resolve().parents[1]
SCRIPT_NAME = "submit.sbatch"
RECIPE_NAME = "recipe.yaml"
GOES_ON = "goes-on"
"""The script's argument in all jobs of a chain but the last: what is not done at the limit then ends well."""


@dataclass(frozen=True)
class Job:
    """One stage's job: everything that its files are made of."""

    stage: str
    name: str
    run_dir: Path
    """Absolute."""
    working_dir: Path
    """Where the command was given: relative paths of the recipe count from here."""
    command: str
    """The command line that made this job, for the first lines of what it writes."""
    num_nodes: int
    cluster: ClusterConfig
    python: str
    ends_at_limit: bool
    """Whether a job that has saved ahead of its limit ends well, for the next of a chain; else it is queued again."""

    @property
    def script(self) -> Path:
        return self.run_dir / SCRIPT_NAME

    @property
    def log_dir(self) -> Path:
        return self.run_dir / "logs" / "slurm"

    @property
    def training(self) -> list[str]:
        """The words after Python's options, that of each rank."""
        return [str(ROOT / "launch" / f"{self.stage}.py"), str(self.run_dir / RECIPE_NAME)]


def batch_script(job: Job) -> str:
    """Return the whole of `submit.sbatch`."""
    head = "\n".join([*_directives(job), "", *_settings(job)])
    return f"{head}\n{_BODY}"


def rank_variables(cluster: ClusterConfig) -> dict[str, str]:
    """Return the environment variables that the cluster file gives to all ranks."""
    variables = {"OMP_NUM_THREADS": "1"}  # as torchrun sets it, which says so in every log
    if cluster.gpus_per_node == 0:
        variables["SHARDWRIGHT_PLATFORM"] = "cpu"
    if cluster.interface is not None:
        variables |= {"NCCL_SOCKET_IFNAME": cluster.interface, "GLOO_SOCKET_IFNAME": cluster.interface}
    return variables | cluster.environment


def container_words(job: Job) -> tuple[list[str], list[str]]:
    """Return the options of srun and the words before Python with which the ranks run in the image."""
    container = job.cluster.container
    if container is None:
        return [], []
    places = dict.fromkeys([str(ROOT), str(job.working_dir), str(job.run_dir)])
    mounts = [*(f"{place}:{place}" for place in places), *container.mounts]
    if container.runtime == "pyxis":
        image, mounted = f"--container-image={container.image}", f"--container-mounts={','.join(mounts)}"
        return [image, mounted, f"--container-workdir={job.working_dir}"], []
    gpus = ["--nv"] if job.cluster.gpus_per_node else []
    binds = [f"--bind={mount}" for mount in mounts]
    return [], ["apptainer", "exec", *gpus, *binds, f"--pwd={job.working_dir}", container.image]


def _directives(job: Job) -> Iterator[str]:
    cluster = job.cluster
    yield from ("#!/bin/bash -l", f"# Written by: {job.command}", f"# To submit it again: sbatch {job.script}")
    yield f"#SBATCH --job-name={job.name}"
    yield f"#SBATCH --nodes={job.num_nodes}"
    yield "# One task a node: torchrun, which starts the ranks of its node."
    yield "#SBATCH --ntasks-per-node=1"
    if cluster.gpus_per_node:
        kind = f"{cluster.gpu_type}:" if cluster.gpu_type else ""
        yield f"#SBATCH --gpus-per-node={kind}{cluster.gpus_per_node}"
    if cluster.exclusive:
        yield "#SBATCH --exclusive"
    if cluster.cpus_per_rank is not None:
        yield f"#SBATCH --cpus-per-task={cluster.cpus_per_rank * cluster.num_local_ranks}"
    yield f"#SBATCH --mem={cluster.memory_per_node}"
    yield f"#SBATCH --time={cluster.time_limit}"
    for name in ("partition", "account", "qos", "reservation", "constraint", "exclude"):
        value = getattr(cluster, name)
        if value is not None:
            yield f"#SBATCH --{name}={value}"
    yield f"#SBATCH --chdir={job.working_dir}"
    yield "# A job that was queued again has the same number: its log goes on in the same file."
    yield f"#SBATCH --output={job.log_dir}/%j.log"
    yield "#SBATCH --open-mode=append"
    yield "# After the failure of a node, SLURM itself puts the job back into the queue."
    yield "#SBATCH --requeue"
    yield "# Ahead of the limit this script is signalled (B:), which tells the ranks; SLURM may be a minute early."
    yield f"#SBATCH --signal=B:USR1@{cluster.signal_seconds}"
    yield "# Nothing of the shell that submits is taken along: all that the ranks see is set below."
    yield "#SBATCH --export=NIL"
    for option in cluster.sbatch_options:
        yield f"#SBATCH {option}"


def _settings(job: Job) -> Iterator[str]:
    cluster = job.cluster
    for name, value in (
        ("RUN_DIR", str(job.run_dir)),
        ("LOG_DIR", str(job.log_dir)),
        ("SIGNAL_SECONDS", str(cluster.signal_seconds)),
        ("MAX_IDLE_RESTARTS", str(cluster.max_idle_restarts)),
        ("AT_LIMIT", "end" if job.ends_at_limit else "requeue"),
    ):
        yield f"{name}={shlex.quote(value)}"
    yield "NEXT=${1:-}  # given where a job of the same run waits for this one"
    kept = 'ls "$RUN_DIR/rollouts" | tail -n 1' if job.stage == "rft" else 'readlink "$RUN_DIR/checkpoints/latest"'
    yield f'latest() {{ local last; last=$({kept} 2> /dev/null); echo "${{last:-none}}"; }}'
    yield _SIGNALS
    yield "# srun hands on what is set here, not the little that --export named above."
    yield "export SLURM_EXPORT_ENV=ALL"
    for name, value in rank_variables(cluster).items():
        yield f"export {name}={shlex.quote(value)}"
    for line in cluster.setup:
        yield f"{line}\nafter_setup {shlex.quote(line)}"
    yield ""
    srun_options, prefix = container_words(job)
    torchrun = [f"--nnodes={job.num_nodes}", f"--nproc-per-node={cluster.num_local_ranks}", "--rdzv-backend=c10d"]
    yield f"SRUN_OPTIONS=({shlex.join(srun_options)})"
    yield f"PYTHON=({shlex.join([*prefix, job.python])})"
    yield f"TORCHRUN_OPTIONS=({shlex.join(torchrun)})"
    yield f"TRAINING=({shlex.join(job.training)})"


_SIGNALS = r"""
say() { echo "submit.sbatch: $*"; }
after_setup() { [ $? = 0 ] || { say "setup: this line failed: $1"; exit 2; }; }
limit_near=""
trap 'limit_near=$SECONDS; say "the limit is near: the ranks are told to save"' USR1
# When SLURM ends a job it tells the ranks too; they have until KillWait to save, and this script waits for them.
ended=""
trap 'ended=yes' TERM
"""

_BODY = r"""
restart=${SLURM_RESTART_COUNT:-0}

# A restart that left nothing new behind is idle; after too many in a row the cause is not one that passes.
begun_at=$(latest)
progress=$LOG_DIR/$SLURM_JOB_ID.progress
idle=0
if [ "$restart" -gt 0 ] && read -r before idle < "$progress"; then
  if [ "$before" = "$begun_at" ]; then idle=$((idle + 1)); else idle=0; fi
fi
echo "$begun_at $idle" > "$progress"
say "job $SLURM_JOB_ID, restart $restart, on $SLURM_JOB_NODELIST, from checkpoint $begun_at"
if [ "$idle" -gt "$MAX_IDLE_RESTARTS" ]; then
  say "gives up: $idle restarts in a row left no new checkpoint (max_idle_restarts: $MAX_IDLE_RESTARTS)"
  exit 5
fi

# The ranks leave their exit codes here: srun tells the largest of all nodes, and torchrun has but 1.
export SHARDWRIGHT_ENDS=$LOG_DIR/$SLURM_JOB_ID.$restart
rm -rf "$SHARDWRIGHT_ENDS" && mkdir -p "$SHARDWRIGHT_ENDS"

# Where the ranks meet: the first node, by its address where its name does not resolve.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$first
getent hosts "$first" > /dev/null ||
  address=$(scontrol show node "$first" | grep -o 'NodeAddr=[^ ]*' | cut -d = -f 2)
export RENDEZVOUS=$address:$((20000 + SLURM_JOB_ID % 12000))

# Keep the job off nodes that have failed, also when they come back: SLURM takes this of a job that is to run again.
exclude() {
  local attempt before
  [ -n "$1" ] || return 0
  before=$(scontrol show job "$SLURM_JOB_ID" | grep -o 'ExcNodeList=[^ ]*' | cut -d = -f 2 | grep -vx "(null)")
  say "excluded from now on: ${before:+$before,}$1"
  for attempt in 1 2 3 4 5; do
    if scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="${before:+$before,}$1"; then return; fi
    sleep 1
  done
}
# Which of this job's nodes SLURM knows to have failed.
failed_nodes() {
  sinfo -h -N -n "$SLURM_JOB_NODELIST" -o "%N %t" | grep -E "down|fail|[*]" | cut -d " " -f 1 | sort -u | paste -s -d ,
}
# And which left no word and do not answer: SLURM itself may need minutes to see that. Many silent nodes are no failure
# of theirs, and where not even this node answers, the question is wrong.
answers() { timeout 20 srun --overlap --mem=0 --nodes=1 --ntasks=1 --nodelist="$1" true; }
silent=""
find_silent_nodes() {
  local node wordless=()
  for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
    compgen -G "$SHARDWRIGHT_ENDS/*.$node" > /dev/null || wordless+=("$node")
  done
  if [ ${#wordless[@]} -gt 8 ] || ! answers "$SLURMD_NODENAME"; then return; fi
  for node in "${wordless[@]}"; do
    answers "$node" || silent=${silent:+$silent,}$node
  done
}

# --cpu-bind=none: torchrun's ranks share all CPUs of the job on the node; one task would be bound to one.
# --wait: once a node has ended, the others have a minute for their last words.
# trap "" USR1: torchrun would die of the signal; ignored there, it still reaches the ranks, which save.
# PET_RDZV_CONF: torchrun's --rdzv-conf; the first node keeps the rendezvous, whatever it takes its own name for.
srun --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=0 --wait=60 "${SRUN_OPTIONS[@]}" bash -c '
  trap "" USR1
  export PET_RDZV_CONF=is_host=$((SLURM_NODEID == 0))
  exec "$@"
' node "${PYTHON[@]}" -m torch.distributed.run "${TORCHRUN_OPTIONS[@]}" --rdzv-id="$SLURM_JOB_ID.$restart" \
  --rdzv-endpoint="$RENDEZVOUS" "${TRAINING[@]}" &
step=$!
step_ended=""
while kill -0 "$step" 2> /dev/null; do
  if [ -n "$limit_near" ]; then
    # Again and again: ranks that are still starting do not heed it yet.
    scancel --signal=USR1 "$SLURM_JOB_ID"
    # What does not end in time must not keep this script from its own end.
    if [ $((SECONDS - limit_near)) -ge $((SIGNAL_SECONDS * 3 / 4)) ]; then break; fi
  fi
  sleep 2 &
  wait $!  # not a plain sleep, which a signal would not interrupt
done
kill -0 "$step" 2> /dev/null || step_ended=yes
if [ -n "$ended" ]; then
  say "SLURM ends the job"
  exclude "$(failed_nodes)"
fi

# What ended it: the cause before what follows from it. Without a word of a rank: killed, or never begun.
code=killed
for known in 2 4 1 3 5; do
  if compgen -G "$SHARDWRIGHT_ENDS/$known.*" > /dev/null; then code=$known; break; fi
done
if [ "$code" = killed ] && [ -n "$step_ended" ] && wait "$step"; then code=0; fi
say "ended with exit code $code"
head -qn 5 "$SHARDWRIGHT_ENDS/$code".* 2> /dev/null | head -n 20  # who ended so, and why
case $code in
  0) exit 0 ;;
  1 | 2 | 4) exit "$code" ;;  # the same again would end the same
  3) [ -n "$limit_near" ] || exit 3 ;;  # stopped by somebody else, who knows why
esac
[ -z "$ended" ] || exit 5  # SLURM has the say: it cancels the job, or puts it back into the queue itself
if [ "$AT_LIMIT" = end ] && [ -n "$limit_near" ]; then
  [ -n "$NEXT" ] && exit 0
  say "the last job of the chain, and the run is not done: sbatch $RUN_DIR/submit.sbatch goes on"
  exit 3  # no stage may start from here
fi

[ "$(latest)" != "$begun_at" ] && idle=-1
if [ $((idle + 1)) -gt "$MAX_IDLE_RESTARTS" ]; then
  say "gives up: $((idle + 1)) starts in a row left no new checkpoint (max_idle_restarts: $MAX_IDLE_RESTARTS)"
  exit 5
fi
[ -n "$limit_near" ] || find_silent_nodes
say "back into the queue"
if ! scontrol requeue "$SLURM_JOB_ID" && [ -z "$ended" ]; then
  say "SLURM does not queue this job again: sbatch $RUN_DIR/submit.sbatch goes on, and --chain does without requeueing"
  if [ -n "$limit_near" ]; then exit 3; else exit 5; fi
fi
exclude "$silent"
"""
