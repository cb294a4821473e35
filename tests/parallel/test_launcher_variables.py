"""Which rank a process is, from torchrun's variables, SLURM's, or none."""

import pytest

from configs.errors import BadInput
from parallel.environment import Environment
from parallel.launcher_variables import find_environment, first_host

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29400",
}
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_TASKS_PER_NODE": "4(x2)",
    "SLURM_JOB_NODELIST": "localhost,n[2-3]",
}


def test_torchrun_variables():
    found = find_environment(TORCHRUN)
    assert found == Environment(5, 8, 1, 4, "node1", 29400, "torchrun")
    assert found.as_variables() == TORCHRUN


def test_torchrun_inside_slurm_wins():
    assert find_environment(SLURM | TORCHRUN).launcher == "torchrun"


def test_slurm_variables():
    found = find_environment(SLURM)
    assert (found.rank, found.world_size, found.local_rank, found.local_world_size) == (5, 8, 1, 4)
    assert (found.master_addr, found.launcher) == ("localhost", "slurm")


def test_slurm_ranks_agree_on_the_port_and_steps_differ():
    assert find_environment(SLURM).master_port == find_environment(SLURM | {"SLURM_PROCID": "0"}).master_port
    assert find_environment(SLURM).master_port != find_environment(SLURM | {"SLURM_STEP_ID": "1"}).master_port


def test_slurm_uneven_nodes():
    uneven = SLURM | {"SLURM_TASKS_PER_NODE": "2(x3),7", "SLURM_NODEID": "3"}
    assert find_environment(uneven).local_world_size == 7


def test_master_address_given_by_hand_wins_over_the_node_list():
    assert find_environment(SLURM | {"MASTER_ADDR": "10.0.0.9"}).master_addr == "10.0.0.9"


def test_no_launcher_is_a_world_of_one_on_a_free_port():
    found = find_environment({})
    assert (found.rank, found.world_size, found.launcher) == (0, 1, "single")
    assert found.master_port > 1023


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"RANK": "0"}, "WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set"),
        (TORCHRUN | {"RANK": "8"}, "rank 8 of a world of 8; ranks go from 0 to 7"),
        (TORCHRUN | {"LOCAL_RANK": "4"}, "local rank 4 of 4"),
        (TORCHRUN | {"WORLD_SIZE": "many"}, "WORLD_SIZE is 'many'"),
        (TORCHRUN | {"WORLD_SIZE": "0"}, "at least 1 rank"),
        ({key: SLURM[key] for key in SLURM if key != "SLURM_STEP_ID"}, "put srun (or torchrun) in front"),
        ({key: SLURM[key] for key in SLURM if key != "SLURM_JOB_NODELIST"}, "SLURM_JOB_NODELIST is not set"),
    ],
)
def test_contradictions_are_one_clear_sentence(variables, sentence):
    with pytest.raises(BadInput) as refused:
        find_environment(variables)
    assert sentence in str(refused.value)


@pytest.mark.parametrize(
    ("node_list", "host"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[017-032]", "gpu017"),
        ("gpu[3,7-9],login", "gpu3"),
        ("rack[07-09,12]n2,x", "rack07n2"),
        ("r[1-2]n[05-06]", "r1n05"),
    ],
)
def test_first_host_of_a_node_list(node_list, host):
    assert first_host(node_list) == host


@pytest.mark.parametrize("name", ["SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"])
def test_a_job_that_is_started_again_is_known(name):
    """Such a run waits for what it was before to let go of the run directory."""
    assert not find_environment({}).is_restart and not find_environment({name: "0"}).is_restart
    assert find_environment({name: "1"}).is_restart
