#!/usr/bin/env bash
# A real SLURM on this machine for tests/cluster: nodes n1, n2, ... on loopback, each with eight GPUs that are empty
# files, a host name of its own and its own view of the disk. As root, on Debian; tried with SLURM 22.05.
# Run: tests/cluster/slurm_lab.sh install | start DIR [NODES] | node DIR NAME | stop DIR
set -euo pipefail

install_packages() {  # where that cannot be, the tests say that they are skipped
  if command -v slurmctld > /dev/null && command -v munged > /dev/null; then return; fi
  if [ "$(id -u)" != 0 ]; then
    echo "slurm-wlm and munge are not installed, which needs root"
  elif ! { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends \
    slurm-wlm munge > /dev/null; }; then
    echo "slurm-wlm and munge could not be installed by apt-get"
  fi
}

write_settings() {  # DIR NODES
  local dir=$1 count=$2 host
  host=$(hostname -s)
  mkdir -p "$dir"/{state,log,run,dev,local,small}
  touch "$dir"/dev/gpu{0..7}
  cp /etc/hosts "$dir/hosts"
  cat > "$dir/gres.conf" <<END
AutoDetect=off
NodeName=n[1-$count] Name=gpu Type=h100 File=$dir/dev/gpu[0-7]
END
  # linuxproc and task/none: no cgroups. config_overrides: two cores may pose as 64. SlurmdTimeout: a dead node is told
  # after seconds. cred_expire: a requeued job waits for longer than that.
  cat > "$dir/slurm.conf" <<END
ClusterName=lab
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
SlurmctldPort=17817
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool.%n
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd.%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$dir/log/jobcomp.txt
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
SlurmctldTimeout=10
SlurmdTimeout=8
KillWait=5
SlurmdParameters=config_overrides
GresTypes=gpu
PartitionName=debug Nodes=ALL Default=YES MaxTime=60 State=UP
END
  for number in $(seq "$count"); do
    mkdir -p "$dir/spool.n$number"
    echo "127.0.0.$((10 + number)) n$number" >> "$dir/hosts"
    echo "NodeName=n$number NodeHostname=$host NodeAddr=127.0.0.$((10 + number)) Port=$((17830 + number)) CPUs=64" \
      "RealMemory=4000 Gres=gpu:h100:8 State=UNKNOWN" >> "$dir/slurm.conf"
  done
}

start_munge() {  # DIR
  if munge -n 2> /dev/null | unmunge > /dev/null 2>&1; then return; fi
  install -d -o munge -g munge -m 755 /run/munge
  su -s /bin/sh munge -c munged
  ln -sf /run/munge/munged.pid "$1/run/munged.pid"  # ours to stop
  for _ in $(seq 40); do
    if munge -n 2> /dev/null | unmunge > /dev/null 2>&1; then return; fi
    sleep 0.1
  done
  echo "munged does not answer" >&2
  return 1
}

start_node() {  # DIR NAME: its own host name, and mounts that the others do not see
  SLURM_CONF="$1/slurm.conf" unshare --uts --mount sh -euc '
    hostname "$2"
    mount --bind "$1/hosts" /etc/hosts
    if [ "$2" = n4 ]; then  # the node without room: it sees the files, and what it writes goes elsewhere
      mount -t tmpfs -o size=64k small "$1/small"
      mkdir "$1/small/upper" "$1/small/work"
      mount -t overlay -o "lowerdir=$1/local,upperdir=$1/small/upper,workdir=$1/small/work" small "$1/local" ||
        touch "$1/no_overlay"
    fi
    exec slurmd -f "$1/slurm.conf" -N "$2"' - "$1" "$2"
}

start() {  # DIR NODES
  local dir=$1 count=$2
  write_settings "$dir" "$count"
  start_munge "$dir"
  export SLURM_CONF="$dir/slurm.conf"
  slurmctld -c -f "$SLURM_CONF"
  for number in $(seq "$count"); do start_node "$dir" "n$number"; done
  for _ in $(seq 60); do
    if [ "$(sinfo -h -o %t 2> /dev/null | sort -u)" = idle ]; then return; fi
    sleep 0.25
  done
  sinfo >&2
  return 1
}

stop() {  # DIR
  local file
  for file in "$1"/run/slurmd*.pid "$1"/run/slurmctld.pid "$1"/run/munged.pid; do
    if [ -e "$file" ]; then kill "$(cat "$file")" 2> /dev/null || true; fi
  done
}

case "${1:-}" in
  install) install_packages ;;
  start) start "$(realpath -m "$2")" "${3:-4}" ;;
  node) start_node "$(realpath -m "$2")" "$3" ;;
  stop) stop "$(realpath -m "$2")" ;;
  *) sed -n 4,5p "${BASH_SOURCE[0]}" >&2; exit 2 ;;
esac
