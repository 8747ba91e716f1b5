"""The environment variables below were recorded from real launchers, and reduced to those that concern ranks."""

import dataclasses

import pytest

from disttrain.comm.launch.environment import Environment, detect, first_slurm_host
from disttrain.errors import UserError

TORCHRUN = {
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node-a",
    "MASTER_PORT": "41257",
    "RANK": "2",
    "ROLE_RANK": "2",
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "WORLD_SIZE": "4",
}
HOROVODRUN = {
    "HOROVOD_CONTROLLER": "gloo",
    "HOROVOD_CROSS_RANK": "1",
    "HOROVOD_CROSS_SIZE": "2",
    "HOROVOD_HOSTNAME": "node-b",
    "HOROVOD_LOCAL_RANK": "1",
    "HOROVOD_LOCAL_SIZE": "2",
    "HOROVOD_RANK": "3",
    "HOROVOD_SIZE": "4",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_NODE_RANK": "1",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "PMIX_NAMESPACE": "2005008385",
    "PMIX_RANK": "1",
}
HOROVODRUN_MPI = {
    **OPEN_MPI,
    "NCCL_SOCKET_IFNAME": "lo",
    "OMPI_MCA_btl": "^openib",
    "OMPI_MCA_btl_tcp_if_include": "lo",
    "OMPI_MCA_hwloc_base_binding_policy": "none",
    "OMPI_MCA_orte_tag_output": "1",
    "OMPI_MCA_pml": "ob1",
    "OMPI_MCA_rmaps_base_mapping_policy": "slot",
}
MPICH = {"MPI_LOCALNRANKS": "2", "MPI_LOCALRANKID": "1", "PMI_FD": "9", "PMI_RANK": "1", "PMI_SIZE": "2"}
SBATCH_BODY = {
    "SLURM_GTIDS": "0",
    "SLURM_JOB_ID": "4",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_LOCALID": "0",
    "SLURM_NNODES": "2",
    "SLURM_NODEID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "0",
    "SLURM_TASKS_PER_NODE": "2(x2)",
}
SRUN = {
    **SBATCH_BODY,
    "SLURM_GTIDS": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "3",
    "SLURM_PROCID": "2",
    "SLURM_STEP_ID": "1",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
}
# A single task that srun starts in a job of four: detection must read the step's numbers, not the job's.
SRUN_ONE_TASK = {
    **SBATCH_BODY,
    "SLURM_NNODES": "1",
    "SLURM_NTASKS": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "n1",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1",
    "SLURM_TASKS_PER_NODE": "1",
}
SRUN_PMI2 = {**SRUN, "PMI_FD": "13", "PMI_RANK": "2", "PMI_SIZE": "3", "SLURM_MPI_TYPE": "pmi2"}
SRUN_PMIX = {**SRUN, "PMIX_NAMESPACE": "slurm.pmix.4.1", "PMIX_RANK": "2"}
SLURM_PORT = 15000 + 4 * 31 + 1

