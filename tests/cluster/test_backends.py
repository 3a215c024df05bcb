"""torch.distributed without Horovod or MPI, and the sweep over numbers of ranks, on a real SLURM of two nodes."""

import json

import pytest

from dist_lars import runlog
from tests.cluster.conftest import SMALL_RUN
from tests.cluster.slurm import Job
from tests.conftest import ROOT

pytestmark = pytest.mark.cluster
PER_NODE = ("--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=1", "--time=10")


@pytest.mark.parametrize(
    ("how", "line"),
    [
        ("srun", "srun --mpi=none --kill-on-bad-exit=1 python -m dist_lars.train"),
        ("mpirun", "mpirun -np 4 --map-by ppr:2:node --bind-to none -x PATH -x PYTHONPATH python -m dist_lars.train"),
        (
            "torchrun",
            "srun --ntasks=2 --ntasks-per-node=1 --mpi=none torchrun --nnodes=2 --nproc-per-node=2 --rdzv-backend=c10d "
            "--rdzv-endpoint=n1:29411 --rdzv-id=$SLURM_JOB_ID -m dist_lars.train",
        ),
    ],
)
def test_four_ranks_on_two_nodes_by_torch(slurm, images, how, line):
    """The ranks find each other from what the launcher tells, with no word of ours about addresses."""
    options = " ".join([*SMALL_RUN, "--data.path", str(images), "--run_dir", f"runs/torch-{how}"])
    script = slurm.work / f"{how}.sh"
    script.write_text(f"#!/bin/bash\nexport OMP_NUM_THREADS=1\n{line} {options} --comm.backend torch --micro_batch 2\n")
    job = Job(slurm, slurm.on("sbatch", "--parsable", *PER_NODE, str(script)).strip())
    job.completes()
    run_dir = slurm.work / "runs" / f"torch-{how}"
    (start,) = runlog.read(run_dir, "start")
    assert start["hosts"] == ["n1", "n1", "n2", "n2"]
    assert start["plan"]["world_size"] == 4
    assert runlog.read_status(run_dir)["state"] == "finished"


def test_the_sweep_runs_in_one_job(slurm):
    small = ("--model", "cnn_small", "--image_size", "32", "--batch", "8", "--seconds", "1", "--carriers",
             "horovod,torch", "--option", "precision=fp32", "--name", "test-sweep")  # fmt: skip
    job = slurm.submit("scaling", *PER_NODE, "--gpus-per-node=0", run=small, OMP_NUM_THREADS="1")
    try:
        log = job.completes()
        body = json.loads((ROOT / "benchmarks/records/test-sweep.json").read_text())
    finally:
        for path in (ROOT / "benchmarks/records").glob("test-sweep.*"):
            path.unlink()
    assert "ranks: 1,2,4, by srun" in log
    assert body["ranks_per_host"] == {"1 ranks": [1], "2 ranks": [2], "4 ranks": [2, 2]}, "a node, then two"
    rows = {(r["ranks"], r["carrier"]): r for r in body["rows"]}
    assert set(rows) == {(1, "none"), *((n, c) for n in (2, 4) for c in ("none", "horovod", "torch"))}
    assert rows[2, "horovod"]["of 1 node"] == 1, "two ranks are the node"
    assert 0 < rows[4, "horovod"]["of 1 node"] < 1.5
