"""torch.distributed without Horovod or MPI, and the sweep over numbers of ranks, on a real SLURM of two nodes."""

import json

import pytest

from dist_lars import runlog
from tests.cluster.conftest import SMALL_JOB, SMALL_RUN
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


@pytest.mark.parametrize(
    ("per_node", "carriers", "sizes"),
    [
        (1, ("horovod", "torch"), {1: [1], 2: [1, 1]}),
        # gloo alone: a dozen MPI ranks that poll starve the two cores of everything else.
        (2, ("torch",), {1: [1], 2: [2], 4: [2, 2]}),
    ],
)
def test_the_sweep_runs_in_one_job(slurm, per_node, carriers, sizes):
    small = ("--model", "cnn_small", "--image_size", "32", "--batch", "8", "--seconds", "1", "--carriers",
             ",".join(carriers), "--option", "precision=fp32", "--name", "test-sweep")  # fmt: skip
    job = slurm.submit("scaling", *SMALL_JOB, f"--ntasks-per-node={per_node}", run=small, OMP_NUM_THREADS="1")
    try:
        log = job.completes()
        body = json.loads((ROOT / "benchmarks/records/test-sweep.json").read_text())
    finally:
        for path in (ROOT / "benchmarks/records").glob("test-sweep.*"):
            path.unlink()
    assert f"ranks: {','.join(map(str, sizes))}, by srun" in log
    assert body["ranks_per_host"] == {f"{n} ranks": hosts for n, hosts in sizes.items()}
    rows = {(r["ranks"], r["carrier"]): r for r in body["rows"]}
    assert set(rows) == {(1, "none"), *((n, c) for n in sizes if n > 1 for c in ("none", *carriers))}
    assert rows[2 * per_node, carriers[0]]["of 1 node"] > 0
    if per_node == 2:
        assert "of 1 node" not in rows[2, carriers[0]], "it is the node"
