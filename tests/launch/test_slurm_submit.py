"""`launch/slurm.py` with commands that stand in for SLURM's: what it refuses, writes and submits; the script's ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from configs.load import load_config
from launch import slurm

ROOT = Path(__file__).resolve().parents[2]
STAND_INS = {
    "sinfo": 'echo "gpu|4|1-00:00:00|gpu*"; echo "long|2|infinite|long"',
    "squeue": 'cat "$FAKE/queue" 2> /dev/null || true',
    "sbatch": 'echo "$*" >> "$FAKE/submitted"; wc -l < "$FAKE/submitted"',
    "scancel": "true",
    "sleep": "exec /bin/sleep 0.05",
    "scontrol": """
case "$1 $2" in
  "show hostnames") echo n1; echo n2 ;;
  "show job") echo "ExcNodeList=n9" ;;
  requeue* | update*) echo "$*" >> "$FAKE/calls"; [ -z "${FAKE_NO_REQUEUE:-}" ] ;;
esac""",
    # The step's own call trains; the other is the question whether a node answers.
    "srun": """
case "$*" in *--nodelist=n2*) exit 1 ;; *--overlap*) exit 0 ;; esac
if [ -n "${FAKE_SIGNAL:-}" ]; then kill -USR1 "$PPID"; /bin/sleep 0.2; fi
for end in ${FAKE_ENDS:-}; do echo "rank 1 on ${end#*.}" > "$SHARDWRIGHT_ENDS/$end"; done
exit "${FAKE_CODE:-0}"
""",
}


@pytest.fixture
def site(tmp_path, monkeypatch) -> Path:
    """Put the stand-ins on the path and return the directory that they write to, which is where commands are given."""
    for name, text in STAND_INS.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cluster.yaml").write_text(
        "gpus_per_node: 4\npartition: gpu\ntime_limit: 1:00:00\nsignal_seconds: 60\n"
    )
    return tmp_path


RECIPE = str(ROOT / "configs/demo/pretrain.yaml")
SFT = str(ROOT / "configs/demo/sft.yaml")
PLAIN = [RECIPE, "--cluster", "cluster.yaml", "--nodes", "2"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([RECIPE, "--nodes", "2"], "--cluster: missing; a value that would work: configs/clusters/h100.yaml"),
        ([*PLAIN, "--chian", "2"], "--chian: unknown option; did you mean --chain?"),
        ([*PLAIN, "--time", "1h"], "--time: '1h' is not a time as SLURM writes it; a value that would work: 24:00:00"),
        ([*PLAIN, "--time", "1"], "signal_seconds: 60 before a limit of 60 seconds (time_limit, --time) leaves no"),
        ([*PLAIN, "--time", "2-0"], "time_limit: 2-0 is beyond the 1440 minutes of the partition gpu; a value that"),
        ([*PLAIN, "--nodes", "5"], "--nodes: 5, and the partition gpu has 4; a value that would work: 4"),
        ([*PLAIN, "parallel.tp=8"], "parallel.tp: 8 does not divide the 4 ranks of a node"),
        ([*PLAIN, "--nodes", "3", "parallel.pp=5"], "parallel: world size 12 is no multiple of tp*pp*cp = 2*5*1 = 10;"),
        ([*PLAIN, "--nodes", "3", "parallel.pp=5"], "(--nodes 3, 4 ranks each; such as --nodes 5, 10, 15)"),
        ([*PLAIN, "trian.num_steps=3"], "trian: unknown field; did you mean train?"),
        ([*PLAIN, SFT, "--stages", "pretrain"], "--stages: 1 stages for 2 recipes; name a recipe for each stage"),
        ([*PLAIN, SFT, "run.name=demo"], "is that of an earlier stage too; give each stage its own run.name"),
        ([*PLAIN, SFT, "model.num_layers=2"], "sft: model: cannot take over the weights of the stage before: model."),
        ([*PLAIN, "run.dir=a%b"], "has letters that sbatch does not take in paths; such as"),
        ([*PLAIN, "--nodes", "-2"], "--nodes: '-2' is not a number from 1; a value that would work: 2"),
        ([*PLAIN, "--stage", "stf"], "; a value that would work: sft"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_told_before_anything_is_written(site, capsys, words, sentence):
    assert slurm.main(words) == 2
    assert sentence in capsys.readouterr().err
    assert not (site / "runs").exists() and not (site / "submitted").exists()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("gpus_per_nod: 8", "cluster.yaml: gpus_per_nod: unknown field; did you mean gpus_per_node?"),
        ("gpus_per_node: eight", "cluster.yaml: gpus_per_node: 'eight' is not a whole number; a value that"),
        ("gpus_per_node: 0", "cluster.yaml: ranks_per_node: missing, and gpus_per_node is 0; a value that"),
        ("{gpus_per_node: 4, ranks_per_node: 8}", "ranks_per_node: 8 ranks for gpus_per_node: 4, and each needs one"),
        ("{gpus_per_node: 4, partition: gup}", "partition: gup does not exist here; did you mean gpu?"),
        ("{gpus_per_node: 4, environment: {A-B: 1}}", "environment.A-B"),
        ("{gpus_per_node: 4, environment: {A: null}}", "a value that would work: environment: {NCCL_IB_HCA: mlx5}"),
        ("{gpus_per_node: 4, account: a b}", "not one word without quotes; a value that would work: my_project"),
        ("{gpus_per_node: 4, sbatch_options: [mail-type=END]}", "of sbatch; a value that would work: --mail-type="),
        ("{gpus_per_node: 4, sbatch_options: [--export=ALL]}", "--export is set by the script itself; remove it"),
        ("", "cluster.yaml is empty; its top level must be sections such as `model:` and `train:`, or a cluster's"),
        ("{gpus_per_node: 4, interface: ib0, environment: {NCCL_SOCKET_IFNAME: eth0}}", "interface: sets NCCL_SOCKET"),
        ("{gpus_per_node: 4, container: {runtime: docker, image: x}}", "'docker' is not one of pyxis, apptainer"),
    ],
)  # fmt: skip
def test_a_cluster_file_is_judged_like_a_recipe(site, capsys, text, sentence):
    (site / "cluster.yaml").write_text(text)
    assert slurm.main(PLAIN) == 2
    assert sentence in capsys.readouterr().err


def test_one_of_several_partitions_is_enough(site, capsys):
    (site / "cluster.yaml").write_text("{gpus_per_node: 4, partition: 'gpu,long'}")
    assert slurm.main([*PLAIN, "--time", "2-0"]) == 0
    assert slurm.main([*PLAIN, "--nodes", "9"]) == 2
    assert "--nodes: 9, and the partition gpu has 4; a value that would work: 4" in capsys.readouterr().err


def test_stages_and_chains_wait_for_each_other_and_begin_where_the_one_before_ended(site, capsys):
    words = [
        RECIPE,
        "run.name=one",
        SFT,
        "run.name=two",
        "--nodes",
        "2,1",
        "--chain",
        "2",
        "train.global_batch_size=16",
    ]
    assert slurm.main([*words, "--cluster", "cluster.yaml"]) == 0
    one, two = (site / "runs" / name / "submit.sbatch" for name in ("one", "two"))
    waits = [f"--parsable --dependency=afterok:{number} --kill-on-invalid-dep=yes" for number in (1, 2, 3)]
    assert (site / "submitted").read_text().splitlines() == [
        f"--parsable {one} goes-on", f"{waits[0]} {one}", f"{waits[1]} {two} goes-on", f"{waits[2]} {two}",
    ]  # fmt: skip
    assert f"  log: {one.parent}/logs/slurm/1.log" in capsys.readouterr().out.splitlines()
    written = load_config(str(two.parent / "recipe.yaml"), (), "sft")
    assert written.checkpoint.init_from == str(one.parent) and written.train.global_batch_size == 16
    asked = load_config(SFT, ["run.name=two", "train.global_batch_size=16"], "sft")
    assert written.sft == asked.sft and written.model == asked.model
    assert "#SBATCH --nodes=1\n" in two.read_text() and "AT_LIMIT=end\n" in two.read_text()


def test_what_follows_a_reward_model_begins_with_the_language_model_before_it(site):
    recipes = [str(ROOT / f"configs/demo/{name}.yaml") for name in ("sft", "reward", "ppo")]
    words = [word for recipe in recipes for word in (recipe, f"run.name={Path(recipe).stem}")]
    assert slurm.main(["train.global_batch_size=16", *words, "--nodes", "1", "--cluster", "cluster.yaml"]) == 0
    for stage in ("reward", "ppo"):
        written = load_config(str(site / "runs" / stage / "recipe.yaml"), (), stage)
        assert written.checkpoint.init_from == str(site / "runs" / "sft")


def test_the_student_of_a_stage_begins_where_its_recipe_says(site):
    """It is another model; and a stage that leaves data alone is nothing to begin with."""
    recipes = [str(ROOT / f"configs/demo/{name}.yaml") for name in ("sft", "teacher_cache", "distill")]
    words = [word for recipe in recipes for word in (recipe, f"run.name={Path(recipe).stem}")]
    first = ["train.global_batch_size=32", *words]
    last = ["--nodes", "1", "--cluster", "cluster.yaml"]
    cached = ["distill.teacher=null", "distill.cache=data/teacher_cache"]
    for own in (cached, ["distill.teacher=runs/sft"], ["distill.teacher=./runs/../runs/sft/checkpoints/latest"]):
        assert slurm.main([*first, *own, *last]) == 0
        starts = [
            load_config(str(site / "runs" / stage / "recipe.yaml"), (), stage).checkpoint.init_from
            for stage in ("teacher_cache", "distill")
        ]
        assert starts == [str(site / "runs" / "sft"), None]
    assert slurm.main([*first, "distill.teacher=elsewhere", *last]) == 2  # half the size


def test_a_directory_with_a_live_owner_is_left_alone(site, capsys):
    run_dir = site / "runs" / "demo"
    (site / "queue").write_text(
        f"41|RUNNING|n[1-2]|{run_dir}/submit.sbatch goes-on\n42|RUNNING|n3|elsewhere/submit.sbatch\n"
    )
    assert slurm.main(PLAIN) == 2
    assert f"run.dir: {run_dir} belongs to SLURM job 41 (running on n[1-2]); wait for it" in capsys.readouterr().err
    (site / "queue").unlink()
    run_dir.mkdir(parents=True)
    holder = "import fcntl, sys; f = open(sys.argv[1], 'a+'); fcntl.lockf(f, fcntl.LOCK_EX); print('process 7 on n5', "
    holder += "file=f, flush=True); print(flush=True); input()"
    words = [sys.executable, "-c", holder, str(run_dir / ".lock")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert slurm.main(PLAIN) == 2
        other.communicate(b"\n")
    assert f"run.dir: {run_dir} belongs to process 7 on n5; wait for it" in capsys.readouterr().err
    assert slurm.main(PLAIN) == 0


def test_a_dry_run_needs_no_torch_and_no_slurm_and_writes_nothing(tmp_path):
    code = "import runpy, sys; sys.modules['torch'] = None; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    words = [RECIPE, "--cluster", str(ROOT / "configs/clusters/h100_container.yaml"), "--nodes", "2", "--dry-run"]
    environment = {**os.environ, "PATH": str(tmp_path)}
    command = [sys.executable, "-c", code, str(ROOT / "launch/slurm.py"), *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "this machine has no SLURM: partition" in done.stderr and not list(tmp_path.iterdir())
    assert "#SBATCH --gpus-per-node=8\n" in done.stdout and "--container-image=nvcr.io#nvidia" in done.stdout


def test_other_launchers_get_files_to_start_it_with(site):
    assert slurm.main([*PLAIN, "--format", "torchrun"]) == 0
    text = (site / "runs/demo/torchrun.sh").read_text()
    alone = subprocess.run(["bash", str(site / "runs/demo/torchrun.sh")], capture_output=True, text=True)
    assert alone.returncode != 0 and "is missing: bash torchrun.sh FIRST_HOST" in alone.stderr
    assert "--nnodes=2 --nproc-per-node=4 --rdzv-backend=c10d" in text and '--rdzv-endpoint="$first:29400"' in text
    assert slurm.main([*PLAIN, "--format", "pytorchjob"]) == 2, "it needs an image"
    image = (
        "{gpus_per_node: 4, setup: ['true # here'], container: {runtime: pyxis, image: a/b:1, mounts: ['/d:/e:ro']}}"
    )
    (site / "cluster.yaml").write_text(image.replace("a/b:1", "/b.sqsh"))
    assert slurm.main([*PLAIN, "--format", "pytorchjob"]) == 2, "no registry has a file"
    (site / "cluster.yaml").write_text(image)
    assert slurm.main([*PLAIN, "--format", "pytorchjob", "run.name=8b", "run.dir=runs/demo"]) == 0
    job = yaml.safe_load((site / "runs/demo/pytorchjob.yaml").read_text())
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert [replicas[kind]["replicas"] for kind in ("Master", "Worker")] == [1, 1]
    pod = replicas["Worker"]["template"]["spec"]
    number = next(one["name"] for one in pod["volumes"] if one.get("hostPath") == {"path": "/d"})
    assert {"name": number, "mountPath": "/e", "readOnly": True} in pod["containers"][0]["volumeMounts"]
    assert job["metadata"]["name"] == "run-8b", "names of Services begin with a letter"
    assert pod["containers"][0]["command"][2].splitlines()[:2] == ["set -e", "true # here"]
    assert pod["containers"][0]["resources"] == {"limits": {"nvidia.com/gpu": 4}}
    assert not (site / "submitted").exists()


def test_a_directory_that_sbatch_could_not_enter_is_refused(site, capsys, monkeypatch):
    (site / "my dir").mkdir()
    monkeypatch.chdir(site / "my dir")
    words = [RECIPE, f"run.dir={site}/run", "--cluster", "../cluster.yaml", "--nodes", "2"]
    assert slurm.main(words) == 2
    assert f"'{site}/my dir' has letters that sbatch does not take in paths" in capsys.readouterr().err
    assert slurm.main([*words, "--format", "torchrun"]) == 0


def test_a_line_of_setup_that_fails_ends_the_job(site):
    with (site / "cluster.yaml").open("a") as file:
        file.write("setup: ['export A=1  # first', 'false  # a comment']\n")
    code, said, _ = run_script(site)
    assert code == 2 and "setup: this line failed: false  # a comment" in said


def run_script(
    site: Path, *arguments: str, restart: int = 0, chain: int = 1, **variables: str
) -> tuple[int, str, list[str]]:
    """Write the script, run it as SLURM would, and return its exit code, its words and what it asked SLURM to do."""
    if restart == 0:
        assert slurm.main([*PLAIN, "--chain", str(chain)]) == 0
    (site / "calls").write_text("")
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_RESTART_COUNT": str(restart)}
    job["SLURMD_NODENAME"] = "n1"
    script = ["bash", str(site / "runs/demo/submit.sbatch"), *arguments]
    done = subprocess.run(script, env={**os.environ, **job, **variables}, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, (site / "calls").read_text().splitlines()


@pytest.mark.parametrize(
    ("variables", "code", "calls"),
    [
        ({"FAKE_ENDS": "0.n1 0.n2"}, 0, []),
        ({"FAKE_ENDS": "5.n1 2.n2", "FAKE_CODE": "1"}, 2, []),  # the cause, not what follows from it
        ({"FAKE_ENDS": "1.n1 5.n2", "FAKE_CODE": "1"}, 1, []),
        ({"FAKE_ENDS": "4.n1 4.n2", "FAKE_CODE": "1"}, 4, []),
        ({"FAKE_ENDS": "3.n1 3.n2", "FAKE_CODE": "1"}, 3, []),  # somebody else has stopped it
        ({"FAKE_ENDS": "3.n1 3.n2", "FAKE_CODE": "1", "FAKE_SIGNAL": "1"}, 0, ["requeue 7"]),
        ({"FAKE_ENDS": "5.n1", "FAKE_CODE": "1"}, 0, ["requeue 7", "update JobId=7 ExcNodeList=n9,n2"]),
        ({"FAKE_ENDS": "5.n1 5.n2", "FAKE_CODE": "1"}, 0, ["requeue 7"]),
        ({"FAKE_CODE": "137"}, 0, ["requeue 7", "update JobId=7 ExcNodeList=n9,n2"]),
    ],
)
def test_the_script_does_what_the_exit_code_calls_for(site, variables, code, calls):
    assert run_script(site, **variables)[::2] == (code, calls)


def test_the_next_of_a_chain_takes_over_at_the_limit(site):
    ends = {"FAKE_ENDS": "3.n1 3.n2", "FAKE_CODE": "1"}
    assert run_script(site, "goes-on", chain=2, FAKE_SIGNAL="1", **ends)[::2] == (0, [])
    assert run_script(site, "goes-on", chain=2, **ends)[::2] == (3, [])
    code, said, calls = run_script(site, chain=2, FAKE_SIGNAL="1", **ends)  # the last: no stage may start from it
    assert (code, calls) == (3, []) and "the last job of the chain, and the run is not done: sbatch" in said


def test_a_site_that_queues_no_job_again_ends_it_without_success(site):
    code, said, calls = run_script(site, FAKE_ENDS="5.n1 5.n2", FAKE_CODE="1", FAKE_NO_REQUEUE="1")
    assert (code, calls) == (5, ["requeue 7"]) and "SLURM does not queue this job again: sbatch" in said
    ends = {"FAKE_ENDS": "3.n1 3.n2", "FAKE_CODE": "1", "FAKE_SIGNAL": "1", "FAKE_NO_REQUEUE": "1"}
    assert run_script(site, **ends)[::2] == (3, ["requeue 7"])


def test_restarts_without_progress_end(site):
    ends = {"FAKE_ENDS": "5.n1 5.n2", "FAKE_CODE": "1"}
    for restart in range(3):
        assert run_script(site, restart=restart, **ends)[::2] == (0, ["requeue 7"]), restart
    latest = site / "runs/demo/checkpoints/latest"
    latest.parent.mkdir()
    latest.symlink_to("step_00000010")  # the third restart begins behind where the second did
    for restart in range(3, 6):
        assert run_script(site, restart=restart, **ends)[::2] == (0, ["requeue 7"]), restart
    code, said, calls = run_script(site, restart=6, **ends)
    assert (code, calls) == (5, []) and "gives up: 4 starts in a row left no new checkpoint" in said
    code, said, calls = run_script(site, restart=7, **ends)  # as SLURM queues it again after a node's failure
    assert (code, calls) == (5, []) and "gives up: 4 restarts in a row left no new checkpoint" in said