LOCAL = ("127.0.0.1", 29500)
RECORDED = {
    "none": ({}, Environment("none", "single", 0, 1, 0, 1, 1)),
    "torchrun": (TORCHRUN, Environment("torchrun", "torch", 2, 4, 0, 2, 2, "node-a", 41257)),
    "horovodrun": (HOROVODRUN, Environment("horovodrun", "horovod", 3, 4, 1, 2, 2)),
    "openmpi": (OPEN_MPI, Environment("mpirun (Open MPI)", "mpi", 1, 2, 1, 2, 1, *LOCAL)),
    "horovodrun-mpi": (HOROVODRUN_MPI, Environment("horovodrun --mpi", "horovod", 1, 2, 1, 2, 1, *LOCAL)),
    "mpich": (MPICH, Environment("mpiexec (MPICH)", "mpi", 1, 2, 1, 2, 1, *LOCAL)),
    "sbatch": (SBATCH_BODY, Environment("none", "single", 0, 1, 0, 1, 1)),
    "srun": (SRUN, Environment("srun", "torch", 2, 3, 0, 1, 2, "n1", SLURM_PORT)),
    "srun-1": (SRUN_ONE_TASK, Environment("srun", "single", 0, 1, 0, 1, 1, "127.0.0.1", SLURM_PORT - 1)),
    "srun-pmi2": (SRUN_PMI2, Environment("srun --mpi=pmi2", "mpi", 2, 3, 0, 1, 2, "n1", SLURM_PORT)),
    "srun-pmix": (SRUN_PMIX, Environment("srun --mpi=pmix", "mpi", 2, 3, 0, 1, 2, "n1", SLURM_PORT)),
    # A launcher inside a Slurm job starts its daemons by srun, so its workers inherit a step's variables.
    "openmpi-in-slurm": (SRUN | OPEN_MPI, Environment("mpirun (Open MPI)", "mpi", 1, 2, 1, 2, 1, *LOCAL)),
    "mpich-in-slurm": (SRUN | MPICH, Environment("mpiexec (MPICH)", "mpi", 1, 2, 1, 2, 1, *LOCAL)),
    "horovodrun-in-slurm": (SBATCH_BODY | HOROVODRUN, Environment("horovodrun", "horovod", 3, 4, 1, 2, 2)),
    "torchrun-in-slurm": (SRUN | TORCHRUN, Environment("torchrun", "torch", 2, 4, 0, 2, 2, "node-a", 41257)),
}


@pytest.mark.parametrize(("environ", "expected"), RECORDED.values(), ids=RECORDED)
def test_recorded_environment(environ, expected):
    assert detect(environ) == expected


def test_manually_exported_ranks():
    manual = {"RANK": "1", "WORLD_SIZE": "3", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}
    assert detect(manual) == Environment("torchrun", "torch", 1, 3, 0, 1, None, "10.0.0.1", 1234)
    here = detect({**manual, "MASTER_ADDR": "localhost"})
    assert (here.local_rank, here.local_size, here.num_hosts) == (1, 3, 1)


def test_empty_variable_counts_as_unset():
    assert detect({"RANK": "", "WORLD_SIZE": " "}).launcher == "none"


def test_an_interactive_step_is_not_a_launcher():
    assert detect({**SRUN, "SLURM_STEP_ID": "4294967290"}).launcher == "none"


def test_tasks_per_node_of_each_node():
    nodes = {**SRUN, "SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_STEP_NUM_TASKS": "7", "SLURM_PROCID": "6"}
    assert [detect({**nodes, "SLURM_NODEID": str(node)}).local_size for node in range(4)] == [2, 2, 2, 1]


def test_master_variables_take_precedence_over_the_node_list():
    environment = detect({**SRUN, "MASTER_ADDR": "10.1.1.1", "MASTER_PORT": "2000"})
    assert environment.rendezvous() == ("10.1.1.1", 2000)


def test_steps_of_a_job_use_different_ports():
    assert detect(SRUN).master_port != detect({**SRUN, "SLURM_STEP_ID": "2"}).master_port


def test_rendezvous_over_hosts_needs_an_address():
    several_hosts = detect({**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "4"})
    with pytest.raises(UserError, match="export MASTER_ADDR"):
        several_hosts.rendezvous()
    assert detect({**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "4", "MASTER_ADDR": "a"}).rendezvous() == ("a", 29500)


# Variables that Kubernetes sets in a pod with one worker; an image or a profile may set them too.
POD = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
STARTED = {name: recorded for name, recorded in RECORDED.items() if recorded[1].world_size > 1}


@pytest.mark.parametrize(
    "left_over", [POD, {"RANK": "0", "WORLD_SIZE": "1"}, {"RANK": "0"}], ids=["pod", "two", "rank"]
)
@pytest.mark.parametrize("launcher", STARTED)
def test_a_launcher_takes_precedence_over_leftover_variables_of_one_process(launcher, left_over):
    environ, expected = STARTED[launcher]
    found = detect({**left_over, **environ})
    # A given port is always used, a given address only if it can be right.
    assert dataclasses.replace(found, master_port=expected.master_port) == expected


def test_ranks_on_one_host_ignore_a_leftover_address():
    assert detect({**OPEN_MPI, "MASTER_ADDR": "another-pod"}).rendezvous() == LOCAL


