"""What is read from each launcher's environment, and which one counts where they are nested."""

import pytest

from dist_lars.errors import UserError
from dist_lars.launchers import (
    Place,
    expected_ranks,
    host_names,
    is_first_process,
    place_of,
    rank_of,
    tasks_per_node,
)

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "8", "RANK": "5", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
MPIRUN = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
          "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}  # fmt: skip
SRUN = {"SLURM_STEP_NUM_TASKS": "5", "SLURM_PROCID": "4", "SLURM_LOCALID": "0", "SLURM_NODEID": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2),1"}  # fmt: skip
BATCH_STEP = {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
              "SLURM_STEP_TASKS_PER_NODE": "1"}  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"SLURM_NTASKS": "8"}, None),  # the allocation's size: a single process inside it is no mistake
        ({"WORLD_SIZE": "8", "RANK": "0"}, None),  # exported by somebody, not by torchrun
        (TORCHRUN, 8),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, 4),
        ({"HOROVOD_SIZE": "3"}, 3),
        ({"SLURM_STEP_NUM_TASKS": "2"}, 2),
        (MPIRUN | BATCH_STEP, 4),
        (TORCHRUN | SRUN, 8),  # srun starts one torchrun per node
        ({"DIST_LARS_RANKS": "16"} | MPIRUN, 16),  # the launch line has the last word
    ],
)
def test_the_launcher_says_how_many_ranks_there_are(environment, expected):
    assert expected_ranks(environment)[0] == expected


@pytest.mark.parametrize("text", ["two", "0", "-1", "1.5"])
def test_a_number_of_ranks_that_is_none_is_refused(text):
    with pytest.raises(UserError, match=f"DIST_LARS_RANKS is '{text}', but it must be the number of ranks"):
        expected_ranks({"DIST_LARS_RANKS": text})


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, None),
        (TORCHRUN | SRUN | {"OMPI_COMM_WORLD_SIZE": ""}, Place("torchrun", 5, 8, 1, 4)),
        (MPIRUN | BATCH_STEP, Place("mpirun", 3, 4, 1, 2)),
        (SRUN, Place("srun", 4, 5, 0, 1)),
        (SRUN | {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "0"}, Place("srun", 1, 5, 1, 2)),
    ],
    ids=["alone", "torchrun in srun", "mpirun in sbatch", "srun", "srun, first node"],
)
def test_the_place_of_a_rank(environment, place):
    assert place_of(environment) == place


def test_half_an_answer_is_refused():
    broken = {k: v for k, v in TORCHRUN.items() if k != "LOCAL_RANK"}
    with pytest.raises(UserError, match="TORCHELASTIC_RUN_ID is set, as torchrun does, but LOCAL_RANK is not"):
        place_of(broken)


@pytest.mark.parametrize(
    ("text", "tasks"), [("4", [4]), ("2(x3),1", [2, 2, 2, 1]), ("1,3(x2)", [1, 3, 3]), ("16(x1)", [16])]
)
def test_tasks_per_node(text, tasks):
    assert tasks_per_node(text) == tasks


@pytest.mark.parametrize(
    ("nodes", "names"),
    [
        ("", ""),
        ("n1", "n1"),
        ("n1,n2", "n1 n2"),
        ("gpu[07-09,12],login1", "gpu07 gpu08 gpu09 gpu12 login1"),
        ("r[1-2]n[098-100]", "r1n098 r1n099 r1n100 r2n098 r2n099 r2n100"),
        ("c[3,5]-ib,d1", "c3-ib c5-ib d1"),
    ],
)
def test_a_node_list_written_out(nodes, names):
    assert host_names(nodes) == names.split()


@pytest.mark.parametrize(
    ("environment", "first"),
    [
        ({}, True),
        ({"RANK": "3"}, True),  # without torchrun's mark it means nothing
        (TORCHRUN, False),
        (TORCHRUN | {"RANK": "0"}, True),
        (MPIRUN, False),
        (MPIRUN | BATCH_STEP | {"OMPI_COMM_WORLD_RANK": "0"}, True),
        (SRUN, False),
        ({"PMIX_RANK": "1"}, False),
        ({"HOROVOD_SIZE": "2", "HOROVOD_RANK": "1"}, False),
    ],
)
def test_one_process_speaks(environment, first):
    assert is_first_process(environment) == first


@pytest.mark.parametrize(
    ("environment", "rank"),
    [({}, "0"), (TORCHRUN | SRUN, "5"), (MPIRUN | BATCH_STEP, "3"), (SRUN, "4"), ({"PMIX_RANK": "1"}, "1")],
)
def test_the_rank_that_a_message_names(environment, rank):
    assert rank_of(environment) == rank
