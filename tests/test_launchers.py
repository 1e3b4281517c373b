"""Who a process takes itself for, from the variables of each launcher."""

import pytest

from hpcmlip.errors import RunError
from hpcmlip.launch import World, detect, job_end

STEP = {
    "SLURM_JOB_ID": "17",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
}
# as sbatch leaves it in a batch script of one task: SLURM_PROCID is there without any srun
BATCH = {"SLURM_JOB_ID": "17", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "1", "SLURM_NNODES": "1"}
TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "41335",
    "TORCHELASTIC_RUN_ID": "x",
    "GROUP_WORLD_SIZE": "1",
}
OPENMPI = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "PMIX_NAMESPACE": "prterun-node-7242@1",
    "PMIX_RANK": "1",
}


@pytest.mark.parametrize(
    ("env", "world"),
    [
        ({}, World(0, 1, 0, "alone")),
        (BATCH, World(0, 1, 0, "alone")),
        (TORCHRUN, World(1, 2, 1, "torchrun", "environment")),
        (OPENMPI, World(1, 2, 1, "mpirun", "mpi-prterun-node-7242@1")),
        (STEP, World(3, 4, 1, "srun", "slurm-17.2.0")),
        (STEP | {"SLURM_RESTART_COUNT": "5"}, World(3, 4, 1, "srun", "slurm-17.2.5")),
        # a step counts its own tasks, whatever the job asked for
        (STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, World(0, 1, 1, "srun", "slurm-17.2.0")),
        # the shell of salloc and the batch script have special step numbers
        (BATCH | {"SLURM_STEP_ID": "4294967290"}, World(0, 1, 0, "alone")),
        (BATCH | {"SLURM_STEP_ID": "4294967291"}, World(0, 1, 0, "alone")),
        # one torchrun a node under srun, joined into one run
        (
            TORCHRUN | {"GROUP_WORLD_SIZE": "2", "WORLD_SIZE": "4"} | STEP | {"SLURM_STEP_NUM_TASKS": "2"},
            World(1, 4, 1, "torchrun", "environment"),
        ),
        # Open MPI starts its daemons on other nodes as tasks of a Slurm step
        (OPENMPI | STEP | {"SLURM_STEP_NUM_TASKS": "1"}, World(1, 2, 1, "mpirun", "mpi-prterun-node-7242@1")),
        # a job template that exports these for torch, with srun on top
        (
            STEP | {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "n0", "MASTER_PORT": "1234"},
            World(3, 4, 0, "env", "environment"),
        ),
    ],
)
def test_world_of_each_launcher(env, world):
    assert detect(env) == world


@pytest.mark.parametrize(
    ("env", "reason"),
    [
        (BATCH | {"SLURM_NTASKS": "4"}, "srun hpcmlip train"),
        (BATCH | {"SLURM_NNODES": "2"}, "not started by srun"),
        (TORCHRUN | STEP, "4 tasks and each believes"),
        (STEP | {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "n0", "MASTER_PORT": "1234"}, "4 tasks and each"),
        (OPENMPI | STEP, "each started an mpirun of 2"),
        ({k: v for k, v in OPENMPI.items() if k != "PMIX_NAMESPACE"}, "no common job name"),
        ({k: v for k, v in STEP.items() if k != "SLURM_PROCID"}, "SLURM_PROCID"),
        ({"PMI_SIZE": "4", "PMI_RANK": "1"}, "PMI_SIZE=4"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4"),
        ({"MV2_COMM_WORLD_SIZE": "2"}, "srun, torchrun or Open MPI"),
        (TORCHRUN | {"RANK": "one"}, "RANK='one'"),
        ({k: v for k, v in OPENMPI.items() if k != "OMPI_COMM_WORLD_RANK"}, "no OMPI_COMM_WORLD_RANK"),
    ],
)
def test_a_process_that_would_take_itself_for_the_whole_run_is_refused(env, reason):
    with pytest.raises(RunError, match=reason):
        detect(env)


def test_the_end_of_a_job_is_what_slurm_set_or_unknown(tmp_path):
    assert job_end({}) is None
    assert job_end(STEP | {"SLURM_JOB_END_TIME": "1795630318"}) == 1795630318.0
    assert job_end(STEP | {"PATH": str(tmp_path)}) is None, "no squeue"
    with pytest.raises(RunError, match="SLURM_JOB_END_TIME='soon'"):
        job_end({"SLURM_JOB_END_TIME": "soon"})