@pytest.mark.parametrize("launcher", ["openmpi", "horovodrun-mpi", "mpich", "srun", "srun-pmi2", "srun-pmix"])
def test_manual_ranks_that_contradict_the_launcher_are_an_error(launcher):
    environ, expected = RECORDED[launcher]
    for rank, world_size in ((expected.rank - 1, expected.world_size), (0, expected.world_size - 1)):
        manual = {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
        if world_size > 1:
            with pytest.raises(UserError, match=f"RANK={rank} and WORLD_SIZE={world_size} contradict .*unset RANK"):
                detect({**environ, **manual})


@pytest.mark.parametrize(
    ("outer", "manual"),
    [
        (SRUN, {"RANK": "2", "WORLD_SIZE": "3"}),  # a script under srun repeats the ranks for torch
        (OPEN_MPI, {"RANK": "1", "WORLD_SIZE": "2"}),
        (SRUN, {"RANK": "5", "WORLD_SIZE": "12"}),  # one process per node started four workers
        (OPEN_MPI, {"RANK": "0", "WORLD_SIZE": "8"}),
        (SRUN_ONE_TASK, {"RANK": "1", "WORLD_SIZE": "2"}),  # set manually in a shell that srun opened
    ],
)
def test_manual_ranks_inside_another_launcher(outer, manual):
    found = detect({**outer, **manual, "MASTER_ADDR": "node-a"})
    assert (found.engine, found.rank, found.world_size) == ("torch", int(manual["RANK"]), int(manual["WORLD_SIZE"]))
    assert found.master_addr == "node-a"


def test_torchrun_with_one_worker_inside_srun_is_a_world_of_one():
    alone = {**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "GROUP_WORLD_SIZE": "1"}
    assert detect({**SRUN, **alone}).world_size == 1


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({**TORCHRUN, "RANK": "two"}, "RANK='two' must be an integer, 0 or more"),
        ({**TORCHRUN, "RANK": "-1"}, "RANK='-1' must be an integer, 0 or more"),
        ({**TORCHRUN, "RANK": "4"}, "RANK=4 must be below WORLD_SIZE=4"),
        ({**TORCHRUN, "WORLD_SIZE": "0"}, "WORLD_SIZE='0' must be an integer, 1 or more"),
        ({**TORCHRUN, "LOCAL_RANK": "2"}, "LOCAL_RANK=2 must be below"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "8"}, "8 workers on this host are more than WORLD_SIZE=4"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": ""}, "LOCAL_WORLD_SIZE is not set, but LOCAL_RANK is"),
        ({**TORCHRUN, "MASTER_PORT": "70000"}, "MASTER_PORT=70000"),
        ({"RANK": "0"}, "WORLD_SIZE is not set, but RANK is"),
        ({**HOROVODRUN, "HOROVOD_SIZE": "x"}, "HOROVOD_SIZE='x'"),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "2(y3)"}, "SLURM_STEP_TASKS_PER_NODE="),
        ({**SRUN, "SLURM_NODEID": "2"}, "SLURM_NODEID=2 must be below 2, the nodes in SLURM_STEP_TASKS_PER_NODE"),
        ({**SRUN, "SLURM_LOCALID": ""}, "SLURM_LOCALID is not set"),
    ],
)
def test_inconsistent_variables_are_named(environ, message):
    with pytest.raises(UserError) as raised:
        detect(environ)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("node_list", "host"),
    [
        ("login1", "login1"),
        ("n1,n2", "n1"),
        ("gpu[003-007,9],login1", "gpu003"),
        ("rack[1-2]n[04,06-08]", "rack1n04"),
        ("rack[2,4]-x.cluster,a", "rack2-x.cluster"),
    ],
)
def test_first_host_of_a_node_list(node_list, host):
    assert first_slurm_host(node_list) == host


def test_detection_reads_the_process_environment_when_called(monkeypatch):
    for name in ("HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE", "HOROVOD_CROSS_SIZE"):
        monkeypatch.setenv(name, HOROVODRUN[name])
    assert dataclasses.replace(detect(), master_addr=None, master_port=None) == RECORDED["horovodrun"][1]
